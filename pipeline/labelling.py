"""Running a teacher over views: labels, their logit margins, and the replay of a finished cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import NumericalError
from pipeline.labels import Canary, LabelCache
from pipeline.runtime import autocast
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
        model: Returns `(B, K)` logits; in evaluation mode, on its device.
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
        """Return `(B, K)` float32 logits of normalised images `(B, 3, H, W)`.

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
    """Return the teacher's labels of a whole view, `(N,)` int64 in [0, K).

    Raises:
        NumericalError: A logit is not finite.
    """
    views.prepare(view)
    rows = []
    for start in range(0, views.num_samples, teacher.batch_size):
        indices = torch.arange(start, min(start + teacher.batch_size, views.num_samples))
        images = normalize(views.batch(view, indices).images, teacher.mean, teacher.std)
        rows.append(teacher.logits(images).argmax(1))
    return torch.cat(rows).cpu().numpy()


def online_labels(teacher: Teacher) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Return a source of teacher labels that asks the teacher at every step, for pipeline.training.TrainingData.

    The images are normalised by the data set's statistics, which are the teacher's own.
    """

    def labels(view: int, indices: Tensor, images: Tensor) -> Tensor:
        # Cloned, because tensors made in inference mode can't be saved for a backward pass.
        return teacher.logits(images).argmax(1).clone()

    return labels


def cached_labels(cache: LabelCache, device: torch.device) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Return a source of teacher labels that reads the cache, for pipeline.training.TrainingData."""
    rows = torch.from_numpy(np.array(cache.labels)).to(device)

    def labels(view: int, indices: Tensor, images: Tensor) -> Tensor:
        return rows[view][indices.to(device)].long()

    return labels


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


def replay(
    cache: LabelCache, teacher: Teacher, views: Views, chosen: Sequence[tuple[int, int]]
) -> Iterator[Difference]:
    """Label some (view, sample) pairs again and yield those whose label differs from the cache."""
    by_view: dict[int, list[int]] = {}
    for view, sample in chosen:
        by_view.setdefault(view, []).append(sample)
    for view, samples in sorted(by_view.items()):
        for start in range(0, len(samples), teacher.batch_size):
            part = torch.tensor(sorted(samples)[start : start + teacher.batch_size])
            logits = teacher.logits(normalize(views.batch(view, part).images, teacher.mean, teacher.std)).cpu()
            cached = torch.from_numpy(cache.labels[view].astype(np.int64))[part]
            replayed = logits.argmax(1)
            for row in torch.nonzero(cached != replayed)[:, 0].tolist():
                old, new = int(cached[row]), int(replayed[row])
                yield Difference(view, int(part[row]), old, new, float(logits[row, new] - logits[row, old]))
