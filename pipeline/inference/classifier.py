"""A trained model as its users want it: uint8 images in, class probabilities out, class names beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pipeline.data.images import read_image, to_rgb, upright
from pipeline.errors import DataError, NumericalError, UsageError, printable
from pipeline.losses import probabilities

INPUT = "images"
OUTPUTS = ("probabilities", "class_logits", "distillation_logits")
"""What a classifier returns, in this order; the last only with two heads."""

Runner = Callable[[Tensor], Mapping[str, Tensor]]
"""Maps images `(B, 3, H, W)` uint8 to the OUTPUTS there are by name, `(B, K)` float32 each."""


AnyImage = Path | str | bytes | Image.Image | NDArray[Any]
"""A path, a file's content, a PIL image of any mode and size, or uint8 `(H, W)` grey or `(H, W, 3)` RGB."""


class Classifier(nn.Module):
    """Normalisation, a model and softmax in one module: what is exported.

    Args:
        model: Maps normalised images to the logits of one head or of two.
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel, above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(tuple(mean)).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Classify images.

        Args:
            images: `(B, 3, H, W)` uint8 RGB.

        Returns:
            As of OUTPUTS, `(B, K)` float32 each: the probabilities (of two heads their mean), then each head's logits.
        """
        outputs = self.model((images.float() / 255 - self.mean) / self.std)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        return (probabilities(outputs), *heads)

    @torch.inference_mode()
    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Return what `forward` does by name, computed where the model is."""
        return dict(zip(OUTPUTS, self(images.to(self.mean.device)), strict=False))


@dataclass(frozen=True)
class Transform:
    """Turns an image of any size and mode into what an ImageClassifier takes, the way `pipeline prepare` does.

    Attributes:
        image_size: Side of the result, pixels.
    """

    image_size: int

    def __call__(self, image: AnyImage) -> Tensor:
        """Turn it upright by its EXIF orientation, convert it to RGB and resize it.

        Args:
            image: A PIL image, the path or the content of a file, or an array; see AnyImage.

        Returns:
            `(3, image_size, image_size)` uint8; not normalised, which the model does.

        Raises:
            DataError: It is no image, or a damaged one.
        """
        return torch.from_numpy(self._pixels(image)).permute(2, 0, 1).contiguous()

    def _pixels(self, image: AnyImage) -> NDArray[np.uint8]:
        """Return `(image_size, image_size, 3)` uint8 RGB."""
        if isinstance(image, Path | str):
            try:
                return read_image(Path(image), self.image_size)
            except DataError as error:
                raise DataError(f"{printable(image)}: {error}") from error
        if isinstance(image, bytes):
            return read_image(image, self.image_size)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
                raise DataError(f"an array {image.shape} {image.dtype} is no image; pass uint8 (H, W) or (H, W, 3)")
            image = Image.fromarray(image)
        try:
            return to_rgb(upright(image), self.image_size)
        except (OSError, ValueError) as error:  # a file that PIL opened is decoded only now
            raise DataError(f"an image of mode {image.mode}: {error}") from None


@dataclass(frozen=True, eq=False)
class ImageClassifier:
    """A model that has been loaded; see pipeline.load.

    Attributes:
        class_names: K names.
        image_size: Side of the images it takes, pixels.
        format: `checkpoint`, or one of pipeline.inference.exporting.FILES.
        config: What is known of it: the checkpoint's JSON, or the export's config.json.
        runner: Computes the outputs.
    """

    class_names: tuple[str, ...]
    image_size: int
    format: str
    config: Mapping[str, Any]
    runner: Runner

    def __call__(self, images: Tensor) -> Tensor:
        """Return the class probabilities.

        Args:
            images: `(B, 3, image_size, image_size)` uint8 RGB, as of Transform.

        Returns:
            `(B, K)` float32, rows that sum to 1.

        Raises:
            UsageError: The images have another shape or dtype.
            DataError: The file holds another model than its config.json says.
            NumericalError: An output is not finite.
        """
        return self.outputs(images)["probabilities"]

    def outputs(self, images: Tensor) -> Mapping[str, Tensor]:
        """Return `probabilities`, `class_logits` and, of two heads, `distillation_logits`; else as of a call."""
        sides = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != sides or not len(images):
            raise UsageError(
                f"images: {tuple(images.shape)} {images.dtype}; (B, {', '.join(map(str, sides))}) uint8 is "
                "needed: stack what the transform returns, or add [None] to one"
            )
        outputs = self.runner(images)
        shape = (len(images), len(self.class_names))
        if "probabilities" not in outputs or not all(
            isinstance(output, Tensor) and output.shape == shape for output in outputs.values()
        ):
            raise DataError("the model's outputs are not what an export's are; export it again")
        if not all(bool(output.isfinite().all()) for output in outputs.values()):
            raise NumericalError("the model's output is not finite; train it again")
        return outputs
