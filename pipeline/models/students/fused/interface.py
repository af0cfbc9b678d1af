"""What a fused inner block of TNT and TITN is given, what it returns, and how PyTorch differentiates it.

256 pixel tokens of width 12 per image make matrices so small that passes over memory take most of the time, and
PyTorch's operations make dozens of passes, forward and backward. A fused inner block keeps a patch's tokens in
registers or shared memory from the first LayerNorm to the last. The backward pass computes them again instead of
storing them.

Letters: N patches of all images, M pixel tokens of a patch, c their width, r the MLP's ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]


class InnerWeights(NamedTuple):
    """The parameters of an inner block and of the LayerNorm behind it, float32.

    Attributes:
        attention_norm_weight: `(c,)`.
        attention_norm_bias: `(c,)`.
        queries_keys_values_weight: `(3c, c)`: queries, keys, values; inside each, heads; no bias.
        projection_weight: `(c, c)`.
        projection_bias: `(c,)`.
        mlp_norm_weight: `(c,)`.
        mlp_norm_bias: `(c,)`.
        hidden_weight: `(rc, c)`, into the MLP.
        hidden_bias: `(rc,)`.
        output_weight: `(c, rc)`, out of the MLP.
        output_bias: `(c,)`.
        pixel_norm_weight: `(c,)`.
        pixel_norm_bias: `(c,)`.
    """

    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    queries_keys_values_weight: Tensor
    projection_weight: Tensor
    projection_bias: Tensor
    mlp_norm_weight: Tensor
    mlp_norm_bias: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    pixel_norm_weight: Tensor
    pixel_norm_bias: Tensor


InnerBlock = Callable[[Tensor, InnerWeights, int], tuple[Tensor, Tensor]]
"""Maps (pixels `(N, M, c)` float32, weights, heads) to the refined pixels and their LayerNorm, both `(N, M, c)`."""


def register(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Tell PyTorch how to differentiate an inner block, and what shapes its two operators return.

    Args:
        forward: (pixels, weights, *options) to the refined pixels and their LayerNorm.
        backward: (pixels, weights, refined_gradient, normed_gradient, *options), both gradients contiguous, to the
            pixels' gradient and those of all weights, flat, one after another.
    """

    @forward.register_fake
    def _(pixels: Tensor, weights: list[Tensor], *options: object) -> tuple[Tensor, Tensor]:
        return torch.empty_like(pixels), torch.empty_like(pixels)

    @backward.register_fake
    def _(pixels: Tensor, weights: list[Tensor], *rest: object) -> tuple[Tensor, Tensor]:
        num_parameters = sum(weight.numel() for weight in weights)
        return torch.empty_like(pixels), pixels.new_empty(num_parameters, dtype=torch.float32)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        pixels, weights, *ctx.options = inputs
        ctx.save_for_backward(pixels, *weights)

    def differentiate(ctx: Any, refined_gradient: Tensor, normed_gradient: Tensor) -> tuple[Any, ...]:
        pixels, *weights = ctx.saved_tensors
        directions = refined_gradient.contiguous(), normed_gradient.contiguous()
        pixels_gradient, flat = backward(pixels, weights, *directions, *ctx.options)
        parts = flat.split([weight.numel() for weight in weights])
        gradients = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
        return pixels_gradient, gradients, *[None for _ in ctx.options]

    forward.register_autograd(differentiate, setup_context=keep)
