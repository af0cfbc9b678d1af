"""AutoAugment, RandAugment and TrivialAugment: which operations an image gets, and how strong."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.config.recipes import ViewRecipe
from pipeline.views import draws
from pipeline.views.operations import (
    EVENLY_DRAWN,
    NO_OPERATION,
    OperationChoice,
    OperationTable,
    Space,
    magnitude,
    tabulate,
    timm_magnitude,
)

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


class Policy:
    """A way to choose operations for each image.

    Attributes:
        title: Displayed name.
        name: Name of its draws.
        num_draws: Number of draws per sample.
        space: The magnitude of each operation at each bin.
        entries: The operations it can apply, each with a magnitude bin.
    """

    title: ClassVar[str]
    name: ClassVar[str]
    num_draws: ClassVar[int]
    space: ClassVar[Space]
    entries: Sequence[tuple[str, int]]

    def tabulate(self, height: int, width: int) -> OperationTable:
        """Tabulate the operations for images of one size."""
        return tabulate(functools.partial(magnitude, self.space), self.entries, height, width)

    def choose(self, uniform: NDArray[np.float64], height: int, width: int) -> OperationChoice:
        """Turn draws into operations for each image.

        Args:
            uniform: `(B, num_draws)` float64 in [0, 1).
            height: H, pixels.
            width: W, pixels.
        """
        raise NotImplementedError


class AutoAugment(Policy):
    """AutoAugment for CIFAR-10: one of 25 sub-policies, which are two operations with probabilities.

    Source: arXiv:1805.09501, OperationTable 7; torchvision's `AutoAugment(AutoAugmentPolicy.CIFAR10)`.
    Differs: an operation is applied if its draw is below its probability. torchvision also applies it at equality, so
        that one of probability 0 is applied once in 2^24 times.
    """

    title, name, num_draws = "AutoAugment", "autoaugment", 5
    space = Space(10, shear=0.3, translation=lambda side: 150.0 / 331.0 * side, rotation=30.0, factor=0.9, bits=4)
    entries = tuple((operation, magnitude_bin or 0) for pair in CIFAR10_POLICY for operation, _, magnitude_bin in pair)

    def choose(self, uniform: NDArray[np.float64], height: int, width: int) -> OperationChoice:
        """See Policy; the draws: the sub-policy, whether to apply each operation, whether to negate it (below 1/2)."""
        chosen, table = sub_policies(uniform), _table(self, height, width)
        rows = table.rows[2 * chosen[:, None] + [0, 1], (uniform[:, 3:] < 0.5).astype(np.int64)]
        return OperationChoice(table, np.where(uniform[:, 1:3] < PROBABILITIES[chosen], rows, NO_OPERATION))


def sub_policies(uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return AutoAugment's sub-policies, `(B,)` int64, indices into CIFAR10_POLICY, from the draws of its `choose`."""
    return draws.integers(uniform[:, 0], len(CIFAR10_POLICY))


class RandAugment(Policy):
    """RandAugment: two operations, drawn evenly, all of one strength.

    Args:
        strength: The magnitude bin, of 31.

    Source: arXiv:1909.13719; torchvision's `RandAugment()`: 2 operations, magnitude 9 of 31.
    """

    title, name, num_draws = "RandAugment", "randaugment", 4
    space = AutoAugment.space._replace(num_bins=31)
    drawn: ClassVar[Sequence[str]] = EVENLY_DRAWN

    def __init__(self, strength: int) -> None:
        self.entries = tuple((operation, strength) for operation in self.drawn)

    def choose(self, uniform: NDArray[np.float64], height: int, width: int) -> OperationChoice:
        """See Policy; the draws are the two operations, and whether to negate either magnitude (below 1/2)."""
        table, entries = _table(self, height, width), draws.integers(uniform[:, :2], len(self.drawn))
        return OperationChoice(table, table.rows[entries, (uniform[:, 2:] < 0.5).astype(np.int64)])


class TimmRandAugment(RandAugment):
    """RandAugment by timm's operations and magnitudes, of which the largest is 10.

    Source: timm's `rand_augment_transform("rand-m9-inc1")`.
    Differs: timm resamples geometric operations by a bilinear or a bicubic filter, and what lies outside of the frame
        is grey; here they take the nearest pixel, and it is black. timm's default probability of each operation is 1/2.
    """

    drawn = (
        "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
        "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
    )  # fmt: skip

    def tabulate(self, height: int, width: int) -> OperationTable:
        """See Policy."""
        return tabulate(timm_magnitude, self.entries, height, width, whole_pixels=False)


class TrivialAugment(Policy):
    """TrivialAugment, wide: one operation, drawn evenly, of a strength drawn evenly.

    Source: arXiv:2103.10158; torchvision's `TrivialAugmentWide()`.
    """

    title, name, num_draws = "TrivialAugment", "trivialaugment", 3
    space = Space(31, shear=0.99, translation=lambda _: 32.0, rotation=135.0, factor=0.99, bits=6)
    entries = tuple((operation, magnitude_bin) for operation in EVENLY_DRAWN for magnitude_bin in range(31))

    def choose(self, uniform: NDArray[np.float64], height: int, width: int) -> OperationChoice:
        """See Policy; the draws are the operation, its magnitude, and whether to negate that (below 1/2)."""
        table, num_bins = _table(self, height, width), self.space.num_bins
        entries = draws.integers(uniform[:, 0], len(EVENLY_DRAWN)) * num_bins + draws.integers(uniform[:, 1], num_bins)
        return OperationChoice(table, table.rows[entries, (uniform[:, 2] < 0.5).astype(np.int64)][:, None])


# By the value of the view recipe's `autoaugment`; RandAugment as it is by default.
POLICIES: dict[str, Policy] = {
    "cifar10": AutoAugment(),
    "randaugment": RandAugment(9),
    "trivialaugment": TrivialAugment(),
}


def policy(recipe: ViewRecipe) -> Policy | None:
    """Return the policy of a recipe, or None."""
    if recipe.autoaugment == "randaugment":
        return _rand_augment(recipe.magnitudes, recipe.magnitude)
    return POLICIES.get(recipe.autoaugment)


@functools.cache
def _rand_augment(magnitudes: str, strength: int) -> RandAugment:
    """Return one RandAugment for equal recipes, for its tables are kept."""
    return {"torchvision": RandAugment, "timm": TimmRandAugment}[magnitudes](strength)


@functools.lru_cache(maxsize=24)
def _table(policy: Policy, height: int, width: int) -> OperationTable:
    """Return a policy's table, made once for images of one size."""
    return policy.tabulate(height, width)
