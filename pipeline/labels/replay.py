"""Checks of a finished label cache: the pixels that were labelled, and the teacher's answers to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.decoding import decoders, named_decoders
from pipeline.labels.answers import ViewLabels
from pipeline.labels.cache import Canary, LabelCache
from pipeline.labels.teacher import Teacher
from pipeline.views.views import Views

NUM_CANARY_SAMPLES = 16
# Largest logit margin by which a replayed label may differ. With the recorded kind of device and precision only the
# order of additions differs (batch size, threads); otherwise all products are rounded differently. Both are measured,
# not proven, see pipeline.labels.teacher.
SAME_MARGIN = 5e-3
OTHER_MARGIN = 0.25


def make_canaries(views: Views, count: int) -> list[Canary]:
    """Return pixel digests of a few samples of the first, middle and last of `count` views."""
    samples = np.linspace(0, views.num_samples - 1, min(NUM_CANARY_SAMPLES, views.num_samples)).astype(np.int64)
    return [
        Canary(view=view, samples=tuple(samples.tolist()), sha256=views.digest(view, samples).hex())
        for view in sorted({0, (count - 1) // 2, count - 1})
    ]


def check_canaries(cache: LabelCache, views: Views) -> int | None:
    """Return the first canary view whose pixels are no longer what was labelled, or None."""
    for canary in cache.canaries:
        if views.digest(canary.view, np.array(canary.samples, dtype=np.int64)).hex() != canary.sha256:
            return canary.view
    return None


def other_pixels(cache: LabelCache, view: int) -> str:
    """Say that a view's pixels are not those that were labelled, and for files by which decoders they were and are."""
    why = "another version of this project or of its libraries made them"
    if "rendition" in cache.identity:
        before, now = named_decoders(cache.provenance["versions"]), named_decoders(decoders())
        if before != now:
            why = f"the files were decoded by {before}, and are here by {now}"
    return f"the pixels of view {view} are not those that were labelled ({why})"


@dataclass(frozen=True)
class ChangedLabel:
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
    """A comparison of a teacher's answers now with those in the cache.

    Attributes:
        num_samples: How many labels were replayed.
        differences: The labels that it would not give again.
        probability_error: Largest absolute difference of a kept probability; None where none are kept.
    """

    num_samples: int
    differences: list[ChangedLabel]
    probability_error: float | None


def replay(cache: LabelCache, teacher: Teacher, views: Views, chosen: Sequence[tuple[int, int]]) -> Replay:
    """Label some (view, sample) pairs again and compare with the cache."""
    by_view: dict[int, list[int]] = {}
    for view, sample in chosen:
        by_view.setdefault(view, []).append(sample)
    differences: list[ChangedLabel] = []
    error = 0.0
    for view, samples in sorted(by_view.items()):
        kept = cache.view(view)
        for start in range(0, len(samples), teacher.batch_size):
            part = torch.tensor(sorted(samples)[start : start + teacher.batch_size])
            logits = teacher(views.batch(view, part).images).cpu()
            differences += _differences(kept, view, part, logits)
            if kept.classes is not None and kept.probabilities is not None:
                rows = part.numpy()  # NumPy would take a tensor of one index for a number, and drop the axis
                again = np.take_along_axis(logits.softmax(1).numpy(), kept.classes[rows].astype(np.int64), axis=1)
                error = max(error, float(np.abs(again - kept.probabilities[rows]).max()))
    return Replay(len(chosen), differences, error if cache.topk else None)


def _differences(kept: ViewLabels, view: int, samples: Tensor, logits: Tensor) -> Iterator[ChangedLabel]:
    """Yield the samples, `(B,)`, whose labels by these logits, `(B, C)`, differ from those kept."""
    cached, replayed = torch.from_numpy(kept.labels.astype(np.int64))[samples], logits.argmax(1)
    for row in torch.nonzero(cached != replayed)[:, 0].tolist():
        old, new = int(cached[row]), int(replayed[row])
        yield ChangedLabel(view, int(samples[row]), old, new, float(logits[row, new] - logits[row, old]))
