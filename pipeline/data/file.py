"""A data set on disk: dataset.json, and beside it arrays of NumPy's format for each split, as `train-labels.npy`.

Of `store: pixels` the arrays are `images` (N, S, S, 3) uint8 and `labels` (N,) int64. Of `store: encoded` the bytes of
all files lie one after the other in files.bin, and the arrays are `labels`, `offsets` (N, 2) int64, where each file
begins and ends there, `sizes` (N, 2) int32, width and height of the upright image, and `sha256` (N, 32) uint8. Where
images come from a folder, `paths` (N,) are relative to it. dataset.json has the SHA-256 of every array, and that of the
content as a whole; and the rule by which images become squares, `resize`, of pixels only where it is not `squeeze`. No
file is mapped into memory: reading a mapped file that is cut short ends the process.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.config.recipes import ENCODED, PIXELS, RESIZES, SQUEEZE
from pipeline.data.arrays import Images, StoredFile, StoredImages, chunks
from pipeline.data.decoding import EXIF_RULE
from pipeline.data.encoded import QUALITY, EncodedImages, Index
from pipeline.errors import DataError
from pipeline.system.canonical import SEAL, is_sha256, is_whole, seal
from pipeline.system.storage import parse_json, read_if_exists, sha256_file, storage_errors, to_json, write_together

SCHEMA = "titn-dataset/2"
FILE, FORMER_FILE, BYTES = "dataset.json", "dataset.h5", "files.bin"
SPLITS = ("train", "val", "test")
# Of each array the type, and the shape of a sample.
_ARRAYS = {
    "images": (r"\|u1", r"(\d+), \1, 3"),
    "offsets": ("<i8", "2"),
    "sizes": ("<i4", "2"),
    "sha256": (r"\|u1", "32"),
    "labels": ("<i8", ""),
    "paths": (r"\|S[1-9]\d{0,6}", ""),
}
_PARTS = {PIXELS: ("images", "labels"), ENCODED: ("offsets", "sizes", "sha256", "labels", "paths")}
NAMES = (BYTES, *(f"{split}-{part}.npy" for split in SPLITS for part in _ARRAYS), FORMER_FILE, FILE)
"""Every file that a data set can have, of a former layout too; the one that makes it complete is the last."""

MAX_SIDE = 4096  # of the images that an encoded store gives, pixels

Channels = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True)
class Content:
    """What the files hold.

    Attributes:
        source: Where the images come from.
        class_names: K names.
        splits: By name, in the order of SPLITS: images `(N, S, S, 3)`, labels `(N,)` int64, and paths `(N,)` or None.
        sha256: The SHA-256 of the content without the paths; as it is read, the recorded one, not verified.
        statistics: Of an encoded store, mean and standard deviation of each channel over train.
        resize: How images become squares, or became them where pixels are stored.
    """

    source: str
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[Images, NDArray[np.int64], NDArray[np.bytes_] | None]]
    sha256: str
    statistics: tuple[Channels, Channels] | None = None
    resize: str = SQUEEZE


def write_content(path: Path, content: Content, *, may_move: bool = False) -> None:
    """Write the files, a few images at a time, and then let them replace what is there; equal contents, equal bytes.

    Args:
        path: The file dataset.json; missing folders above it are made.
        content: What to write.
        may_move: See `write_together`.

    Raises:
        StorageError: A file cannot be written.
    """
    folder, files = path.parent, dict[Path, Any]()
    description: dict[str, Any] = {
        "schema": SCHEMA,
        "store": PIXELS,
        "source": content.source,
        "class_names": content.class_names,
        "splits": {split: len(labels) for split, (_, labels, _) in content.splits.items()},
        "sha256": content.sha256,
        "files": {},
    }
    if content.resize != SQUEEZE:  # the rule of pixels that name none
        description["resize"] = content.resize
    for split, (images, labels, paths) in content.splits.items():
        parts: dict[str, Any] = {"images": images}
        if isinstance(images, EncodedImages):
            parts = {part: getattr(images.index, part) for part in ("offsets", "sizes", "sha256")}
            files[folder / BYTES] = images.path
            description |= {"store": ENCODED, "image_size": images.image_size, "resize": images.resize}
            description |= {"bytes": images.file.size, **encoding(images)}
        for part, values in {**parts, "labels": np.asarray(labels, np.int64), "paths": paths}.items():
            if values is not None:
                name = f"{split}-{part}.npy"
                files[folder / name] = _npy(values, name, description["files"])
    if content.statistics is not None:
        description["mean"], description["std"] = content.statistics
    files[path] = (to_json(seal(description)) for _ in range(1))  # in its turn, when all arrays are described
    write_together(files, may_move=may_move)
    with storage_errors(f"clean up in {folder}"):
        for name in NAMES:
            if folder / name not in files:
                (folder / name).unlink(missing_ok=True)


def encoding(images: EncodedImages) -> dict[str, Any]:
    """Return how the files of an encoded store were made, which is part of its identity."""
    return {"exif": EXIF_RULE, "max_side": images.max_side, "quality": QUALITY if images.max_side else None}


def _npy(values: Any, name: str, described: dict[str, Any]) -> Iterator[bytes | memoryview]:
    """Yield the parts of an array's file, and describe it at the end."""
    dtype = values.dtype.newbyteorder("<").str if isinstance(values, np.ndarray) else "|u1"
    header = _header(values.shape, dtype)
    digest = hashlib.sha256(header)
    yield header
    for part in chunks(values):
        view = np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8).data
        digest.update(view)
        yield view
    described[name] = {"dtype": dtype, "shape": list(values.shape), "sha256": digest.hexdigest()}


def _header(shape: Sequence[int], dtype: str) -> bytes:
    """Return NumPy's header of an array in C order."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": tuple(shape)})
    return file.getvalue()


def read_content(path: Path, max_bytes: int | None = None) -> Content:
    """Read the files, checking types, shapes and the SHA-256 of all arrays but the images.

    Args:
        path: The file dataset.json.
        max_bytes: If the images of all splits take more, they stay in their files and are read on demand. Those of an
            encoded store always do.

    Raises:
        DataError: There is no such file, it is of a former layout, or not a data set.
        StorageError: A file cannot be read.
    """
    data = read_if_exists(path)
    if data is None:
        if (former := path.with_name(FORMER_FILE)).exists():
            raise DataError(f"{former}: of a former layout; run `pipeline prepare` again")
        raise DataError(f"{path}: no prepared data set there; `pipeline prepare` makes it")
    try:
        description = parse_json(data, path)
        if description["schema"] != SCHEMA:
            raise ValueError(f"schema {description['schema']!r}, expected {SCHEMA!r}")
        if to_json(description) != data or SEAL not in description or not is_whole(description):
            raise ValueError("changed since it was written")
        return _read(description, path.parent, max_bytes)
    except (DataError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a prepared data set ({reason}); run `pipeline prepare` again") from error


def damaged_array(path: Path) -> Path:
    """Return the first array of a data set that is not as it was written; dataset.json itself if all are."""
    for name, described in parse_json(read_if_exists(path) or b"", path)["files"].items():
        if sha256_file(path.with_name(name)) != described["sha256"]:
            return path.with_name(name)
    return path


def _read(description: dict[str, Any], folder: Path, max_bytes: int | None) -> Content:
    """Read everything, or leave the images where they are."""
    store, source, class_names, counts = (description[key] for key in ("store", "source", "class_names", "splits"))
    if not class_names or not all(isinstance(text, str) for text in (source, *class_names)):
        raise ValueError(f"source {source!r}, {len(class_names)} class names")
    if not {"train", "test"} <= counts.keys() <= set(SPLITS) or not is_sha256(description["sha256"]):
        raise ValueError(f"splits {', '.join(counts)}, SHA-256 {description['sha256']!r}")
    if (resize := description.get("resize", SQUEEZE)) not in RESIZES:
        raise ValueError(f"resize {resize!r}")
    arrays: dict[str, dict[str, _Array]] = {split: {} for split in SPLITS if split in counts}
    for split, parts in arrays.items():
        for part in dict.fromkeys((*_PARTS[store], "paths")):
            if (name := f"{split}-{part}.npy") in description["files"] or part in _PARTS[store]:
                parts[part] = _Array.described(folder / name, part, description["files"][name], counts[split])
    if store == PIXELS:
        every = [parts["images"] for parts in arrays.values()]
        stay = max_bytes is not None and sum(images.num_bytes for images in every) > max_bytes
        stored: dict[str, Images] = {split: parts["images"].images(stay=stay) for split, parts in arrays.items()}
        statistics = None
    else:
        stored = _encoded(description, folder, arrays)
        statistics = _channels(description["mean"]), _channels(description["std"])
    splits = {}
    for split, parts in arrays.items():
        labels = parts["labels"].load()
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise ValueError(f"{split}-labels.npy: labels outside 0 to {len(class_names) - 1}")
        images = stored[split]
        paths: NDArray[np.bytes_] | None = images.index.names if isinstance(images, EncodedImages) else None
        if "paths" in parts and paths is None:
            paths = parts["paths"].load()
        splits[split] = images, labels, paths
    return Content(source, tuple(class_names), splits, description["sha256"], statistics, resize)


def _encoded(
    description: dict[str, Any], folder: Path, arrays: Mapping[str, Mapping[str, _Array]]
) -> dict[str, Images]:
    """Open the images of an encoded store."""
    path, size = folder / BYTES, description["bytes"]
    rules = {key: description[key] for key in ("image_size", "resize", "max_side")}
    if not (0 < rules["image_size"] <= MAX_SIDE and 0 <= rules["max_side"]):
        raise ValueError(", ".join(f"{key} {value!r}" for key, value in rules.items()))
    file = StoredFile.opened(path, size)
    images: dict[str, Images] = {}
    for split, parts in arrays.items():
        offsets, sizes, sha256, names = (parts[part].load() for part in ("offsets", "sizes", "sha256", "paths"))
        if offsets.min() < 0 or offsets.max() > size or (offsets[:, 0] >= offsets[:, 1]).any() or sizes.min() < 1:
            raise ValueError(f"{split}-offsets.npy, {split}-sizes.npy: outside {BYTES}, or nothing")
        images[split] = EncodedImages(file, path, Index(offsets, sizes, sha256, names), **rules)
    return images


def _channels(values: Any) -> Channels:
    red, green, blue = map(float, values)
    return red, green, blue


@dataclass(frozen=True)
class _Array:
    """An array in a file.

    Attributes:
        path: The file.
        dtype: Its type, as NumPy writes it.
        shape: Its shape.
        sha256: Of the whole file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def described(cls, path: Path, part: str, description: Mapping[str, Any], num_samples: int) -> _Array:
        """Check what dataset.json says of a file, and that the file begins and ends like that."""
        dtype, shape = description["dtype"], tuple(description["shape"])
        types, sample = _ARRAYS[part]
        is_whole_number = all(type(number) is int and number > 0 for number in shape)
        fits = re.fullmatch(sample, ", ".join(map(str, shape[1:]))) and re.fullmatch(types, dtype)
        if not is_whole_number or not fits or shape[0] != num_samples:
            raise ValueError(f"{path.name}: {dtype} of shape {shape} for {num_samples} samples")
        array = cls(path, dtype, shape, description["sha256"])
        if not path.is_file():
            raise ValueError(f"{path.name}: missing")
        with storage_errors(f"read {path}"), path.open("rb") as file:
            # Before anything is allocated: the file may hold less than it claims.
            size = os.fstat(file.fileno()).st_size
            if size != len(array.header) + array.num_bytes or file.read(len(array.header)) != array.header:
                raise ValueError(f"{path.name}: damaged: {size} bytes, not {dtype} of shape {shape}")
        return array

    @property
    def header(self) -> bytes:
        """The bytes before the values."""
        return _header(self.shape, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def load(self, *, verify: bool = True) -> NDArray[Any]:
        """Read the array."""
        array = np.empty(self.shape, self.dtype)
        view = array.reshape(-1).view(np.uint8).data
        with storage_errors(f"read {self.path}"), self.path.open("rb") as file:
            file.seek(len(self.header))
            num_read = file.readinto(view)
        digest = hashlib.sha256(self.header)
        if verify:
            digest.update(view)
        if num_read < len(view) or (verify and digest.hexdigest() != self.sha256):
            raise ValueError(f"{self.path.name}: damaged: its SHA-256 is not {self.sha256} as recorded")
        return array

    def images(self, *, stay: bool) -> Images:
        """Return images, of which the content's SHA-256 is told later; they may stay in the file."""
        if not stay:
            return self.load(verify=False)
        with storage_errors(f"read {self.path}"), self.path.open("rb") as file:
            return StoredImages(file.fileno(), self.shape, len(self.header), name=str(self.path))
