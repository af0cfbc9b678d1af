"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.config.recipes import FitRecipe
from pipeline.training.column_sum import SUMMABLE, column_sums

EPS = 1e-8  # torch's default


def build_optimizer(model: nn.Module, recipe: FitRecipe, *, captured: bool = False) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over a model's parameters.

    Weight decay acts on every parameter, as in the paper's SGD, or on those that `decayed` names. `momentum` is also
    RMSprop's momentum and the beta1 of Adam and AdamW; everything else is torch's default, but for the weight of a
    `ColumnSum` under AdamW. Where torch has a fused update it is used: memory bounds the update of a VGG's 134 million
    weights, and one pass over them takes a fifth of the time of a pass per operation.

    Args:
        model: On one device.
        recipe: Its optimizer, lr, momentum, weight_decay and decay.
        captured: Whether its steps will be captured in a CUDA graph; learning rates are then tensors.

    Source: arXiv:2502.16762 §4.1, Figure 5.
    """
    named, sums = dict(model.named_parameters()), column_sums(model)
    assert not sums or recipe.optimizer in SUMMABLE
    lr = torch.tensor(recipe.lr, device=next(iter(named.values())).device) if captured else recipe.lr
    decay = recipe.weight_decay
    of_decay = named.keys() if recipe.decay == "all" else decayed(model)
    apart = {f"{name}.weight": module.scale for name, module in sums.items() if recipe.optimizer == "adamw"}
    parameters: list[Any] = [
        {"params": [named[name] for name in named if name in of_decay and name not in apart]},
        {"params": [named[name] for name in named if name not in of_decay], "weight_decay": 0.0},
        *(
            {"params": [named[name]], "lr": lr * scale, "lr_factor": scale, "weight_decay": decay / scale,
             "eps": EPS * scale}
            for name, scale in apart.items()
        ),
    ]  # fmt: skip
    parameters = [group for group in parameters if group["params"]]
    adaptive: dict[str, Any] = {"lr": lr, "weight_decay": decay, "capturable": captured}
    match recipe.optimizer:
        case "sgd":
            sgd = torch.optim.SGD(parameters, fused=True, lr=lr, momentum=recipe.momentum, weight_decay=decay)
            # The same first step; but a fused one fails where a parameter gets its first gradient after the others.
            for parameter in named.values() if recipe.momentum else ():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        case "adam":
            return torch.optim.Adam(parameters, fused=True, betas=(recipe.momentum, 0.999), **adaptive)
        case "adamw":
            return torch.optim.AdamW(parameters, fused=True, betas=(recipe.momentum, 0.999), **adaptive)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, momentum=recipe.momentum, **adaptive)
    raise AssertionError(recipe.optimizer)


def decayed(model: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay acts on where it leaves all but matrices alone.

    They have two or more dimensions and a name that ends in `weight`: those of linear, convolution and attention
    layers. So norms, biases, tokens, positions and scales are left out, and with them embeddings and what
    `no_weight_decay` names, which timm's models have: of the model, or of one that is a part of it.
    """
    tables = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Embedding)}
    own = {
        f"{part}.{name}" if part else name
        for part, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name.endswith("weight") and name not in tables | own
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group; one that is a tensor is filled, so that a CUDA graph sees it."""
    for group in optimizer.param_groups:
        of_group = lr * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(of_group)
        else:
            group["lr"] = of_group


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


class MovingAverage:
    """An exponential moving average of a model's parameters, in their dtype and on their device.

    Buffers are not averaged: the model's go with the average, as in torch.optim.swa_utils.AveragedModel. The arithmetic
    is torch's too. AveragedModel itself is not used, because it keeps a second model, waits for the device in every
    step to copy a counter there, and starts from the weights after the first step.

    Args:
        model: Whose weights are averaged; they are the first value.
        decay: Share of the old value that is kept in a step, above 0 and below 1.

    Attributes:
        tensors: Name to average of every parameter.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._decay = decay
        self.tensors = {name: parameter.clone() for name, parameter in self._parameters.items()}

    def update(self, step: int) -> None:
        """Update the average after a step, without waiting for the device.

        The decay after t steps is min(decay, (1 + t) / (10 + t)); a constant one would leave the average of a short run
        close to its random start.

        Args:
            step: Steps done before this one, t, 0 for the first.

        Source: tf.train.ExponentialMovingAverage, `num_updates`.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self.tensors.values()), list(self._parameters.values()), step)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Use the average as the model's weights within a block."""
        weights = {name: torch.empty_like(parameter) for name, parameter in self._parameters.items()}
        _copy(self._parameters, weights)
        self.give()
        try:
            yield
        finally:
            _copy(weights, self._parameters)

    def give(self) -> None:
        """Copy the average into the model."""
        _copy(self.tensors, self._parameters)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load a saved average of the same model."""
        _copy(tensors, self.tensors)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy values in place, since captured steps read the target's memory."""
    with torch.no_grad():
        torch._foreach_copy_([*target.values()], [source[name] for name in target])
