"""Groups of images by what was drawn for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 4
# Operation, what is drawn for it, and for which images, `(N,)` bool.
Groups = Iterator[tuple[str, str, NDArray[np.bool_]]]


def by_range(
    operation: str, values: NDArray[Any], low: float, high: float, form: str, num_bins: int = NUM_BINS
) -> Groups:
    """Cut [low, high] into equal parts. A value on an inner edge belongs to the upper part, `high` to the last.

    Args:
        operation: Displayed name of the operation.
        values: `(N,)` numbers.
        low: Lower bound.
        high: Upper bound.
        form: Format of the ends of a part, such as `{:.1f} to {:.1f}`.
        num_bins: Number of parts.
    """
    edges = np.linspace(low, high, num_bins + 1)
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, num_bins - 1)
    for part in range(num_bins):
        yield operation, form.format(edges[part], edges[part + 1]), index == part


def by_pixels(operation: str, shifts: NDArray[np.int64], reach: int) -> Groups:
    """Group `(N, 2)` shifts of at most `reach` pixels by the larger of both, in steps of one or more pixels."""
    distance = np.abs(shifts).max(axis=1)
    step = -(-(reach + 1) // (NUM_BINS + 2))
    for start in range(0, reach + 1, step):
        end = min(start + step - 1, reach)
        name = f"{start} px" if start == end else f"{start} to {end} px"
        yield operation, name, (distance >= start) & (distance <= end)
