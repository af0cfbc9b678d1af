"""Names that do not exist are refused before anything is done; those at the top that a recipe lacks are left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.in_process import invoke
from tests.support.project import Project

COMMANDS = {
    "prepare": ("prepare",),
    "teacher": ("teacher", "squeezenet1_1"),
    "teacher of a dry run": ("teacher", "squeezenet1_1", "--dry-run"),
    "teacher-select": ("teacher-select",),
    "teacher-select of a dry run": ("teacher-select", "--dry-run"),
    "distill": ("distill", "--student", "vit"),
    "reproduce": ("reproduce", "--recipe", "smoke", "--dry-run"),
    "report": ("report", "--recipe", "digits"),
}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.create(tmp_path / "project")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_an_unknown_teacher_in_a_recipe_is_refused_by_every_command_before_it_does_anything(
    project: Project, command: tuple[str, ...]
) -> None:
    project.edit("vgg19: {}", "vgg19: {}\n      resnet18: {}")
    words = "recipes.smoke.teachers.resnet18: 'resnet18' is no teacher; choose from densenet121, "
    assert words in invoke(project, *command, code=2)
    assert not (project.path / "data").exists()


def test_the_doctor_names_an_unknown_teacher_as_a_problem(project: Project) -> None:
    project.edit("vgg19: {}", "vgg19: {}\n      resnet18: {}")
    told = invoke(project, "doctor", code=1)
    assert "problem recipes.smoke.teachers.resnet18: 'resnet18' is no teacher; choose from densenet121" in told
    assert "1 problem: a full run cannot work here" in told


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ("titan: {}", "students.titan.model: 'titan' is no student; choose from vit, deit, tnt, titn"),
        ("tall: {model: vit, arguments: {height: 2}}", "students.tall.arguments.height: 2, but vit takes no such arg"),
    ],
)
def test_an_unknown_student_in_a_recipe_is_refused(project: Project, student: str, words: str) -> None:
    project.edit("vit: {}", f"vit: {{}}\n      {student}")
    assert f"recipes.smoke.{words}" in invoke(project, "teacher-select", "--dry-run", code=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--teachers", "squeezenet1_1,resnet18"), "teacher resnet18: not in recipe smoke; choose from densenet121"),
        (("--optimizers", "adam,lion"), "--optimizers lion: choose from sgd"),
    ],
)
def test_an_unknown_name_in_a_list_of_an_option_is_refused_before_anything_is_trained(
    project: Project, options: tuple[str, ...], words: str
) -> None:
    assert words in invoke(project, "teacher-select", *options, code=2)
    assert not (project.path / "data").exists()


def test_names_at_the_top_that_the_recipe_lacks_stop_no_command(project: Project) -> None:
    file = project.path / "params.yaml"
    text = file.read_text().replace("recipe: smoke", "recipe: folder-small", 1)
    text = text.replace("teachers: [squeezenet1_1,", "teachers: [resnet50, squeezenet1_1,", 1)
    file.write_text(text.replace("view_recipes: [default]", "view_recipes: [default, mixup]", 1))
    assert "prepare" in invoke(project, "prepare", code=2)  # no folder: this, and not a name, is what it lacks
    planned = invoke(project, "teacher-select", "--recipe", "digits", "--dry-run")
    assert "teacher resnet50: train 4 epochs" in planned and "labels of the views mixup" in planned
    invoke(project, "prepare", "--recipe", "smoke")
    assert "labels of the views mixup: label 2 views" in invoke(
        project, "teacher-select", "--recipe", "smoke", "--dry-run"
    )


def test_warm_up_over_all_epochs_is_possible_and_said(project: Project) -> None:
    words = "students.vit.warmup_epochs: 3 is more than students.vit.epochs, 2"
    assert words in invoke(project, "distill", "--student", "vit", "--set", "warmup_epochs=3", code=2)
    project.edit("warmup_epochs: 0.5", "warmup_epochs: 1.0")
    invoke(project, "prepare")
    out = invoke(project, "distill", "--student", "vit", "--labels", "none", "--set", "epochs=1")
    assert "vit: warning: warmup_epochs 1 is all of its epochs" in out
    assert "warmup" not in invoke(project, "distill", "--student", "vit", "--labels", "none").partition("chance")[0]
