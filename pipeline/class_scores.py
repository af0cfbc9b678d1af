"""What a model reaches on each class, from the confusion matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ClassScores:
    """One class.

    Attributes:
        name: Of the class.
        support: Its images.
        recall: Share of them that are predicted as it, in [0, 1], which is the class's accuracy; None without images.
        precision: Share of the images predicted as it that are its own, in [0, 1]; None where it is never predicted.
        f1: Harmonic mean of both, in [0, 1], 0 where one is 0; None without images and predictions.
        confused_with: The class that most of its other images are predicted as, of equal ones the first; None where
            there are none.
        num_confused: How many those are.
    """

    name: str
    support: int
    recall: float | None
    precision: float | None
    f1: float | None
    confused_with: str | None
    num_confused: int


def class_scores(confusion: Tensor, class_names: tuple[str, ...]) -> list[ClassScores]:
    """Return the scores of every class, in the order of their labels.

    Args:
        confusion: `(K, K)` int64 counts, row: target, column: prediction.
        class_names: K names.
    """
    counts = confusion.cpu()
    hits, supports, predictions = (each.tolist() for each in (counts.diagonal(), counts.sum(1), counts.sum(0)))
    num_confused, others = counts.clone().fill_diagonal_(0).max(dim=1)
    scores = []
    for label, name in enumerate(class_names):
        hit, support, predicted = hits[label], supports[label], predictions[label]
        scores.append(
            ClassScores(
                name=name,
                support=support,
                recall=hit / support if support else None,
                precision=hit / predicted if predicted else None,
                f1=2 * hit / (support + predicted) if support + predicted else None,
                confused_with=class_names[int(others[label])] if num_confused[label] else None,
                num_confused=int(num_confused[label]),
            )
        )
    return scores


def worst_first(scores: list[ClassScores]) -> list[ClassScores]:
    """Return classes by ascending recall, then F1; those without images come last."""
    return sorted(scores, key=lambda each: (math.inf if each.recall is None else each.recall, each.f1 or 0.0))
