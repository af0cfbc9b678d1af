"""Training steps and forward passes to be timed, of any model, on one synthetic batch that stays on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from benchmarks.synthetic import MEAN, NUM_CLASSES, STD, images_and_labels
from pipeline.config.recipes import FitRecipe
from pipeline.errors import UsageError
from pipeline.system.runtime import autocast
from pipeline.training.batches import Batch
from pipeline.training.step import CapturedStep, Objective, train_step
from pipeline.views.views import normalize


def synthetic_batch(size: int, device: torch.device) -> Batch:
    """Make a batch as training sees one: mixed images, both labels, lambda, and a teacher's labels.

    Args:
        size: B.
        device: Where it stays.
    """
    generator = torch.Generator().manual_seed(0)
    images, labels = images_and_labels(size)
    partners, teacher = torch.randint(NUM_CLASSES, (2, size), generator=generator).to(device)
    lam = torch.rand(size, generator=generator).to(device)
    return Batch(labels.to(device), partners, lam, teacher, images=normalize(images.to(device), MEAN, STD))


def our_step(
    model: nn.Module,
    batch: Batch,
    *,
    recipe: FitRecipe,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    precision: str,
    micro_batch: int | None = None,
    captured: bool = False,
) -> Callable[[], object]:
    """Return a training step as the pipeline does it: the recipe's loss, the gradient's norm, the check for numbers.

    Args:
        model: In training mode, on the batch's device.
        batch: See synthetic_batch.
        recipe: Holds clip.
        objective: The loss.
        optimizer: Over the model's parameters.
        precision: `fp32` or `bf16`.
        micro_batch: As for pipeline.training.step.train_step.
        captured: Whether it is replayed from a CUDA graph.
    """

    def step(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return train_step(
            model, batch, objective, optimizer, clip=recipe.clip, precision=precision, micro_batch=micro_batch
        )

    if not captured:
        return lambda: step(batch)

    def refuse(reason: str) -> None:
        raise UsageError(f"the step cannot be captured in a CUDA graph here ({reason})")

    replayed = CapturedStep(step, batch.images.device, refuse)
    return lambda: replayed(batch)


def plain_step(
    model: nn.Module, batch: Batch, *, optimizer: torch.optim.Optimizer, precision: str
) -> Callable[[], object]:
    """Return a training step as anybody would write it: cross-entropy of every head, backward, update.

    Args:
        model: In training mode, on the batch's device.
        batch: See synthetic_batch; only images and labels are used.
        optimizer: Over the model's parameters.
        precision: `fp32` or `bf16`.
    """

    def step() -> None:
        with autocast(batch.images.device, precision):
            outputs = model(batch.images)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        losses = [functional.cross_entropy(head.float(), batch.labels) for head in heads]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def forward_pass(model: nn.Module, batch: Batch, *, precision: str) -> Callable[[], object]:
    """Return a forward pass without gradients.

    Args:
        model: In evaluation mode, on the batch's device.
        batch: See synthetic_batch.
        precision: `fp32` or `bf16`.
    """

    def run() -> None:
        with torch.no_grad(), autocast(batch.images.device, precision):
            model(batch.images)

    return run


def at_rest(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Set the learning rate to 0: the work is the same, and no step changes the weights."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    """Return several steps in a row as one turn."""

    def run() -> None:
        for _ in range(times):
            step()

    return run
