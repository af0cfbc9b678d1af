"""The passes of an encoder block on CUDA: PyTorch's operations, joined by torch.compile, function by function.

Five small functions compile in seconds, a model in minutes, and products and attention stay the libraries'. Sequences
and tokens are symbols from the start: otherwise a second size of batch would be compiled again and might round
otherwise. Within a pass everything is float32, and results are rounded once. Like PyTorch's own operations the kernels
are replayed from a CUDA graph, since the steps before it is captured have compiled them.

Letters as in pipeline.models.students.fused.passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.students.fused.passes import Branch, Passes
from pipeline.models.students.layers import attend_in_parts

VARIANTS = 64  # of a function in one process: widths, dtypes, with gradients or without, with drop path or without


def why_not(width: int, num_heads: int, hidden: int) -> str | None:
    """Say in a phrase why a block of width D, heads and hidden width F cannot be compiled; None if it may be tried."""
    return None if find_spec("triton") else "Triton is not installed"


def misfit(width: int, num_heads: int, hidden: int) -> str | None:
    """Return None: every geometry can be compiled."""
    return None


def explain(error: Exception) -> str:
    """Say in a phrase what torch.compile could not do."""
    return f"torch.compile fails: {error}"


def attend(projected: Sequence[Tensor], num_heads: int) -> Tensor:
    """See Passes; by PyTorch's fused attention, which no compiler would better."""
    if len(projected) == 1:
        queries, keys, values = (_heads(part, num_heads) for part in projected[0].chunk(3, dim=-1))
    else:
        queries, keys, values = (_heads(part, num_heads) for part in (projected[0], *projected[1].chunk(2, dim=-1)))
    return attend_in_parts(queries, keys, values).transpose(1, 2).flatten(2)


def gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """See Passes."""
    active: Tensor = _compiled(_gelu)(hidden, bias)
    return active


def residual(tokens: Tensor, branch: Branch | None, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
    """See Passes."""
    tokens = tokens.contiguous()  # for other strides a pass would be compiled again
    weights = () if norm is None else (norm.weight, norm.bias, _products(tokens.device))
    if branch is None:
        return tokens, _compiled(_norm)(tokens, *weights) if weights else tokens
    given = tokens, *branch
    if not weights:
        summed: Tensor = _compiled(_add)(*given)
        return summed, summed
    # Two functions, because PyTorch compiles a function for a few kinds of arguments only.
    add = _enter_and_normalize if branch.product.shape[1] < tokens.shape[1] else _add_and_normalize
    results: tuple[Tensor, Tensor] = _compiled(add)(*given, *weights)
    return results


PASSES = Passes(attend, gelu, residual)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile prepares when it is first called; sizes of weights are no symbols."""
    # So each width of a student is a variant. After eight PyTorch would take single operations, which round otherwise.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(function, dynamic=True, fullgraph=True)  # where it cannot, it says so


def _gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(hidden.float() + bias).to(hidden.dtype)


def _norm(tokens: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(tokens, weight.shape, weight, bias).to(dtype)


def _add(tokens: Tensor, product: Tensor, bias: Tensor, first: int, factors: Tensor | None) -> Tensor:
    added = product.float() + bias
    if factors is not None:
        added = added * factors[:, None, None]
    behind = tokens.shape[1] - first - product.shape[1]
    return tokens + (F.pad(added, (0, 0, first, behind)) if first or behind else added)


def _add_and_normalize(
    tokens: Tensor,
    product: Tensor,
    bias: Tensor,
    first: int,
    factors: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    summed = _add(tokens, product, bias, first, factors)
    return summed, _norm(summed, weight, norm_bias, dtype)


def _enter_and_normalize(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _add_and_normalize(*arguments)


def _heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Cut tokens `(N, T, D)` into heads, `(N, heads, T, d)`."""
    number, length, width = tokens.shape
    return tokens.view(number, length, num_heads, width // num_heads).transpose(1, 2)


def _products(device: torch.device) -> torch.dtype:
    """Return the dtype of what enters a product here and now."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
