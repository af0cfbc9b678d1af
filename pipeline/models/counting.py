"""Parameters, the paper's GMACs and true FLOPs of a model.

MACs and FLOPs come from one forward pass of an image of zeros in evaluation mode, whose products are counted and not
computed: zeros take their place. It takes place on the model's device; a model built under `torch.device("meta")` gets
parameters on the CPU that take no memory. The plain formulation is counted: a model that leaves out or fuses anything
has an attribute `plain`, which is set meanwhile. Compiled models may bypass the modules that are counted, so don't
count them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

PAPER_BATCH_SIZE = 1024
NORM_MACS_PER_ELEMENT = 4


def num_parameters(model: nn.Module) -> int:
    """Count the parameters of a model, with frozen ones, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def paper_macs(model: nn.Module, image_size: int) -> int:
    """Count the multiply-accumulates of one image by the paper's convention.

    Linear and convolution layers count their multiply-accumulates, LayerNorm and evaluation-mode batch norm 4
    for each element, average pooling 1 for each element of its output and, where adaptive, of its input;
    attention products, softmax, activations and sums count nothing. The model's training mode and hooks stay as
    they are.

    Args:
        model: Model of `(B, 3, image_size, image_size)` images.
        image_size: Side of the square image, pixels.

    Source: arXiv:2502.16762 Tables 3 and 6, whose columns follow to the last digit from the rules of thop
        (github.com/Lyken17/pytorch-OpCounter, vision/basic_hooks.py), which counts modules and not functions.
    """
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        macs += _module_macs(module, inputs, output)

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    try:
        with _Products():
            _forward_one_image(model, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return macs


def paper_gmacs_1024(model: nn.Module, image_size: int) -> float:
    """Return `paper_macs` of a batch of 1024, in 10^9: the paper's column "GFLOPs".

    Source: arXiv:2502.16762 Table 3.
    """
    return paper_macs(model, image_size) * PAPER_BATCH_SIZE / 1e9


def flops_per_image(model: nn.Module, image_size: int) -> int:
    """Count the floating-point operations of one image, as PyTorch's counter does.

    A multiply-accumulate is 2 operations. Matrix products and convolutions count, attention as its two products;
    norms, softmax, activations and sums do not.

    Args:
        model: Model of `(B, 3, image_size, image_size)` images.
        image_size: Side of the square image, pixels.

    Source: torch.utils.flop_counter.FlopCounterMode.
    """
    products = _Products()
    with products:
        _forward_one_image(model, image_size)
    return products.flops


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products and convolutions, and returns zeros of the result's shape instead.

    PyTorch's counter imports its compiler and SymPy, as do PyTorch's kernels for the device `meta`. This takes longer
    than everything else that is done here.

    Attributes:
        flops: Counted so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: int = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what would be skipped is imported for that

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten, packet = torch.ops.aten, func.overloadpacket
        if packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm) and args[-2].shape[-1] == args[-1].shape[-2]:
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
            return left.new_zeros(*left.shape[:-1], right.shape[-1])
        if packet is aten.convolution:
            images, weight, _, stride, padding, dilation, transposed, _, groups = args
            if transposed:
                self.flops += 2 * len(images) * prod(images.shape[2:]) * weight.numel()
            elif images.shape[1] == groups * weight.shape[1]:
                lengths = zip(images.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
                sides = [(size + 2 * pad - gap * (side - 1) - 1) // step + 1 for size, side, step, pad, gap in lengths]
                self.flops += 2 * len(images) * prod(sides) * weight.numel()
                return images.new_zeros(len(images), len(weight), *sides)
        with self:  # in inference mode an operation comes before its parts
            made_of_parts = func.decompose(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if made_of_parts is NotImplemented else made_of_parts


def _module_macs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Count the MACs of one module; containers and other modules count nothing."""
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.weight[0].numel()
    if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
        return inputs[0].numel() * NORM_MACS_PER_ELEMENT
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return inputs[0].numel() + output.numel()
    if isinstance(module, nn.AvgPool2d):
        return output.numel()
    return 0


def _forward_one_image(model: nn.Module, image_size: int) -> None:
    """Run one image of zeros through the model in evaluation mode."""
    weight: Tensor = next(model.parameters())
    tensors = {}
    if weight.is_meta:
        named = (*model.named_parameters(), *model.named_buffers())
        tensors = {name: torch.zeros((), dtype=one.dtype).expand(one.shape) for name, one in named}
        weight = torch.zeros((), dtype=weight.dtype)
    image = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
    # Which fused attention is known differs between releases; all of them know matrix products.
    with _plainly_evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        torch.func.functional_call(model, tensors, image)


@contextmanager
def _plainly_evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode and its plain formulation, and restore every module afterwards."""
    former = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in ("training", "plain")
        if hasattr(module, name)
    ]
    for module, name, _ in former:
        setattr(module, name, name == "plain")
    try:
        yield
    finally:
        for module, name, value in former:
            setattr(module, name, value)
