"""Tables for the terminal, Markdown and CSV, figures, and how numbers are written in them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table as RichTable

from pipeline.system.text import markdown_text, to_csv


@dataclass(frozen=True)
class Table:
    """A table of texts, shown alike on a terminal and in Markdown.

    Attributes:
        title: One line above it.
        columns: Headings; the first column is aligned left, the others right.
        rows: Cells.
        note: One line below it: the conditions of the numbers.
        optional: Columns to leave out on a narrow terminal, in this order; Markdown has them all.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    optional: Sequence[str] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), "a row has a cell for every column"

    def to_rich(self, width: int) -> RichTable:
        """Return the table for a console of `width` characters, without the `optional` columns that do not fit."""
        shown = self._fitting(width)
        widths = self._widths(shown, width)
        table = RichTable(
            title=escape(self.title),
            caption=escape(self.note) or None,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for index in shown:
            justify: JustifyMethod = "left" if index == 0 else "right"
            table.add_column(escape(self.columns[index]), justify=justify, width=widths[index])
        for row in self.rows:
            table.add_row(*(escape(row[index]) for index in shown))
        return table

    def _fitting(self, width: int) -> list[int]:
        """Return the indices of the columns that fit into `width`."""
        shown = list(range(len(self.columns)))
        for name in self.optional:
            if _total(self._width(index) for index in shown) <= width:
                break
            if name in self.columns:
                shown.remove(self.columns.index(name))
        return shown

    def _widths(self, shown: Sequence[int], width: int) -> dict[int, int]:
        """Return the columns' widths; headings break where there is no room for them in one line."""
        widths = {index: max(self._width(index), len(self.columns[index])) for index in shown}
        while _total(widths.values()) > width:
            widest = max(shown, key=lambda index: widths[index] - self._width(index))
            if widths[widest] == self._width(widest):
                break
            widths[widest] -= 1
        return widths

    def _width(self, index: int) -> int:
        """Return the narrowest width of a column: its longest cell, or the longest word of its heading."""
        return max(map(len, [*self.columns[index].split(), *(row[index] for row in self.rows)]))

    def to_csv(self) -> bytes:
        """Return columns and rows as CSV."""
        return to_csv(self.columns, self.rows)

    def to_markdown(self, level: int = 2) -> str:
        """Return the table as GitHub Markdown, with its title as a heading of a level."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(map(markdown_text, cells)) + " |"

        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        parts = [f"{'#' * level} {markdown_text(self.title)}", "", line(self.columns), rule, *map(line, self.rows)]
        return "\n".join([*parts, *(["", markdown_text(self.note)] if self.note else []), ""])


def _total(widths: Iterable[int]) -> int:
    """Return the width of a table on a terminal: each column has two spaces, and the table one more."""
    return sum(width + 2 for width in widths) + 1


@dataclass(frozen=True)
class Figure:
    """A picture for the report.

    Attributes:
        name: File name without suffix, as figure-6.
        title: One line above it.
        png: The picture.
        alt: A description for those who cannot see it.
        note: One line below it: the conditions of its numbers.
        data: Its numbers, for a CSV file; None where there are none.
    """

    name: str
    title: str
    png: bytes
    alt: str
    note: str = ""
    data: Table | None = None


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with fixed digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def difference(value: float, reference: float | None) -> str:
    """Return value - reference with its sign, or a dash where there is no reference."""
    if reference is None:
        return "-"
    text = f"{value - reference:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Return the mean of a figure over runs, of several with their sample standard deviation and number.

    Args:
        values: One for each run; a dash is returned where there is none, or one is None.
        digits: After the point.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = number(statistics.fmean(known), digits)
    return mean if len(known) == 1 else f"{mean} ± {number(statistics.stdev(known), digits)} ({len(known)})"
