"""The guard of a fused block: it is compared with the plain one before a process first relies on it.

A compiler, a driver or a graphics card that nobody here has tested may compute something else without a word. So a few
tokens go through the fused block, PyTorch's modules and the same modules in float64, with the weights of the model
that is about to run. All tensors are the guard's own: no gradient, no weight and no generator of random numbers is
touched. Once a process is enough for a device, a geometry and a precision of products.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import UsageError, one_line
from pipeline.models.students.fused.interface import InnerBlock
from pipeline.models.students.fused.passes import Passes
from pipeline.models.students.layers import EncoderBlock, Entering
from pipeline.models.students.tnt import NestedBlock, inner_weights
from pipeline.system.runtime import autocast

MARGIN = 4.0
SLACK = 1e-6
"""The fused block's error may be MARGIN times the plain block's, plus SLACK."""
MAX_REASON = 200
PRODUCTS = {torch.ops.aten.mm: 2, torch.ops.aten.bmm: 2, torch.ops.aten.addmm: 2, torch.ops.aten.baddbmm: 2}
"""The operators that modules multiply with, and how many factors are last among their arguments."""

_verdicts: dict[tuple[object, ...], str | None] = {}


class Errors(NamedTuple):
    """How far results are from float64's: the largest difference in a tensor, as a share of its largest value.

    Attributes:
        fused: Of the fused block, the worst tensor's.
        plain: Of PyTorch's modules, with products of the same precision.
    """

    fused: float
    plain: float

    @property
    def are_alike(self) -> bool:
        """Whether the fused block is within the bound; one that is not a number is not."""
        return self.fused <= MARGIN * self.plain + SLACK


def why_not_inner(
    fused: InnerBlock,
    block: NestedBlock,
    device: torch.device,
    *,
    precision: str,
    training: bool,
    num_patches: int,
    explain: Callable[[Exception], str] = str,
) -> str | None:
    """Say in a phrase why a fused inner block cannot be relied on; None if it can.

    Args:
        fused: The fused block.
        block: Of the model that is about to run; its weights may be on another device.
        device: Where the model computes.
        precision: Of the model, `fp32` or `bf16`; it decides that of products on a GPU.
        training: Whether gradients are compared too.
        num_patches: Patches to compare.
        explain: Turns what the fused block may raise into a phrase.

    Raises:
        UsageError: A CUDA error has left the process without its GPU.
    """
    comparison = functools.partial(
        compare_inner, fused, block, device, precision=precision, training=training, num_patches=num_patches
    )
    key = (fused, device, block.inner_geometry, _rounds(device, precision))
    return _once(key, training, comparison, device, explain)


def why_not_outer(
    passes: Passes,
    block: EncoderBlock,
    device: torch.device,
    *,
    precision: str,
    training: bool,
    explain: Callable[[Exception], str] = str,
) -> str | None:
    """Say in a phrase why the fused passes of an outer block cannot be relied on; see `why_not_inner`."""
    comparison = functools.partial(compare_outer, passes, block, device, precision=precision, training=training)
    return _once((passes, device, block.geometry, precision), training, comparison, device, explain)


def _once(
    key: tuple[object, ...],
    training: bool,
    comparison: Callable[[], dict[str, Errors]],
    device: torch.device,
    explain: Callable[[Exception], str],
) -> str | None:
    """Return what a comparison found, once a process; one with gradients is one without."""
    if training is False and _verdicts.get((*key, True), "unknown") is None:
        return None
    if (*key, training) not in _verdicts:
        _verdicts[(*key, training)] = _judge(comparison, device, explain)
    return _verdicts[(*key, training)]


def _judge(
    comparison: Callable[[], dict[str, Errors]], device: torch.device, explain: Callable[[Exception], str]
) -> str | None:
    """Compare, and say what is wrong; see `why_not_inner`."""
    try:
        compared = comparison()
    except Exception as error:  # compilers, drivers and their libraries raise what they like
        reason = _first_line(explain(error)) or type(error).__name__
        if device.type == "cuda":
            _require_alive(device, reason)
        return reason
    for name, errors in compared.items():
        if not errors.are_alike:
            return f"the error of its {name} is {errors.fused:.1e}, and {errors.plain:.1e} of the plain block"
    return None


def compare_inner(
    fused: InnerBlock, block: NestedBlock, device: torch.device, *, precision: str, training: bool, num_patches: int
) -> dict[str, Errors]:
    """Return the errors of a fused block's results and, when training, of its gradients; see `why_not_inner`."""
    heads = block.inner.attention.num_heads
    modules = nn.ModuleList([block.inner, block.pixel_norm])

    def plain(modules: nn.ModuleList, pixels: Tensor) -> Sequence[Tensor]:
        inner, norm = modules
        # The block computes in float32 whatever the autocast; see NestedBlock.
        with torch.autocast(device.type, enabled=False):
            refined = inner(pixels)
            return refined, norm(refined)

    def ours(modules: nn.ModuleList, pixels: Tensor) -> Sequence[Tensor]:
        return fused(pixels, inner_weights(*modules), heads)

    shape = (num_patches, *block.inner_geometry[:2])
    products = _tf32 if _rounds(device, precision) else contextlib.nullcontext
    return _compare(modules, [shape], plain, ours, device, precision=precision, training=training, products=products)


def compare_outer(
    passes: Passes, block: EncoderBlock, device: torch.device, *, precision: str, training: bool
) -> dict[str, Errors]:
    """Return the errors of an outer block by fused passes and, when training, of its gradients; see `why_not_outer`.

    Some tokens enter by a layer, as those of TNT do, and once only the last attends.
    """
    width, num_tokens = block.geometry[0], 18
    modules = nn.ModuleList([block])

    def run(modules: nn.ModuleList, tokens: Tensor, inputs: Tensor, plain: bool) -> Sequence[Tensor]:
        block = cast(EncoderBlock, modules[0])
        entering = Entering(block.attention.projection, inputs, first=1)  # a layer that fits
        return (
            block(tokens, entering=entering, plain=plain),
            block(tokens, slice(num_tokens - 1, None), plain=plain),
        )

    def ours(modules: nn.ModuleList, tokens: Tensor, inputs: Tensor) -> Sequence[Tensor]:
        cast(EncoderBlock, modules[0]).passes = passes
        return run(modules, tokens, inputs, False)

    shapes = [(5, num_tokens, width), (5, num_tokens - 2, width)]
    plain = functools.partial(run, plain=True)
    return _compare(modules, shapes, plain, ours, device, precision=precision, training=training)


def _compare(
    modules: nn.ModuleList,
    shapes: Sequence[tuple[int, ...]],
    plain: Callable[..., Sequence[Tensor]],
    fused: Callable[..., Sequence[Tensor]],
    device: torch.device,
    *,
    precision: str,
    training: bool,
    products: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, Errors]:
    """Return the errors of what `fused` computes with copies of modules, on drawn inputs of these shapes."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def outcome(modules: nn.ModuleList, run: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
        dtype = next(modules.parameters()).dtype
        inputs = [tensor.to(dtype).clone().requires_grad_(training) for tensor in drawn]
        outputs = run(modules, *inputs)
        directions.extend(draw(output.shape) for output in outputs[len(directions) :])
        towards = [direction.to(output.dtype) for direction, output in zip(directions, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, [*inputs, *modules.parameters()], towards) if training else ()
        return [*(output.detach() for output in outputs), *gradients]

    drawn, directions = [draw(shape) for shape in shapes], list[Tensor]()
    with torch.inference_mode(False), torch.set_grad_enabled(training):
        copies = copy.deepcopy(modules).to(device).requires_grad_(training).eval()
        with torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH), _one_thread():
            exact = outcome(copy.deepcopy(copies).double(), plain)
        with _products(device), products(), autocast(device, precision), sdpa_kernel(SDPBackend.MATH), _one_thread():
            rounded = outcome(copies, plain)
        with autocast(device, precision):
            ours = outcome(copies, fused)
    num_outputs = len(directions)
    parts = {"results": slice(num_outputs), **({"gradients": slice(num_outputs, None)} if training else {})}
    return {
        name: Errors(_error(ours[part], exact[part]), _error(rounded[part], exact[part]))
        for name, part in parts.items()
    }


def _rounds(device: torch.device, precision: str) -> bool:
    """Tell whether a fused block multiplies in tf32."""
    return device.type == "cuda" and precision == "bf16"


def _tf32() -> contextlib.AbstractContextManager[Any]:
    """Return the context of `_Tf32`, whose base has no annotations."""
    return _Tf32()  # type: ignore[no-untyped-call]


class _Tf32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Cuts the factors of every product to tf32's 10 bits of fraction, as the kernels' instructions do.

    PyTorch's own tf32 would not do: a library may round where these instructions cut. This halves each error and takes
    the bias away; such results are up to five times as near to float64's.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        num_factors = PRODUCTS.get(func.overloadpacket, 0)
        kept = len(args) - num_factors
        return func(*args[:kept], *map(_cut, args[kept:]), **(kwargs or {}))


def _cut(factor: Tensor) -> Tensor:
    """Return float32 values without the last 13 bits of their fractions."""
    return (factor.view(torch.int32) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread: on a busy CPU several wait for each other longer than these patches take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _products(device: torch.device) -> Iterator[None]:
    """Let PyTorch multiply in float32 on a GPU, whatever the process has set."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest difference from `exact` as a share of the tensor's largest value; NaN where there is one."""
    shares = [
        (one.double() - other).abs().max() / other.abs().max().clamp(min=sys.float_info.min)
        for one, other in zip(ours, exact, strict=True)
    ]
    return float(torch.stack(shares).max())


def _require_alive(device: torch.device, reason: str) -> None:
    """Check that a GPU still works after an error.

    Raises:
        UsageError: It does not: no later work of this process can use it.
    """
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise UsageError(
            f"inner_block: the fused block ended in a CUDA error that this process cannot survive ({reason}); write "
            "inner_block: plain in the recipe, or give --device cpu"
        ) from None


def _first_line(text: str) -> str:
    line = one_line(text.strip().partition("\n")[0])
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} ..."
