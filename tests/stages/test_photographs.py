"""A folder of photographs of mixed sizes, whose files are the prepared data: every stage works on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.datasets import Dataset
from pipeline.labels.cache import LabelCache
from tests.support.in_process import invoke
from tests.support.project import Project

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two classes of JPEGs, dark and bright."""
    project = Project.create(tmp_path_factory.mktemp("photographs") / "project", alone=True)
    rng = np.random.default_rng(0)
    for number in range(96):
        path = project.path / "photos" / ("dark", "bright")[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (30 + number % 31, 25 + number % 37, 3), np.uint8) + number % 2 * 130
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    project.edit("{source: digits, image_size: 32, ", "{source: folder, path: photos, store: encoded, resize: crop, ")
    return project


def test_every_stage_works_on_the_files_themselves(project: Project) -> None:
    name = "squeezenet1_1"
    out = invoke(project, "teacher-select", "--teachers", name, *CPU)
    assert "prepared" in out
    dataset = Dataset.load(project.data / "prepared/dataset.json")
    labels = LabelCache.open(project.data / "labels/default.h5").labels
    assert labels.shape == (2, len(dataset.train)) and set(labels.ravel()) == {0, 1}
    invoke(project, "distill", "--student", "vit", "--set", "epochs=1", *CPU)
    assert "0 differ" in invoke(project, "labels", "verify", "data/smoke/labels/default.h5", "--sample", "20")
    assert json.loads(invoke(project, "evaluate", "data/smoke/teacher", "--json", *CPU))


def test_a_damaged_file_ends_a_command_by_name(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.path, tmp_path / "copy")
    copy = Project(tmp_path / "copy")
    invoke(copy, "prepare")
    dataset = Dataset.load(copy.data / "prepared/dataset.json")
    assert dataset.test.names is not None
    start = dataset.test.images.index.offsets[0, 0]  # type: ignore[attr-defined]
    with (copy.data / "prepared/files.bin").open("r+b") as file:
        file.seek(start + 50)
        file.write(b"damage")
    said = invoke(copy, "evaluate", "data/smoke/teacher", *CPU, code=3)
    assert f"files.bin: {dataset.test.names[0]}: damaged" in said
    assert "run `pipeline prepare --recipe smoke` again" in said
