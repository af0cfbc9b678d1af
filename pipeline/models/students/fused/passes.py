"""What an encoder block does between its matrix products, in passes over memory.

PyTorch's operations make a pass each: for a sum, a cast, a LayerNorm, a bias. `Passes` are these passes joined: from a
product's result to the next product's factor. Products that a pass follows leave their bias to it.

Letters: N sequences of T tokens, D width, F the MLP's hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Branch(NamedTuple):
    """What a residual pass adds to tokens.

    Attributes:
        product: `(N, W, D)` in the dtype of products, of a linear layer without its bias.
        bias: `(D,)` float32, the layer's.
        first: The first of the W tokens that it is added to.
        factors: `(N,)` float32, by which product and bias are multiplied; None is 1.
    """

    product: Tensor
    bias: Tensor
    first: int = 0
    factors: Tensor | None = None


class Passes(NamedTuple):
    """The passes of an encoder block, differentiable once.

    Attributes:
        attend: Maps queries, keys and values, side by side `(N, T, 3D)` or as `(N, W, D)` and `(N, T, 2D)`, and the
            number of heads to softmax(Q K^T / sqrt(d)) V, `(N, W, D)`, in their dtype.
        gelu: Maps hidden tokens `(N, T, F)` and a bias `(F,)` to GELU of their sum, in the tokens' dtype.
        residual: Maps tokens `(N, T, D)` float32, a branch or None, and a LayerNorm or None to the sum of tokens and
            branch, `(N, T, D)` float32, and its LayerNorm in the dtype of products; without a norm the sum again.
    """

    attend: Callable[[Sequence[Tensor], int], Tensor]
    gelu: Callable[[Tensor, Tensor], Tensor]
    residual: Callable[[Tensor, Branch | None, nn.LayerNorm | None], tuple[Tensor, Tensor]]
