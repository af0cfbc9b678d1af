"""Cells of CSV files: harmless in a spreadsheet and on a terminal, read back as they were; numbers stay numbers."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.system.text import from_cell, to_cell, to_csv


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=SUM(1+1)", "'=SUM(1+1)"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3+cmd|' /C calc'!A0", "'-2+3+cmd|' /C calc'!A0"),
        ("@SUM(1)", "'@SUM(1)"),
        (" =1", "' =1"),
        ("＝1", "'＝1"),
        ("-cat", "'-cat"),
        ("'=1", "''=1"),
        ("\t=1", "\\t=1"),
        ("\x1b[31mred\n", "\\x1b[31mred\\n"),
        ("it's", "it's"),
        ("'cat'", "'cat'"),
        ("a-b", "a-b"),
    ],
)
def test_a_formula_gets_an_apostrophe_and_a_control_character_is_written_out(text: str, cell: str) -> None:
    assert to_cell(text) == cell
    if text.isprintable():
        assert from_cell(cell) == text


@pytest.mark.parametrize(
    "cell", ["-0.5", "+4.94", "-1e-05", "-", "-1.00 ± 0.50 (3)", "-2.24 to +0.24", "-5 %", "12", ".5", "-.5", ""]
)
def test_numbers_and_their_intervals_stay(cell: str) -> None:
    assert to_cell(cell) == from_cell(cell) == cell


@given(st.text(st.characters(categories=("L", "N", "P", "S")) | st.sampled_from("'=+-@ ")))
def test_every_printable_text_comes_back(text: str) -> None:
    if text.isprintable():
        assert from_cell(to_cell(text)) == text


def test_a_file_has_headings_and_cells_made_harmless_and_numbers_as_they_are() -> None:
    data = to_csv(("=a", "b"), [(-0.5, None), ("-x", "\x1b"), (7, "é")]).decode()
    assert data == "'=a,b\n-0.5,\n'-x,\\x1b\n7,é\n"
    assert list(csv.reader(io.StringIO(data)))[2] == ["'-x", "\\x1b"]
