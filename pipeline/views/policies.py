"""AutoAugment's policy for CIFAR-10: two operations with probabilities, one of 25 such sub-policies for each image."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pipeline.views import draws
from pipeline.views.operations import NO_OPERATION, Choice, Space, Table, tabulate

SPACE = Space(num_bins=10, shear=0.3, translation=lambda side: 150.0 / 331.0 * side, rotation=30.0, factor=0.9, bits=4)
NUM_DRAWS = 5

# (operation, probability, magnitude bin or None) twice for each sub-policy. Kept here rather than read from
# torchvision, so that the views of a recipe are the same whichever version is installed.
CIFAR10_POLICY = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)
PROBABILITIES = np.array([[probability for _, probability, _ in sub_policy] for sub_policy in CIFAR10_POLICY])


def sub_policies(uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the sub-policies drawn, `(B,)` int64, indices into CIFAR10_POLICY.

    Args:
        uniform: As of `choose`.
    """
    return draws.integers(uniform[:, 0], len(CIFAR10_POLICY))


def choose(uniform: NDArray[np.float64], height: int, width: int) -> Choice:
    """Turn draws into one sub-policy for each image.

    Args:
        uniform: `(B, 5)` float64 in [0, 1): the sub-policy, whether its first and second operation are
            applied, and whether their magnitudes are negative (below 1/2).
        height: H, pixels.
        width: W, pixels.

    Returns:
        Two operations for each image.

    Source: arXiv:1805.09501, Table 7; torchvision's `AutoAugment(AutoAugmentPolicy.CIFAR10)`.
    Differs: an operation is applied below its probability, torchvision's also at it, so that there one of
        probability 0 is applied once in 2^24 times.
    """
    chosen = sub_policies(uniform)
    table = _table(height, width)
    rows = table.rows[2 * chosen[:, None] + [0, 1], (uniform[:, 3:] < 0.5).astype(np.int64)]
    return Choice(table, np.where(uniform[:, 1:3] < PROBABILITIES[chosen], rows, NO_OPERATION))


@functools.lru_cache(maxsize=8)
def _table(height: int, width: int) -> Table:
    """Tabulate the policy, an entry for each of a sub-policy's two operations."""
    entries = [(operation, magnitude_bin or 0) for pair in CIFAR10_POLICY for operation, _, magnitude_bin in pair]
    return tabulate(SPACE, entries, height, width)
