"""Images of any common format, and folders of them with one subfolder for each class, as uint8 RGB arrays.

A folder holds `train/<class>/<image>` and, unless a test split is to be cut off train,
`test/<class>/<image>`; whatever else lies beside `train` and `test` is left alone. Classes are ordered by the
bytes of their names and so are the images of a class, which makes the same folder the same data set under
every locale and file system.

Left out in silence: names that start with a dot, and files `Thumbs.db`, `desktop.ini`, `*.txt` and `*.md`.
Whatever else is not an image that can be decoded is a bad file: reported by name, never dropped unseen.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.datasets import Split
from pipeline.errors import DataError, StorageError, UsageError
from pipeline.image_arrays import Images, Spill, SpilledImages

# Pillow reads many more, some of them by starting other programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "PPM", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp")
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
IGNORED_NAMES = ("thumbs.db", "desktop.ini")
IGNORED_SUFFIXES = (".txt", ".md")
NUM_NAMED = 3
READ_AT_ONCE = 4096


@dataclass(frozen=True)
class BadFile:
    """A file of an image folder that is not an image that can be decoded.

    Attributes:
        path: Relative to the image folder, with `/`; bytes that are not UTF-8 are escaped.
        reason: What is wrong with it, one line.
    """

    path: str
    reason: str


def to_rgb(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """Convert an image of any mode to RGB and resize it, without keeping its aspect ratio.

    Transparency is composited on white. 16-bit grey is scaled to 8 bits and rounded. An animation gives its
    first frame. Resizing is PIL's antialiased bilinear, and left out where the size is right already.

    Args:
        image: The image.
        image_size: Side of the result, pixels.

    Returns:
        `(image_size, image_size, 3)` uint8 RGB.

    Raises:
        ValueError: The pixels are floating-point numbers, whose range nobody states.

    Differs: `convert("RGB")`, as in torchvision's ImageFolder, shows whatever colour lies under transparent
        pixels, and clips 16-bit grey to white.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        levels = np.array(image, np.int32)
        levels += 128
        levels //= 257
        image = Image.fromarray(levels.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image)


def read_image(source: Path | bytes, image_size: int) -> NDArray[np.uint8]:
    """Read one image file.

    The format is recognised by content, among FORMATS. A photograph is turned as its EXIF orientation says.

    Args:
        source: The file, or its content.
        image_size: Side of the result, pixels.

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
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            if max(image.size) > MAX_SIDE:
                raise DataError(f"{image.width} x {image.height} pixels, a side of more than {MAX_SIDE}")
            return to_rgb(upright(image), image_size)
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


def refusal(folder: Path, bad: Sequence[BadFile]) -> DataError:
    """Return the error that names a folder's first bad files."""
    named = "; ".join(f"{file.path} ({file.reason})" for file in bad[:NUM_NAMED])
    more = f"; and {len(bad) - NUM_NAMED} more" if len(bad) > NUM_NAMED else ""
    return DataError(f"{printable(folder)}: {len(bad)} bad: {named}{more}; mend them or add --skip-bad")


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF orientation says."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError):
        return image  # metadata that is no EXIF does not spoil the pixels
    return image if turn is None else image.transpose(turn)


def list_folder(folder: Path, bad: list[BadFile]) -> dict[str, dict[str, list[Path]]]:
    """List the images of an image folder without opening them.

    Args:
        folder: As of `read_folder`.
        bad: What is no file that can be read is added to it.

    Returns:
        Their paths by class name by split.

    Raises:
        UsageError: There is no such folder.
        DataError: It has no `train`, a class of `test` is not in `train`, or a class name is not UTF-8.
        StorageError: A folder cannot be listed.
    """
    if not folder.is_dir():
        raise UsageError(f"--from {printable(folder)}: no such folder; it must hold train/<class>/<image>")
    if not (folder / "train").is_dir():
        raise DataError(f"{printable(folder)}: no folder `train` in it; images go in train/<class>/<image>")
    listed = {name: list_classes(folder, name, bad) for name in ("train", "test") if (folder / name).is_dir()}
    for name in listed.get("test", {}):
        if name not in listed["train"]:
            path = printable(folder / "test" / name)
            raise DataError(f"{path}: a class that `train` does not have; rename or remove it")
    return listed


def read_folder(
    folder: Path, image_size: int, *, skip_bad: bool, spill: Spill | None = None
) -> tuple[tuple[str, ...], Split, Split | None, list[BadFile]]:
    """Read an image folder.

    Args:
        folder: Holds `train/<class>/<image>` and perhaps `test/<class>/<image>`.
        image_size: Side of the result's images, pixels.
        skip_bad: Leave bad files out; otherwise one is enough to refuse the folder.
        spill: Where the images go if they are too many for RAM; None keeps any number there.

    Returns:
        Class names (those of `train`, ascending by bytes), train, test or None where there is no `test`, and
        the bad files that were skipped.

    Raises:
        UsageError: There is no such folder.
        DataError: It has no `train`, a class of `test` is not in `train`, a class has no image, a class name
            is not UTF-8, or there are bad files.
        StorageError: A folder cannot be listed, or images cannot be spilled.
    """
    bad: list[BadFile] = []
    listed = list_folder(folder, bad)
    class_names = tuple(listed["train"])
    num_images = sum(len(paths) for classes in listed.values() for paths in classes.values())
    if spill is not None and num_images * image_size * image_size * 3 <= spill.max_bytes:
        spill = None
    splits = {name: _read_split(folder, each, class_names, image_size, bad, spill) for name, each in listed.items()}
    if bad and not skip_bad:
        raise refusal(folder, bad)
    for split_name, split in splits.items():
        empty = [name for name in listed[split_name] if class_names.index(name) not in split.labels]
        if empty or not len(split):
            path = printable(folder.joinpath(split_name, *empty[:1]))
            raise DataError(f"{path}: no image in it; add some or remove the folder")
    return class_names, splits["train"], splits.get("test"), bad


def list_classes(folder: Path, split: str, bad: list[BadFile]) -> dict[str, list[Path]]:
    """List each class's images.

    Args:
        folder: An image folder.
        split: The folder in it that holds the classes' folders; empty where it is `folder` itself.
        bad: Gains what is in no class or no image.

    Returns:
        Class name to images, both ascending by bytes.

    Raises:
        DataError: A class name is not UTF-8.
        StorageError: A folder cannot be listed.
    """
    classes: dict[str, list[Path]] = {}
    for entry in _list(folder / split):
        if not entry.is_dir():
            bad.append(_bad_file(folder, entry, "not in a class folder"))
            continue
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{printable(entry)}: class name is not UTF-8; rename the folder") from None
        classes[entry.name] = []
        for path in _list(entry):
            if path.is_dir():
                bad.append(_bad_file(folder, path, "a folder inside a class folder"))
            elif path.suffix.lower() not in SUFFIXES:
                bad.append(_bad_file(folder, path, f"not one of {' '.join(SUFFIXES)}"))
            else:
                classes[entry.name].append(path)
    return classes


def is_ignored(path: Path) -> bool:
    """Whether desktops and authors leave such files beside images."""
    if path.name.startswith("."):
        return True
    is_known = path.name.lower() in IGNORED_NAMES or path.suffix.lower() in IGNORED_SUFFIXES
    return is_known and not path.is_dir()


def printable(path: Path | str) -> str:
    """Return a path as text that any terminal and any JSON file can hold: one line, other bytes escaped."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _list(folder: Path) -> list[Path]:
    """List a folder, ascending by bytes, without what is left out in silence."""
    try:
        entries = sorted(folder.iterdir(), key=os.fsencode)
    except OSError as error:
        raise StorageError(f"{printable(folder)}: cannot be listed ({error.strerror})") from error
    return [entry for entry in entries if not is_ignored(entry)]


def _bad_file(folder: Path, path: Path, reason: str) -> BadFile:
    return BadFile(printable(path.relative_to(folder).as_posix()), reason)


def _read_split(
    folder: Path,
    classes: dict[str, list[Path]],
    class_names: tuple[str, ...],
    image_size: int,
    bad: list[BadFile],
    spill: Spill | None,
) -> Split:
    """Read the images of a split, in order; append to `bad` those that cannot be read."""
    paths = [path for class_paths in classes.values() for path in class_paths]
    labels = np.array([class_names.index(name) for name in classes], np.int64)
    labels = np.repeat(labels, [len(class_paths) for class_paths in classes.values()])
    shape = (len(paths), image_size, image_size, 3)
    if spill is None or not paths:
        images: Images = np.empty(shape, np.uint8)
        found = _decode(folder, paths, image_size, images)
    else:
        with SpilledImages(spill.folder, shape) as spilled:
            found = _decode(folder, paths, image_size, spilled)
            images = spilled.read()
    bad += found.values()
    split = Split(images, labels)
    return split if not found else split.take(np.setdiff1d(np.arange(len(paths)), list(found)))


def _decode(folder: Path, paths: list[Path], image_size: int, images: Any) -> dict[int, BadFile]:
    """Read each image into its row of `images`; return those that cannot be read, by row."""
    bad: dict[int, BadFile] = {}

    def read(index: int) -> BadFile | None:
        try:
            image = read_image(paths[index], image_size)
        except DataError as error:
            return _bad_file(folder, paths[index], str(error))
        images[index] = image
        return None

    # Decoding releases the interpreter's lock. What Pillow only warns of (damaged metadata) does no harm.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        # In blocks: the pool makes a record of a kilobyte for each image that it is to read.
        for start in range(0, len(paths), READ_AT_ONCE):
            block = range(start, min(start + READ_AT_ONCE, len(paths)))
            for index, problem in zip(block, pool.map(read, block), strict=True):
                if problem is not None:
                    bad[index] = problem
    return bad
