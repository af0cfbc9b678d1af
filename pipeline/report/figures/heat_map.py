"""A matrix as shades."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.report.figures.canvas import INK, WIDTH, new_figure, shown, style, to_png

MAX_LABELS = 26
MAX_NUMBERED = 20
NAME_LENGTH = 16
DIGIT = 0.64  # width of a digit, as a part of the font's size
MIN_SIZE = 4.0  # points; numbers that would be smaller are left out


def heat_map(
    shades: NDArray[np.float64],
    names: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    bar_label: str,
    numbers: NDArray[np.int64] | None = None,
) -> bytes:
    """Draw a square matrix; darker is more, on a logarithmic scale, and what is below 0.5 is white.

    Args:
        shades: `(K, K)` float64 in [0, 100], as percent of a row.
        names: K names, of rows and columns; of more than MAX_LABELS only some are shown.
        x_label: Of the columns.
        y_label: Of the rows.
        bar_label: Of the scale, with unit.
        numbers: `(K, K)` int64, written into the cells where there are at most MAX_NUMBERED rows and they fit;
            zeros are not.

    Returns:
        PNG.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    count = len(names)
    every = -(-count // MAX_LABELS)
    with style():
        figure = new_figure(WIDTH * 0.86)
        axes = figure.add_subplot()
        axes.grid(visible=False)
        image = axes.imshow(
            np.ma.masked_less(shades, 0.5), cmap="Blues", norm=LogNorm(0.3, 100, clip=True), interpolation="nearest"
        )
        ticks = list(range(0, count, every))
        labels = [shown(names[tick], NAME_LENGTH) for tick in ticks]
        size = 10.0 if count <= 12 else 8.0
        axes.set_xticks(ticks, labels, rotation=0 if max(map(len, labels)) <= 3 else 90, fontsize=size)
        axes.set_yticks(ticks, labels, fontsize=size)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        for side in ("right", "top"):
            axes.spines[side].set_visible(True)
        bar = figure.colorbar(image, ax=axes, label=bar_label, shrink=0.7)
        bar.ax.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 20, 50, 100]))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        if numbers is not None and count <= MAX_NUMBERED:
            figure.draw_without_rendering()  # only then is a cell's size known
            figure.set_layout_engine("none")  # a second layout would move what the first has placed
            cell = axes.get_window_extent().width / count * 72 / figure.dpi
            size = min(size, cell / (DIGIT * (len(str(numbers.max())) + 0.5)))
            written = numbers if size >= MIN_SIZE else np.zeros_like(numbers)
            for row, column in zip(*np.nonzero(written), strict=True):
                colour = "white" if shades[row, column] > 12 else INK
                text = f"{numbers[row, column]}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
        return to_png(figure)
