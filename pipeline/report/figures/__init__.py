"""Figures: from plain arrays to PNG, the one home of matplotlib.

Nothing of matplotlib's global state is used or kept, and equal arrays give equal bytes. All are 1200 pixels wide, with
texts that are readable at 800, and legible in greyscale: dashes, markers and lightness differ, not colours alone.
"""

from pipeline.report.figures.canvas import require_matplotlib
from pipeline.report.figures.dots import DotRow, dots
from pipeline.report.figures.heat_map import heat_map
from pipeline.report.figures.lines import Series, lines, smoothing
from pipeline.report.figures.repeats import Panel, Repeats, over_counts
from pipeline.report.figures.sheet import Cell, sheet

__all__ = [
    "Cell",
    "DotRow",
    "Panel",
    "Repeats",
    "Series",
    "dots",
    "heat_map",
    "lines",
    "over_counts",
    "require_matplotlib",
    "sheet",
    "smoothing",
]
