"""docs/paper-to-code.md: every equation, figure and table of the paper has a line, and what it names exists."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from tests.support.markdown import page
from tests.support.project import ROOT

PAGE = page("docs/paper-to-code.md")
NAMED = sorted(set(re.findall(r"\[`((?:pipeline|stages)[\w.]*)`\]\(\.\./([\w/.]+)\)", PAGE)))


def locate(name: str) -> tuple[object, Path]:
    """What a dotted name stands for, and the file of its module."""
    module, *rest = name.rsplit(".", 1)
    try:
        named: object = importlib.import_module(name)
        file = importlib.import_module(name).__file__
    except ModuleNotFoundError:
        named = getattr(importlib.import_module(module), rest[0])
        file = importlib.import_module(module).__file__
    assert file is not None
    return named, Path(file)


@pytest.mark.parametrize("kind, numbers", [("Table", range(1, 7)), ("Figure", range(1, 9))])
def test_every_table_and_figure_has_a_row(kind: str, numbers: range) -> None:
    rows = re.findall(rf"^\| {kind} (\d+) \|", PAGE, re.MULTILINE)
    assert rows == [str(number) for number in numbers]


def test_every_equation_has_a_row() -> None:
    firsts = re.findall(r"^\| (\(\d+\)(?:, \(\d+\))*) \|", PAGE, re.MULTILINE)
    assert re.findall(r"\d+", " ".join(firsts)) == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("name, file", NAMED, ids=[name for name, _ in NAMED])
def test_what_the_page_names_is_in_the_file_that_it_links(name: str, file: str) -> None:
    named, module = locate(name)
    assert (ROOT / file).resolve() == module.resolve()
    if not inspect.ismodule(named):
        source = inspect.getsourcefile(inspect.unwrap(named))  # type: ignore[arg-type]
        assert source == str(module), f"{name} is only imported there"


def test_every_difference_that_the_code_states_is_on_the_page() -> None:
    differing = {
        str(file.relative_to(ROOT))
        for package in ("pipeline", "stages")
        for file in (ROOT / package).rglob("*.py")
        if "Differs:" in file.read_text()
    }
    linked = {file for _, file in NAMED}
    assert differing - linked == set()
    assert len(differing) > 10
