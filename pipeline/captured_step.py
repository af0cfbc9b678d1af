"""Training steps replayed from CUDA graphs.

A step of a small transformer is a great many short kernels: started one by one they can keep the processor busier than
the GPU. A CUDA graph starts them all at once. It replays the very same work on the very same
memory, so each size of batch has a graph and inputs of its own, and the learning rate is a tensor.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.batches import Batch

Step = Callable[[Batch], tuple[Tensor, Tensor]]
"""Does a training step; returns what `pipeline.training_step.train_step` does."""

# Libraries set themselves up in the first steps, and the optimiser makes its moments: neither may be captured.
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class _Capture:
    """A captured step.

    Attributes:
        graph: What is replayed.
        batch: The memory that it reads.
        results: The memory that it writes.
    """

    graph: torch.cuda.CUDAGraph
    batch: Batch
    results: tuple[Tensor, Tensor]


class CapturedStep:
    """A training step that is captured once it has been done a few times, and replayed from then on.

    Args:
        step: Must not wait for the GPU, and must do the same to every batch of a size. Its optimiser's learning rates
            are tensors on the device.
        device: A CUDA device.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._device = device
        self._done: Counter[int] = Counter()
        self._captures: dict[int, _Capture] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Do a step on a batch on the device."""
        size = len(batch.labels)
        with torch.cuda.device(self._device):
            if self._done[size] < WARM_UP_STEPS:
                self._done[size] += 1
                return self._warm_up(batch)
            if size not in self._captures:
                self._captures[size] = self._capture(batch)
            capture = self._captures[size]
            for own, values in zip(_tensors(capture.batch), _tensors(batch), strict=True):
                own.copy_(values)
            capture.graph.replay()
            loss, finite = capture.results
            return loss.clone(), finite.clone()

    def _warm_up(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Do the step as it will be captured, on a stream of its own."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results = self._step(batch)
        current.wait_stream(stream)
        return results

    def _capture(self, batch: Batch) -> _Capture:
        """Record the step; nothing is computed yet."""
        own = dataclasses.replace(
            batch,
            **{
                field.name: value.clone()
                for field in dataclasses.fields(batch)
                if isinstance(value := getattr(batch, field.name), Tensor)
            },
        )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self._step(own)
        return _Capture(graph, own, results)


def _tensors(batch: Batch) -> list[Tensor]:
    values = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    return [value for value in values if isinstance(value, Tensor)]
