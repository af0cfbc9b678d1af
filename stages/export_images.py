"""The real images that an export is checked on: a recipe's test split, or a folder's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.arrays import Images
from pipeline.data.images import SUFFIXES, read_image
from pipeline.errors import DataError, UsageError, printable
from pipeline.inference.descriptions import Description
from stages.shared.context import Context

NUM_CHECKED = 256
BATCH = 64


@dataclass(frozen=True, eq=False)
class RealImages:
    """Images, and their classes where these are known.

    Attributes:
        images: `(N, H, W, 3)` uint8, N at least 1.
        labels: `(N,)` int64, or None.
        description: What they are, for people.
        source: The data set's, one of pipeline.config.recipes.SOURCES; None for a folder.
        sha256: The data set's; None for a folder.
        evaluated_on: The split that the recipe's models are compared on; None for a folder.
    """

    images: Images
    labels: NDArray[np.int64] | None
    description: str
    source: str | None = None
    sha256: str | None = None
    evaluated_on: str | None = None

    def sample(self) -> Tensor:
        """Return at most NUM_CHECKED of them, evenly spread, `(n, 3, H, W)` uint8."""
        count = len(self.images)
        rows = np.linspace(0, count - 1, min(count, NUM_CHECKED)).astype(np.int64)
        return _to_tensor(self.images[rows])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images with their labels, BATCH at a time."""
        assert self.labels is not None
        for start in range(0, len(self.images), BATCH):
            part = slice(start, start + BATCH)
            yield _to_tensor(self.images[part]), torch.from_numpy(self.labels[part])


def from_recipe(context: Context, inputs: Description) -> RealImages:
    """Return a recipe's prepared test images.

    Args:
        context: The command's setting.
        inputs: The model's.

    Raises:
        DataError: There is no prepared data, or its classes or image size are not the model's.
    """
    try:
        dataset = context.dataset()
    except DataError as error:
        raise DataError(f"{error}, or give a folder of images with --data") from error
    for key in ("class_names", "image_size"):
        if getattr(dataset, key) != getattr(inputs, key):
            raise DataError(f"recipe {context.recipe.name}: its {key} is not the model's; give its own with --recipe")
    return RealImages(
        images=dataset.test.images,
        labels=dataset.test.labels,
        description=f"{context.recipe.name}, test",
        source=dataset.source,
        sha256=dataset.sha256,
        evaluated_on=dataset.evaluation[0],
    )


def from_folder(folder: Path, inputs: Description, *, labelled: bool) -> RealImages:
    """Return the images at any depth of a folder.

    Args:
        folder: The folder. A name that starts with a dot, of a file or a folder, is passed over.
        inputs: The model's.
        labelled: Whether every image must lie in a folder named after one of the model's classes; then all are
            returned, else at most NUM_CHECKED.

    Raises:
        UsageError: There is no such folder.
        DataError: There is no image in it, one cannot be read, or one has no class.
    """
    if not folder.is_dir():
        raise UsageError(f"--data {printable(folder)}: no such folder")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    paths = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    paths.sort(key=os.fsencode)
    if not paths:
        raise DataError(f"--data {printable(folder)}: no image in it ({' '.join(SUFFIXES)})")
    labels = None
    if labelled:
        classes = {name: label for label, name in enumerate(inputs.class_names)}
        for path in paths:
            if path.parent.name not in classes:
                raise DataError(
                    f"{printable(path)}: not in a folder named after a class, without which --int8 and --dtype bf16 "
                    "can't be measured; use <class>/<image>, or leave them out"
                )
        labels = np.array([classes[path.parent.name] for path in paths], np.int64)
    elif len(paths) > NUM_CHECKED:
        paths = [paths[row] for row in np.linspace(0, len(paths) - 1, NUM_CHECKED).astype(int)]
    images = np.empty((len(paths), inputs.image_size, inputs.image_size, 3), np.uint8)
    for row, path in enumerate(paths):
        try:
            images[row] = read_image(path, inputs.image_size)
        except DataError as error:
            raise DataError(f"{printable(path)}: {error}; mend or remove it") from error
    return RealImages(images, labels, printable(folder))


def _to_tensor(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
