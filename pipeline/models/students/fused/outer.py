"""The passes of an encoder block on the CPU: outer.cpp, see pipeline.system.compiling.

Letters as in pipeline.models.students.fused.passes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.students.fused.passes import Branch, Passes
from pipeline.system.compiling import NotAvailable, load_library, openmp

CPU = "cpu"
PRODUCTS = (torch.float32, torch.bfloat16)
"""Dtypes of what enters and leaves a product."""


def why_not(width: int, num_heads: int, hidden: int) -> str | None:
    """Say in a phrase why the passes cannot compute a block of width D, heads and hidden width F; None if they can."""
    try:
        _library()
    except NotAvailable as error:
        return str(error)
    return misfit(width, num_heads, hidden)


def misfit(width: int, num_heads: int, hidden: int) -> str | None:
    """Say in a phrase why a block's geometry is none for the passes; None if it is, or if there are no passes here."""
    try:
        lanes = _library().outer_lanes()
    except NotAvailable:
        return None
    for name, size in (("width", width), ("heads' width", width // num_heads), ("hidden width", hidden)):
        if size % lanes:
            return f"{name} {size} is no multiple of {lanes}, the processor's lanes"
    return None


def explain(error: Exception) -> str:
    """Say in a phrase what the library could not do."""
    return str(error)


def attend(projected: Sequence[Tensor], num_heads: int) -> Tensor:
    """See Passes."""
    mixed: Tensor = _Attend.apply(num_heads, *projected)
    return mixed


def gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """See Passes."""
    active: Tensor = _Gelu.apply(hidden, bias)
    return active


def residual(tokens: Tensor, branch: Branch | None, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
    """See Passes."""
    weights = (None, None) if norm is None else (norm.weight, norm.bias)
    if branch is None:
        if norm is None:
            return tokens, tokens
        passed, normed = _Norm.apply(tokens, *weights)
        return passed, normed
    results: tuple[Tensor, Tensor | None] = _Add.apply(tokens, *branch, *weights)
    summed, maybe_normed = results
    return summed, summed if maybe_normed is None else maybe_normed


PASSES = Passes(attend, gelu, residual)


class _Attend(torch.autograd.Function):
    """Attention; keeps its shares, `(N, heads, W, T)` float32, rows padded to full registers."""

    @staticmethod
    def forward(ctx: Any, num_heads: int, *projected: Tensor) -> Tensor:
        dtype = projected[0].dtype
        projected = tuple(_checked(tensor, dtype) for tensor in projected)
        (sequences, queries, _), (_, keys, width) = projected[0].shape, projected[-1].shape
        width //= 3 if len(projected) == 1 else 2
        library = _library()
        padded = -(-keys // library.outer_lanes()) * library.outer_lanes()
        mixed = torch.empty(sequences, queries, width, dtype=dtype)
        shares = torch.empty(sequences, num_heads, queries, padded)
        sizes = (ctypes.c_int64 * 5)(sequences, num_heads, queries, keys, width // num_heads)
        pointers, steps = _heads(projected, width)
        library.outer_attention_forward(
            *_how(dtype), sizes, *_paired(pointers, steps), mixed.data_ptr(), shares.data_ptr()
        )
        ctx.save_for_backward(shares, *projected)
        ctx.sizes, ctx.width = sizes, width
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mixed_gradient: Tensor) -> tuple[Tensor | None, ...]:
        shares, *projected = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in projected]
        mixed_gradient = _checked(mixed_gradient, projected[0].dtype)
        pointers, steps = _heads(projected, ctx.width)
        _library().outer_attention_backward(
            *_how(projected[0].dtype),
            ctx.sizes,
            *_paired(pointers, steps),
            shares.data_ptr(),
            mixed_gradient.data_ptr(),
            *_heads(gradients, ctx.width)[0],
        )
        return None, *gradients


class _Gelu(torch.autograd.Function):
    """GELU of tokens and their bias."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor) -> Tensor:
        hidden, bias = _checked(hidden, hidden.dtype), _checked(bias, torch.float32)
        active = torch.empty_like(hidden)
        width = len(bias)
        _library().outer_gelu_forward(
            *_how(hidden.dtype), hidden.numel() // width, width, hidden.data_ptr(), bias.data_ptr(), active.data_ptr()
        )
        ctx.save_for_backward(hidden, bias)
        return active

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, active_gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, bias = ctx.saved_tensors
        active_gradient, gradient = _checked(active_gradient, hidden.dtype), torch.empty_like(hidden)
        width = len(bias)
        sums = torch.zeros(torch.get_num_threads(), width)
        _library().outer_gelu_backward(
            *_how(hidden.dtype),
            hidden.numel() // width,
            width,
            hidden.data_ptr(),
            bias.data_ptr(),
            active_gradient.data_ptr(),
            gradient.data_ptr(),
            sums.data_ptr(),
        )
        return gradient, sums.sum(0)


class _Norm(torch.autograd.Function):
    """Tokens, and their LayerNorm in the dtype of products; so the gradients of both are added in the same pass."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        tokens, weight, bias = (_checked(tensor, torch.float32) for tensor in (tokens, weight, bias))
        normed = torch.empty(tokens.shape, dtype=_products())
        pass_ = _residual(tokens, (weight, bias))
        _library().outer_residual_forward(*_how(normed.dtype), pass_, tokens.data_ptr(), None, None, normed.data_ptr())
        ctx.save_for_backward(tokens, weight, bias)
        ctx.set_materialize_grads(False)
        return tokens, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, passed: Tensor | None, normed_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if normed_gradient is None:
            return passed, None, None
        tokens, weight, bias = ctx.saved_tensors
        gradient, sums = torch.empty_like(tokens), _sums(tokens)
        normed_gradient = normed_gradient.contiguous()
        passed = None if passed is None else _checked(passed, torch.float32)
        _library().outer_residual_backward(
            *_how(normed_gradient.dtype),
            _residual(tokens, (weight, bias)),
            tokens.data_ptr(),
            None if passed is None else passed.data_ptr(),
            normed_gradient.data_ptr(),
            gradient.data_ptr(),
            None,
            sums.data_ptr(),
        )
        return gradient, *sums.sum(0)[:2]


class _Add(torch.autograd.Function):
    """The sum of tokens and a branch, and its LayerNorm."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        product: Tensor,
        bias: Tensor,
        first: int,
        factors: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        tokens, product = _checked(tokens, torch.float32), _checked(product, product.dtype)
        summed = torch.empty_like(tokens)
        normed = None if norm_weight is None else torch.empty(tokens.shape, dtype=product.dtype)
        _library().outer_residual_forward(
            *_how(product.dtype),
            _residual(tokens, (norm_weight, norm_bias), Branch(product, bias, first, factors)),
            tokens.data_ptr(),
            product.data_ptr(),
            summed.data_ptr(),
            None if normed is None else normed.data_ptr(),
        )
        # Without a LayerNorm the backward pass reads no values.
        ctx.save_for_backward(summed if normed is not None else None, bias, norm_weight, norm_bias, factors)
        ctx.product, ctx.first, ctx.shape = (product.shape, product.dtype), first, tokens.shape
        ctx.set_materialize_grads(False)
        return summed, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, sum_gradient: Tensor | None, normed_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if sum_gradient is None and normed_gradient is None:
            return (None,) * 7
        summed, bias, norm_weight, norm_bias, factors = ctx.saved_tensors
        shape, dtype = ctx.product
        sum_gradient = None if sum_gradient is None else _checked(sum_gradient, torch.float32)
        normed_gradient = None if normed_gradient is None else _checked(normed_gradient, dtype)
        # Tokens and branch have one gradient where they have one shape and dtype, and that of the sum without a norm.
        are_same = shape == ctx.shape and dtype == torch.float32 and factors is None
        gradient = sum_gradient if are_same and normed_gradient is None else torch.empty(ctx.shape)
        assert gradient is not None
        branch_gradient = gradient if are_same else torch.empty(shape, dtype=dtype)
        sums = _sums(gradient)
        _library().outer_residual_backward(
            *_how(dtype),
            _residual(gradient, (norm_weight, norm_bias), Branch(branch_gradient, bias, ctx.first, factors)),
            None if summed is None else summed.data_ptr(),
            None if sum_gradient is None else sum_gradient.data_ptr(),
            None if normed_gradient is None else normed_gradient.data_ptr(),
            None if gradient is sum_gradient else gradient.data_ptr(),
            None if branch_gradient is gradient else branch_gradient.data_ptr(),
            sums.data_ptr(),
        )
        weight_gradient, norm_gradient, bias_gradient = sums.sum(0)
        norm_gradients = (None, None) if norm_weight is None else (weight_gradient, norm_gradient)
        return gradient, branch_gradient, bias_gradient, None, None, *norm_gradients


class _ResidualSizes(ctypes.Structure):
    """`Residual` of outer.cpp. What its pointers show to is kept alive by the caller."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sequences", "tokens", "width", "first", "branch_tokens")),
        *((name, ctypes.c_void_p) for name in ("bias", "factors", "norm_weight", "norm_bias")),
    )


def _residual(tokens: Tensor, norm: tuple[Tensor | None, Tensor | None], branch: Branch | None = None) -> Any:
    """Describe a residual pass, by the shapes of tokens and branch and the tensors that are small."""
    small = (None if branch is None else branch.bias, None if branch is None else branch.factors, *norm)
    assert all(tensor is None or (tensor.is_contiguous() and tensor.dtype == torch.float32) for tensor in small)
    num_sequences, num_tokens, width = tokens.shape
    first, branch_tokens = (0, 0) if branch is None else (branch.first, branch.product.shape[1])
    assert first + branch_tokens <= num_tokens
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in small]
    return ctypes.byref(_ResidualSizes(num_sequences, num_tokens, width, first, branch_tokens, *pointers))


def _sums(tokens: Tensor) -> Tensor:
    """Return room for each thread's gradients of a LayerNorm's weight and bias and of a branch's bias."""
    return torch.zeros(torch.get_num_threads(), 3, tokens.shape[-1])


def _heads(projected: Sequence[Tensor], width: int) -> tuple[list[int], list[Any]]:
    """Return where queries, keys and values begin, and their steps from sequence to sequence and token to token."""
    first, last = projected[0], projected[-1]
    behind = 1 if first is last else 0  # of keys and values, counted in widths
    pointers = [first.data_ptr(), *(last.data_ptr() + (behind + i) * width * last.element_size() for i in range(2))]
    steps = [(ctypes.c_int64 * 2)(tensor.shape[1] * tensor.shape[2], tensor.shape[2]) for tensor in (first, last, last)]
    return pointers, steps


def _paired(pointers: Sequence[int], steps: Sequence[Any]) -> list[Any]:
    return [argument for pair in zip(pointers, steps, strict=True) for argument in pair]


def _products() -> torch.dtype:
    """Return the dtype of what enters a product here and now."""
    return torch.get_autocast_dtype(CPU) if torch.is_autocast_enabled(CPU) else torch.float32


def _checked(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    assert tensor.dtype == dtype and dtype in PRODUCTS, f"a fused pass takes {dtype}, not {tensor.dtype}"
    assert tensor.device.type == CPU, tensor.device
    return tensor.contiguous()


def _how(dtype: torch.dtype) -> tuple[int, int]:
    """Return whether products are bfloat16, and the number of threads."""
    return int(dtype == torch.bfloat16), torch.get_num_threads()


@functools.cache
def _library() -> ctypes.CDLL:
    """Load the library, or compile it."""
    source = Path(__file__).with_name("outer.cpp")
    library = load_library(source, openmp(), header=source.with_name("vector.h"))
    pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.outer_attention_forward.argtypes = [flag, flag, *[pointer] * 9]
    library.outer_attention_backward.argtypes = [flag, flag, *[pointer] * 12]
    library.outer_gelu_forward.argtypes = [flag, flag, count, count, *[pointer] * 3]
    library.outer_gelu_backward.argtypes = [flag, flag, count, count, *[pointer] * 5]
    library.outer_residual_forward.argtypes = [flag, flag, *[pointer] * 5]
    library.outer_residual_backward.argtypes = [flag, flag, *[pointer] * 7]
    for name in ("attention", "gelu", "residual"):
        for direction in ("forward", "backward"):
            getattr(library, f"outer_{name}_{direction}").restype = None
    return library
