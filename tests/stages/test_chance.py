"""A teacher that gives one class for every image is never selected, however common that class is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.in_process import invoke
from tests.support.project import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project whose data are noise: 95 images of a common class and 5 of a rare one, and as many for the test."""
    project = Project.create(tmp_path / "project")
    draws = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, count in (("common", 95), ("rare", 5)):
            folder = project.path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    project.edit(
        "source: digits, image_size: 32, val_fraction: 0.25", "source: folder, image_size: 32, val_fraction: 0"
    )
    invoke(project, "prepare", "--from", "images")
    return project


def test_a_teacher_that_always_gives_the_commonest_class_is_not_selected_and_labels_nothing(project: Project) -> None:
    refusal = invoke(project, "teacher-select", "--teachers", "squeezenet1_1", code=3)
    assert "none of squeezenet1_1 has learned anything" in refusal and "recipes.smoke.select: {by: f1}" in refusal
    metrics = json.loads((project.data / "teachers/squeezenet1_1/metrics.json").read_text())
    assert (metrics["best"]["top1"], metrics["best"]["recall"]) == (95.0, 0.5), "else the test shows nothing"
    assert metrics["at_chance"] and "macro recall 0.500" in metrics["warnings"][0]
    assert not (project.data / "teacher").exists() and not (project.data / "labels/default.h5").exists()
