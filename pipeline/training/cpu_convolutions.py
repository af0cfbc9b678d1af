"""Convolutions that a CPU trains faster by other means than PyTorch's, oneDNN.

At 32x32 pixels the last stages of torchvision's models convolve maps of 2x2 and 1x1 with millions of weights. There
oneDNN takes a multiple of what the arithmetic needs, most of all for the gradient of the weights. Such a convolution is
a matrix product here: what an output sees is gathered in one row, and all rows are multiplied by the weights. Weights
that see nothing but padding are left out: of a 3x3 kernel on a 1x1 map, eight of nine.

A depthwise convolution is computed in float32 under autocast, too: oneDNN's gradients of it take up to twenty times as
long in bfloat16.

These are the same sums in another order or with more digits, so results differ by rounding only. In evaluation mode
nothing differs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_WEIGHTS = 1024
"""A convolution with as many weights for each of a batch's output positions is a matrix product."""
FEWEST_WEIGHTS_POINTWISE = 128
"""The same for 1x1 kernels, whose inputs need not be copied."""


class CpuConv2d(nn.Conv2d):
    """A convolution that is trained on a CPU as it is fastest there; elsewhere and in evaluation, a plain one."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the convolution `(B, out_channels, H', W')` of maps `(B, in_channels, H, W)`."""
        if not self.training or images.device.type != "cpu":
            return super().forward(images)
        if self.groups > 1:
            with torch.autocast("cpu", enabled=False):
                return super().forward(images.to(self.weight.dtype)).to(images.dtype)
        rows, columns = (self._seen(axis, images.shape[2 + axis]) for axis in (0, 1))
        positions = len(images) * rows.outputs * columns.outputs
        fewest = FEWEST_WEIGHTS_POINTWISE if self.kernel_size == (1, 1) else FEWEST_WEIGHTS
        if self.weight.numel() < fewest * positions:
            return super().forward(images)
        seen = images.permute(0, 2, 3, 1)
        parts = [(row, column) for row in rows.slices for column in columns.slices]
        if any(rows.padding + columns.padding):
            seen = F.pad(seen, (0, 0, *columns.padding, *rows.padding))
        if len(parts) > 1 or seen.shape[1:3] != (rows.outputs, columns.outputs):
            seen = _Gather.apply(seen, parts)
        weight = self.weight[:, :, rows.kernel, columns.kernel].permute(0, 2, 3, 1)
        return F.linear(seen, weight.reshape(self.out_channels, -1), self.bias).permute(0, 3, 1, 2)

    def _seen(self, axis: int, size: int) -> _Seen:
        kernel, stride, before = self.kernel_size[axis], self.stride[axis], int(self.padding[axis])
        outputs = (size + 2 * before - kernel) // stride + 1
        reach = stride * (outputs - 1) + 1
        sees = [index for index in range(kernel) if index < before + size and index + reach > before] or [0]
        first, last = sees[0], sees[-1]
        padding = max(0, before - first), max(0, last - before + reach - size)
        starts = [index - before + padding[0] for index in sees]
        return _Seen(outputs, slice(first, last + 1), padding, [slice(at, at + reach, stride) for at in starts])


class _Gather(torch.autograd.Function):
    """What each output sees, side by side: of padded maps `(B, H, W, C)`, `(B, H', W', parts * C)`.

    PyTorch's own gradient of so many slices fills and adds a whole map for each, twice.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, parts: list[tuple[slice, slice]]) -> Tensor:
        ctx.shape, ctx.parts = padded.shape, parts
        return torch.cat([padded[:, row, column] for row, column in parts], 3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.new_zeros(ctx.shape)
        for (row, column), part in zip(ctx.parts, gradient.chunk(len(ctx.parts), 3), strict=True):
            total[:, row, column] += part
        return total, None


class _Seen(NamedTuple):
    """What a kernel sees along one axis of a map.

    Attributes:
        outputs: Number of output positions.
        kernel: The part of the kernel that sees more than padding.
        padding: Zeros needed before and after the map for this part.
        slices: Of the padded map, for each place in this part: what the outputs see there.
    """

    outputs: int
    kernel: slice
    padding: tuple[int, int]
    slices: list[slice]


def use_cpu_convolutions(model: nn.Module) -> None:
    """Let a model's convolutions, dense or depthwise, be `CpuConv2d`: the same modules with the same parameters."""
    for module in model.modules():
        if type(module) is nn.Conv2d and (_is_dense(module) or _is_depthwise(module)):
            module.__class__ = CpuConv2d


def _is_dense(layer: nn.Conv2d) -> bool:
    is_zero_padded = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return layer.groups == 1 and layer.dilation == (1, 1) and is_zero_padded


def _is_depthwise(layer: nn.Conv2d) -> bool:
    return 1 < layer.groups == layer.in_channels
