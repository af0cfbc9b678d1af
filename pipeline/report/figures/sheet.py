"""Images in rows and columns, each with a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.report.figures.canvas import INK, WIDTH, new_figure, shown, style, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE = 0.165  # inches, height of a line of a caption
CHARACTER = 0.077  # inches, width of a character of it, about
GAP = 0.14  # inches, between columns and between rows
HEADING = 0.5  # inches
SHARE = 0.5  # of the colour of a weight; the rest is the image in grey
FRAME = "#E8550F"  # an orange that neither dark nor light images have at their border, and dark in greyscale
OUTSIDE = 0.035  # inches, from the edge of an image to the middle of its frame
MAX_SIDE = 1.25  # inches, of an image


@dataclass(frozen=True, eq=False)
class Cell:
    """An image of the sheet.

    Attributes:
        image: `(H, W, 3)` uint8.
        caption: Lines below it.
        marked: Whether it has a thick orange frame around it and a bold caption.
        weights: `(R, C)` float in [0, 1], laid over the image, see `overlaid`; None draws none.
        grid: Patches along a side, whose borders are drawn; 0 draws none.
    """

    image: NDArray[np.uint8]
    caption: Sequence[str] = ()
    marked: bool = False
    weights: NDArray[np.float64] | None = None
    grid: int = 0


def sheet(rows: Sequence[Sequence[Cell | None]], columns: Sequence[str]) -> bytes:
    """Draw images in rows and columns.

    Args:
        rows: From top to bottom, each with a cell for every column; None leaves its place empty.
        columns: Headings, two lines at most; empty ones take no room.

    Returns:
        PNG.
    """
    assert all(len(row) == len(columns) for row in rows), "a row has a cell for every column"
    pitch = (WIDTH - GAP) / len(columns)
    side = min(pitch - GAP, MAX_SIDE)
    heading_height = HEADING if any(columns) else GAP
    heights = [side + GAP + LINE * max(len(cell.caption) if cell else 0 for cell in row) for row in rows]
    with style():
        figure = new_figure(heading_height + sum(heights), constrained=False)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for index, heading in enumerate(columns):
            left = GAP + index * pitch
            axes.text(left, HEADING - 0.1, heading, va="bottom", fontweight="bold", fontsize=9.5)
        top = heading_height
        for row, height in zip(rows, heights, strict=True):
            for index, cell in enumerate(row):
                if cell is not None:
                    _draw(axes, cell, GAP + index * pitch, top, side, int((pitch - GAP * 0.5) / CHARACTER))
            top += height
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(heading_height + sum(heights), 0)
        return to_png(figure, 256)


def overlaid(image: NDArray[np.uint8], weights: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Lay weights over an image, which shows through in grey, in the colours of `plasma`: 0 dark blue, 1 light yellow.

    Args:
        image: `(H, W, 3)` uint8.
        weights: `(R, C)` float in [0, 1]; R divides H, and C divides W.

    Returns:
        `(H, W, 3)` uint8, the lighter the larger the weight.
    """
    from matplotlib import colormaps

    height, width = image.shape[:2]
    scale = np.kron(weights, np.ones((height // weights.shape[0], width // weights.shape[1])))[..., None]
    tint = 255 * colormaps["plasma"](scale[..., 0])[..., :3]
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    laid: NDArray[np.uint8] = np.rint((1 - SHARE) * grey + SHARE * tint).astype(np.uint8)
    return laid


def _draw(axes: Axes, cell: Cell, left: float, top: float, side: float, length: int) -> None:
    """Draw one image, `side` inches high, with its caption."""
    height, width = cell.image.shape[:2]
    right, bottom = left + side * width / height, top + side
    image = cell.image if cell.weights is None else overlaid(cell.image, cell.weights)
    axes.imshow(image, extent=(left, right, bottom, top), aspect="auto")
    for line in range(1, cell.grid):
        x, y = left + line / cell.grid * (right - left), top + line / cell.grid * side
        for ends in (([x, x], [top, bottom]), ([left, right], [y, y])):
            axes.plot(*ends, color="white", linewidth=0.9)
            axes.plot(*ends, color="black", linewidth=0.9, linestyle=(0, (2, 2)))
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=INK, linewidth=0.6)
    if cell.marked:  # beside the image, so that it is seen beside a dark one too
        west, east, north, south = left - OUTSIDE, right + OUTSIDE, top - OUTSIDE, bottom + OUTSIDE
        corners = [west, east, east, west, west], [north, north, south, south, north]
        axes.plot(*corners, color=FRAME, linewidth=3.0, solid_joinstyle="miter")
    for number, text in enumerate(cell.caption):
        y = bottom + 0.08 + LINE * number
        weight = "bold" if cell.marked else "normal"
        axes.text(left, y, shown(text, length), va="top", fontsize=8.8, fontweight=weight)
