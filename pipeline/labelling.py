"""Running a teacher over views: labels, their logit margins, and the replay of a finished cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import NumericalError, UsageError
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
        compiled: Whether the model went through torch.compile, see `compile_teacher`.
    """

    model: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: str
    batch_size: int
    compiled: bool = False

    def logits(self, images: Tensor) -> Tensor:
        """Return `(B, K)` float32 logits of normalised images `(B, 3, H, W)`.

        Raises:
            NumericalError: A logit is not finite; argmax would still return a valid label.
        """
        logits = self._forward(images)
        _require_finite(torch.isfinite(logits))
        return logits

    def label(self, images: Tensor) -> NDArray[np.int64]:
        """Return the argmax labels `(N,)` of uint8 images `(N, 3, H, W)`.

        Raises:
            NumericalError: A logit is not finite.
        """
        return self.label_batches(torch.split(images, self.batch_size))

    def label_batches(self, batches: Iterable[Tensor]) -> NDArray[np.int64]:
        """Return the argmax labels `(N,)` of batches of uint8 images `(B, 3, H, W)`.

        Labels and the verdict on the logits leave the device once, after the last batch.

        Raises:
            NumericalError: A logit is not finite.
        """
        rows, finite = [], []
        for images in batches:
            logits = self._forward(normalize(images, self.mean, self.std))
            rows.append(logits.argmax(1))
            finite.append(torch.isfinite(logits).all())
        _require_finite(torch.stack(finite))
        return torch.cat(rows).cpu().numpy()

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            logits: Tensor = self.model(images)
        return logits.float()


def _require_finite(finite: Tensor) -> None:
    if not finite.all():
        raise NumericalError("labelling: a logit of the teacher is not finite; train the teacher again")


def compile_teacher(teacher: Teacher, image_size: int) -> Teacher:
    """Return a teacher whose model torch.compile has fused, and which therefore rounds differently.

    Batches are of symbolic size from the start, so that the program a batch runs through depends on its size alone.
    By default PyTorch would compile for the first size and again, for all sizes, when a second one comes: the rounding
    would depend on what was labelled before.

    Args:
        teacher: A teacher that is not compiled.
        image_size: Side of the images, pixels.

    Raises:
        UsageError: torch.compile does not work here.
    """
    model = torch.compile(teacher.model, dynamic=True)
    assert isinstance(model, nn.Module)
    compiled = dataclasses.replace(teacher, model=model, compiled=True)
    device = next(teacher.model.parameters()).device
    try:
        compiled.logits(torch.zeros(2, 3, image_size, image_size, device=device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"label.compile: true: torch.compile fails here ({reason}); set it to false or install a C++ compiler"
        ) from error
    return compiled


def label_view(teacher: Teacher, views: Views, view: int) -> NDArray[np.int64]:
    """Return the teacher's labels of a whole view, `(N,)` int64 in [0, K).

    Batches start anew with each view, so that their composition depends on the batch size alone and not on which view
    a run was stopped at or which rank labels it.

    Raises:
        NumericalError: A logit is not finite.
    """
    indices = torch.split(torch.arange(views.num_samples), teacher.batch_size)
    return teacher.label_batches(views.batch(view, part).images for part in indices)


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
