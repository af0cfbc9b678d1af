"""What a trained model says of images: all its heads together, and each alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.datasets import Channels
from pipeline.errors import NumericalError
from pipeline.losses import Outputs, probabilities
from pipeline.system.runtime import autocast
from pipeline.views.views import normalize

PIXELS_AT_ONCE = {"cpu": 256 * 32**2, "cuda": 4096 * 32**2}
"""Kind of device to pixels of a batch: on a CPU it should fit the cache, a GPU wants few, large launches."""
HEADS = ("class", "distillation")


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of B images.

    Attributes:
        probabilities: `(B, K)` float32 on the CPU, the prediction: that of the one head, or the mean of both.
        heads: What each head alone says, `class` and, where there are two, `distillation`; as `probabilities`.
        class_names: K names.
    """

    probabilities: Tensor
    heads: Mapping[str, Tensor]
    class_names: tuple[str, ...]

    def top(self, count: int = 5, head: str | None = None) -> list[list[tuple[str, float]]]:
        """Return each image's most probable classes with their probabilities, the most probable first.

        Args:
            count: How many; at most K.
            head: One of `heads`; None for the prediction.
        """
        likely = self.probabilities if head is None else self.heads[head]
        # A stable sort: of equal classes the first comes first, as by argmax.
        values, classes = likely.sort(dim=1, descending=True, stable=True)
        rows = zip(classes[:, :count].tolist(), values[:, :count].tolist(), strict=True)
        return [[(self.class_names[index], value) for index, value in zip(*row, strict=True)] for row in rows]


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A model with what comes before it: from uint8 pixels to logits.

    Attributes:
        model: Returns the logits of one head or of two, `(B, K)` each; in evaluation mode, on its device.
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel, above 0.
        precision: `fp32` or `bf16`.
    """

    model: nn.Module
    mean: Channels
    std: Channels
    precision: str = "fp32"

    def __call__(self, images: Tensor) -> Outputs:
        """Return the logits of images `(B, 3, H, W)` uint8 on the model's device."""
        with autocast(images.device, self.precision):
            outputs: Outputs = self.model(normalize(images, self.mean, self.std))
        return outputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """A trained model, whatever computes it, and what its inputs are.

    Attributes:
        network: Maps images `(B, 3, image_size, image_size)` uint8 on the device to the logits of one head or of two.
        class_names: K names.
        image_size: Side of the images it takes, pixels.
        device: Where it takes them.
    """

    network: Callable[[Tensor], Outputs]
    class_names: tuple[str, ...]
    image_size: int
    device: torch.device

    @property
    def batch_size(self) -> int:
        """Images that are best answered at once."""
        return max(1, PIXELS_AT_ONCE.get(self.device.type, PIXELS_AT_ONCE["cpu"]) // self.image_size**2)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Outputs:
        """Return the logits of one batch.

        Args:
            images: `(B, 3, image_size, image_size)` uint8 RGB, on the device.

        Raises:
            NumericalError: A logit is not finite.
        """
        outputs = self.network(images)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        if not torch.stack([head.isfinite().all() for head in heads]).all():
            raise NumericalError("a logit is not finite; train the model again")
        return outputs

    @torch.inference_mode()
    def answer(self, pixels: NDArray[np.uint8]) -> Answer:
        """Answer to one batch.

        Args:
            pixels: `(B, image_size, image_size, 3)` uint8 RGB.

        Raises:
            NumericalError: A logit is not finite.
        """
        outputs = self.logits(self.place(pixels))
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        likely = torch.stack([probabilities(outputs), *map(probabilities, heads)]).cpu()
        return Answer(likely[0], dict(zip(HEADS, likely[1:], strict=False)), self.class_names)

    def place(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Copy pixels `(B, H, W, 3)` to the device, as `(B, 3, H, W)`."""
        return torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).contiguous()
