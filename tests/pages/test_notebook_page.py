"""docs/notebook.md: its blocks run one after the other and do what the page says."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.datasets import Dataset
from pipeline.errors import DataError
from tests.support.commands import run
from tests.support.markdown import blocks, page
from tests.support.project import Project

PAGE = page("docs/notebook.md")


@pytest.fixture(scope="module")
def notebook(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page's blocks define."""
    project = Project(tmp_path_factory.mktemp("notebook") / "project")
    shutil.copytree(taught.path, project.path)
    ended = run(project.path, "label")
    assert ended.code == 0, ended.err
    names: dict[str, Any] = {"folder": project.path}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.path)
        for block in blocks(PAGE, "python"):
            exec(block.replace('name = "digits"', 'name = "smoke"'), names)
    return names


def test_its_view_is_the_one_that_students_see(notebook: dict[str, Any]) -> None:
    with Image.open(notebook["folder"] / "view.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (32, 8 * 32, 3)
    assert np.array_equal(pixels[:, :32], notebook["views"].batch(0, [0]).images[0].permute(1, 2, 0).numpy())


def test_its_student_learns_and_is_scored(notebook: dict[str, Any]) -> None:
    first, last = notebook["result"].curve
    assert last["train_loss"] < first["train_loss"] < 2.4
    probability = notebook["probability"]
    assert torch.isclose(probability.sum(), torch.tensor(1.0)) and probability.shape == (10,)


def test_its_teacher_answers_in_probabilities(notebook: dict[str, Any]) -> None:
    assert notebook["answer"].sum() == pytest.approx(1.0, abs=1e-5)
    assert notebook["model"].class_names == notebook["data"].class_names


def test_its_arrays_make_a_data_set_of_their_own(notebook: dict[str, Any]) -> None:
    other, data = notebook["other"], notebook["data"]
    assert len(other.train) + len(other.test) == len(data.train) and other.sha256 != data.sha256


IMAGES, LABELS = np.zeros((6, 4, 4, 3), np.uint8), np.array([0, 1] * 3)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES.astype(np.float32), LABELS, "float32"),
        (IMAGES[..., 0], LABELS, "(6, 4, 4)"),
        (IMAGES[:, :2], LABELS, "(6, 2, 4, 3)"),
        (IMAGES, LABELS[:5], "give 6 integers"),
        (IMAGES, LABELS.astype(float), "float64"),
        (IMAGES, LABELS + 1, "from 1 to 2; there are 2"),
        (IMAGES, LABELS - 1, "from -1 to 0"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(images: Any, labels: Any, words: str) -> None:
    with pytest.raises(DataError) as error:
        Dataset.from_arrays(images, labels, ["a", "b"])
    assert words in str(error.value)


def test_a_test_split_of_arrays_is_kept_and_must_fit() -> None:
    dataset = Dataset.from_arrays(IMAGES, LABELS, ["a", "b"], test=(IMAGES[:2] + 9, LABELS[:2]))
    assert len(dataset.train) == 6 and dataset.test.images.max() == 9
    with pytest.raises(DataError, match="test images"):
        Dataset.from_arrays(IMAGES, LABELS, ["a", "b"], test=(np.zeros((2, 8, 8, 3), np.uint8), LABELS[:2]))
