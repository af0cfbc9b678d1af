"""Values of many named things as dots on a common scale, in sections, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.report.figures.canvas import COLOURS, FAINT, INK, MARKERS, PAPER, new_figure, shown, style, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_HEIGHT = 0.235  # inches
LABEL_LENGTH = 26
SERIES_LENGTH = 24


@dataclass(frozen=True)
class DotRow:
    """A line of dots.

    Attributes:
        name: At its left.
        values: One for each series; None draws nothing.
        intervals: Low and high of each series; empty draws none.
        section: A heading is drawn where it differs from the row's above.
        remark: At its right, as the number of images.
    """

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()
    section: str = ""
    remark: str = ""


def dots(
    rows: Sequence[DotRow],
    series: Sequence[str],
    *,
    x_label: str,
    y_label: str = "",
    overall: Sequence[float | None] = (),
    origin: str = "",
    remarks: str = "",
) -> bytes:
    """Draw a dot for each row and series.

    Args:
        rows: From top to bottom, at least one.
        series: Names of the series, at most 8.
        x_label: With unit.
        y_label: What the rows are.
        overall: Value of each series over everything, drawn as a dotted line.
        origin: What a dotted line at 0 means; empty draws none.
        remarks: Heading of the rows' remarks.

    Returns:
        PNG.
    """
    places, headings, bottom = _places(rows)
    with style():
        figure = new_figure(max(2.2, (bottom + 1) * ROW_HEIGHT + 1.0))
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="y")
        axes.hlines(places, 0, 1, transform=axes.get_yaxis_transform(), color=FAINT, linewidth=0.7, zorder=0)
        for index, name in enumerate(series):
            _draw(axes, rows, places, index, name, overall[index] if index < len(overall) else None)
        if origin:
            axes.axvline(0.0, color=INK, linestyle=(0, (1, 2)), linewidth=1.0, zorder=1, label=origin)
        axes.set_yticks(places, [shown(row.name, LABEL_LENGTH) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        beside = axes.get_yaxis_transform()
        for place, heading in headings:
            text = shown(heading, LABEL_LENGTH + 14)
            axes.text(-0.012, place, text, transform=beside, ha="right", va="center", fontweight="bold")
        for place, row in zip(places, rows, strict=True):
            axes.text(1.01, place, row.remark, transform=beside, va="center", fontsize=8.5, color=PAPER)
        if remarks:
            axes.text(1.01, -1, remarks, transform=beside, va="center", fontsize=8.5, color=PAPER)
        axes.set_ylim(bottom + 0.6, -0.9)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside upper center", ncols=min(len(series), 4), handlelength=1.2)
        return to_png(figure)


def _places(rows: Sequence[DotRow]) -> tuple[list[float], list[tuple[float, str]], float]:
    """Return where each row goes, counted in rows from the top, where each heading, and where all end."""
    places: list[float] = []
    headings: list[tuple[float, str]] = []
    at, section = 0.0, ""
    for row in rows:
        if row.section != section:
            at += 0.5 if places else 0.0
            headings.append((at, row.section))
            section = row.section
            at += 1
        places.append(at)
        at += 1
    return places, headings, at - 1


def _draw(
    axes: Axes, rows: Sequence[DotRow], places: Sequence[float], index: int, name: str, overall: float | None
) -> None:
    """Draw one series; the first one's markers are filled, the others' hollow."""
    colour, marker = COLOURS[index], MARKERS[index]
    known = [(row.values[index], place) for row, place in zip(rows, places, strict=True)]
    drawn = [(value, place) for value, place in known if value is not None]
    for row, place in zip(rows, places, strict=True):
        interval = row.intervals[index] if index < len(row.intervals) else None
        if interval is not None:
            axes.plot(interval, [place, place], color=colour, linewidth=1.1, zorder=2)
    axes.plot(
        [value for value, _ in drawn],
        [place for _, place in drawn],
        linestyle="none",
        marker=marker,
        markersize=6 if index == 0 else 7.5,
        color=colour,
        markerfacecolor=colour if index == 0 else "none",
        markeredgewidth=1.3,
        label=shown(name, SERIES_LENGTH),
        clip_on=False,
        zorder=4 - 0.1 * index,
    )
    if overall is not None:
        dashes = (0, (1, 2)) if index == 0 else (0, (5, 2))
        axes.axvline(
            overall,
            color=colour if index else INK,
            linestyle=dashes,
            linewidth=1.0,
            zorder=1,
            label=f"{shown(name, SERIES_LENGTH)}, overall {overall:.1f}",
        )
