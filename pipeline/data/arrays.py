"""Images as arrays that may be larger than RAM: mapped files, rows of them, and files without a name.

Callers take slices or rows of images, and need not know how these are stored.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.system.storage import storage_errors

# Digested, summed or copied at once: fits a cache, and is enough for a disk.
CHUNK_BYTES = 2**22


class Images(Protocol):
    """Images `(N, H, W, 3)` uint8 RGB: an array, MappedImages, or a Selection."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, H, W, 3)`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        """Return the images of a slice, or of an `(n,)` int64 array."""


class MappedImages:
    """Images in a file, mapped into memory: the system reads pages on access, and drops them when memory is short.

    By default it reads one image after another, each with its surroundings. Told of all images in advance, it reads
    only these, many at once, which is many times faster: see benchmarks/README.md, "streaming".

    Args:
        descriptor: Of the file; it may be closed afterwards.
        shape: `(N, H, W, 3)`.
        offset: Where the images begin, bytes.

    Raises:
        ValueError: The file is too short.
        OSError: It cannot be mapped.
    """

    def __init__(self, descriptor: int, shape: tuple[int, ...], offset: int = 0) -> None:
        self.shape, self.nbytes, self._offset = shape, math.prod(shape), offset
        self._map = mmap.mmap(descriptor, offset + self.nbytes, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._map, np.uint8, self.nbytes, offset).reshape(shape)

    def __len__(self) -> int:
        """Return N."""
        return self.shape[0]

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        """Return the images of a slice, read-only, or of an `(n,)` int64 array."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            self._read_ahead(start, stop)
        else:
            for row in rows.tolist():
                self._read_ahead(row, row + 1)
        images: NDArray[np.uint8] = self._array[rows]
        return images

    def _read_ahead(self, start: int, stop: int) -> None:
        """Ask the system to start reading some images."""
        image_bytes = self.nbytes // len(self)
        begin = (self._offset + start * image_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_WILLNEED, begin, self._offset + stop * image_bytes - begin)


@dataclass(frozen=True, eq=False)
class Selection:
    """Some of the images of a file, in any order, read on demand.

    Attributes:
        images: The images of the file.
        rows: `(N,)` int64, the index of each selected image.
    """

    images: Images
    rows: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, H, W, 3)`."""
        return (len(self.rows), *self.images.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return self.images.nbytes // len(self.images) * len(self.rows)

    def __len__(self) -> int:
        """Return N."""
        return len(self.rows)

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        """Return the images of a slice, or of an `(n,)` int64 array."""
        return self.images[self.rows[rows]]


def select(images: Images, rows: NDArray[np.int64]) -> Images:
    """Return the images at `rows`, `(n,)` int64, in their order: a copy for an array, else a Selection."""
    if isinstance(images, Selection):
        return Selection(images.images, images.rows[rows])
    return Selection(images, rows) if isinstance(images, MappedImages) else images[rows]


def chunks(images: Images) -> Iterator[NDArray[np.uint8]]:
    """Yield all images in order, about CHUNK_BYTES at a time, each chunk contiguous."""
    size = max(1, CHUNK_BYTES * len(images) // max(images.nbytes, 1))
    for start in range(0, len(images), size):
        yield np.ascontiguousarray(images[start : start + size])


@dataclass(frozen=True)
class Spill:
    """Where images go that are too many for RAM.

    Attributes:
        folder: Holds a file without a name, which the system removes when its last user ends.
        max_bytes: Images of more bytes go there.
    """

    folder: Path
    max_bytes: int


class SpilledImages:
    """Images in a file without a name, written one by one in any order, from any thread, and then read.

    Use it as a context. Its end closes the file, which exists as long as the result of `read`.

    Args:
        folder: Where the file lies, made where missing.
        shape: `(N, H, W, 3)`.

    Raises:
        StorageError: The file cannot be made.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._folder = folder
        self._image_bytes = math.prod(shape[1:])
        with self._storage_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
            os.ftruncate(self._file.fileno(), shape[0] * self._image_bytes)

    def __enter__(self) -> SpilledImages:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def __setitem__(self, row: int, image: NDArray[np.uint8]) -> None:
        """Write an image, `(H, W, 3)`.

        Raises:
            StorageError: The disk is full or failed.
        """
        view, at = np.ascontiguousarray(image).data.cast("B"), row * self._image_bytes
        with self._storage_errors():
            while view:
                written = os.pwrite(self._file.fileno(), view, at)
                view, at = view[written:], at + written

    def read(self) -> MappedImages:
        """Return all images; what was not written is black."""
        return MappedImages(self._file.fileno(), self.shape)

    def _storage_errors(self) -> AbstractContextManager[None]:
        return storage_errors(f"write decoded images in {self._folder}", "; free space or rights there")
