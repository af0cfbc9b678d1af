"""Parameters, the paper's GMACs and true FLOPs of a model.

MACs and FLOPs come from one evaluation-mode forward of a single image of zeros on the model's own device; a
model built under `torch.device("meta")` is counted without any arithmetic. What is counted is the plain formulation: a
model that leaves out or fuses anything has an attribute `plain`, which is set meanwhile. Don't count compiled models,
which may bypass the modules that are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PAPER_BATCH_SIZE = 1024
NORM_MACS_PER_ELEMENT = 4


def num_parameters(model: nn.Module) -> int:
    """Count the parameters of a model, frozen ones included, buffers not.

    Args:
        model: Any module.

    Returns:
        Number of parameters.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def paper_macs(model: nn.Module, image_size: int) -> int:
    """Count the multiply-accumulates of one image by the paper's convention.

    Linear and convolution layers count their multiply-accumulates, LayerNorm and evaluation-mode batch norm 4
    for each element, average pooling 1 for each element of its output and, where adaptive, of its input;
    attention products, softmax, activations and sums count nothing. The model's training mode and hooks are
    left as they were.

    Args:
        model: Model of `(B, 3, image_size, image_size)` images.
        image_size: Side of the square image, pixels.

    Returns:
        Multiply-accumulates of one image.

    Source: arXiv:2502.16762 Tables 3 and 6, whose columns come out to the last digit by the rules of thop
        (github.com/Lyken17/pytorch-OpCounter, vision/basic_hooks.py), which sees modules and not functions.
    """
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        macs += _module_macs(module, inputs, output)

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    try:
        _forward_one_image(model, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return macs


def paper_gmacs_1024(model: nn.Module, image_size: int) -> float:
    """Count what the paper's column "GFLOPs" holds: 10^9 multiply-accumulates of a batch of 1024.

    Args:
        model: Model of `(B, 3, image_size, image_size)` images.
        image_size: Side of the square image, pixels.

    Returns:
        10^9 multiply-accumulates by the convention of `paper_macs`.

    Source: arXiv:2502.16762 Table 3.
    """
    return paper_macs(model, image_size) * PAPER_BATCH_SIZE / 1e9


def flops_per_image(model: nn.Module, image_size: int) -> int:
    """Count the floating-point operations of one image by PyTorch's own counter.

    A multiply-accumulate is 2 operations. Matrix products and convolutions count, attention as its two products;
    norms, softmax, activations and sums do not.

    Args:
        model: Model of `(B, 3, image_size, image_size)` images.
        image_size: Side of the square image, pixels.

    Returns:
        Floating-point operations of one image.

    Source: torch.utils.flop_counter.FlopCounterMode.
    """
    # Which fused attention the counter knows changes from release to release; it knows matrix products in all of them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _forward_one_image(model, image_size)
    return int(counter.get_total_flops())


def _module_macs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Count what one module itself does; containers and everything else count nothing."""
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
    weight = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
    with _plainly_evaluating(model), torch.no_grad():
        model(image)


@contextmanager
def _plainly_evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode and its plain formulation, and every module of it back afterwards."""
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
