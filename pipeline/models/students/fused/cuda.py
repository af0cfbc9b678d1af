"""The fused inner block on CUDA: one Triton kernel forward, one backward.

The forward kernel reads the pixels once and writes the refined pixels and their LayerNorm once. The backward kernel
reads the pixels and both gradients, repeats the forward pass and writes the pixels' gradient. Each program keeps its
sums of the parameters' gradients in registers until its last patch, and the programs' sums are added in a fixed order.
So the same device gives the same bits every time.

Under autocast products are computed in tf32, with 10 bits of fraction (bf16 has 7). Otherwise a product is made of
three tf32 products and is exact to float32, at twice the instructions. Everything else is always float32.

Letters: N patches of all images, M pixel tokens of a patch, c their width.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pipeline.models.students.fused.interface import InnerWeights, register
from pipeline.models.students.fused.tiles import Geometry, geometry

# With more, the sums or a patch's scores would need more registers than there are.
MAX_WIDTH = 31
MAX_HIDDEN = 128
MAX_PIXELS = 64
# The oldest version the kernels were compiled with; PyTorch 2.9 brings it.
MIN_TRITON = (3, 5)
# A multiprocessor of an H100 or H200 has registers for this many warps; more programs would only write more sums.
FORWARD_WARPS = 16
BACKWARD_WARPS = 8
# Triton wants to be told whether to fuse multiplication and addition.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@functools.cache
def why_not(num_pixels: int, width: int, num_heads: int, hidden: int) -> str | None:
    """Say in a phrase why `inner_block` cannot compute M, c, heads and hidden width of the MLP; None if it can."""
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


def num_checked(device: torch.device, num_pixels: int, width: int, num_heads: int, hidden: int) -> int:
    """Return how many patches check the kernels on a GPU: every program has two tiles, and one tile is not full."""
    of = geometry(num_pixels, width, num_heads, hidden, "tf32")
    return 2 * _programs_at_once(device, of, FORWARD_WARPS) * of.patches + 1


def explain(error: Exception) -> str:
    """Say in a phrase what Triton could not do on this device."""
    from triton.runtime.errors import OutOfResources

    if isinstance(error, OutOfResources):
        # Triton compares with the device's own shared_memory_per_block_optin before it starts a kernel.
        unit = " bytes" if "memory" in error.name else ""
        return f"a kernel needs {error.required:,}{unit} of {error.name}, and the device has {error.limit:,}"
    if isinstance(error, subprocess.CalledProcessError):
        return f"Triton's compiler fails ({error.cmd[0]} returned {error.returncode})"
    return f"Triton fails: {error}"


def inner_block(pixels: Tensor, weights: InnerWeights, num_heads: int) -> tuple[Tensor, Tensor]:
    """Refine the pixels of every patch, and normalise them; differentiable once.

    Autocast changes the precision of products, not dtypes.

    Args:
        pixels: `(N, M, c)` float32 or bfloat16, on a CUDA device.
        weights: On the same device.
        num_heads: Heads of the attention; the number divides c.

    Returns:
        The refined pixels and their LayerNorm, both `(N, M, c)` of the dtype of `pixels`.

    Source: arXiv:2502.16762 §3.2; 1e-5 is added to LayerNorm's variances, PyTorch's default.
    """
    precision = "tf32" if torch.is_autocast_enabled(pixels.device.type) else "tf32x3"
    refined, normed = _inner_block(pixels.contiguous(), list(weights), num_heads, precision)
    return refined, normed


@torch.library.custom_op("pipeline::inner_block", mutates_args=())
def _inner_block(pixels: Tensor, weights: Sequence[Tensor], num_heads: int, precision: str) -> tuple[Tensor, Tensor]:
    from pipeline.models.students.fused.triton_forward import forward_kernel

    refined, normed = torch.empty_like(pixels), torch.empty_like(pixels)
    of = _geometry(pixels, weights, num_heads, precision)
    num_programs = _num_programs(pixels, of, FORWARD_WARPS)
    _launch(forward_kernel, num_programs, of, pixels, refined, normed, _contiguous(weights), len(pixels))
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

    pixels_gradient = torch.empty_like(pixels)
    of = _geometry(pixels, weights, num_heads, precision)
    num_programs = _num_programs(pixels, of, BACKWARD_WARPS)
    sizes = [weight.numel() for weight in weights]
    sums = torch.empty(num_programs, sum(sizes), device=pixels.device)
    gradients = pixels, refined_gradient, normed_gradient, pixels_gradient
    targets = InnerWeights(*torch.split(sums, sizes, dim=1))
    _launch(backward_kernel, num_programs, of, *gradients, _contiguous(weights), targets, len(pixels), sum(sizes))
    return pixels_gradient, sums.sum(0)


def _geometry(pixels: Tensor, weights: Sequence[Tensor], num_heads: int, precision: str) -> Geometry:
    hidden = InnerWeights(*weights).hidden_bias.numel()
    return geometry(pixels.shape[1], pixels.shape[2], num_heads, hidden, precision)


def _contiguous(weights: Sequence[Tensor]) -> InnerWeights:
    return InnerWeights(*(weight.contiguous() for weight in weights))


def _num_programs(pixels: Tensor, of: Geometry, num_warps: int) -> int:
    """Return how many programs the device runs at once, at most one for each tile."""
    return min(-(-len(pixels) // of.patches), _programs_at_once(pixels.device, of, num_warps))


def _programs_at_once(device: torch.device, of: Geometry, num_warps: int) -> int:
    """Return how many programs of a kernel a device runs at once, with so many warps of each multiprocessor."""
    is_gpu = device.type == "cuda"  # Triton's interpreter runs on the CPU
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 1
    return num_processors * max(1, num_warps // of.num_warps)


def _launch(kernel: Any, num_programs: int, of: Geometry, pixels: Tensor, *arguments: Any) -> None:
    """Start a kernel's programs on the device of the pixels."""
    from pipeline.models.students.fused.triton_forward import constants

    if num_programs:
        with torch.cuda.device_of(pixels):  # type: ignore[no-untyped-call]
            kernel[(num_programs,)](pixels, *arguments, constants(of), num_warps=of.num_warps, **OPTIONS)


register(_inner_block, _inner_block_backward)
