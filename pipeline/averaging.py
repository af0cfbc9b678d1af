"""An exponential moving average of a model's weights.

Averaged over many steps, weights come out where a smaller learning rate would have taken them: the average is evaluated
and kept in place of the last step's weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """An exponential moving average of a model's parameters, in their dtype and on their device.

    Buffers are not averaged: the model's own go with the average, as in torch.optim.swa_utils.AveragedModel. The
    arithmetic is torch's own too. The class is not: it keeps a second model to evaluate, copies a counter to the device
    in every step, which waits for it, and starts from the weights after the first step.

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
        """Take in the weights after a step, without waiting for the device.

        Early on less of the old value is kept, min(decay, (1 + t) / (10 + t)) after t steps: else the average of a
        short run would be that of its random start.

        Args:
            step: Steps done before this one, t, 0 for the first.

        Source: tf.train.ExponentialMovingAverage, `num_updates`.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self.tensors.values()), list(self._parameters.values()), step)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the average within a block, and its own weights back at the end."""
        own = {name: parameter.clone() for name, parameter in self._parameters.items()}
        self.give()
        try:
            yield
        finally:
            _copy(own, self._parameters)

    def give(self) -> None:
        """Replace the model's weights by the average."""
        _copy(self.tensors, self._parameters)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a saved average of the same model."""
        _copy(tensors, self.tensors)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy values into memory that stays where it is, since captured steps read it there."""
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
