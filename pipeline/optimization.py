"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from pipeline.recipes import FitRecipe


def build_optimizer(parameters: Iterable[nn.Parameter], recipe: FitRecipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over `parameters`.

    Weight decay acts on every parameter, as in the paper's SGD. `momentum` is also RMSprop's momentum and the beta1
    of Adam and AdamW; everything else is torch's default. Fused where torch can: the update of a VGG's 134 million
    weights is bound by memory, and one pass over them takes a fifth of the time of one pass for every operation.

    Source: arXiv:2502.16762 §4.1, Figure 5.
    """
    parameters, lr, decay = list(parameters), recipe.lr, recipe.weight_decay
    match recipe.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, fused=True, lr=lr, momentum=recipe.momentum, weight_decay=decay)
        case "adam":
            return torch.optim.Adam(parameters, fused=True, lr=lr, betas=(recipe.momentum, 0.999), weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, fused=True, lr=lr, betas=(recipe.momentum, 0.999), weight_decay=decay)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=lr, momentum=recipe.momentum, weight_decay=decay)
    raise AssertionError(recipe.optimizer)


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
