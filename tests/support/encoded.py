"""Images of sizes of their own, with the interface of an encoded store, in RAM."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.recipes import ViewRecipe
from pipeline.data.streaming import HostImages
from pipeline.views.views import Views


class EncodedImages:
    """As pipeline.data.encoded.EncodedImages; counts how often each image is read.

    Args:
        images: RGB, of any sizes.
        image_size: S.
    """

    def __init__(self, images: list[Image.Image], image_size: int) -> None:
        self.images = images
        self.shape = (len(images), image_size, image_size, 3)
        self.nbytes = int(np.prod(self.shape))
        self.sizes = np.array([image.size for image in images], dtype=np.int32)
        self.reads = np.zeros(len(images), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        return self.read(np.arange(len(self))[rows])

    def read(self, rows: NDArray[np.int64], boxes: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        np.add.at(self.reads, rows, 1)
        square = self.shape[1:3]
        made = np.zeros((len(rows), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows):
            image = self.images[row] if boxes is None else self.images[row].crop(tuple(boxes[place].tolist()))
            made[place] = np.asarray(image.resize(square, Image.Resampling.BILINEAR))
        return made


def photographs(num_images: int = 30, image_size: int = 12) -> EncodedImages:
    """Noise over ramps, of sizes from 9 to 40 pixels, some of them narrow."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(num_images):
        height, width = rng.integers(9, 41, 2)
        ramp = np.linspace(0, 150, width)[None, :, None] + rng.integers(0, 60, 3)
        images.append(Image.fromarray((ramp + rng.integers(0, 46, (height, width, 3))).astype(np.uint8)))
    return EncodedImages(images, image_size)


def views_of(images: EncodedImages, recipe: ViewRecipe, *, key: str = "") -> Views:
    labels = torch.arange(len(images)) % 7
    return Views(HostImages(images, torch.device("cpu")), labels, recipe, key=key)
