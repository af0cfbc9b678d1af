"""Curves over a number, such as accuracy over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.report.figures.canvas import (
    COLOURS,
    DASHES,
    MARKER_SIZES,
    MARKERS,
    STYLE,
    new_figure,
    shown,
    style,
    to_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Longer curves are drawn as running means, in front of what they are means of.
LONG = 100
# Curves whose later halves share less than this of the whole range are drawn a second time, larger.
ZOOM = 0.3
# Between two entries of the legend, as a part of the font's size.
SPACING = 0.7


@dataclass(frozen=True, eq=False)
class Series:
    """A curve.

    Attributes:
        name: In the legend.
        x: `(n,)` float, ascending.
        y: `(n,)` float; NaN leaves a gap.
        spread: `(n,)` float, half the height of the band around y; None draws none.
        reference: A value beside which the curve is to be seen, drawn as a thin line; None draws none.
        detail: A second line of the legend.
    """

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    spread: NDArray[np.float64] | None = None
    reference: float | None = None
    detail: str = ""


def lines(series: Sequence[Series], *, x_label: str, y_label: str, legend: str = "") -> bytes:
    """Draw curves, and where they end close together a second time on a larger scale.

    Args:
        series: At least one, at most 40: as many pairs of dash and marker there are.
        x_label: With unit.
        y_label: With unit.
        legend: Heading of the legend.

    Returns:
        PNG.
    """
    zoom = _zoom_limits(series)
    with style():
        figure = new_figure(max(4.6 if zoom is None else 6.6, _legend_height(series)))
        panels = figure.subplots(1 if zoom is None else 2, 1, sharex=True, squeeze=False)[:, 0]
        for axes in panels:
            for index, one in enumerate(series):
                _draw(axes, one, index)
            axes.set_ylabel(y_label)
        panels[-1].set_xlabel(x_label)
        _set_x_limits(panels[-1], series)
        if zoom is not None:
            panels[1].set_ylim(*zoom)
            panels[1].set_ylabel(f"{y_label}, enlarged")
        _mark_references(panels[-1], series)
        handles = panels[0].get_legend_handles_labels()[0]
        figure.legend(
            handles=handles,
            loc="outside right upper",
            title=legend,
            alignment="left",
            handlelength=3.4,
            labelspacing=SPACING,
        )
        return to_png(figure)


def smoothing(num_points: int) -> int:
    """Return the number of neighbouring points that `lines` takes the mean of: 1, or an odd number for long curves."""
    return 1 if num_points < LONG else (num_points // 40) | 1


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean of each value and its neighbours, of fewer at the ends.

    Args:
        values: `(n,)` float; NaN stays, and is left out of its neighbours' means.
        width: Odd number of values.
    """
    known = np.isfinite(values)
    kernel = np.ones(width)
    sums = np.convolve(np.where(known, values, 0.0), kernel, mode="full")
    counts = np.convolve(known.astype(np.float64), kernel, mode="full")
    half = width // 2
    inner = slice(half, half + len(values))
    return np.where(known, sums[inner] / np.maximum(counts[inner], 1.0), np.nan)


def _legend_height(series: Sequence[Series]) -> float:
    """Return about how many inches the legend takes, with its heading."""
    num_lines = sum(2 if one.detail else 1 for one in series)
    return 0.7 + (1.2 * num_lines + SPACING * len(series)) * float(STYLE["font.size"]) / 72


def _draw(axes: Axes, series: Series, index: int) -> None:
    """Draw a curve with its band."""
    colour, width = COLOURS[index % len(COLOURS)], smoothing(len(series.x))
    # About 12 markers, at other places for each curve.
    step = max(1, len(series.x) // 12)
    name = shown(series.name, 24)
    axes.plot(
        series.x,
        running_mean(series.y, width),
        color=colour,
        linestyle=DASHES[index % len(DASHES)],
        linewidth=1.5,
        marker=MARKERS[index % len(MARKERS)],
        markersize=MARKER_SIZES.get(MARKERS[index % len(MARKERS)], 5.5),
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=list(range((index * step // 8) % step, len(series.x), step)),
        label=f"{name}\n{series.detail}" if series.detail else name,
        zorder=3,
    )
    if series.spread is not None:
        low, high = series.y - series.spread, series.y + series.spread
        axes.fill_between(series.x, low, high, color=colour, alpha=0.2, linewidth=0.5, zorder=1)
    elif width > 1:
        axes.plot(series.x, series.y, color=colour, linewidth=0.6, alpha=0.35, zorder=2)


def _mark_references(axes: Axes, series: Sequence[Series]) -> None:
    """Draw the reference values: a dotted line, and the curve's own marker, hollow, at the right."""
    near = 0.03 * float(np.ptp(axes.get_ylim()))
    slots: list[tuple[float, int]] = []
    for index, one in enumerate(series):
        if one.reference is None:
            continue
        colour = COLOURS[index % len(COLOURS)]
        axes.axhline(one.reference, color=colour, linestyle=(0, (1, 3)), linewidth=0.9, zorder=2)
        taken = {slot for value, slot in slots if abs(one.reference - value) < near}
        slot = min(set(range(len(taken) + 1)) - taken)
        slots.append((one.reference, slot))
        place = 1.012 + 0.022 * slot
        axes.plot(
            [place],
            [one.reference],
            transform=axes.get_yaxis_transform(),
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markerfacecolor="white",
            markersize=6,
            clip_on=False,
            zorder=4,
        )
        # Nothing to see, but what the layout keeps free for the marker.
        axes.text(place + 0.01, one.reference, " ", transform=axes.get_yaxis_transform(), fontsize=6)


def _zoom_limits(series: Sequence[Series]) -> tuple[float, float] | None:
    """Return the range of the later halves and the references, or None where it is not small beside the whole."""
    references = [one.reference for one in series if one.reference is not None]
    whole = np.concatenate([*(one.y for one in series), references])
    later = np.concatenate([*(one.y[len(one.y) // 2 :] for one in series), references])
    whole, later = whole[np.isfinite(whole)], later[np.isfinite(later)]
    if not len(later) or np.ptp(later) >= ZOOM * np.ptp(whole):
        return None
    room = max(0.06 * float(np.ptp(later)), 0.02)
    return float(later.min()) - room, float(later.max()) + room


def _set_x_limits(axes: Axes, series: Sequence[Series]) -> None:
    """Show all of x, whole numbers as such."""
    from matplotlib.ticker import MaxNLocator

    low = min(float(one.x.min()) for one in series)
    high = max(float(one.x.max()) for one in series)
    room = max((high - low) * 0.02, 0.3 if high == low else 0.0)
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
