"""Text as Markdown and as CSV, and counts in words; pipeline.errors.printable makes it safe to print."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from pipeline.errors import printable

# What a spreadsheet takes for a formula, in full width too; behind apostrophes, so that what is added can be taken off.
_FORMULA = re.compile(r"('*)\s*[=+\-@＝＋－＠]")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_FIGURES = re.compile(rf"-|{_NUMBER}(?: ± {_NUMBER} \(\d+\))?(?: to {_NUMBER})?(?: ?%)?")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which is given in the singular: `1 class`, `2 classes`."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def to_csv(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> bytes:
    """Return CSV in UTF-8 with a line of headings; None is an empty cell, and text is as `to_cell` returns it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for row in (columns, *rows):
        writer.writerow([to_cell(value) if isinstance(value, str) else value for value in row])
    return text.getvalue().encode()


def to_cell(text: str) -> str:
    """Return a text that no spreadsheet computes and no terminal obeys; numbers and their intervals stay.

    Control characters are escaped as by `printable`. An apostrophe is put before what begins as a formula does, as
    spreadsheets themselves do, and before one that `from_cell` would take off.
    """
    line = printable(text)
    return f"'{line}" if _FORMULA.match(line) and not _FIGURES.fullmatch(line) else line


def from_cell(cell: str) -> str:
    """Return the text of a cell without the apostrophe that `to_cell` puts before formulas."""
    formula = _FORMULA.match(cell)
    return cell[1:] if formula and formula[1] else cell


def markdown_text(text: str) -> str:
    """Return one line of text that Markdown shows unchanged; an underscore within a word needs no escape."""
    text = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*`\[\]~]|\b_|_\b)", r"\\\1", text)
