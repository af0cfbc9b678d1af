"""A model that normalises pixels itself and computes in a chosen precision; the last layer is never rounded to bf16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.system.runtime import deciding


def last_layers(module: nn.Module) -> list[nn.Module]:
    """Return the last linear or convolution layer of a module, in a list that is empty where it has none."""
    layers: list[nn.Module] = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return layers[-1:]


def logit_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers that make a model's logits: the last of each child whose name ends in `head`, else of all."""
    heads = [child for name, child in module.named_children() if name.endswith("head")]
    return [layer for head in heads or [module] for layer in last_layers(head)]


def rounds_logits(module: nn.Module, images: Tensor) -> bool:
    """Tell whether bf16 would round a model's logits, because another layer makes them than `logit_layers` says.

    Args:
        module: Built by `build_teacher` or `build_student`; its mode stays.
        images: `(B, 3, H, W)` float, on its device.
    """
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            outputs = module.eval()(images)
    finally:
        for part, mode in modes.items():
            part.training = mode
    return any(logits.dtype != torch.float32 for logits in (outputs if isinstance(outputs, tuple) else (outputs,)))


def decide_in_fp32(layer: nn.Module) -> None:
    """Let a layer that makes logits compute in its weights' precision in evaluation mode, under autocast too.

    Rounded to the 8 significant bits of bf16, the two largest logits are equal on 1 to 4 % of the images (see
    pipeline.labels.teacher), and of equal ones the lower class counts. So wherever a class is decided, by labelling,
    evaluation or prediction, the last layer is not rounded. Training is as if this had not been called.

    Args:
        layer: A linear or convolution layer; called with one that decides so already, this does nothing.
    """
    if _in_weights_precision not in layer._forward_hooks.values():
        layer.register_forward_hook(_in_weights_precision)


def _in_weights_precision(layer: nn.Module, inputs: tuple[Tensor, ...], rounded: Tensor) -> Tensor | None:
    """Compute a layer again that autocast has rounded, in evaluation mode; None keeps its output."""
    dtype = next(layer.parameters()).dtype
    if layer.training or rounded.dtype == dtype:
        return None
    with torch.autocast(rounded.device.type, enabled=False):
        exact: Tensor = layer.forward(inputs[0].to(dtype))
    return exact


class Network(nn.Module):
    """A model of uint8 pixels. The labelling teacher and every loaded model build on it.

    Args:
        module: Maps normalised images `(B, 3, H, W)` float32 to the logits of one head or of two, `(B, K)` each.
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel, pixels in [0, 1], above 0.
        precision: `fp32` or `bf16`.

    Attributes:
        module: The same module, in its mode and on its device.
        mean: `(3, 1, 1)` float32, on the module's device.
        std: As mean.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.module = module
        self.precision = precision
        device = next((parameter.device for parameter in module.parameters()), None)
        for name, values in (("mean", mean), ("std", std)):
            channels = torch.as_tensor(values, dtype=torch.float32, device=device).reshape(3, 1, 1)
            self.register_buffer(name, channels, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Turn pixels `(B, 3, H, W)` uint8 into the module's input, float32.

        The result equals that of pipeline.views.views.normalize, bit for bit. That function caches its constants, and
        torch.export would leave fake ones in the cache; here they are buffers.
        """
        return (images.float() / 255 - self.mean) / self.std

    def logits(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits of normalised images `(B, 3, H, W)`, float32 if `decide_in_fp32` knows the last layers."""
        with deciding(inputs.device, self.precision):
            outputs: Tensor | tuple[Tensor, Tensor] = self.module(inputs)
        return outputs

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits of images `(B, 3, H, W)` uint8 on the module's device."""
        return self.logits(self.normalize(images))
