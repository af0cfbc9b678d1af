"""How often a teacher's label of an augmented view is right, by what was drawn for the image.

A label is right where it is the target of the image with the larger share: the image itself without mixing, its partner
where lambda is below 1/2. It is grouped by the operations that were drawn for that same image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.recipes import ViewRecipe
from pipeline.views.augment import POLICIES
from pipeline.views.operations import NO_OPERATION, OPERATIONS
from pipeline.views.policies import CIFAR10_POLICY

NUM_BINS = 4
EVERYTHING = "all"
SUB_POLICY = "sub-policy"
Z95 = 1.959964
Members = Iterator[tuple[str, str, NDArray[np.bool_]]]


@dataclass
class OperationScores:
    """What a teacher reaches on the images for which something was drawn.

    Attributes:
        operation: Which.
        drawn: What.
        num_images: How many images, counted once in each view.
        num_right: Whose label is the target of the larger share.
        num_either: Whose label is one of their two targets.
    """

    operation: str
    drawn: str
    num_images: int = 0
    num_right: int = 0
    num_either: int = 0


class OperationMeter:
    """Adds up views.

    Args:
        recipe: The view recipe.
        image_size: Side of the images, pixels.
    """

    def __init__(self, recipe: ViewRecipe, image_size: int) -> None:
        self._recipe, self._image_size = recipe, image_size
        self._scores: dict[tuple[str, str], OperationScores] = {}

    def add(self, labels: NDArray[Any], targets: NDArray[np.int64], drawn: Mapping[str, NDArray[Any]]) -> None:
        """Count a view.

        Args:
            labels: `(N,)` integers, the teacher's.
            targets: `(N,)` int64, of the images.
            drawn: What `Views.drawn` returns for the view.
        """
        own = np.arange(len(labels))
        partners = drawn.get("partner", own)
        larger = np.where(drawn["lambda"] >= 0.5, own, partners) if "lambda" in drawn else own
        right = labels == targets[larger]
        either = (labels == targets) | (labels == targets[partners])
        for operation, name, members in self._members(drawn, larger):
            scores = self._scores.setdefault((operation, name), OperationScores(operation, name))
            scores.num_images += int(members.sum())
            scores.num_right += int(right[members].sum())
            scores.num_either += int(either[members].sum())

    def scores(self) -> list[OperationScores]:
        """Return what was drawn at least once, beginning with everything."""
        return [scores for scores in self._scores.values() if scores.num_images]

    def _members(self, drawn: Mapping[str, NDArray[Any]], larger: NDArray[np.int64]) -> Members:
        """Yield each operation, what is drawn of it, and for which images, `(N,)` bool."""
        yield EVERYTHING, EVERYTHING, np.ones(len(larger), dtype=np.bool_)
        if "lambda" in drawn:
            share = np.maximum(drawn["lambda"], 1 - drawn["lambda"])
            yield from _ranges("larger share", share, 0.5, 1.0, "{:.2f} to {:.2f}", num_bins=5)
        of = {name: values[larger] for name, values in drawn.items() if name not in ("lambda", "partner")}
        recipe, size = self._recipe, self._image_size
        if "flip" in of:
            for name, flipped in (("left-right", True), ("none", False)):
                yield "flip", name, np.asarray(of["flip"] == flipped)
        if "crop" in of:
            yield from _pixels("crop, moved by", of["crop"], recipe.crop)
        if "rotation" in of:
            angle = np.abs(of["rotation"])
            yield from _ranges("rotation, either way", angle, 0.0, recipe.rotation, "{:.1f}° to {:.1f}°")
        if "translate" in of:
            yield from _pixels("translation", of["translate"], round(recipe.translate * size))
        if "shear" in of:
            yield from _ranges("shear, either way", np.abs(of["shear"]), 0.0, recipe.shear, "{:.1f}° to {:.1f}°")
        for name, reach in (("scale", recipe.scale), ("brightness", recipe.brightness), ("contrast", recipe.contrast)):
            if name in of:
                yield from _ranges(f"{name}, times", of[name], 1 - reach, 1 + reach, "{:.2f} to {:.2f}")
        if "operations" in of:
            yield from _chosen(POLICIES[recipe.autoaugment].title, of)


def wilson_interval(num_right: int, num_images: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share, both ends in percent.

    Args:
        num_right: At most `num_images`.
        num_images: At least 1; taken as independent.

    Source: E. B. Wilson, Probable inference (1927).
    """
    share, spread = num_right / num_images, Z95**2 / num_images
    middle = share + spread / 2
    half = np.sqrt(spread * (share * (1 - share) + spread / 4))
    return 100 * float(middle - half) / (1 + spread), 100 * float(middle + half) / (1 + spread)


def _ranges(
    operation: str, values: NDArray[Any], low: float, high: float, form: str, num_bins: int = NUM_BINS
) -> Members:
    """Cut [low, high] into equal parts; what lies at their ends belongs to the upper, the highest to the last."""
    edges = np.linspace(low, high, num_bins + 1)
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, num_bins - 1)
    for number in range(num_bins):
        yield operation, form.format(edges[number], edges[number + 1]), index == number


def _pixels(operation: str, shifts: NDArray[np.int64], reach: int) -> Members:
    """Group `(N, 2)` shifts by the larger of both, a pixel at a time or several."""
    distance = np.abs(shifts).max(axis=1)
    step = -(-(reach + 1) // (NUM_BINS + 2))
    for start in range(0, reach + 1, step):
        end = min(start + step - 1, reach)
        name = f"{start} px" if start == end else f"{start} to {end} px"
        yield operation, name, (distance >= start) & (distance <= end)


def _chosen(title: str, of: Mapping[str, NDArray[Any]]) -> Members:
    """Group by each operation that a policy chose, and by sub-policy where there are any."""
    yield title, "nothing applied", np.all(of["operations"] == NO_OPERATION, axis=1)
    for number, name in sorted(enumerate(OPERATIONS), key=lambda entry: entry[1]):
        yield title, name, np.any(of["operations"] == number, axis=1)
    if "sub_policy" not in of:
        return
    for number, sub_policy in enumerate(CIFAR10_POLICY):
        name = ", ".join(f"{operation} {probability:g}" for operation, probability, _ in sub_policy)
        yield SUB_POLICY, f"{number + 1}: {name}", of["sub_policy"] == number
