"""Means of repeated runs over a count, such as that of views, with their intervals and every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.report.figures.canvas import COLOURS, DASHES, MARKERS, new_figure, shown, style, to_png
from pipeline.report.intervals import estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 4.2  # inches
MOST_TICKS = 8
TITLE_LENGTH, NAME_LENGTH = 20, 24
LEGEND_LENGTH = 44  # of all names, in one line
# Distance of runs from their mean, and of a series from the one before, as a share of the width.
APART = 0.02


@dataclass(frozen=True)
class Repeats:
    """A series.

    Attributes:
        name: In the legend.
        values: Count, then the runs' values, at least one. Counts ascend from at least 1; a series of a single one is
            drawn as a level over the whole width.
    """

    name: str
    values: Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One of the scores.

    Attributes:
        title: Above it.
        series: The same in all panels, at most 8.
    """

    title: str
    series: Sequence[Repeats]


def over_counts(panels: Sequence[Panel], *, x_label: str, y_label: str) -> bytes:
    """Draw panels side by side over counts, on logarithmic axes.

    Args:
        panels: At least one.
        x_label: What is counted.
        y_label: With unit; all panels share its scale.

    Returns:
        PNG.
    """
    counts = sorted({count for panel in panels for one in panel.series for count in one.values})
    low, high = counts[0] / 1.25, counts[-1] * 1.35
    with style():
        figure = new_figure(HEIGHT)
        every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(every, panels, strict=True):
            for index, one in enumerate(panel.series):
                _draw(axes, one, index, (high / low) ** APART)
            axes.set_title(shown(panel.title, TITLE_LENGTH), fontsize=10.5)
            axes.set_xlabel(x_label)
            _set_x_axis(axes, counts, low, high)
        every[0].set_ylabel(y_label)
        handles, names = every[0].get_legend_handles_labels()
        columns = len(names) if sum(map(len, names)) <= LEGEND_LENGTH else 1
        figure.legend(handles, names, loc="outside upper center", ncols=columns, handlelength=3.0)
        return to_png(figure)


def _draw(axes: Axes, series: Repeats, index: int, apart: float) -> None:
    """Draw a series: filled means, and small hollow runs beside them, further right by the factor `apart`."""
    colour, marker = COLOURS[index], MARKERS[index]
    places = [count * apart ** (2 * index) for count in series.values]
    means = [estimate(values) for values in series.values.values()]
    is_level = len(places) == 1
    if is_level:
        axes.axhline(means[0].mean, color=colour, linestyle=(0, (1, 2)), linewidth=1.3, zorder=2)
    for place, mean in zip(places, means, strict=True):
        if mean.interval is not None:
            axes.plot([place, place], mean.interval, color=colour, linewidth=1.1, zorder=2)
    for place, values in zip(places, series.values.values(), strict=True):
        axes.plot(
            [place * apart] * len(values),
            values,
            linestyle="none",
            marker=marker,
            markersize=4,
            color=colour,
            markerfacecolor="white",
            zorder=3,
        )
    axes.plot(
        places,
        [mean.mean for mean in means],
        color=colour,
        linestyle=(0, (1, 2)) if is_level else DASHES[index],
        linewidth=1.5,
        marker=marker,
        markersize=6.5,
        label=shown(series.name, NAME_LENGTH),
        zorder=4,
    )


def _set_x_axis(axes: Axes, counts: Sequence[int], low: float, high: float) -> None:
    """Scale by logarithm, and write the counts themselves."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    step = -(-len(counts) // MOST_TICKS)
    ticks = counts[::step]
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
