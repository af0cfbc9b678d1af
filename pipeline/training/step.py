"""One training step: forward, loss, backward, update."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import one_line
from pipeline.losses import Outputs
from pipeline.system.runtime import autocast
from pipeline.training.batches import Batch
from pipeline.training.distributed import accumulating

Objective = Callable[[Outputs, Batch], Tensor]
"""Maps a model's outputs and the batch to the mean loss of its samples, a float32 scalar."""

Step = Callable[[Batch], tuple[Tensor, Tensor]]
"""Does a training step on a batch, and returns what `train_step` returns."""

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
    parts, device = batch.split(micro_batch), batch.images.device
    forward = rounded_at_once(model) if precision == "bf16" and device.type == "cuda" else model
    total = torch.zeros((), device=device)
    with autocast(device, precision):  # it casts weights once, for all parts
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] else accumulating(model):
                outputs = forward(part.images) if part.draws is None else forward(part.images, part.draws)
                with torch.autocast(device.type, enabled=False):
                    loss = objective(outputs, part) * (batch.weight * len(part) / len(batch))
                    torch.autograd.backward(loss)
            total += loss.detach()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    if clip > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
    optimizer.step()
    return total, torch.isfinite(total) & torch.isfinite(norm)


def rounded_at_once(model: nn.Module) -> Callable[..., Outputs]:
    """Return what computes a model under autocast to bfloat16, rounding the weights that `model.rounded` names at once.

    Autocast launches a kernel for each weight, and one for its gradient. Results are the same, bit for bit. A compiled
    model stays as it is: other parameters in every step would be compiled again, and its compiler joins casts itself.
    """
    names: list[str] = getattr(model, "rounded", [])
    if not names or getattr(model, "_compiled_call_impl", None) is not None:
        return model
    weights = dict(model.named_parameters())

    def forward(*inputs: Tensor) -> Outputs:
        rounded = _Round.apply(*(weights[name] for name in names))
        outputs: Outputs = torch.func.functional_call(model, dict(zip(names, rounded, strict=True)), inputs)
        return outputs

    return forward


class _Round(torch.autograd.Function):
    """Rounds many float32 tensors to bfloat16, and turns their gradients into float32, in a few launches."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _converted(tensors, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return _converted(gradients, torch.float32)


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    converted = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(converted, list(tensors))
    return tuple(converted)


class _Capture(NamedTuple):
    """A captured step.

    Attributes:
        graph: Replays it.
        memory: The batch that it reads.
        results: Loss and whether all is finite, which it writes.
    """

    graph: torch.cuda.CUDAGraph
    memory: Batch
    results: tuple[Tensor, Tensor]


class CapturedStep:
    """A training step that runs eagerly a few times, then is captured in a CUDA graph and replayed.

    Args:
        step: Must not wait for the GPU, and must do the same to every batch of a size. Its optimiser's learning rates
            are tensors on the device.
        device: A CUDA device.
        refuse: Told why a step cannot be captured. Unless it raises, batches of this size stay eager.
    """

    def __init__(self, step: Step, device: torch.device, refuse: Callable[[str], None]) -> None:
        self._step = step
        self._device = device
        self._refuse = refuse
        self._done: Counter[int] = Counter()
        self._captures: dict[int, _Capture | None] = {}

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
            captured = self._captures[size]
            if captured is None:
                return self._step(batch)
            for target, values in zip(captured.memory.tensors().values(), batch.tensors().values(), strict=True):
                target.copy_(values)
            captured.graph.replay()
            loss, finite = captured.results
            return loss.clone(), finite.clone()

    def _capture(self, batch: Batch) -> _Capture | None:
        """Record the step, which computes nothing; None where that fails."""
        stream = torch.cuda.current_stream()
        try:
            memory, graph = batch.map(torch.clone), torch.cuda.CUDAGraph()
            # The thread that reads images ahead pins memory meanwhile, which a capture of the whole process forbids.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = self._step(memory)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # PyTorch stays on the capture's where that cannot be ended
            first = error.__context__ or error
            self._refuse(one_line(str(first).strip().partition("\n")[0]))
            return None
        return _Capture(graph, memory, results)


@contextlib.contextmanager
def _another_stream() -> Iterator[None]:
    """Run the block on another stream, ordered between the current stream's work before it and after it."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
