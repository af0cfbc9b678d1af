"""The fused inner block on the CPU: inner.cpp, see pipeline.system.compiling."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from pipeline.models.students.fused.interface import InnerWeights, register
from pipeline.system.compiling import NotAvailable, load_library, openmp


def why_not(num_pixels: int, width: int, num_heads: int, hidden: int) -> str | None:
    """Say in a phrase why `inner_block` cannot compute M, c, heads and hidden width of the MLP; None if it can."""
    try:
        _library(num_pixels, width, num_heads, hidden)
    except NotAvailable as error:
        return str(error)
    return None


def num_checked(device: torch.device, num_pixels: int, width: int, num_heads: int, hidden: int) -> int:
    """Return how many patches check a library: groups of 16 that are full, and one of 5."""
    return 37


def explain(error: Exception) -> str:
    """Say in a phrase what the library could not do."""
    return str(error)


def inner_block(pixels: Tensor, weights: InnerWeights, num_heads: int) -> tuple[Tensor, Tensor]:
    """Refine the pixels of every patch, and normalise them; differentiable once.

    Args:
        pixels: `(N, M, c)` float32 on the CPU.
        weights: float32.
        num_heads: Heads of the attention; the number divides c.

    Returns:
        The refined pixels and their LayerNorm, `(N, M, c)` float32 each. Autocast does not change them.
    """
    # Its first call imports PyTorch's compiler, which takes longer than all of a prediction.
    needs_operator = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(pixels) is not Tensor
    refined, normed = (_forward if needs_operator else _compute)(pixels, list(weights), num_heads)
    return refined, normed


@torch.library.custom_op(
    "titn::inner_block_cpp",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor pixels, Tensor[] weights, int num_heads) -> (Tensor, Tensor)",
)
def _forward(pixels: Tensor, weights: list[Tensor], num_heads: int) -> tuple[Tensor, Tensor]:
    return _compute(pixels, weights, num_heads)


def _compute(pixels: Tensor, weights: list[Tensor], num_heads: int) -> tuple[Tensor, Tensor]:
    pixels, weights = _contiguous(pixels), [_contiguous(weight) for weight in weights]
    refined, normed = torch.empty_like(pixels), torch.empty_like(pixels)
    _geometry_library(pixels, weights, num_heads).inner_block_forward(
        len(pixels),
        torch.get_num_threads(),
        pixels.data_ptr(),
        _pointers(weights),
        refined.data_ptr(),
        normed.data_ptr(),
    )
    return refined, normed


@torch.library.custom_op(
    "titn::inner_block_cpp_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor pixels, Tensor[] weights, Tensor refined_gradient, Tensor normed_gradient, int num_heads)"
    " -> (Tensor, Tensor)",
)
def _backward(
    pixels: Tensor, weights: list[Tensor], refined_gradient: Tensor, normed_gradient: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the pixels and of all weights, one after another."""
    pixels, weights = _contiguous(pixels), [_contiguous(weight) for weight in weights]
    gradient = torch.empty_like(pixels)
    sums = torch.zeros(torch.get_num_threads(), sum(weight.numel() for weight in weights))
    _geometry_library(pixels, weights, num_heads).inner_block_backward(
        len(pixels),
        len(sums),
        pixels.data_ptr(),
        _pointers(weights),
        refined_gradient.data_ptr(),
        normed_gradient.data_ptr(),
        gradient.data_ptr(),
        sums.data_ptr(),
    )
    return gradient, sums.sum(0)


register(_forward, _backward)


def _contiguous(tensor: Tensor) -> Tensor:
    assert tensor.dtype == torch.float32, f"the fused inner block computes in float32, not {tensor.dtype}"
    assert tensor.device.type == "cpu", tensor.device
    return tensor.contiguous()


def _pointers(weights: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))


def _geometry_library(pixels: Tensor, weights: list[Tensor], num_heads: int) -> ctypes.CDLL:
    _, num_pixels, width = pixels.shape
    return _library(num_pixels, width, num_heads, len(InnerWeights(*weights).hidden_bias))


@functools.cache
def _library(num_pixels: int, width: int, num_heads: int, hidden: int) -> ctypes.CDLL:
    """Load the library of a geometry, or compile it."""
    sizes = {"TOKENS": num_pixels, "WIDTH": width, "HEADS": num_heads, "HIDDEN": hidden}
    source, constants = Path(__file__).with_name("inner.cpp"), (f"-D{key}={size}" for key, size in sizes.items())
    library = load_library(source, *constants, openmp(), header=source.with_name("vector.h"))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.inner_block_forward.argtypes = [count, ctypes.c_int, *[pointer] * 4]
    library.inner_block_forward.restype = None
    library.inner_block_backward.argtypes = [count, ctypes.c_int, *[pointer] * 6]
    library.inner_block_backward.restype = None
    return library
