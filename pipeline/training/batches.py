"""The inputs of the fit loop: batches of views, the evaluation split, and the order of samples."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.streaming import HostImages, in_batches
from pipeline.labels.source import TeacherLabels
from pipeline.losses import Targets
from pipeline.views.draws import uniforms
from pipeline.views.mixing import by_pairs
from pipeline.views.views import ViewBatch, Views, normalize


@dataclass(frozen=True)
class Batch(Targets):
    """A training step's views and targets.

    Attributes:
        images: `(B, 3, H, W)` float32, normalised.
        weight: This rank's number of samples, divided by the mean over all ranks.
        draws: `(B, n)` float32, uniform in [0, 1): the random numbers that a model takes for each image, see
            `step_draws`; None for a model that takes none.
    """

    images: Tensor = field(kw_only=True)
    weight: float = field(default=1.0, kw_only=True)
    draws: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        """Return B."""
        return len(self.labels)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every tensor changed."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def split(self, size: int | None) -> list[Batch]:
        """Cut the batch into parts of `size` samples, the last perhaps smaller; None does not cut."""
        if size is None or size >= len(self):
            return [self]

        def part(start: int) -> Batch:
            return self.map(lambda tensor: tensor[start:][:size] if tensor.ndim else tensor)

        return [part(start) for start in range(0, len(self), size)]


@dataclass(frozen=True)
class TrainingData:
    """The training set as batches of views.

    Attributes:
        views: Renders the views on the device.
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel.
        num_views: Epoch e trains on view e mod num_views; None for view e (teachers, whose draws never repeat).
        teacher_labels: Where a batch's teacher labels come from, or None.
    """

    views: Views
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_views: int | None = None
    teacher_labels: TeacherLabels | None = None

    def pairs(self, epoch: int) -> NDArray[np.int64] | None:
        """Return the pairs of the epoch's view, see Views.pairs."""
        return self.views.pairs(self._view(epoch))

    def batches(self, epoch: int, parts: Sequence[Tensor]) -> Generator[Batch, None, None]:
        """Render batches of the epoch's view; images that stream are read ahead.

        Args:
            epoch: From 0.
            parts: The samples of each batch, `(B,)` int64; best on the CPU.

        Yields:
            The batches in order. Closing the iterator ends the reading thread.
        """
        view = self._view(epoch)
        with contextlib.closing(self.views.batches(view, parts)) as batches:
            for rendered in batches:
                yield self._with_answers(view, rendered)

    def check(self) -> None:
        """Check what the teacher has answered since the last call, where it is asked in every step.

        Raises:
            NumericalError: A logit was not finite.
        """
        check: Callable[[], None] | None = getattr(self.teacher_labels, "check", None)
        if check is not None:
            check()

    def _view(self, epoch: int) -> int:
        """Return the index of an epoch's view."""
        return epoch if self.num_views is None else epoch % self.num_views

    def _with_answers(self, view: int, rendered: ViewBatch) -> Batch:
        """Normalise a batch and add the teacher's answer."""
        images = normalize(rendered.images, self.mean, self.std)
        batch = Batch(rendered.labels, rendered.partner_labels, rendered.lam, images=images)
        if self.teacher_labels is None:
            return batch
        labels, confidence = self.teacher_labels(view, rendered.indices, rendered.images)
        mean = None if confidence is None else confidence.mean()
        return dataclasses.replace(batch, teacher_labels=labels, confidence=confidence, mean_confidence=mean)


@dataclass(frozen=True)
class EvaluationData:
    """A split of clean images.

    Attributes:
        images: `(N, 3, H, W)` uint8, on the device, or on the host and streamed to it.
        labels: `(N,)` int64, on the device.
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel.
        num_classes: K.
        teacher_labels: `(N,)` int64, the teacher's labels of the same images, or None.
    """

    images: Tensor | HostImages
    labels: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int
    teacher_labels: Tensor | None = None

    def batches(self, batch_size: int, share: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield positions and uint8 images `(B, 3, H, W)` of a share of the split, in order."""
        start = share.start
        for images in in_batches(self.images, batch_size, share):
            yield slice(start, start + len(images)), images
            start += len(images)


def split_batches(num_samples: int, batch_size: int) -> list[slice]:
    """Cut positions into batches; a last batch of one sample joins the one before, for batch norm's sake."""
    bounds = [*range(0, num_samples, batch_size), num_samples]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        del bounds[-2]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def epoch_order(seed: int, epoch: int, num_samples: int, paired: NDArray[np.int64] | None = None) -> Tensor:
    """Return the order of the samples in an epoch, `(N,)` int64: a pure function of its arguments.

    Args:
        seed: Of the run.
        epoch: From 0.
        num_samples: N.
        paired: `(N,)`, the pairs of the epoch's view, which are shuffled as wholes; None shuffles samples.
    """
    keys = uniforms(seed, "order", epoch, "order", num_samples, 1)[:, 0]
    return torch.from_numpy(by_pairs(keys, paired))


def step_draws(seed: int, step: int, num_samples: int, num_draws: int) -> Tensor:
    """Return a step's random numbers, `(num_samples, num_draws)` float32, uniform in [0, 1].

    They are a pure function of the arguments, so that a resumed run, another number of ranks, other parts of the batch
    or a CUDA graph change nothing.

    Args:
        seed: Of the run.
        step: Steps done before this one, in all epochs.
        num_samples: Of all ranks.
        num_draws: For each sample.
    """
    return torch.from_numpy(uniforms(seed, "drop path", step, "drop path", num_samples, num_draws)).float()
