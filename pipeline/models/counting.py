"""Parameters, the paper's GMACs and true FLOPs of a model.

MACs and FLOPs come from one forward pass of an image of zeros in evaluation mode on the model's device; a model built
under `torch.device("meta")` is counted without any arithmetic. The plain formulation is counted: a model that leaves
out or fuses anything has an attribute `plain`, which is set meanwhile. Compiled models may bypass the modules that are
counted, so don't count them.
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
    """Count the floating-point operations of one image by PyTorch's counter.

    A multiply-accumulate is 2 operations. Matrix products and convolutions count, attention as its two products;
    norms, softmax, activations and sums do not.

    Args:
        model: Model of `(B, 3, image_size, image_size)` images.
        image_size: Side of the square image, pixels.

    Source: torch.utils.flop_counter.FlopCounterMode.
    """
    # Which fused attention the counter knows differs between releases; all of them know matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _forward_one_image(model, image_size)
    return int(counter.get_total_flops())


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
    weight = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
    with _plainly_evaluating(model), torch.no_grad():
        model(image)


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
