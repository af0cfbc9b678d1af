"""Numbers that are not finite, put where training and labelling meet them, at a chosen step of a command."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Spoil = Callable[[nn.Module, Any, Any, Any], tuple[Any, Any]]
"""Is given a step's model, batch, objective and optimiser; returns the batch and objective to use."""


def at_step(step: int, spoil: Spoil) -> None:
    """Spoil one step of training, counted from 1 over all epochs."""
    from pipeline.training import fit as training

    train_step, steps = training.train_step, itertools.count(1)

    def spoiled(model: nn.Module, batch: Any, objective: Any, optimizer: Any, **options: Any) -> Any:
        if next(steps) == step:
            batch, objective = spoil(model, batch, objective, optimizer)
        return train_step(model, batch, objective, optimizer, **options)

    training.train_step = spoiled


def loss(value: float, model: nn.Module, batch: Any, objective: Any, optimizer: Any) -> tuple[Any, Any]:
    """Add a number to the loss of the last part of a batch; its gradients stay as they are."""
    return (
        batch,
        lambda outputs, part: objective(outputs, part) + (value if part.images[-1].equal(batch.images[-1]) else 0.0),
    )


def gradient(value: float, model: nn.Module, batch: Any, objective: Any, optimizer: Any) -> tuple[Any, Any]:
    """Put a number into the gradient of one weight."""
    parameter = next(model.parameters())

    def replace(tensor: Tensor) -> Tensor:
        handle.remove()
        tensor = tensor.clone()
        tensor[(0,) * tensor.dim()] = value
        return tensor

    handle = parameter.register_hook(replace)
    return batch, objective


def pixel(value: float, model: nn.Module, batch: Any, objective: Any, optimizer: Any) -> tuple[Any, Any]:
    """Put a number into one pixel of a batch."""
    images = batch.images.clone()
    images[len(images) // 2, 0, 0, 0] = value
    return dataclasses.replace(batch, images=images), objective


def moment(value: float, model: nn.Module, batch: Any, objective: Any, optimizer: Any) -> tuple[Any, Any]:
    """Fill the optimiser's state of one weight, if it has any."""
    for moment_tensor in optimizer.state[next(model.parameters())].values():
        if moment_tensor.dim():
            moment_tensor.fill_(value)
    return batch, objective


def evaluation(number: int, value: float) -> None:
    """Put a number among the logits of one evaluation, counted from 1: those of the epochs, then the test split's."""
    from pipeline.training import fit as training
    from stages.shared import fitting

    evaluate, numbers = training.evaluate, itertools.count(1)

    def spoiled(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        if next(numbers) != number:
            return evaluate(model, *arguments, **options)
        handle = model.register_forward_hook(lambda module, inputs, outputs: with_number(outputs, value))
        try:
            return evaluate(model, *arguments, **options)
        finally:
            handle.remove()

    training.evaluate = fitting.evaluate = spoiled


def teacher(number: int, value: float) -> None:
    """Put a number among the logits of one of the labelling teacher's batches, counted from 1."""
    from pipeline.labels.teacher import Teacher

    forward, numbers = Teacher._forward, itertools.count(1)

    def spoiled(self: Teacher, images: Tensor) -> Tensor:
        logits = forward(self, images)
        return with_number(logits, value) if next(numbers) == number else logits

    Teacher._forward = spoiled  # type: ignore[method-assign]


def with_number(outputs: Any, value: float) -> Any:
    """Return logits, or the last of several heads' logits, of which one is replaced."""
    *others, last = outputs if isinstance(outputs, tuple) else (outputs,)
    last = last.clone()
    last[-1, 0] = value
    return (*others, last) if others else last


TRAINING: dict[str, tuple[Callable[..., tuple[Any, Any]], float]] = {
    "NaN in the loss": (loss, math.nan),
    "inf in the loss": (loss, math.inf),
    "NaN in a gradient": (gradient, math.nan),
    "-inf in a gradient": (gradient, -math.inf),
    "inf in a pixel": (pixel, math.inf),
    "NaN in the optimiser's state": (moment, math.nan),
}
