"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pipeline.recipes import FitRecipe


def build_optimizer(
    parameters: Iterable[nn.Parameter], recipe: FitRecipe, *, captured: bool = False
) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over `parameters`.

    Weight decay acts on every parameter, as in the paper's SGD. `momentum` is also RMSprop's momentum and the beta1
    of Adam and AdamW; everything else is torch's default. Fused where torch can: the update of a VGG's 134 million
    weights is bound by memory, and one pass over them takes a fifth of the time of one pass for every operation.

    Args:
        parameters: On one device.
        recipe: Its optimizer, lr, momentum and weight_decay.
        captured: Whether its steps will be captured in a CUDA graph; learning rates are then tensors.

    Source: arXiv:2502.16762 §4.1, Figure 5.
    """
    parameters, decay = list(parameters), recipe.weight_decay
    lr = torch.tensor(recipe.lr, device=parameters[0].device) if captured else recipe.lr
    adaptive: dict[str, Any] = {"lr": lr, "weight_decay": decay, "capturable": captured}
    match recipe.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, fused=True, lr=lr, momentum=recipe.momentum, weight_decay=decay)
        case "adam":
            return torch.optim.Adam(parameters, fused=True, betas=(recipe.momentum, 0.999), **adaptive)
        case "adamw":
            return torch.optim.AdamW(parameters, fused=True, betas=(recipe.momentum, 0.999), **adaptive)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, momentum=recipe.momentum, **adaptive)
    raise AssertionError(recipe.optimizer)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter; one that is a tensor is filled, so that a CUDA graph sees it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(recipe: FitRecipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step.

    Linear warm-up to `lr` over `warmup_epochs`, then half a cosine to zero at the end of the last epoch, or constant.

    Args:
        recipe: Holds lr, schedule, warmup_epochs and epochs.
        step: Steps done before this one, 0 for the first.
        steps_per_epoch: Number of steps of an epoch.

    Source: arXiv:2502.16762 §4.1.
    Differs: the cosine advances with every step, not with every epoch; with 600 epochs the two are the same curve.
    """
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    if recipe.schedule == "constant":
        return recipe.lr
    progress = (step - warmup) / max(1, recipe.epochs * steps_per_epoch - warmup)
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
