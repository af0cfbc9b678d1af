"""A folder of photographs of mixed sizes, whose files are the prepared data: every stage works on them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipeline.config.params import load_params
from pipeline.data.datasets import Dataset
from pipeline.data.encoded import EncodedImages
from pipeline.data.streaming import HostImages
from pipeline.errors import UsageError
from pipeline.labels.cache import LabelCache
from pipeline.system.stopping import StopSignal
from stages.prepare import take_dataset
from stages.shared.context import Context
from stages.shared.fitting import make_views
from tests.support.in_process import invoke
from tests.support.project import Project
from tests.support.untrained import untrained

CPU = ("--device", "cpu")


def lay(project: Project) -> None:
    """Two classes of JPEGs, dark and bright."""
    rng = np.random.default_rng(0)
    for number in range(96):
        path = project.path / "photos" / ("dark", "bright")[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (30 + number % 31, 25 + number % 37, 3), np.uint8) + number % 2 * 130
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    project.edit("{source: digits, image_size: 32, ", "{source: folder, path: photos, store: encoded, resize: crop, ")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Prepared, with a teacher of random weights."""
    return untrained(tmp_path_factory.mktemp("photographs") / "project", lay)


@pytest.fixture
def project(made: Project, tmp_path: Path) -> Project:
    """A copy for one test."""
    shutil.copytree(made.path, tmp_path / "copy")
    return Project(tmp_path / "copy")


@pytest.mark.slow
def test_every_stage_works_on_the_files_themselves(project: Project) -> None:
    shutil.rmtree(project.data)
    invoke(project, "teacher-select", "--teachers", "squeezenet1_1", *CPU)
    dataset = Dataset.load(project.data / "prepared/dataset.json")
    labels = LabelCache.open(project.data / "labels/default.h5").labels
    assert labels.shape == (2, len(dataset.train)) and set(labels.ravel()) == {0, 1}
    invoke(project, "distill", "--student", "vit", "--set", "epochs=1", *CPU)
    assert "0 differ" in invoke(project, "labels", "verify", "data/smoke/labels/default.h5", "--sample", "20")
    assert json.loads(invoke(project, "evaluate", "data/smoke/teacher", "--json", *CPU))


def test_a_damaged_file_ends_a_command_by_name(project: Project) -> None:
    assert "top1" in invoke(project, "evaluate", "data/smoke/teacher", "--json", *CPU)
    dataset = Dataset.load(project.data / "prepared/dataset.json")
    assert dataset.test.names is not None and isinstance(dataset.test.images, EncodedImages)
    with (project.data / "prepared/files.bin").open("r+b") as file:
        file.seek(dataset.test.images.index.offsets[0, 0] + 50)
        file.write(b"damage")
    said = invoke(project, "evaluate", "data/smoke/teacher", *CPU, code=3)
    assert f"files.bin: {dataset.test.names[0]}: damaged" in said
    assert "run `pipeline prepare --recipe smoke` again" in said


def test_images_of_which_each_view_is_another_part_stay_on_the_host(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.path)
    params, out = load_params(Path("params.yaml")), io.StringIO()
    context = Context(params, params.select("smoke"), Console(file=out, width=200), StopSignal(), "cpu")
    assert isinstance(make_views(context, context.dataset(), "default").images, torch.Tensor) and not out.getvalue()
    spans = {"scale": [0.5, 1.0], "ratio": [0.75, 1.333]}
    object.__setattr__(context.recipe.views["default"], "resized_crop", spans)
    assert isinstance(make_views(context, context.dataset(), "default").images, HostImages)
    line = f"the files of {len(context.dataset().train)} training images are decoded from data/smoke/prepared for every"
    assert line in out.getvalue()


def test_arrays_are_no_files(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.path)
    params = load_params(Path("params.yaml"))
    context = Context(params, params.select("smoke"), Console(quiet=True), StopSignal(), "cpu")
    arrays = Dataset.from_arrays(np.zeros((10, 32, 32, 3), np.uint8), np.arange(10) % 2, ["a", "b"])
    with pytest.raises(
        UsageError, match=r"recipes.smoke.dataset.store: encoded keeps image files, and these are arrays"
    ):
        take_dataset(context, arrays)
    take_dataset(context, context.dataset())
