"""One training step: forward, loss, backward, update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.batches import Batch
from pipeline.distributed import accumulating
from pipeline.losses import Outputs
from pipeline.runtime import autocast

Objective = Callable[[Outputs, Batch], Tensor]
"""Maps a model's outputs and the batch to the mean loss of its samples, a float32 scalar."""


def train_step(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float,
    precision: str,
    micro_batch: int | None = None,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Do one step: forward, loss, backward, clip, update.

    Args:
        model: In training mode.
        batch: On the model's device; this rank's share.
        objective: Maps outputs and batch to the mean loss of its samples.
        optimizer: Over the model's parameters.
        clip: Largest gradient norm; 0 leaves gradients alone.
        precision: `fp32` or `bf16`.
        micro_batch: Samples that go through the model at once; their gradients add up to those of the batch. None
            takes all. Not for models with batch norm.
        weight: Size of the share over the mean size of all ranks' shares, so that the mean over the ranks of loss and
            gradients is that over all samples.

    Returns:
        The loss times `weight`, a float32 scalar, and whether loss and gradient norm are finite, a boolean scalar;
        both stay on the device.
    """
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=batch.images.device)
    parts = batch.split(micro_batch)
    for part in parts:
        with contextlib.nullcontext() if part is parts[-1] else accumulating(model):
            with autocast(batch.images.device, precision):
                outputs = model(part.images)
            loss = objective(outputs, part) * (weight * len(part) / len(batch))
            torch.autograd.backward(loss)
        total += loss.detach()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    if clip > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
    optimizer.step()
    return total, torch.isfinite(total) & torch.isfinite(norm)
