"""A student and an augmentation of one's own: one file, one line of a table, one recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import pipeline
from pipeline.config.recipes import ViewRecipe, number
from pipeline.labels.identity import make_identity
from pipeline.models.students import STUDENTS
from pipeline.models.students.layers import Student, initialise
from pipeline.training.checkpoints import read_meta
from pipeline.views import augment, colour, draws
from pipeline.views.augment import AUGMENTATIONS, Changing, Draws, Erasing, Moving, Parameters, ResizedCrop
from pipeline.views.grouping import Groups, by_range
from pipeline.views.mixing import MIXINGS
from pipeline.views.parcel import Parcel
from pipeline.views.scores import OperationMeter
from pipeline.views.views import Views
from tests.support.in_process import invoke
from tests.support.project import Project, unseal


class Windowed(Student):
    """Averages windows of the image. Of the shared geometry it uses the width only."""

    has_distillation_head: ClassVar[bool] = False

    def __init__(
        self, *, num_classes: int, image_size: int, width: int = 8, window: int = 8, bias: bool = True
    ) -> None:
        super().__init__()
        self.window = nn.AvgPool2d(window)
        self.hidden = nn.Linear(3 * (image_size // window) ** 2, width, bias=bias)
        self.head = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.window(images).flatten(1)).relu())
        return logits


@pytest.fixture
def project(taught: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a teacher, and a student `windowed` whose architecture is known."""
    monkeypatch.setitem(STUDENTS, "windowed", Windowed)
    shutil.copytree(taught.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    project.edit("vit: {}", "vit: {}\n      windowed: {epochs: 1, arguments: {window: 4, bias: false}}")
    return project


def test_a_student_of_ones_own_is_trained_exported_and_loaded(project: Project) -> None:
    invoke(project, "label")
    invoke(project, "distill", "--student", "windowed")
    out = project.data / "students/windowed"
    meta = read_meta(out)
    arguments = {"num_classes": 10, "image_size": 32, "width": 48, "window": 4, "bias": False}
    assert meta is not None and meta["arguments"] == arguments
    assert meta["training"]["arguments"] == {"window": 4, "bias": False}
    assert "windowed: up to date" in invoke(project, "distill", "--student", "windowed", "--dry-run")
    exported = project.path / "exported"
    invoke(project, "export", str(out), "--format", "safetensors", "--out", str(exported))
    assert json.loads((exported / "config.json").read_text())["arguments"] == arguments
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model, _ = pipeline.load(exported)
    trained, _ = pipeline.load(out)
    assert torch.equal(model(images), trained(images)) and model(images).shape == (4, 10)
    project.edit("window: 4", "window: 8")
    assert "windowed: train 1 epoch (window 4 -> 8)" in invoke(project, "distill", "--student", "windowed", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{windows: 4}", "windows: 4, but windowed takes no such argument; allowed are window, bias"),
        ("{window: four}", "window: 'four' is not of the type int"),
        ("{window: 4.0}", "window: 4.0 is not of the type int"),
        ("{bias: 1}", "bias: 1 is not of the type bool"),
        ("{window: 1000001}", "window: 1000001 is out of range; allowed is up to 1,000,000"),
        ("{width: 4}", "width: 4 does not belong there; width is given beside arguments"),
        ("{window: [4]}", "window: [4] is not a number, a text, true or false"),
    ],
)  # fmt: skip
def test_an_argument_that_the_constructor_does_not_take_is_refused(
    project: Project, arguments: str, words: str
) -> None:
    project.edit("{window: 4, bias: false}", arguments)
    assert words in invoke(project, "distill", "--student", "windowed", "--labels", "none", code=2)


def test_a_checkpoint_with_impossible_arguments_is_refused(project: Project) -> None:
    invoke(project, "distill", "--student", "windowed", "--labels", "none")
    [out] = (project.path / "data/runs").glob("*/windowed-*")
    file = unseal(out) / "best.json"
    text = file.read_text()
    for argument in ('"windows": 4', '"window": "four"', '"window": 10000000', '"window": -1'):
        file.write_text(text.replace('"window": 4', argument, 1))
        assert str(out) in invoke(project, "evaluate", str(out), code=3)


def test_the_arguments_of_the_four_students_can_be_set_too(project: Project) -> None:
    project.edit("vit: {}", "vit: {arguments: {mlp_ratio: 0}}")
    refusal = invoke(project, "distill", "--student", "vit", "--labels", "none", code=2)
    assert "mlp_ratio 0 is too small" in refusal
    project.edit("mlp_ratio: 0", "mlp_ratio: 1")
    invoke(project, "distill", "--student", "vit", "--labels", "none", "--set", "epochs=1")
    [out] = (project.path / "data/runs").glob("*/vit-*")
    meta = read_meta(out)
    assert meta is not None and meta["arguments"]["mlp_ratio"] == 1 and meta["arguments"]["pixel_size"] == 2


@dataclass(frozen=True, kw_only=True)
class SolarizedViews(ViewRecipe):
    solarize: int = number(0, 256, 0, absent=0)


class Solarize(Changing):
    """Invert the levels at or above a threshold, drawn for each image. Parameters: `solarize` `(B,)`, the threshold."""

    fields: ClassVar = {"solarize": 1}

    def parameters(self, uniform: Draws, recipe: Any, height: int, width: int) -> Parameters:
        return {"solarize": draws.between(uniform["solarize"][:, 0], recipe.solarize, 256)}

    def plan(self, uniform: Draws, recipe: Any, height: int, width: int, parcel: Parcel) -> Callable[[Tensor], Tensor]:
        thresholds = parcel.add(self.parameters(uniform, recipe, height, width)["solarize"])
        return lambda images: colour.solarize(images, thresholds())

    def groups(self, drawn: Mapping[str, NDArray[Any]], recipe: Any, image_size: int) -> Groups:
        if "solarize" in drawn:
            yield from by_range("solarize, from", drawn["solarize"], recipe.solarize, 256, "{:.0f} to {:.0f}")


VIEWS = SolarizedViews(
    seed=1, count=2, crop=2, flip=True, rotation=10.0, brightness=0.2, contrast=0.2, autoaugment="cifar10",
    mixing="cutmix",
)  # fmt: skip
N, SIZE = 40, 12
IMAGES = torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 10


def drawn_by(recipe: ViewRecipe) -> dict[str, NDArray[Any]]:
    return Views(IMAGES, LABELS, recipe).drawn(1)


def pixels(recipe: ViewRecipe) -> Tensor:
    return Views(IMAGES, LABELS, recipe).batch(1, torch.arange(N)).images


def identity(recipe: ViewRecipe) -> dict[str, Any]:
    return make_identity(
        dataset_sha256="a" * 64, split="train", view_recipe=recipe, class_names=("a", "b"), num_samples=N
    )


@pytest.mark.parametrize("place", [0, 2, len(AUGMENTATIONS)])
def test_an_augmentation_of_ones_own_is_one_line_of_the_table(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    former, before = pixels(VIEWS), drawn_by(VIEWS)
    plain = ViewRecipe(**{name: value for name, value in vars(VIEWS).items() if name != "solarize"})
    monkeypatch.setattr(augment, "AUGMENTATIONS", (*AUGMENTATIONS[:place], Solarize(), *AUGMENTATIONS[place:]))
    assert torch.equal(pixels(VIEWS), former), "a field at 0 does nothing"
    assert identity(VIEWS) == identity(plain)
    used = replace(VIEWS, solarize=100)
    assert identity(used)["view_recipe"] == {**identity(plain)["view_recipe"], "solarize": 100}
    drawn = drawn_by(used)
    assert drawn.keys() == {*before, "solarize"}
    for name, values in before.items():
        np.testing.assert_array_equal(drawn[name], values, err_msg=f"the draws of {name} were shifted")
    assert not torch.equal(pixels(used), former)
    meter = OperationMeter(used, SIZE)
    meter.add(LABELS.numpy(), LABELS.numpy(), drawn)
    counted = {(scores.operation, scores.drawn): scores.num_images for scores in meter.scores()}
    assert sum(images for (operation, _), images in counted.items() if operation == "solarize, from") == N
    assert counted["all", "all"] == N and ("flip", "none") in counted


def test_its_pixels_are_those_of_its_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "AUGMENTATIONS", (*AUGMENTATIONS, Solarize()))
    used = replace(VIEWS, solarize=100, mixing="none")
    without = pixels(replace(used, solarize=0))
    thresholds = torch.from_numpy(drawn_by(used)["solarize"])
    assert ((thresholds >= 100) & (thresholds < 256)).all()
    assert torch.equal(pixels(used), colour.solarize(without, thresholds))


def test_its_views_are_labelled_by_the_command(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke(project, "label")
    monkeypatch.setattr(augment, "AUGMENTATIONS", (*AUGMENTATIONS, Solarize()))
    monkeypatch.setattr("pipeline.config.params.ViewRecipe", SolarizedViews)
    assert "up to date" in invoke(project, "label", "--dry-run")
    project.edit("mixing: cutmix}", "mixing: cutmix, solarize: 200}")
    assert "view_recipe.solarize is missing, expected 200" in invoke(project, "label", "--dry-run")
    invoke(project, "label")
    assert "up to date" in invoke(project, "label", "--dry-run")


def test_every_field_of_a_view_is_one_augmentations_in_the_order_of_the_fields() -> None:
    fields = [name for augmentation in AUGMENTATIONS for name in augmentation.fields]
    *others, last = vars(ViewRecipe(count=1))
    assert last == "partner"
    assert fields == [name for name in others if name not in ("seed", "count") and not name.startswith(("mix", "cutm"))]
    assert isinstance(AUGMENTATIONS[0], ResizedCrop) and isinstance(AUGMENTATIONS[-1], Erasing)
    assert all(isinstance(augmentation, Moving | Changing) for augmentation in AUGMENTATIONS[1:])
    assert list(ViewRecipe.__dataclass_fields__["mixing"].metadata["choices"]) == ["none", *MIXINGS]


def test_all_that_only_moves_pixels_is_one_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    gathers = []
    gather = augment.geometry.gather
    monkeypatch.setattr(augment.geometry, "gather", lambda *given: gathers.append(1) or gather(*given))
    pixels(ViewRecipe(count=1, crop=2, flip=True, rotation=9.0, translate=0.1, scale=0.1, shear=5.0, brightness=0.1))
    assert len(gathers) == 1
