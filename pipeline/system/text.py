"""Text as Markdown and as CSV, and counts in words; pipeline.errors.printable makes it safe to print."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from pipeline.errors import printable


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which is given in the singular: `1 class`, `2 classes`."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def to_csv(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> bytes:
    """Return CSV in UTF-8 with a line of headings; None is an empty cell, text that is not Unicode is escaped."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def markdown_text(text: str) -> str:
    """Return one line of text that Markdown shows unchanged; an underscore within a word needs no escape."""
    text = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*`\[\]~]|\b_|_\b)", r"\\\1", text)
