"""Running a teacher over views: labels, their top-k and logit margins, and the replay of a finished cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.batches import TeacherAnswer, TeacherLabels
from pipeline.errors import NumericalError
from pipeline.labels import Canary, LabelCache
from pipeline.losses import marginal_smoothing
from pipeline.runtime import autocast
from pipeline.view_labels import ViewLabels
from pipeline.views import Views, normalize

NUM_CANARY_SAMPLES = 16
# Largest logit margin by which a replayed label may differ. On the recorded kind of device and precision only the
# order of additions can differ (batch size, threads); elsewhere whole products are rounded differently.
SAME_MARGIN = 1e-3
OTHER_MARGIN = 0.25


@dataclass(frozen=True)
class Teacher:
    """A trained teacher, ready to label.

    Attributes:
        model: Returns `(B, C)` logits; in evaluation mode, on its device.
        mean: Normalisation of its inputs, pixels in [0, 1].
        std: As mean.
        precision: `fp32` or `bf16`.
        batch_size: Images a forward pass.
    """

    model: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: str
    batch_size: int

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Return `(B, C)` float32 logits of normalised images `(B, 3, H, W)`.

        Raises:
            NumericalError: A logit is not finite; argmax would still return a valid label.
        """
        with autocast(images.device, self.precision):
            logits: Tensor = self.model(images).float()
        if not torch.isfinite(logits).all():
            raise NumericalError("labelling: a logit of the teacher is not finite; train the teacher again")
        return logits

    def label(self, images: Tensor) -> NDArray[np.int64]:
        """Return the argmax labels `(N,)` of uint8 images `(N, 3, H, W)`."""
        rows = [
            self.logits(normalize(part, self.mean, self.std)).argmax(1) for part in torch.split(images, self.batch_size)
        ]
        return torch.cat(rows).cpu().numpy()


def label_view(teacher: Teacher, views: Views, view: int) -> NDArray[np.int64]:
    """Return the teacher's labels of a whole view, `(N,)` int64 in [0, C).

    Raises:
        NumericalError: A logit is not finite.
    """
    return torch.cat([logits.argmax(1) for logits in _logits_of_view(teacher, views, view)]).cpu().numpy()


def label_view_topk(teacher: Teacher, views: Views, view: int, topk: int) -> ViewLabels:
    """Return the teacher's labels of a whole view with its most probable classes.

    Args:
        teacher: The teacher.
        views: The views.
        view: View index.
        topk: Classes to keep of each sample, K, in 1..C.

    Returns:
        Int64 labels, as those of `label_view`, int32 classes and float16 probabilities.

    Raises:
        NumericalError: A logit is not finite.
    """
    # Packed into one tensor, because each transfer waits for the device.
    packed = [
        torch.cat([classes.int(), probabilities.half().view(torch.int16).int()], dim=1)
        for classes, probabilities in (top_classes(logits, topk) for logits in _logits_of_view(teacher, views, view))
    ]
    classes, bits = np.split(torch.cat(packed).cpu().numpy(), 2, axis=1)
    return ViewLabels(classes[:, 0].astype(np.int64), classes, bits.astype(np.int16).view(np.float16))


def _logits_of_view(teacher: Teacher, views: Views, view: int) -> Iterator[Tensor]:
    """Yield `(B, C)` float32 logits of a view, batch by batch."""
    views.prepare(view)
    for start in range(0, views.num_samples, teacher.batch_size):
        indices = torch.arange(start, min(start + teacher.batch_size, views.num_samples))
        yield teacher.logits(normalize(views.batch(view, indices).images, teacher.mean, teacher.std))


def top_classes(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the most probable classes and their probabilities.

    Args:
        logits: `(B, C)` float32, finite.
        topk: Classes to return, K, in 1..C.

    Returns:
        `(B, K)` int64, the argmax first even among equal logits, and `(B, K)` float32, descending: the softmax over
        all C classes.
    """
    # topk breaks ties in its own way; the label is the argmax's.
    classes = logits.scatter(1, logits.argmax(1, keepdim=True), math.inf).topk(topk, dim=1).indices
    # Vectorised exponentials of equal logits may differ in their last bit.
    return classes, logits.softmax(1).gather(1, classes).cummin(1).values


def online_labels(teacher: Teacher, *, soft: bool = False, confidence: bool = False) -> TeacherLabels:
    """Return a source of teacher labels that asks the teacher at every step, for pipeline.training.TrainingData.

    The images are normalised by the data set's statistics, which are the teacher's own.

    Args:
        teacher: The teacher.
        soft: Whether to give its distribution over all classes instead of its labels.
        confidence: Whether to give its probability of each label beside.
    """

    def answer(view: int, indices: Tensor, images: Tensor) -> TeacherAnswer:
        # Cloned, because tensors made in inference mode can't be saved for a backward pass.
        logits = teacher.logits(images).clone()
        probabilities = logits.softmax(1)
        return TeacherAnswer(probabilities if soft else logits.argmax(1), probabilities.amax(1) if confidence else None)

    return answer


def cached_labels(
    cache: LabelCache, device: torch.device, *, soft: bool = False, confidence: bool = False
) -> TeacherLabels:
    """Return a source of teacher labels that reads the cache, for pipeline.training.TrainingData.

    Args:
        cache: The cache; with its top-k where `soft` or `confidence`.
        device: Where the answers are kept and given.
        soft: Whether to give the distributions of `marginal_smoothing` instead of labels.
        confidence: Whether to give the probability of each label beside.
    """

    def put(array: NDArray[np.generic] | None) -> Tensor:
        assert array is not None, "the cache keeps no top-k"
        return torch.from_numpy(np.array(array)).to(device)

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
        return TeacherAnswer(marginal_smoothing(classes[view][chosen].long(), kept, cache.num_classes), weights)

    return answer


def make_canaries(views: Views, count: int) -> list[Canary]:
    """Return pixel digests of a few samples of the first, middle and last of `count` views."""
    samples = np.linspace(0, views.num_samples - 1, min(NUM_CANARY_SAMPLES, views.num_samples)).astype(np.int64)
    return [
        Canary(view=view, samples=tuple(samples.tolist()), sha256=views.canary_digest(view, samples))
        for view in sorted({0, (count - 1) // 2, count - 1})
    ]


def check_canaries(cache: LabelCache, views: Views) -> int | None:
    """Return the first canary view whose pixels are no longer what was labelled, or None."""
    for canary in cache.canaries:
        if views.canary_digest(canary.view, np.array(canary.samples, dtype=np.int64)) != canary.sha256:
            return canary.view
    return None


@dataclass(frozen=True)
class Difference:
    """A label that the teacher would not give again.

    Attributes:
        view: View index.
        sample: Sample index.
        cached: The label in the cache.
        replayed: The label now.
        margin: The logit of `replayed` minus that of `cached`, now.
    """

    view: int
    sample: int
    cached: int
    replayed: int
    margin: float


@dataclass(frozen=True)
class Replay:
    """What a teacher answers now to what it once answered.

    Attributes:
        differences: The labels that it would not give again.
        probability_error: Largest absolute difference of a kept probability; None where none are kept.
    """

    differences: list[Difference]
    probability_error: float | None


def replay(cache: LabelCache, teacher: Teacher, views: Views, chosen: Sequence[tuple[int, int]]) -> Replay:
    """Label some (view, sample) pairs again and compare with the cache."""
    by_view: dict[int, list[int]] = {}
    for view, sample in chosen:
        by_view.setdefault(view, []).append(sample)
    differences: list[Difference] = []
    error = 0.0
    for view, samples in sorted(by_view.items()):
        kept = cache.view(view)
        for start in range(0, len(samples), teacher.batch_size):
            part = torch.tensor(sorted(samples)[start : start + teacher.batch_size])
            logits = teacher.logits(normalize(views.batch(view, part).images, teacher.mean, teacher.std)).cpu()
            differences += _differences(kept, view, part, logits)
            if kept.classes is not None and kept.probabilities is not None:
                now = logits.softmax(1).numpy()
                again = np.take_along_axis(now, kept.classes[part].astype(np.int64), axis=1)
                error = max(error, float(np.abs(again - kept.probabilities[part]).max()))
    return Replay(differences, error if cache.topk else None)


def _differences(kept: ViewLabels, view: int, samples: Tensor, logits: Tensor) -> Iterator[Difference]:
    """Yield the samples, `(B,)`, whose labels by these logits, `(B, C)`, differ from those kept."""
    cached, replayed = torch.from_numpy(kept.labels.astype(np.int64))[samples], logits.argmax(1)
    for row in torch.nonzero(cached != replayed)[:, 0].tolist():
        old, new = int(cached[row]), int(replayed[row])
        yield Difference(view, int(samples[row]), old, new, float(logits[row, new] - logits[row, old]))
