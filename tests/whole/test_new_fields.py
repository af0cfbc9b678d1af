"""A field is added, changes its default, or is removed: earlier labels, models and data stay valid."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.config.params import load_params
from pipeline.config.recipes import (
    DatasetRecipe,
    RecipeSection,
    Removed,
    StudentRecipe,
    TeacherRecipe,
    ViewRecipe,
    choice,
    deciding_values,
    number,
    setting,
)
from pipeline.errors import UsageError
from pipeline.labels.identity import SCHEMA_VERSION, make_identity
from pipeline.system.canonical import fingerprint
from stages.shared.runs import Run, student_arguments
from tests.support.in_process import invoke
from tests.support.project import Project

VIEWS = {"seed": 3, "count": 9, "crop": 4, "flip": True, "rotation": 10, "autoaugment": "cifar10", "mixing": "cutmix"}
DATA = {"source": "cifar10", "val_fraction": 0.1}
FIT = {"epochs": 3, "batch_size": 8, "lr": 0.1}
# Of version 0.1.0, before a field could come or go.
IDENTITY = "6741a145dd4dc6b372a3d2f335b1a4cfd1e98b4e196459187367f825acd5838c"
SETTINGS = "f26a7b6aedf4c256216180387411b5483e6ef4145b63265ee7e59659a9338e93"
TEACHER = "80ad0e6318b1db80e7d9b5d176c41295eb4871b39431e7c2a3dbe444589355fa"
STUDENTS = {
    "vit": "be6f64ce4652f31be939fa5d6f4532806957323f7409ba6e987a1d1f195c39bd",
    "deit": "c612a7ad959d4107bc606277bc751e7880b53085dc17d9cbf5830f82f49f5a65",
    "tnt": "f89d43e30c941a73cc367f890fe5ff51b8819dd80855f239ca5ecba4ce84abf1",
    "titn": "f70608ba5219c65e8daa2c6860bba545a15fe360e7fa470664955a2e01b7e800",
}


@dataclass(frozen=True, kw_only=True)
class LaterViews(ViewRecipe):
    noise: float = number(0.0, 1.0, 0.0, absent=0.0)


@dataclass(frozen=True, kw_only=True)
class LaterStudent(StudentRecipe):
    groups: str = choice(("all", "matrices"), "all", absent="all")


@dataclass(frozen=True, kw_only=True)
class LaterTeacher(TeacherRecipe):
    freeze: bool = setting(False, absent=False)


@dataclass(frozen=True, kw_only=True)
class LaterData(DatasetRecipe):
    crops: int = number(1, 9, 1, absent=1)


# The same fields with another default; their `absent` value stays.
@dataclass(frozen=True, kw_only=True)
class DefaultViews(ViewRecipe):
    noise: float = number(0.0, 1.0, 0.5, absent=0.0)


@dataclass(frozen=True, kw_only=True)
class DefaultStudent(StudentRecipe):
    groups: str = choice(("all", "matrices"), "matrices", absent="all")


@dataclass(frozen=True, kw_only=True)
class DefaultTeacher(TeacherRecipe):
    freeze: bool = setting(True, absent=False)


@dataclass(frozen=True, kw_only=True)
class DefaultData(DatasetRecipe):
    crops: int = number(1, 9, 5, absent=1)


# They are gone again.
class PastViews(ViewRecipe):
    removed: ClassVar = (Removed("noise", absent=0.0),)


class PastStudent(StudentRecipe):
    removed: ClassVar = (Removed("groups", absent="all"),)


class PastTeacher(TeacherRecipe):
    removed: ClassVar = (Removed("freeze", absent=False),)


class PastData(DatasetRecipe):
    removed: ClassVar = (Removed("crops", absent=1),)


# For each record: the field, its absent value and another one; the recipe with it, with a new default, without it.
FIELDS: dict[str, tuple[str, Any, Any, type[RecipeSection], type[RecipeSection], type[RecipeSection]]] = {
    "views": ("noise", 0.0, 0.25, LaterViews, DefaultViews, PastViews),
    "student": ("groups", "all", "matrices", LaterStudent, DefaultStudent, PastStudent),
    "teacher": ("freeze", False, True, LaterTeacher, DefaultTeacher, PastTeacher),
    "data": ("crops", 1, 2, LaterData, DefaultData, PastData),
}


def recorded(kind: str, cls: type[Any], **field: Any) -> dict[str, str]:
    """Return what is recorded with one recipe class replaced and all others unchanged."""
    classes = {"views": ViewRecipe, "student": StudentRecipe, "teacher": TeacherRecipe, "data": DatasetRecipe}
    more: dict[str, dict[str, Any]] = {name: {} for name in classes}
    classes[kind], more[kind] = cls, field
    views = classes["views"](**VIEWS, **more["views"])
    identity = make_identity(
        dataset_sha256="a" * 64, split="train", view_recipe=views, class_names=("cat", "dog"), num_samples=7
    )
    teacher = classes["teacher"](**FIT, **more["teacher"])
    hashes = {
        "identity": fingerprint(identity),
        "settings": fingerprint(deciding_values(classes["data"](**DATA, **more["data"]))),
        "teacher": run(teacher, {"kind": "teacher"}, deciding_values(views, but=("count",))),
    }
    for model in STUDENTS:
        student = classes["student"](model=model, soft=2.0, **FIT, **more["student"])
        arguments = student_arguments(student, num_classes=2, image_size=32)
        description = {"kind": "student", "model": model, "arguments": arguments}
        hashes[model] = run(student, description, deciding_values(views))
    return hashes


def run(recipe: Any, description: dict[str, Any], views: dict[str, Any]) -> str:
    """The fingerprint of training a model."""
    return Run(
        name="n", out=Path("o"), work=Path("w"), stage=None, description=description, recipe=recipe, seed=1,
        inputs={"views": views}, differs={},
    ).fingerprint  # fmt: skip


FORMER = {"identity": IDENTITY, "settings": SETTINGS, "teacher": TEACHER, **STUDENTS}
CHANGED = {
    "views": {"identity", "teacher", *STUDENTS},
    "student": set(STUDENTS),
    "teacher": {"teacher"},
    "data": {"settings"},
}


def changed(hashes: dict[str, str]) -> set[str]:
    return {name for name in FORMER if hashes[name] != FORMER[name]}


@pytest.mark.parametrize("kind", FIELDS)
def test_a_field_that_comes_changes_its_default_and_goes_leaves_what_was_recorded(kind: str) -> None:
    name, absent, other, later, default, past = FIELDS[kind]
    assert recorded(kind, later.__base__) == FORMER
    assert recorded(kind, later) == FORMER, "the field came"
    assert changed(recorded(kind, later, **{name: other})) == CHANGED[kind], "and was used"
    assert changed(recorded(kind, default)) == CHANGED[kind], "its default is now another value, which is written"
    assert recorded(kind, default, **{name: absent}) == FORMER
    assert recorded(kind, past) == FORMER, "the field went"


def test_the_schema_and_the_package_have_versions_that_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.__version__", "9.9.9")
    assert recorded("views", ViewRecipe) == FORMER and SCHEMA_VERSION == 2
    monkeypatch.setattr("stages.shared.runs.RESULTS_VERSION", "0.2.0")
    assert changed(recorded("views", ViewRecipe)) == {"teacher", *STUDENTS}


def test_a_field_of_the_first_version_that_goes_is_written_for_ever() -> None:
    @dataclass(frozen=True, kw_only=True)
    class WithoutShear(RecipeSection):
        removed: ClassVar = (Removed("shear", absent=0.0, is_written=True),)

    @dataclass(frozen=True, kw_only=True)
    class WithShear(RecipeSection):
        shear: float = number(0.0, 60.0, 0.0)

    assert deciding_values(WithoutShear()) == deciding_values(WithShear()) == {"shear": 0.0}
    assert deciding_values(WithShear(shear=1.0)) != deciding_values(WithoutShear())


def test_every_field_that_came_later_has_an_absent_value_and_no_removed_one_is_back() -> None:
    """The fields of version 0.1.0; any other must name its absent value."""
    first = {
        DatasetRecipe: "source image_size val_fraction test_fraction split_seed",
        ViewRecipe: "seed count crop flip rotation translate scale shear brightness contrast autoaugment mixing",
        TeacherRecipe: "epochs batch_size optimizer lr momentum weight_decay schedule warmup_epochs clip "
        "label_smoothing precision step compile weights bn_momentum",
        StudentRecipe: "epochs batch_size optimizer lr momentum weight_decay schedule warmup_epochs clip "
        "label_smoothing precision step compile model views alpha patch_size pixel_size width depth num_heads "
        "pixel_width pixel_heads micro_batch inner_block",
    }
    for recipe, names in first.items():
        fields = {field.name: field for field in dataclasses.fields(recipe)}
        assert {name for name, field in fields.items() if "absent" not in field.metadata} <= set(names.split())
        written = {old.name for old in recipe.removed if old.is_written}
        assert set(names.split()) == {name for name in names.split() if name in fields} | written
        assert not {old.name for old in recipe.removed} & fields.keys()


# The same by the command line.


@pytest.fixture(scope="module")
def finished(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a teacher, labels and a student, made before any field came."""
    project = Project(tmp_path_factory.mktemp("fields") / "project")
    shutil.copytree(taught.path, project.path)
    invoke(project, "label")
    invoke(project, "distill", "--student", "vit")
    return project


def patch(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    """Put the recipes with the field, with its new default or without it in the place of today's."""
    for _, (*_, later, default, past) in FIELDS.items():
        assert later.__base__ is not None
        monkeypatch.setattr(f"pipeline.config.params.{later.__base__.__name__}", (later, default, past)[which])


def plans(project: Project, code: int | None = 0) -> list[str]:
    """What the commands would do, in the order of the data flow."""
    commands = (("teacher", "squeezenet1_1"), ("label",), ("distill", "--student", "vit"))
    return [invoke(project, *command, "--dry-run", code=code) for command in commands]


@pytest.mark.parametrize("which", [0, 2])
def test_the_commands_find_everything_up_to_date(
    finished: Project, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch, which)
    assert all("up to date" in plan for plan in plans(finished))
    assert "of the same settings" in invoke(finished, "prepare", "--dry-run")


def test_the_commands_name_a_field_that_is_used(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch, 0)
    project = Project(tmp_path / "project")
    shutil.copytree(finished.path, project.path)
    project.edit("mixing: cutmix}", "mixing: cutmix, noise: 0.25}")
    teacher, *others = plans(project, code=None)
    assert "train 8 epochs (views.noise none -> 0.25)" in teacher
    assert all("view_recipe.noise is missing, expected 0.25" in plan for plan in others)
    project.edit(", noise: 0.25", "")
    project.edit("vit: {}", "vit: {groups: matrices}")
    assert "groups none -> matrices" in plans(project)[2]
    project.edit("image_size: 32,", "image_size: 32, crops: 2,")
    for plan in plans(project, code=3):
        assert "prepared with crops none, but recipe smoke asks for 2; run `pipeline prepare" in plan
    assert "of other settings: crops none -> 2" in invoke(project, "prepare", "--dry-run")


def test_what_was_made_with_a_field_that_is_gone_is_refused_by_name(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(finished.path, project.path)
    with monkeypatch.context() as patched:
        patch(patched, 0)
        project.edit("mixing: cutmix}", "mixing: cutmix, noise: 0.25}")
        project.edit("image_size: 32,", "image_size: 32, crops: 2,")
        invoke(project, "prepare")
        invoke(project, "label")
        invoke(project, "distill", "--student", "vit")
    patch(monkeypatch, 2)
    assert "dataset.crops: 2 is no longer possible, only 1; leave it out" in plans(project, code=2)[1]
    project.edit(" crops: 2,", "")
    assert "views.default.noise: 0.25 is no longer possible, only 0.0; leave it out" in plans(project, code=2)[1]
    project.edit(", noise: 0.25", ", noise: 0.0")  # what is done without the field
    assert all("prepared with crops 2, but recipe smoke asks for none" in plan for plan in plans(project, code=3))
    invoke(project, "prepare")
    _, label, student = plans(project, code=None)
    assert "view_recipe.noise is 0.25, expected none" in label and "view_recipe.noise is 0.25" in student
    invoke(project, "label")
    assert "vit: train 2 epochs (views.noise 0.25 -> none)" in plans(project)[2]


def test_a_removed_field_is_refused_in_every_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch, 2)
    for old, new, words in (
        ("vit: {}", "vit: {groups: matrices}", "students.vit.groups: 'matrices' is no longer possible, only 'all'"),
        ("vgg16: {}", "vgg16: {freeze: true}", "teachers.vgg16.freeze: True is no longer possible, only False"),
    ):
        project = Project.create(tmp_path / old[:3])
        project.edit(old, new)
        with pytest.raises(UsageError, match=words):
            load_params(project.path / "params.yaml")


def test_a_recipe_made_in_python_may_write_ten_for_a_ten_point_nought() -> None:
    views = ViewRecipe(**VIEWS)  # type: ignore[arg-type]
    assert deciding_values(views) == deciding_values(replace(views, rotation=10.0))
    assert type(deciding_values(views)["rotation"]) is float
