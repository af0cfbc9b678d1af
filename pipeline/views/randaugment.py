"""RandAugment: two operations for each image, drawn evenly, all of one strength."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pipeline.views import draws
from pipeline.views import policies as autoaugment
from pipeline.views.operations import EVENLY_DRAWN, Choice, Table, tabulate

SPACE = autoaugment.SPACE._replace(num_bins=31)
MAGNITUDE_BIN = 9
NUM_OPERATIONS = 2
NUM_DRAWS = 2 * NUM_OPERATIONS


def choose(uniform: NDArray[np.float64], height: int, width: int) -> Choice:
    """Turn draws into two operations for each image.

    Args:
        uniform: `(B, 4)` float64 in [0, 1): the first and the second operation, and whether their magnitudes are
            negative (below 1/2).
        height: H, pixels.
        width: W, pixels.

    Source: arXiv:1909.13719; torchvision's `RandAugment()`: 2 operations, magnitude 9 of 31.
    """
    table = _table(height, width)
    entries = draws.integers(uniform[:, :NUM_OPERATIONS], len(EVENLY_DRAWN))
    return Choice(table, table.rows[entries, (uniform[:, NUM_OPERATIONS:] < 0.5).astype(np.int64)])


@functools.lru_cache(maxsize=8)
def _table(height: int, width: int) -> Table:
    """Tabulate each operation at the one magnitude."""
    return tabulate(SPACE, [(operation, MAGNITUDE_BIN) for operation in EVENLY_DRAWN], height, width)
