"""Sources of a student's teacher labels: the label cache, or the teacher in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.labels.answers import indexable
from pipeline.labels.cache import LabelCache
from pipeline.labels.teacher import Teacher, require_finite
from pipeline.losses import marginal_smoothing


class TeacherAnswer(NamedTuple):
    """A teacher's answer to a batch.

    Attributes:
        labels: `(B,)` int64, or `(B, C)` float32, its distributions over the classes.
        confidence: `(B,)` float32 in (0, 1], its probability of its label, or None.
    """

    labels: Tensor
    confidence: Tensor | None = None


TeacherLabels = Callable[[int, Tensor, Tensor], TeacherAnswer]
"""Maps (view, indices `(B,)` on the device, images `(B, 3, H, W)` uint8) to the teacher's answer."""


class OnlineLabels:
    """A source that runs the teacher in every step, for pipeline.training.batches.TrainingData.

    The teacher normalises the images itself: its mean and std need not be the student's.

    Args:
        teacher: The teacher.
        soft: Whether to give its distribution over all classes instead of its labels.
        confidence: Whether to add its probability of each label.
    """

    def __init__(self, teacher: Teacher, *, soft: bool = False, confidence: bool = False) -> None:
        self._teacher, self._soft, self._confidence = teacher, soft, confidence
        self._finite: Tensor | None = None

    def __call__(self, view: int, indices: Tensor, images: Tensor) -> TeacherAnswer:
        """Answer to a batch, see TeacherLabels, without waiting for the device."""
        logits, is_finite = self._teacher.ask(images)
        self._finite = is_finite if self._finite is None else self._finite & is_finite
        # Cloned, because tensors made in inference mode can't be saved for a backward pass.
        logits = logits.clone()
        probabilities = logits.softmax(1)
        return TeacherAnswer(
            probabilities if self._soft else logits.argmax(1), probabilities.amax(1) if self._confidence else None
        )

    def check(self) -> None:
        """Check all answers since the last call, in one wait for the device.

        Raises:
            NumericalError: A logit was not finite; argmax would still have given a valid label.
        """
        finite, self._finite = self._finite, None
        if finite is not None:
            require_finite(finite)


def cached_labels(
    cache: LabelCache, device: torch.device, *, soft: bool = False, confidence: bool = False
) -> TeacherLabels:
    """Return a source that reads the label cache, for pipeline.training.batches.TrainingData.

    Args:
        cache: The cache; `soft` and `confidence` need the top-k that it keeps.
        device: Where the labels are kept and returned.
        soft: Whether to give the distributions of `marginal_smoothing` instead of labels.
        confidence: Whether to add the teacher's probability of each label.
    """

    def put(array: NDArray[np.generic] | None) -> Tensor:
        assert array is not None, "the cache keeps no top-k"
        return torch.from_numpy(indexable(array, cache.num_classes)).to(device)

    labels = None if soft else put(cache.labels)
    classes = put(cache.classes) if soft else None
    probabilities = put(cache.probabilities) if soft or confidence else None

    def answer(view: int, indices: Tensor, images: Tensor) -> TeacherAnswer:
        chosen = indices.to(device)
        kept = None if probabilities is None else probabilities[view][chosen].float()
        weights = kept[:, 0] if confidence and kept is not None else None
        if labels is not None:
            return TeacherAnswer(labels[view][chosen].long(), weights)
        assert classes is not None and kept is not None
        found = classes[view][chosen].long()
        return TeacherAnswer(marginal_smoothing(found, kept, cache.num_classes), weights)

    return answer
