"""docs/titn.ipynb: its cells run one after the other, and show what they say."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import titn
from tests.support.project import ROOT

NOTEBOOK = ROOT / "docs/titn.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
TEXT = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The names that the cells define, and what they print."""
    names, out = {"folder": tmp_path_factory.mktemp("notebook")}, io.StringIO()
    with contextlib.chdir(names["folder"]), contextlib.redirect_stdout(out):
        where = Path.cwd()
        for cell in CELLS:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    return {**names, "where": where}, out.getvalue()


def test_it_holds_no_outputs_and_is_well_formed() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS if "outputs" in cell)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert not re.search(r"^\s*[%!]", "".join("".join(cell["source"]) for cell in CELLS), re.MULTILINE)


def test_its_model_predicts_and_its_export_answers_alike(executed: tuple[dict[str, Any], str]) -> None:
    names, said = executed
    assert isinstance(names["model"], titn.TrainedModel) and "TrainedModel(titn, 4 classes" in said
    assert "Prediction(class_name=" in said and "\nTrue\n" in said
    assert "of the test images {'top1': " in said


def test_its_view_is_the_one_that_the_student_saw_and_its_labels_are_those(
    executed: tuple[dict[str, Any], str],
) -> None:
    names, said = executed
    with Image.open(names["where"] / "view.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (32, 8 * 32, 3)
    assert np.array_equal(pixels[:, :32], names["views"].batch(0, [0]).images[0].permute(1, 2, 0).numpy())
    file = names["where"] / "titn-work/data/folder/labels/default.h5"
    assert np.array_equal(names["cache"].labels, titn.LabelCache.open(file).labels)
    assert "4 views labelled by squeezenet1_1" in said


def test_its_student_by_hand_learns(executed: tuple[dict[str, Any], str]) -> None:
    first, *_, last = executed[0]["result"].curve
    assert last["train_loss"] < first["train_loss"] < 2.6


def test_its_arrays_make_a_data_set_of_their_own(executed: tuple[dict[str, Any], str]) -> None:
    other, data = executed[0]["other"], executed[0]["data"]
    assert len(other.train) + len(other.test) == len(data.train) and other.sha256 != data.sha256


def test_its_three_lines_are_the_readmes() -> None:
    (lines,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    readme = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert readme[0] == ("python", lines) and readme[1][0] == "sh"
