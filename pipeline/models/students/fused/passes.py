"""What an encoder block does between its matrix products, in passes over memory.

PyTorch's operations make a pass each: for a sum, a cast, a LayerNorm, a bias. `Passes` are these passes joined: from a
product's result to the next product's factor. Products that a pass follows leave their bias to it.

Letters: N sequences of T tokens, D width, F the MLP's hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Residual(Protocol):
    """Adds a branch to the tokens, and normalises the result."""

    def __call__(
        self,
        tokens: Tensor,
        branch: Tensor | None = None,
        bias: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        *,
        first: int = 0,
        factors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum, and what it is after the LayerNorm.

        Args:
            tokens: `(N, T, D)` float32.
            branch: `(N, W, D)` in the dtype of products, added to W tokens; None adds nothing.
            bias: `(D,)` float32, the branch's.
            norm: None leaves it out.
            first: The first of the W tokens.
            factors: `(N,)` float32, by which branch and bias are multiplied; None is 1.

        Returns:
            The sum `(N, T, D)` float32, and its LayerNorm `(N, T, D)` in the dtype of products; without `norm` the sum
            again.
        """


class Passes(NamedTuple):
    """The passes of an encoder block, differentiable once.

    Attributes:
        attend: Maps queries, keys and values, side by side `(N, T, 3D)` or as `(N, W, D)` and `(N, T, 2D)`, and the
            number of heads to softmax(Q K^T / sqrt(d)) V, `(N, W, D)`, in their dtype.
        gelu: Maps hidden tokens `(N, T, F)` and a bias `(F,)` to GELU of their sum, in the tokens' dtype.
        residual: See Residual.
    """

    attend: Callable[[Sequence[Tensor], int], Tensor]
    gelu: Callable[[Tensor, Tensor], Tensor]
    residual: Residual
