"""How often a teacher's label of an augmented view is right, by what was drawn for the image.

A label is right if it is the target of the image with the larger share: the image itself without mixing, its partner
if lambda is below 1/2. It is grouped by the operations drawn for that image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.recipes import ViewRecipe
from pipeline.views import augment, mixing
from pipeline.views.grouping import Groups, by_range

EVERYTHING = "all"
Z95 = 1.959964
OF_BOTH = ("lambda", "partner", "mixing")
"""What is drawn for a sample and its partner together."""


@dataclass
class OperationScores:
    """The teacher's scores on the images that share a draw.

    Attributes:
        operation: Name of the operation.
        drawn: What was drawn for it.
        num_images: Number of images, counted once per view.
        num_right: Number whose label is the target of the image with the larger share.
        num_either: Number whose label is one of the two targets.
    """

    operation: str
    drawn: str
    num_images: int = 0
    num_right: int = 0
    num_either: int = 0


class OperationMeter:
    """Adds up the scores of views.

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
            drawn: See `Views.drawn`.
        """
        first = np.arange(len(labels))
        partners = drawn.get("partner", first)
        larger = np.where(drawn["lambda"] >= 0.5, first, partners) if "lambda" in drawn else first
        right = labels == targets[larger]
        either = (labels == targets) | (labels == targets[partners])
        for operation, name, members in self._groups(drawn, larger):
            scores = self._scores.setdefault((operation, name), OperationScores(operation, name))
            scores.num_images += int(members.sum())
            scores.num_right += int(right[members].sum())
            scores.num_either += int(either[members].sum())

    def scores(self) -> list[OperationScores]:
        """Return the scores of all groups that have an image; the first is of all images."""
        return [scores for scores in self._scores.values() if scores.num_images]

    def _groups(self, drawn: Mapping[str, NDArray[Any]], larger: NDArray[np.int64]) -> Groups:
        """Yield each operation, what is drawn for it, and for which images, `(N,)` bool."""
        yield EVERYTHING, EVERYTHING, np.ones(len(larger), dtype=np.bool_)
        if "lambda" in drawn:
            share = np.maximum(drawn["lambda"], 1 - drawn["lambda"])
            yield from by_range("larger share", share, 0.5, 1.0, "{:.2f} to {:.2f}", num_bins=5)
        if "mixing" in drawn:
            for kind, name in enumerate(mixing.KINDS):
                yield "mixing", name, drawn["mixing"] == kind
        of_larger = {name: values[larger] for name, values in drawn.items() if name not in OF_BOTH}
        for augmentation in augment.AUGMENTATIONS:
            yield from augmentation.groups(of_larger, self._recipe, self._image_size)


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
