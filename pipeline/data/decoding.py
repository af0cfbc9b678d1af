"""From an image file's bytes to pixels: upright, in RGB, and at the size that is asked for.

Pillow decodes and resizes, and releases the interpreter's lock meanwhile: threads share the work. No decoder is asked
for a smaller image, as a JPEG's could give, since its pixels are others. torchvision's decoder gives the same pixels
(tested), but takes longer once its tensor has become an image, and is deprecated since torchvision 0.29.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features

from pipeline.config.recipes import SQUEEZE
from pipeline.errors import DataError
from pipeline.system.memory import ram
from pipeline.system.neighbours import num_ranks_here
from pipeline.system.threads import Budget

# Pillow reads many more, some of them by starting other programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "PPM", "BMP", "TIFF")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_RULE = "upright"
"""What is done with a photograph's orientation: it is turned as its EXIF says. Recorded with what was made from it."""
DECODERS = ("pillow", "libjpeg", "libwebp")
"""What decides a photograph's pixels; lossless formats give the same whatever reads them."""
SHARE_OF_SHORTER_SIDE = 0.875  # what `crop` keeps of it, as 224 of 256 pixels
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # JPEG's; resizing goes through an image of `image_size` times the height
MAX_SCANS = 1000  # of a JPEG: encoders write ten, each a pass over the whole image
MAX_SCANNED = 32 * MAX_PIXELS  # pixels times scans
MAX_SEGMENTS = 512  # of a JPEG's header, 64 KiB each; Pillow copies what it has at every one, and keeps them all
MAX_JPEG_BYTES = 2**29  # more than MAX_PIXELS take
JPEG, SCAN, END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # what a JPEG begins with, each of its scans, and it, with
MARKER = re.compile(b"\xff[\x01-\xcf\xd8-\xfe]")  # within a scan's data, FF comes before 0 and restarts alone
BARE_MARKERS = (JPEG, END, b"\xff\x01")  # without a length behind them
JPEG_METADATA = {"exif", "xmp"}  # where Pillow finds a JPEG's orientation
MAX_LEVEL = 65_535  # of 16 bits
BYTES_PER_PIXEL = 20  # the most that decoding, turning and compositing take at once, measured for all modes and formats
SHARE_OF_RAM = 4  # a machine's threads decode at once what takes a quarter of the memory
UNUSED_ALPHA = "alpha is 0 everywhere, and ignored"
TOO_NARROW = "too narrow to be cut to a square of"


def decode(content: bytes, notes: list[str] | None = None) -> Image.Image:
    """Decode an image file's content; see `opened`, which also holds the memory that it takes."""
    with opened(content, notes) as image:
        return image


@contextlib.contextmanager
def opened(source: Path | bytes, notes: list[str] | None = None) -> Iterator[Image.Image]:
    """Decode one image file, and hold the memory that it takes until the context ends.

    The format is recognised by content, among FORMATS. A photograph is turned as its EXIF orientation says. Of several
    pages the first is read. A thread waits until others have decoded what would not fit into memory beside its image;
    it opens one image at a time.

    Args:
        source: The file, or its content.
        notes: See `in_rgb`.

    Yields:
        The image, upright and of mode RGB.

    Raises:
        DataError: It is not an image, damaged, or has more than MAX_PIXELS pixels or a side of more than MAX_SIDE; or
            it is a JPEG made to take minutes or gigabytes. The message has no path.

    Differs: torchvision's ImageFolder ignores the EXIF orientation.
    """
    with contextlib.ExitStack() as held:
        yield _decode(source, notes, held)


def no_file(path: Path) -> str:
    """Say in a phrase why a path is no regular file."""
    if path.exists():
        return "not a regular file"
    return "a link to nothing" if path.is_symlink() else "no such file"


def _decode(source: Path | bytes, notes: list[str] | None, held: contextlib.ExitStack) -> Image.Image:
    """Decode an image file, taking its memory into `held`; see `opened`."""
    try:
        if isinstance(source, Path) and not source.is_file():
            raise DataError(no_file(source))  # opening a named pipe would wait for its writer
        with _open(source) as file:
            content = file.getvalue() if isinstance(file, io.BytesIO) else b""
            start = _first_scan(content) if content.startswith(JPEG) else None
            image = Image.open(file, formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            if max(image.size) > MAX_SIDE:
                raise DataError(f"{image.width} x {image.height} pixels, a side of more than {MAX_SIDE}")
            if start is not None:
                image.decodermaxblock = len(content)  # by default the interpreter's lock is waited for every 64 KiB
                if not _has_one_scan(content, start, image):
                    _check_scans(content, *image.size)
            held.enter_context(_budget().take(image.width * image.height * BYTES_PER_PIXEL))
            return in_rgb(upright(image), notes)
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


def _open(source: Path | bytes) -> io.BytesIO | _BoundedFile:
    """Open an image file: a JPEG's whole content, and of other formats what Pillow asks for."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    file = _BoundedFile(source)
    if not file.peek(len(JPEG)).startswith(JPEG):
        return file
    with file:
        return io.BytesIO(file.read(MAX_JPEG_BYTES))


def _first_scan(content: bytes) -> int:
    """Return where the first scan of a JPEG begins, behind its marker; refuse one with too many segments before it."""
    for count, (marker, end) in enumerate(_markers(content)):
        if marker == SCAN:
            return end
        if count > MAX_SEGMENTS:
            raise DataError(f"more than {MAX_SEGMENTS} segments in its header")
    return len(content)


def _has_one_scan(content: bytes, start: int, image: Image.Image) -> bool:
    """Whether a JPEG's first scan has all of its components, and libjpeg takes no other."""
    return "progressive" not in image.info and content[start + 2 : start + 3] == bytes([len(image.getbands())])


def _check_scans(content: bytes, width: int, height: int) -> None:
    """Refuse a JPEG of so many scans that decoding takes minutes: in a progressive one, ten bytes can make one."""
    limit = min(MAX_SCANS, MAX_SCANNED // (width * height))
    if content.count(SCAN) <= limit:  # those that another picture or a film behind this one seems to have included
        return
    num_scans = 0
    for marker, _ in _markers(content):
        if marker == END:
            return
        num_scans += marker == SCAN
        if num_scans > limit:
            raise DataError(f"more than {limit} scans of {width} x {height} pixels")


def _markers(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield a JPEG's markers in their order, none from within their segments, and where each ends."""
    at = 0
    while (found := MARKER.search(content, at)) is not None:
        marker, at = found[0], found.end()
        yield marker, at
        if marker not in BARE_MARKERS:
            at += int.from_bytes(content[at : at + 2])


@functools.cache
def _budget() -> Budget:
    """Return the bytes for images that are being decoded by all threads of this process."""
    return Budget(ram() // (SHARE_OF_RAM * num_ranks_here()))


if hasattr(os, "register_at_fork"):  # what another thread held at the fork would never be given back
    os.register_at_fork(after_in_child=_budget.cache_clear)


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF orientation says."""
    image.load()  # Pillow turns a TIFF then, and removes its orientation
    if image.format == "JPEG" and not image.info.keys() & JPEG_METADATA:
        return image  # looking for it takes as long as a fiftieth of decoding
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, Warning):  # a host program may make warnings errors
        return image  # damaged metadata does not concern the pixels
    return image if turn is None else image.transpose(turn)


def in_rgb(image: Image.Image, notes: list[str] | None = None) -> Image.Image:
    """Convert an image of any mode to RGB; one that is RGB without transparency is returned itself.

    Transparency is composited on white, except where all pixels are transparent: such a channel is unused, as in many
    BMP files of 32 bits, and the image would become white. 16-bit grey is scaled to 8 bits and rounded. An animation
    gives its first frame.

    Args:
        image: The image.
        notes: UNUSED_ALPHA is appended where that is so.

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
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(image: Image.Image, image_size: int, resize: str = SQUEEZE) -> NDArray[np.uint8]:
    """Bring an image to the square of evaluation, by PIL's antialiased bilinear.

    Args:
        image: Of mode RGB.
        image_size: Side of the result, S, pixels.
        resize: `squeeze` makes it a square whatever its aspect ratio, and leaves one of the right size alone; `crop`
            brings the shorter side to int(S / 0.875) and cuts the middle out.

    Returns:
        `(S, S, 3)` uint8 RGB.

    Raises:
        DataError: It has no pixels, or is so narrow that `crop` would first make more than MAX_PIXELS pixels of it.

    Source: bit for bit torchvision's `Resize((S, S))`, or `Resize(int(S / 0.875))` and `CenterCrop(S)`, on PIL images.
    """
    if not min(image.size):
        raise DataError(f"{image.width} x {image.height} pixels: an empty image")
    if resize == SQUEEZE:
        return np.array(_resized(image, image_size, image_size))
    shorter, (width, height) = shorter_side(image_size), image.size
    longer = shorter * max(image.size) // min(image.size)
    if shorter * longer > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels, {TOO_NARROW} {image_size}")
    image = _resized(image, *((shorter, longer) if width <= height else (longer, shorter)))
    left, top = (round((side - image_size) / 2) for side in image.size)
    return np.array(image.crop((left, top, left + image_size, top + image_size)))


def shorter_side(image_size: int) -> int:
    """Return the side, pixels, to which `crop` brings the shorter one before it cuts out `image_size` of it."""
    return int(image_size / SHARE_OF_SHORTER_SIDE)


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def cut(image: Image.Image, image_size: int, box: Sequence[int]) -> NDArray[np.uint8]:
    """Cut a box out of an image and resize it, by PIL's antialiased bilinear.

    The box is cut out first: resizing it within the image would let pixels from beyond its border in.

    Args:
        image: Of mode RGB.
        image_size: Side of the result, S, pixels.
        box: Left, top, right and bottom, pixels, the last two exclusive; within the image and not empty.

    Returns:
        `(S, S, 3)` uint8 RGB, read-only.

    Source: bit for bit torchvision's `resized_crop` on PIL images, as in `RandomResizedCrop`.
    """
    left, top, right, bottom = box
    return np.asarray(_resized(image.crop((left, top, right, bottom)), image_size, image_size))


def decoders() -> dict[str, str]:
    """Return those of DECODERS that are here, with their versions; other versions may give other pixels."""
    turbo = features.version_feature("libjpeg_turbo")
    jpeg = f"turbo-{turbo}" if turbo else features.version_codec("jpg")
    versions = (PIL.__version__, jpeg, features.version_module("webp"))
    return {name: str(version) for name, version in zip(DECODERS, versions, strict=True) if version}


def named_decoders(versions: Mapping[str, str]) -> str:
    """Write the decoders among names and versions as `pillow 12.0.0, libjpeg turbo-3.1.2`."""
    return ", ".join(f"{name} {versions[name]}" for name in DECODERS if name in versions) or "what is not recorded"
