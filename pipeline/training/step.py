"""One training step: forward, loss, backward, update."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.losses import Outputs
from pipeline.system.runtime import autocast
from pipeline.training.batches import Batch
from pipeline.training.distributed import accumulating

Objective = Callable[[Outputs, Batch], Tensor]
"""Maps a model's outputs and the batch to the mean loss of its samples, a float32 scalar."""

Step = Callable[[Batch], tuple[Tensor, Tensor]]
"""Does a training step on a batch, and returns what `train_step` does."""

# Libraries set themselves up in the first steps, and the optimiser makes its moments: neither may be captured.
WARM_UP_STEPS = 3


def train_step(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float,
    precision: str,
    micro_batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Do one step: forward, loss, backward, clip, update.

    Args:
        model: In training mode.
        batch: This rank's share, on the model's device. With its `weight`, the mean over the ranks of loss and
            gradients is the mean over all samples.
        objective: The loss.
        optimizer: Over the model's parameters.
        clip: Largest gradient norm; 0 leaves gradients alone.
        precision: `fp32` or `bf16`.
        micro_batch: Samples that go through the model at once; their gradients add up to those of the batch. None
            takes all. Not for models with batch norm.

    Returns:
        The loss times the batch's weight, a float32 scalar, and whether loss and gradient norm are finite, a boolean
        scalar; both stay on the device.
    """
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=batch.images.device)
    parts = batch.split(micro_batch)
    for part in parts:
        with contextlib.nullcontext() if part is parts[-1] else accumulating(model):
            with autocast(batch.images.device, precision):
                outputs = model(part.images)
            loss = objective(outputs, part) * (batch.weight * len(part) / len(batch))
            torch.autograd.backward(loss)
        total += loss.detach()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    if clip > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
    optimizer.step()
    return total, torch.isfinite(total) & torch.isfinite(norm)


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
    """A training step that is done a few times, then captured in a CUDA graph, and replayed from then on.

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
        size = len(batch)
        with torch.cuda.device(self._device):
            if self._done[size] < WARM_UP_STEPS:
                self._done[size] += 1
                with _another_stream():  # captured steps run on one too
                    return self._step(batch)
            if size not in self._captures:
                self._captures[size] = self._capture(batch)
            capture = self._captures[size]
            for memory, values in zip(capture.batch.tensors().values(), batch.tensors().values(), strict=True):
                memory.copy_(values)
            capture.graph.replay()
            loss, finite = capture.results
            return loss.clone(), finite.clone()

    def _capture(self, batch: Batch) -> _Capture:
        """Record the step; nothing is computed yet."""
        memory = batch.map(torch.clone)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self._step(memory)
        return _Capture(graph, memory, results)


@contextlib.contextmanager
def _another_stream() -> Iterator[None]:
    """Work on another stream, after what this one does, and before what it will do."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
