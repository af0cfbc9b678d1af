"""A trained model: uint8 images in, class probabilities out, with class names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pipeline.config.recipes import SQUEEZE
from pipeline.data.decoding import fit, in_rgb, upright
from pipeline.data.images import read_image
from pipeline.errors import DataError, NumericalError, UsageError, printable
from pipeline.losses import Outputs, probabilities
from pipeline.models.network import Network
from pipeline.system.neighbours import usable_cores
from pipeline.system.runtime import images_at_once

CPU = torch.device("cpu")
INPUT = "images"
OUTPUTS = ("probabilities", "class_logits", "distillation_logits")
"""Names of a model's outputs, in order; the last exists only with two heads."""
HEADS = ("class", "distillation")

Runner = Callable[[Tensor], tuple[Tensor, ...]]
"""Maps images `(B, 3, H, W)` uint8 to the model's OUTPUTS, `(B, K)` each."""

AnyImage = Path | str | bytes | bytearray | memoryview | Image.Image | NDArray[Any]
"""A path, a file's content, a PIL image of any mode and size, or uint8 `(H, W)` grey or `(H, W, 3)` RGB."""
WAYS_OUT = "a path, a file's bytes, a PIL image, or a uint8 array (H, W) or (H, W, 3); several as a list"


class PixelsToOutputs(nn.Module):
    """A network and the softmax behind it: what ONNX and TorchScript files hold."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the probabilities of images `(B, 3, H, W)` uint8 (the mean of two heads), then each head's logits."""
        outputs = self.network(images)
        return (probabilities(outputs), *(outputs if isinstance(outputs, tuple) else (outputs,)))


@dataclass(frozen=True)
class Transform:
    """Turns an image of any size and mode into a Classifier's input, as `pipeline prepare` does.

    Attributes:
        image_size: Side of the result, pixels.
        resize: How another shape becomes a square, see pipeline.data.decoding.fit.
    """

    image_size: int
    resize: str = SQUEEZE

    def __call__(self, image: AnyImage) -> Tensor:
        """Turn an image upright by its EXIF orientation, convert it to RGB and resize it.

        Returns:
            `(3, image_size, image_size)` uint8; the model normalises it.

        Raises:
            DataError: It is no image, or a damaged one.
        """
        return torch.from_numpy(self._pixels(image)).permute(2, 0, 1).contiguous()

    def _pixels(self, image: AnyImage) -> NDArray[np.uint8]:
        """Return `(image_size, image_size, 3)` uint8 RGB."""
        if isinstance(image, Path | str):
            try:
                return read_image(Path(image), self.image_size, resize=self.resize)
            except DataError as error:
                raise DataError(f"{printable(image)}: {error}") from error
        if isinstance(image, bytes | bytearray | memoryview):
            return read_image(bytes(image), self.image_size, resize=self.resize)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
                raise DataError(f"an array {image.shape} {image.dtype} is no image; pass uint8 (H, W) or (H, W, 3)")
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise DataError(f"a {type(image).__name__} is no image; pass {WAYS_OUT}")
        try:
            return fit(in_rgb(upright(image)), self.image_size, self.resize)
        except (OSError, ValueError) as error:  # PIL decodes an opened file only now
            raise DataError(f"an image of mode {image.mode}: {error}") from None


@dataclass(frozen=True, eq=False)
class Answer:
    """A model's answer to B images.

    Attributes:
        probabilities: `(B, K)` float32 on the CPU, the prediction: that of the one head, or the mean of both.
        heads: Probabilities of each head alone, `class` and, with two heads, `distillation`.
        class_names: K names.
    """

    probabilities: Tensor
    heads: Mapping[str, Tensor]
    class_names: tuple[str, ...]

    def top(self, count: int = 5, head: str | None = None) -> list[list[tuple[str, float]]]:
        """Return each image's most probable classes with their probabilities, the most probable first.

        Args:
            count: Classes for each image, at most K.
            head: One of `heads`; None for the prediction.
        """
        likely = self.probabilities if head is None else self.heads[head]
        # The sort is stable: of equal classes the first comes first, as with argmax.
        values, classes = likely.sort(dim=1, descending=True, stable=True)
        rows = zip(classes[:, :count].tolist(), values[:, :count].tolist(), strict=True)
        return [[(self.class_names[index], value) for index, value in zip(*row, strict=True)] for row in rows]


@dataclass(frozen=True)
class Prediction:
    """The answer to one image.

    Attributes:
        class_name: The most probable class.
        probability: Its probability.
        probabilities: Of every class, the most probable first.
    """

    class_name: str
    probability: float
    probabilities: Mapping[str, float] = field(repr=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class Classifier:
    """A trained model, from a checkpoint or from any file of an export; see pipeline.load.

    Attributes:
        runner: Computes the outputs on the device.
        class_names: K names.
        image_size: Side of the images it takes, pixels.
        resize: How an image of another shape becomes such a square, see pipeline.data.decoding.fit.
        device: Where it computes.
        precision: `fp32` or `bf16`; `int8` of a quantised export.
        format: `checkpoint`, or one of pipeline.inference.card.FILES.
        file: The file of its weights; None for a model without a file.
        config: The checkpoint's JSON, or the export's config.json.
        inner_block: What pipeline.models.students.use_inner_block returned; `none` also of an export's programs.
        outer_block: The same of use_outer_block.
    """

    runner: Runner
    class_names: tuple[str, ...]
    image_size: int
    resize: str = SQUEEZE
    device: torch.device = CPU
    precision: str = "fp32"
    format: str = "checkpoint"
    file: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    inner_block: str = "none"
    outer_block: str = "none"

    @property
    def module(self) -> nn.Module:
        """The student or teacher itself: normalised images `(B, 3, image_size, image_size)` float32 to logits.

        Its weights are this model's. A student of ours computes its blocks in fewer steps than they have layers, so
        hooks of these layers are not called; nor can it be traced or quantised. With `module.plain = True` every layer
        computes, and all of that works.

        Raises:
            UsageError: The model is an ONNX or TorchScript file, a program without such a module.
        """
        if not isinstance(self.runner, PixelsToOutputs):
            raise UsageError(
                f"{self.file}: {self.format} is a program without a module; load safetensors or the checkpoint"
            )
        return self.runner.network.module

    @property
    def transform(self) -> Transform:
        """The transform that makes images fit the model."""
        return Transform(self.image_size, self.resize)

    @property
    def batch_size(self) -> int:
        """Best number of images for one call."""
        module = self.runner.network.module if isinstance(self.runner, PixelsToOutputs) else None
        return images_at_once(self.device, self.image_size, module)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the class probabilities.

        Args:
            images: `(B, 3, image_size, image_size)` uint8 RGB, as Transform makes them, on any device.

        Returns:
            `(B, K)` float32, rows that sum to 1, on the model's device.

        Raises:
            UsageError: The images have another shape or dtype.
            DataError: The file holds another model than its config.json says.
            NumericalError: An output is not finite.
        """
        return self.outputs(images)["probabilities"]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name, see OUTPUTS; arguments, shapes and errors are those of a call."""
        sides = (3, self.image_size, self.image_size)
        if not isinstance(images, Tensor):
            raise UsageError(f"images: a {type(images).__name__}; a tensor is needed: torch.from_numpy makes one")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != sides or not len(images):
            raise UsageError(
                f"images: {tuple(images.shape)} {images.dtype}; (B, {', '.join(map(str, sides))}) uint8 is "
                "needed: stack what the transform returns, or add [None] to one"
            )
        outputs, shape = self.runner(images.to(self.device)), (len(images), len(self.class_names))
        if len(outputs) not in (2, 3) or any(getattr(output, "shape", None) != shape for output in outputs):
            raise DataError("the model's outputs are not what an export's are; export it again")
        if not torch.stack([output.isfinite().all() for output in outputs]).all():
            raise NumericalError("the model's output is not finite; train it again")
        return {name: output.float() for name, output in zip(OUTPUTS, outputs, strict=False)}

    def logits(self, images: Tensor) -> Outputs:
        """Return the logits of one head or of two, float32; arguments and errors are those of a call."""
        heads = tuple(self.outputs(images).values())[1:]
        return heads[0] if len(heads) == 1 else (heads[0], heads[1])

    @overload
    def predict(self, images: AnyImage) -> Prediction: ...  # type: ignore[overload-overlap]  # a text is one path

    @overload
    def predict(self, images: Sequence[AnyImage]) -> list[Prediction]: ...

    def predict(self, images: AnyImage | Sequence[AnyImage]) -> Prediction | list[Prediction]:
        """Name the class of an image, or of each of a list; `transform` is applied to it.

        Args:
            images: One image, or a list or tuple of any number; many are answered in batches.

        Returns:
            A prediction for one image; a list of them, in the same order, for a list.

        Raises:
            DataError: One is no image, or a damaged one.
            NumericalError: An output is not finite.
        """
        if not isinstance(images, list | tuple):
            return self._predict([cast(AnyImage, images)])[0]
        sizes = range(0, len(images), self.batch_size)
        return [one for start in sizes for one in self._predict(images[start : start + self.batch_size])]

    def _predict(self, images: Sequence[AnyImage]) -> list[Prediction]:
        """Answer to one batch, at least one image."""
        if len(images) > 1 and all(isinstance(image, Path | str | bytes) for image in images):
            with ThreadPoolExecutor(usable_cores()) as pool:  # decoding releases the interpreter's lock
                pixels = list(pool.map(self.transform, images))
        else:
            pixels = [self.transform(image) for image in images]  # one PIL image may be there twice
        likely = self(torch.stack(pixels)).cpu()
        answer = Answer(likely, {}, self.class_names)
        return [Prediction(*top[0], dict(top)) for top in answer.top(len(self.class_names))]

    def answer(self, pixels: NDArray[np.uint8]) -> Answer:
        """Answer to pixels `(B, image_size, image_size, 3)` uint8 RGB; errors are those of a call."""
        outputs = self.logits(self.place(pixels))
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        likely = torch.stack([probabilities(outputs), *map(probabilities, heads)]).cpu()
        return Answer(likely[0], dict(zip(HEADS, likely[1:], strict=False)), self.class_names)

    def place(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Copy pixels `(B, H, W, 3)` to the device, as `(B, 3, H, W)`."""
        return torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).contiguous()
