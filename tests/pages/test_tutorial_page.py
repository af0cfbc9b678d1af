"""docs/tutorial.md: its commands run in a fresh folder, with the short recipe of "In a hurry"."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.commands import run
from tests.support.markdown import blocks, commands, page
from tests.support.project import ROOT

PAGE = page("docs/tutorial.md")


def in_a_hurry(params: str) -> str:
    """Shorten the recipe as the page's paragraph "In a hurry" says."""
    hurry = PAGE[PAGE.index("In a hurry") :].split("\n\n")[0]
    assert all(f"`{word}`" in hurry for word in ("count: 1", "epochs: 1", "depth: 1", "NUM_IMAGES = 200"))
    before, recipe = params.split("\n  folder-small:\n")
    recipe, after = recipe.split("\n\n", 1)
    teaching, student = recipe.split("    student:\n")
    student = re.sub(r"\b(epochs|depth): \d+", r"\1: 1", student)
    recipe = re.sub(r"\bcount: \d+", "count: 1", teaching) + "    student:\n" + student
    return f"{before}\n  folder-small:\n{recipe}\n\n{after}"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder in which the page has been followed, and what each command printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "params.yaml").write_text(in_a_hurry((ROOT / "params.yaml").read_text()))
    (images,) = blocks(PAGE, "python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(images.replace("NUM_IMAGES = 1797", "NUM_IMAGES = 200"), {})
    printed = {}
    for line in commands(PAGE):
        program, *arguments = shlex.split(line)
        assert program == "pipeline"
        ended = run(folder, *arguments)
        assert ended.code == 0, f"{line}\n{ended.out}\n{ended.err}"
        printed[line] = ended.out + ended.err
    return folder, printed


@pytest.mark.slow  # the whole tutorial, command by command
def test_the_tutorial_ends_with_a_student_and_its_tables(followed: tuple[Path, dict[str, str]]) -> None:
    folder, printed = followed
    data = folder / "data/folder-small"
    metrics = json.loads((data / "students/titn/metrics.json").read_text())
    assert metrics["distilled"] and metrics["evaluated_on"] == "val" and metrics["num_train"] == 144
    assert (data / "labels/default.h5").is_file() and (data / "reports/report.md").is_file()
    assert any("Teacher and students on folder-small" in out for out in printed.values())
    assert (folder / "data/runs/folder-small/titn-epochs-4-seed-1/metrics.json").is_file()
    *_, predicted = printed.values()
    assert "distillation head" in predicted and "my-images/train/7/7.png" in predicted


def test_the_recipe_is_what_the_tutorial_says() -> None:
    recipe = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())["recipes"]["folder-small"]
    assert len(recipe["teachers"]) == 2 and recipe["teacher"]["weights"] == "none"
    assert recipe["views"]["default"]["count"] == recipe["student"]["epochs"] == 16
    epochs = {teacher.get("epochs", recipe["teacher"]["epochs"]) for teacher in recipe["teachers"].values()}
    assert epochs == {6}
    assert recipe["views"]["default"]["operations"] == {
        "rotation": 10.0, "translate": 0.1, "scale": 0.1, "mixing": "none",
    }  # fmt: skip
    assert {"titn", "vit", "deit", "tnt"} == set(recipe["students"])
