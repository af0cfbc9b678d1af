"""What all figures share: one style, texts that can be drawn, and PNG bytes."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UsageError, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 8.0
"""Inches."""
DPI = 150
INK, FAINT, PAPER = "#222222", "#dddddd", "#666666"
"""Of texts and axes, of grids, and of the reference values beside ours."""
# Okabe and Ito's colours, without yellow, which is too light for lines on white; with a grey in its place.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
# As many as are coprime to the markers, so that 40 series have each their own pair.
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1.2, 2)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*")
MARKER_SIZES = {"*": 9.0, "P": 7.0, "X": 7.0}
"""Of those that would look smaller than the others."""
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError("figures need matplotlib; pip install 'titn-pipeline[report]'") from error


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the one style, whatever the user's matplotlibrc says."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(height: float, *, constrained: bool = True) -> Figure:
    """Return an empty figure WIDTH inches wide.

    Args:
        height: Inches.
        constrained: Whether axes and legends make room for each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained" if constrained else None)
    if constrained:
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure, num_colours: int = 128) -> bytes:
    """Return a figure as PNG, without a date or a version in it.

    Args:
        figure: As made by `new_figure`.
        num_colours: At most as many different ones, which makes a chart's file a third as large; 256 at most.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    data = io.BytesIO()
    pixels.quantize(num_colours, dither=Image.Dither.NONE).save(data, format="PNG", optimize=True)
    return data.getvalue()


def shown(text: str, length: int) -> str:
    """Return a text that can be drawn in a line: at most `length` characters, none of them invisible.

    Args:
        text: Anything, such as the name of a class.
        length: At least 2.
    """
    line = printable(text)
    return line if len(line) <= length else f"{line[: length - 1]}…"
