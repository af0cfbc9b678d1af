"""Users' image files: which they are, their pixels at the size of a data set, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config.recipes import SQUEEZE
from pipeline.data.decoding import fit, opened
from pipeline.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp", ".tif", ".tiff")
NUM_NAMED = 3


@dataclass(frozen=True)
class BadFile:
    """A file of an image folder that cannot be decoded as an image.

    Attributes:
        path: Relative to the image folder, with `/`; bytes that are not UTF-8 are escaped.
        reason: What is wrong with it, one line.
    """

    path: str
    reason: str


def read_image(
    source: Path | bytes, image_size: int, notes: list[str] | None = None, resize: str = SQUEEZE
) -> NDArray[np.uint8]:
    """Read one image file, see pipeline.data.decoding.opened, at the size of evaluation.

    Args:
        source: The file, or its content.
        image_size: Side of the result, pixels.
        notes: See pipeline.data.decoding.in_rgb.
        resize: See pipeline.data.decoding.fit.

    Returns:
        `(image_size, image_size, 3)` uint8 RGB.

    Raises:
        DataError: It is not an image, damaged, or too large; the message has no path.
    """
    with opened(source, notes) as image:
        return fit(image, image_size, resize)


def refusal(folder: Path, bad: Sequence[BadFile]) -> DataError:
    """Return the error that names a folder's first bad files."""
    named = "; ".join(f"{file.path} ({file.reason})" for file in bad[:NUM_NAMED])
    more = f"; and {len(bad) - NUM_NAMED} more" if len(bad) > NUM_NAMED else ""
    return DataError(f"{folder}: {len(bad)} bad: {named}{more}; mend them or add --skip-bad")
