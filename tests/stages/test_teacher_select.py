"""`teacher-select --set --views`: stage one in short, beside the recipe's own runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.in_process import invoke
from tests.support.project import Project

SHORT = ("teacher-select", "--teachers", "squeezenet1_1", "--set", "lr=9e-4", "--views", "1")


@pytest.fixture
def project(taught: Project, tmp_path: Path) -> Project:
    shutil.copytree(taught.path, tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.mark.slow
def test_settings_and_views_are_those_of_distill(project: Project) -> None:
    own = (project.data / "teachers/squeezenet1_1/best.safetensors").read_bytes()
    out = project.path / "data/runs/smoke/squeezenet1_1-lr-0.0009"
    assert "teacher squeezenet1_1: train 8 epochs (not trained); writes data/runs/smoke" in invoke(
        project, *SHORT, "--dry-run"
    )
    shown = invoke(project, *SHORT)
    assert "selected squeezenet1_1 by top1" in shown and "labelled 1/1 views" in shown
    assert json.loads((out / "metrics.json").read_text())["differs"] == {"lr": "0.0009"}
    assert (project.data / "teachers/squeezenet1_1/best.safetensors").read_bytes() == own
    assert (project.data / "teacher/best.safetensors").read_bytes() == (out / "best.safetensors").read_bytes()
    inspected = json.loads(invoke(project, "labels", "inspect", "data/smoke/labels/default.h5", "--json"))
    assert inspected["num_views"] == 1
    again = invoke(project, *SHORT)
    assert "squeezenet1_1: up to date (data/runs/smoke" in again and "up to date, 1 view;" in again
    assert "student" not in invoke(project, "distill", "--student", "deit", "--views", "1", "--dry-run")


def test_labels_of_a_teacher_without_the_settings_are_not_replaced(project: Project) -> None:
    invoke(project, "label")
    file = project.data / "labels/default.h5"
    labels = file.read_bytes()
    refusal = invoke(project, *SHORT, code=3)
    assert "data/smoke/labels/default.h5: made by a squeezenet1_1 without this --set" in refusal
    assert file.read_bytes() == labels and not (project.path / "data/runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "speed=1"), "teachers.squeezenet1_1.speed: unknown key"),
        (("--set", "epochs=-1"), "teachers.squeezenet1_1.epochs: -1 is out of range"),
        (("--set", "epochs=1", "--optimizers", "adam"), "--set and --optimizers"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(
    project: Project, options: tuple[str, ...], words: str
) -> None:
    assert words in invoke(project, "teacher-select", "--teachers", "squeezenet1_1", *options, code=2)
    assert not (project.path / "data/runs").exists()
