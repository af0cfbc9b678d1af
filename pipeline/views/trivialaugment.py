"""TrivialAugment, wide: one operation for each image, drawn evenly, of a strength drawn evenly."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pipeline.views import draws
from pipeline.views.operations import EVENLY_DRAWN, Choice, Space, Table, tabulate

SPACE = Space(num_bins=31, shear=0.99, translation=lambda _: 32.0, rotation=135.0, factor=0.99, bits=6)
NUM_DRAWS = 3


def choose(uniform: NDArray[np.float64], height: int, width: int) -> Choice:
    """Turn draws into one operation for each image.

    Args:
        uniform: `(B, 3)` float64 in [0, 1): the operation, its magnitude, and whether that is negative (below 1/2).
        height: H, pixels.
        width: W, pixels.

    Source: arXiv:2103.10158; torchvision's `TrivialAugmentWide()`.
    """
    table = _table(height, width)
    operations = draws.integers(uniform[:, 0], len(EVENLY_DRAWN))
    entries = operations * SPACE.num_bins + draws.integers(uniform[:, 1], SPACE.num_bins)
    return Choice(table, table.rows[entries, (uniform[:, 2] < 0.5).astype(np.int64)][:, None])


@functools.lru_cache(maxsize=8)
def _table(height: int, width: int) -> Table:
    """Tabulate each operation at each magnitude."""
    entries = [(operation, magnitude_bin) for operation in EVENLY_DRAWN for magnitude_bin in range(SPACE.num_bins)]
    return tabulate(SPACE, entries, height, width)
