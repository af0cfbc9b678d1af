"""A model that normalises pixels itself and computes in a chosen precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.system.runtime import autocast


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
        """Return the logits of normalised images `(B, 3, H, W)`; in bf16 they may be bfloat16."""
        with autocast(inputs.device, self.precision):
            outputs: Tensor | tuple[Tensor, Tensor] = self.module(inputs)
        return outputs

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits of images `(B, 3, H, W)` uint8 on the module's device."""
        return self.logits(self.normalize(images))
