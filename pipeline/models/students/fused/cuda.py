"""The fused inner block on CUDA: one Triton kernel forward, one backward.

Forward reads the pixels once and writes the refined ones and their LayerNorm once. Backward reads the pixels and both
gradients, computes the forward pass again and writes the pixels' gradient; every program keeps its sums of the
parameters' gradients in registers until its last patch, and what the programs wrote is added in a fixed order. So the
same device gives the same bits every time.

Under autocast products are tf32's: of the 10 bits of fraction that bf16 has 7 of. Otherwise each is made of three
of tf32's and exact to float32, at twice the instructions. Everything else is float32 always.

Letters: N patches of all images, M pixel tokens of a patch, c their width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pipeline.models.students.fused.interface import InnerWeights
from pipeline.models.students.fused.tiles import Geometry, geometry

# Wider and longer ones would keep their sums, or a patch's scores, in more registers than there are.
MAX_WIDTH = 31
MAX_HIDDEN = 128
MAX_PIXELS = 64
# The oldest that the kernels have been compiled with; PyTorch 2.9 brings it.
MIN_TRITON = (3, 5)
# Warps that a multiprocessor of an H100 or H200 has registers for at once: more programs would only write more sums.
FORWARD_WARPS = 16
BACKWARD_WARPS = 8
# Triton asks that fusing multiplication and addition be decided.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@functools.cache
def why_not(num_pixels: int, width: int, num_heads: int, hidden: int) -> str | None:
    """Tell in a phrase why `inner_block` does not compute a geometry, or None where it does.

    Args:
        num_pixels: M.
        width: c.
        num_heads: Heads.
        hidden: Width of the MLP's hidden layer.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm, and the kernels for CUDA"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, MIN_TRITON))}"
    if num_pixels > MAX_PIXELS:
        return f"a patch has {num_pixels} pixel tokens, more than {MAX_PIXELS}"
    if width > MAX_WIDTH:
        return f"pixel tokens are {width} wide, more than {MAX_WIDTH}"
    if hidden > MAX_HIDDEN:
        return f"the hidden layer is {hidden} wide, more than {MAX_HIDDEN}"
    if width % num_heads:
        return f"{num_heads} heads do not divide the width {width}"
    return None


def inner_block(pixels: Tensor, weights: InnerWeights, num_heads: int) -> tuple[Tensor, Tensor]:
    """Refine the pixels of every patch, and normalise them; differentiable once.

    Autocast changes nothing but the precision of products: dtypes stay as they are.

    Args:
        pixels: `(N, M, c)` float32 or bfloat16, on a CUDA device.
        weights: Parameters, on the same device.
        num_heads: Heads of the attention; they divide c.

    Returns:
        The refined pixels and their LayerNorm, both `(N, M, c)` of the dtype of `pixels`.

    Source: arXiv:2502.16762 §3.2; 1e-5 is added to LayerNorm's variances, PyTorch's default.
    """
    precision = "tf32" if torch.is_autocast_enabled(pixels.device.type) else "tf32x3"
    refined, normed = _inner_block(pixels.contiguous(), list(weights), num_heads, precision)
    return refined, normed


@torch.library.custom_op("pipeline::inner_block", mutates_args=())
def _inner_block(pixels: Tensor, weights: Sequence[Tensor], num_heads: int, precision: str) -> tuple[Tensor, Tensor]:
    from pipeline.models.students.fused.triton_forward import constants, forward_kernel

    refined, normed = torch.empty_like(pixels), torch.empty_like(pixels)
    of = _geometry(pixels, weights, num_heads, precision)
    num_programs = _num_programs(pixels, of, FORWARD_WARPS)
    if num_programs:
        with _on(pixels.device):
            forward_kernel[(num_programs,)](
                pixels,
                refined,
                normed,
                _contiguous(weights),
                len(pixels),
                constants(of),
                num_warps=of.num_warps,
                **OPTIONS,
            )
    return refined, normed


@torch.library.custom_op("pipeline::inner_block_backward", mutates_args=())
def _inner_block_backward(
    pixels: Tensor,
    weights: Sequence[Tensor],
    refined_gradient: Tensor,
    normed_gradient: Tensor,
    num_heads: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the pixels, and those of all parameters in one vector."""
    from pipeline.models.students.fused.triton_backward import backward_kernel
    from pipeline.models.students.fused.triton_forward import constants

    pixels_gradient = torch.empty_like(pixels)
    of = _geometry(pixels, weights, num_heads, precision)
    num_programs = _num_programs(pixels, of, BACKWARD_WARPS)
    sizes = [weight.numel() for weight in weights]
    sums = torch.empty(num_programs, sum(sizes), device=pixels.device)
    if num_programs:
        with _on(pixels.device):
            backward_kernel[(num_programs,)](
                pixels,
                refined_gradient,
                normed_gradient,
                pixels_gradient,
                _contiguous(weights),
                InnerWeights(*torch.split(sums, sizes, dim=1)),
                len(pixels),
                sum(sizes),
                constants(of),
                num_warps=of.num_warps,
                **OPTIONS,
            )
    return pixels_gradient, sums.sum(0)


def _geometry(pixels: Tensor, weights: Sequence[Tensor], num_heads: int, precision: str) -> Geometry:
    hidden = InnerWeights(*weights).hidden_bias.numel()
    return geometry(pixels.shape[1], pixels.shape[2], num_heads, hidden, precision)


def _contiguous(weights: Sequence[Tensor]) -> InnerWeights:
    return InnerWeights(*(weight.contiguous() for weight in weights))


def _num_programs(pixels: Tensor, of: Geometry, num_warps: int) -> int:
    """As many programs as the device runs at once, or as there are tiles."""
    num_tiles = -(-len(pixels) // of.patches)
    return min(num_tiles, _num_processors(pixels.device) * max(1, num_warps // of.num_warps))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, where Triton launches; Triton's interpreter needs none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@_inner_block.register_fake
def _(pixels: Tensor, weights: Sequence[Tensor], num_heads: int, precision: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pixels), torch.empty_like(pixels)


@_inner_block_backward.register_fake
def _(
    pixels: Tensor,
    weights: Sequence[Tensor],
    refined_gradient: Tensor,
    normed_gradient: Tensor,
    num_heads: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pixels), pixels.new_empty(sum(weight.numel() for weight in weights), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pixels, weights, ctx.num_heads, ctx.precision = inputs
    ctx.save_for_backward(pixels, *weights)


def _differentiate(ctx: Any, refined_gradient: Tensor, normed_gradient: Tensor) -> tuple[Any, ...]:
    pixels, *weights = ctx.saved_tensors
    pixels_gradient, sums = _inner_block_backward(
        pixels, weights, refined_gradient.contiguous(), normed_gradient.contiguous(), ctx.num_heads, ctx.precision
    )
    parts = sums.split([weight.numel() for weight in weights])
    gradients = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
    return pixels_gradient, gradients, None, None


_inner_block.register_autograd(_differentiate, setup_context=_keep)
