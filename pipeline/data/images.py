"""Users' image files: the accepted formats, and the conversion to RGB."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.errors import DataError
from pipeline.system.memory import ram
from pipeline.system.threads import Budget

# Pillow reads many more, some of them by starting other programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "PPM", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp", ".tif", ".tiff")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # JPEG's; resizing goes through an image of `image_size` times the height
MAX_LEVEL = 65_535  # of 16 bits
BYTES_PER_PIXEL = 20  # the most that decoding, turning and compositing take at once, measured for all modes and formats
SHARE_OF_RAM = 4  # threads decode at once what takes a quarter of the memory
NUM_NAMED = 3
UNUSED_ALPHA = "alpha is 0 everywhere, and ignored"


@dataclass(frozen=True)
class BadFile:
    """A file of an image folder that cannot be decoded as an image.

    Attributes:
        path: Relative to the image folder, with `/`; bytes that are not UTF-8 are escaped.
        reason: What is wrong with it, one line.
    """

    path: str
    reason: str


def read_image(source: Path | bytes, image_size: int, notes: list[str] | None = None) -> NDArray[np.uint8]:
    """Read one image file.

    The format is recognised by content, among FORMATS. A photograph is turned as its EXIF orientation says. Of several
    pages the first is read. A thread waits until others have decoded what would not fit into memory beside its image.

    Args:
        source: The file, or its content.
        image_size: Side of the result, pixels.
        notes: See `to_rgb`.

    Returns:
        `(image_size, image_size, 3)` uint8 RGB.

    Raises:
        DataError: It is not an image, damaged, or has more than MAX_PIXELS pixels or a side of more than MAX_SIDE;
            the message has no path.

    Differs: torchvision's ImageFolder ignores the EXIF orientation.
    """
    try:
        if isinstance(source, Path) and not source.is_file():
            raise DataError("not a regular file")  # opening a named pipe would wait for its writer
        with (
            io.BytesIO(source) if isinstance(source, bytes) else _BoundedFile(source) as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            if max(image.size) > MAX_SIDE:
                raise DataError(f"{image.width} x {image.height} pixels, a side of more than {MAX_SIDE}")
            with _budget().take(image.width * image.height * BYTES_PER_PIXEL):
                return to_rgb(upright(image), image_size, notes)
    except UnidentifiedImageError:
        num_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        raise DataError("empty" if num_bytes == 0 else "not an image of a known format") from None
    except Image.DecompressionBombError:
        raise DataError(f"more than {MAX_PIXELS} pixels") from None
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly anything on a damaged file
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot be read: {reason}") from error


class _BoundedFile(io.BufferedReader):
    """An image file that gives at most what it holds, so that a length claimed in its header takes no memory.

    A PNG of 268 bytes may claim a chunk of 4 GiB, for which Pillow asks at once. Being no path, it is not mapped into
    memory either: a mapped file that is cut while it is decoded ends the process.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._num_bytes = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._num_bytes - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


@functools.cache
def _budget() -> Budget:
    """Return the bytes for images that are being decoded by all threads of this process."""
    return Budget(ram() // SHARE_OF_RAM)


if hasattr(os, "register_at_fork"):  # what another thread held at the fork would never be given back
    os.register_at_fork(after_in_child=_budget.cache_clear)


def to_rgb(image: Image.Image, image_size: int, notes: list[str] | None = None) -> NDArray[np.uint8]:
    """Convert an image of any mode to RGB and resize it, without keeping its aspect ratio.

    Transparency is composited on white, except where all pixels are transparent: such a channel is unused, as in many
    BMP files of 32 bits, and the image would become white. 16-bit grey is scaled to 8 bits and rounded. An animation
    gives its first frame. Resizing is PIL's antialiased bilinear; an image of the right size is not resized.

    Args:
        image: The image.
        image_size: Side of the result, pixels.
        notes: UNUSED_ALPHA is appended where that is so.

    Returns:
        `(image_size, image_size, 3)` uint8 RGB.

    Raises:
        ValueError: The pixels are floating-point numbers, of unknown range, or whole numbers beyond 16 bits.

    Differs: `convert("RGB")`, as in torchvision's ImageFolder, shows whatever colour lies under transparent
        pixels, and clips 16-bit grey to white.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        levels = np.array(image, np.int32)
        if levels.min() < 0 or levels.max() > MAX_LEVEL:
            raise ValueError(f"grey levels from {levels.min()} to {levels.max()}, outside 0 to {MAX_LEVEL}")
        levels += 128
        levels //= 257
        image = Image.fromarray(levels.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[1] == 0:
            image.putalpha(255)
            if notes is not None:
                notes.append(UNUSED_ALPHA)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image)


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF orientation says."""
    image.load()  # Pillow turns a TIFF then, and removes its orientation
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError):
        return image  # damaged metadata does not concern the pixels
    return image if turn is None else image.transpose(turn)


def refusal(folder: Path, bad: Sequence[BadFile]) -> DataError:
    """Return the error that names a folder's first bad files."""
    named = "; ".join(f"{file.path} ({file.reason})" for file in bad[:NUM_NAMED])
    more = f"; and {len(bad) - NUM_NAMED} more" if len(bad) > NUM_NAMED else ""
    return DataError(f"{folder}: {len(bad)} bad: {named}{more}; mend them or add --skip-bad")
