"""Hints that name a command name the recipe too, and a file's own recipe is the default."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import click
import pytest

from stages.cli import Commands
from stages.shared.hints import WITH_RECIPE, with_recipe
from tests.support.in_process import invoke
from tests.support.project import ROOT, Project, unseal


@pytest.mark.parametrize(
    ("hint", "complete"),
    [
        ("run `pipeline label --fresh`", "run `pipeline label --recipe tiny --fresh`"),
        ("`pipeline prepare` makes it", "`pipeline prepare --recipe tiny` makes it"),
        ("`pipeline teacher vgg16 --recipe own`", "`pipeline teacher vgg16 --recipe own`"),
        ("`pipeline select`, `pipeline report`", "`pipeline select --recipe tiny`, `pipeline report --recipe tiny`"),
        ("`pipeline export`, `pipeline labels inspect F`", "`pipeline export`, `pipeline labels inspect F`"),
        ("a pipeline label", "a pipeline label"),
    ],
)  # fmt: skip
def test_a_hint_gets_the_recipe_that_it_lacks(hint: str, complete: str) -> None:
    assert with_recipe(hint, "tiny") == complete


def test_the_commands_that_need_a_recipe_are_those_with_the_option() -> None:
    """The others that have it take their file's recipe, the paper's, all, or one in the place of another's name."""
    having = {
        name for name, command in Commands().items()
        if any(isinstance(one, click.Option) and "--recipe" in one.opts for one in command.params)
    }  # fmt: skip
    assert set(WITH_RECIPE) | {"clean", "export", "reproduce"} == having


def test_every_hint_in_the_code_is_in_backticks_or_names_the_recipe() -> None:
    wanting = re.compile(rf"pipeline ({'|'.join(WITH_RECIPE)})\b(?![^`\"]*--recipe)")
    for file in [*ROOT.glob("stages/**/*.py"), *ROOT.glob("pipeline/**/*.py")]:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if ('"' in line or "'" in line) and '"""' not in line and not re.search(r"`pipeline [^`]*`", line):
                assert not wanting.search(line), f"{file}:{number}: {line.strip()}"


@pytest.fixture
def other(taught: Project, tmp_path: Path) -> Project:
    """A project with the data, teacher and labels of `smoke`, whose own recipe is another."""
    shutil.copytree(taught.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    invoke(project, "label")
    project.know_all_recipes("digits")
    return project


def test_a_checkpoint_and_a_label_file_name_their_recipe(other: Project) -> None:
    scored = json.loads(invoke(other, "evaluate", "data/smoke/teacher", "--json"))
    assert (scored["recipe"], scored["split"]) == ("smoke", "test")
    assert "0 differ" in invoke(other, "labels", "verify", "data/smoke/labels/default.h5", "--sample", "10")
    shutil.copy(other.data / "labels/default.h5", other.path / "elsewhere.h5")
    assert "0 differ" in invoke(
        other, "labels", "verify", "elsewhere.h5", "--sample", "10", "--teacher", "data/smoke/teacher"
    )


def test_an_explicit_recipe_wins(other: Project) -> None:
    words = "data/digits/prepared/dataset.json: no prepared data; run `pipeline prepare --recipe digits`"
    assert words in invoke(other, "evaluate", "data/smoke/teacher", "--recipe", "digits", code=3)
    assert words in invoke(other, "labels", "verify", "data/smoke/labels/default.h5", "--recipe", "digits", code=3)


def test_a_recipe_that_params_yaml_lacks_is_named_with_the_way_out(other: Project) -> None:
    file = unseal(other.data / "teacher") / "best.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "recipe": "gone"}))
    words = "recipe gone, which the file names, is not in params.yaml; give --recipe, of digits, "
    assert words in invoke(other, "evaluate", "data/smoke/teacher", code=2)
    assert invoke(other, "evaluate", "data/smoke/teacher", "--recipe", "smoke")


def test_the_hint_of_a_job_names_the_recipe_of_the_job(other: Project) -> None:
    (other.data / "labels/default.h5").write_bytes(b"damaged")
    (other.data / "prepared/dataset.json").write_bytes(b"damaged")
    out = invoke(other, "reproduce", "--recipe", "smoke", "--student", "vit", code=3)
    assert "run `pipeline prepare --recipe smoke` again" in out and "--recipe digits" not in out
    out = invoke(other, "doctor", "--recipe", "smoke", code=1)
    assert "run `pipeline prepare --recipe smoke` again" in out


def test_the_hint_of_an_error_names_the_recipe_of_the_command(other: Project) -> None:
    (other.data / "labels/default.h5").write_bytes(b"damaged")
    refusal = invoke(other, "distill", "--recipe", "smoke", "--student", "titn", code=3)
    assert "label again with `pipeline label --recipe smoke --fresh`" in refusal
