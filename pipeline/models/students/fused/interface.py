"""How the inner blocks of TNT and TITN are computed: by PyTorch's own operations, or fused into one.

256 pixel tokens of width 12 for every image make matrices so small that time goes into passes over memory: PyTorch's
operations make dozens of them, forward and backward. A fused inner block keeps one patch's tokens in registers
or shared memory from the first LayerNorm to the last, and computes them a second time in the backward pass instead of
keeping them.

Letters: N patches of all images, M pixel tokens of a patch, c their width, r the MLP's ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


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
