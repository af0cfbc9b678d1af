"""Images as arrays that may be larger than RAM: in files, rows of them, and in files without a name.

Callers take slices or rows of images, and need not know how these are stored.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StorageError
from pipeline.system.storage import storage_errors

# Digested, summed or copied at once: fits a cache, and is enough for a disk.
CHUNK_BYTES = 2**22
_SEEKING = threading.Lock()
_ONLY_CACHED = getattr(os, "RWF_NOWAIT", 0)  # Linux: fail rather than wait for the disk


class Images(Protocol):
    """Images `(N, H, W, 3)` uint8 RGB: an array, StoredImages, EncodedImages, or a Selection."""

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


class StoredFile:
    """A file that is read in parts, so that one that is cut short or overwritten meanwhile ends in an error.

    The file stays open: one that is put in its place, as all of ours are, changes nothing here. By default the system
    reads one part after another. Told in advance of those that it has not cached, it reads many at once, which is many
    times faster: see benchmarks/README.md, "streaming".

    Args:
        descriptor: Of the file; it may be closed afterwards.
        size: Bytes that it must have at least.
        name: The file, as errors name it.

    Raises:
        ValueError: The file is too short.
        OSError: It cannot be opened.
    """

    def __init__(self, descriptor: int, size: int, name: str) -> None:
        self.name = name
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._version = self._stat()
        if self.size < size:
            raise ValueError(f"{name}: {self.size} bytes, but images up to {size}")

    @classmethod
    def opened(cls, path: Path, size: int) -> StoredFile:
        """Open a file of `size` bytes.

        Raises:
            ValueError: It is missing, or of another size.
            StorageError: It cannot be opened.
        """
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path.name}: missing, or not of {size} bytes")
        with storage_errors(f"read {path}"), path.open("rb") as file:
            return cls(file.fileno(), size, str(path))

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._version[0]

    def read(self, parts: Sequence[tuple[int, int]], view: memoryview) -> None:
        """Read parts of the file, each with its place and size, one after the other into a buffer.

        Raises:
            StorageError: The file has changed since it was opened, or cannot be read.
        """
        with storage_errors(f"read {self.name}"):
            self._read(parts, view)
        self.check()  # afterwards: what was read before a change is good

    def part(self, place: int, size: int) -> bytes:
        """Return a part of the file; whoever reads many asks `check` once, after the last.

        Raises:
            StorageError: The file has been cut short, or cannot be read.
        """
        content = b""
        with storage_errors(f"read {self.name}"):
            while len(content) < size:  # once, on nearly all file systems
                more = _pread(self._descriptor, size - len(content), place + len(content))
                if not more:
                    raise self._changed()
                content = content + more if content else more
        return content

    def check(self) -> None:
        """Ask whether the file is as it was when it was opened.

        Raises:
            StorageError: It has changed.
        """
        if self._stat() != self._version:
            raise self._changed()

    def announce(self, parts: Sequence[tuple[int, int]]) -> None:
        """Tell the system which parts, each with its place and size, will be read."""
        if hasattr(os, "posix_fadvise"):
            for place, size in parts:
                os.posix_fadvise(self._descriptor, place, size, os.POSIX_FADV_WILLNEED)

    def _read(self, parts: Sequence[tuple[int, int]], view: memoryview) -> None:
        count = done = 0
        if len(parts) > 1 and hasattr(os, "preadv"):
            with contextlib.suppress(OSError):  # from here on they are not cached, or this system cannot be asked
                for place, size in parts:
                    if os.preadv(self._descriptor, [view[done : done + size]], place, _ONLY_CACHED) < size:
                        break
                    count, done = count + 1, done + size
        self.announce(parts[count:])
        for place, size in parts[count:]:
            end = done + size
            while done < end:
                if hasattr(os, "preadv"):
                    num_read = os.preadv(self._descriptor, [view[done:end]], place)
                else:
                    content = _pread(self._descriptor, end - done, place)
                    num_read = len(content)
                    view[done : done + num_read] = content
                if not num_read:
                    raise self._changed()
                done, place = done + num_read, place + num_read

    def _stat(self) -> tuple[int, int]:
        """Return the file's size and time of change."""
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns

    def _changed(self) -> StorageError:
        way_out = "leave it alone, run again, and if it is damaged prepare the data again"
        return StorageError(f"{self.name}: cut short or overwritten while it was in use; {way_out}")


def _pread(descriptor: int, size: int, place: int) -> bytes:
    """Read from a place of a file as os.pread does, also where there is none, as on Windows."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, place)
    with _SEEKING:
        os.lseek(descriptor, place, os.SEEK_SET)
        return os.read(descriptor, size)


class StoredImages:
    """Images in a file, read on demand; see StoredFile.

    Args:
        descriptor: Of the file; it may be closed afterwards.
        shape: `(N, H, W, 3)`.
        offset: Where the images begin, bytes.
        name: The file, as errors name it.

    Raises:
        ValueError: The file is too short.
        OSError: It cannot be opened.
    """

    def __init__(self, descriptor: int, shape: tuple[int, ...], offset: int = 0, *, name: str = "images") -> None:
        self.shape, self.nbytes, self._offset = shape, math.prod(shape), offset
        self._file = StoredFile(descriptor, offset + self.nbytes, name)

    def __len__(self) -> int:
        """Return N."""
        return self.shape[0]

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        """Return the images of a slice, or of an `(n,)` int64 array, as an array of their own.

        Raises:
            StorageError: The file has changed since it was opened, or cannot be read.
        """
        if isinstance(rows, slice) and rows.step not in (None, 1):
            rows = np.arange(len(self))[rows]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            firsts, ends = np.array([start]), np.array([max(start, stop)])
        else:
            check_rows(rows, len(self))
            # Images that lie side by side are read together.
            firsts, ends = rows[np.diff(rows, prepend=-2) != 1], rows[np.diff(rows, append=-2) != 1] + 1
        images = np.empty(((ends - firsts).sum(), *self.shape[1:]), np.uint8)
        image_bytes = self.nbytes // len(self)
        places, sizes = firsts * image_bytes + self._offset, (ends - firsts) * image_bytes
        self._file.read(list(zip(places.tolist(), sizes.tolist(), strict=True)), images.reshape(-1).data)
        return images

    def select(self, rows: NDArray[np.int64]) -> Selection:
        """Return the images at `rows`, `(n,)` int64, still in the file."""
        return Selection(self, rows)


def check_rows(rows: NDArray[np.int64], num_images: int) -> None:
    """Raise IndexError unless all of `rows` are in [0, num_images)."""
    if len(rows) and not 0 <= rows.min() <= rows.max() < num_images:
        raise IndexError(f"images {rows.min()} to {rows.max()} of {num_images}")


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

    def select(self, rows: NDArray[np.int64]) -> Selection:
        """Return the images at `rows` of these, `(n,)` int64."""
        return Selection(self.images, self.rows[rows])


def select(images: Images, rows: NDArray[np.int64]) -> Images:
    """Return the images at `rows`, `(n,)` int64, in their order: a copy for an array, else read on demand."""
    if isinstance(images, np.ndarray):
        return images[rows]
    on_demand: Any = images
    chosen: Images = on_demand.select(rows)
    return chosen


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

    def read(self) -> StoredImages:
        """Return all images; what was not written is black."""
        return StoredImages(self._file.fileno(), self.shape, name=f"decoded images in {self._folder}")

    def _storage_errors(self) -> AbstractContextManager[None]:
        return storage_errors(f"write decoded images in {self._folder}", "; free space or rights there")
