"""The HDF5 file of a data set.

It holds, for each split `train`, `val` (where there is one) and `test`, a group with `images` (N, H, W, 3) uint8
and `labels` (N,) int64, both contiguous and uncompressed, so that images can be read where they lie;
where they come from a folder also `paths` (N,), each image's path relative to it;
beside them `class_names`, and the attributes `schema`, `source` and `sha256`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.arrays import Images, StoredImages, chunks
from pipeline.errors import DataError, StorageError
from pipeline.system.storage import WITHOUT_LOCKS, busy, cannot_lock, replacing, uses_locks

if TYPE_CHECKING:
    import h5py

SCHEMA = "titn-dataset/1"
# What HDF5 meets in a file that is none of its own, or by the addresses in a damaged one; others are the system's.
_ERRORS_OF_DAMAGE = (errno.EINVAL, errno.EOVERFLOW, errno.EISDIR)


@dataclass(frozen=True)
class Content:
    """What the file holds.

    Attributes:
        source: Where the images come from.
        class_names: K names.
        splits: By name, in the order of the file, images `(N, H, W, 3)` uint8 and labels `(N,)` int64.
        sha256: The recorded SHA-256 of the content without the paths, not verified.
        paths: For each split whose images come from a folder, their paths `(N,)`, UTF-8.
    """

    source: str
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[Images, NDArray[np.int64]]]
    sha256: str
    paths: Mapping[str, NDArray[np.bytes_]] = field(default_factory=dict)


def write_content(path: Path, content: Content) -> None:
    """Write the file whole or not at all, a few images at a time; equal contents give equal bytes.

    Args:
        path: The file, replaced; missing folders above it are made.
        content: What to write.

    Raises:
        StorageError: The file cannot be written.
    """
    import h5py  # which those who only look at images are spared

    with replacing(path) as descriptor:
        sink = _Sink(descriptor)
        with h5py.File(sink, "w", libver=("earliest", "v110")) as file:
            # Strings of fixed length: where the heap of others is damaged HDF5 can search it for ever.
            file.attrs["schema"] = np.bytes_(SCHEMA)
            file.attrs["source"] = np.bytes_(content.source)
            file.attrs["sha256"] = np.bytes_(content.sha256)
            encoded = [name.encode() for name in content.class_names]
            dtype = h5py.string_dtype("utf-8", max(map(len, encoded)))
            file["class_names"] = np.array(encoded, dtype)
            for name, (images, labels) in content.splits.items():
                stored, start = file.create_dataset(None, images.shape, np.uint8), 0
                for chunk in chunks(images):
                    stored[start : start + len(chunk)] = chunk
                    start += len(chunk)
                    if sink.error is not None:
                        raise sink.error
                file[f"{name}/images"] = stored
                file[f"{name}/labels"] = labels.astype("<i8")
                if name in content.paths:
                    file[f"{name}/paths"] = content.paths[name]
        if sink.error is not None:
            raise sink.error


def read_content(path: Path, max_bytes: int | None = None) -> Content:
    """Read the file, checking schema, types and shapes.

    Args:
        path: The file.
        max_bytes: If the images of all splits take more, they stay in the file and are read on demand.

    Raises:
        DataError: There is no such file, or it is not a data set.
        StorageError: The file cannot be read, or another program holds it.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=None if uses_locks() else False) as file:
            return _read(file, path, max_bytes)
    except FileNotFoundError:
        raise DataError(f"{path}: no prepared data set there; `pipeline prepare` makes it") from None
    except BlockingIOError as error:
        raise busy(path) from error
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        number, reason = error.errno if isinstance(error, OSError) else None, " ".join(str(error).split())
        if number in WITHOUT_LOCKS:
            raise cannot_lock(path, reason) from error
        if number is not None and number not in _ERRORS_OF_DAMAGE:
            raise StorageError(f"{path}: cannot be read ({os.strerror(number)})") from error
        raise DataError(f"{path}: not a prepared data set ({reason}); run `pipeline prepare` again") from error


def _read(file: h5py.File, path: Path, max_bytes: int | None) -> Content:
    """Read everything, or leave the images where they are."""
    if file.attrs["schema"].decode() != SCHEMA:
        raise ValueError(f"schema {file.attrs['schema']!r}, expected {SCHEMA!r}")
    file_size = path.stat().st_size
    encoded = _check(file["class_names"], 1, "|S", file_size)[()]
    class_names = tuple(name.decode() for name in encoded.tolist())
    names = [name for name in ("train", "val", "test") if name != "val" or name in file]
    stored = {name: _check(file[f"{name}/images"], 4, "|u1", file_size) for name in names}
    stay = max_bytes is not None and sum(images.nbytes for images in stored.values()) > max_bytes
    splits, paths = {}, {}
    for name in names:
        labels = _check(file[f"{name}/labels"], 1, "<i8", file_size)[()]
        num_samples, height, width, num_channels = stored[name].shape
        if height != width or num_channels != 3 or len(labels) != num_samples or num_samples == 0:
            raise ValueError(f"{name}: images of shape {stored[name].shape}, labels of shape {labels.shape}")
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise ValueError(f"{name}: labels outside 0 to {len(class_names) - 1}")
        splits[name] = (_leave(stored[name], path) if stay else stored[name][()], labels)
        if "paths" in file[name]:
            paths[name] = _check(file[f"{name}/paths"], 1, "|S", file_size)[()]
            if len(paths[name]) != num_samples:
                raise ValueError(f"{name}: {len(paths[name])} paths of {num_samples} images")
    return Content(file.attrs["source"].decode(), class_names, splits, file.attrs["sha256"].decode(), paths)


def _check(dataset: Any, ndim: int, dtype: str, file_size: int) -> Any:
    """Return an HDF5 dataset after checking its type, dimensions and size."""
    # Without this a size that the file cannot hold would be allocated before HDF5 notices.
    is_expected = dataset.ndim == ndim and dataset.dtype.str.startswith(dtype)
    if not is_expected or dataset.nbytes > file_size:
        raise ValueError(f"{dataset.name}: {dataset.dtype} of shape {dataset.shape}")
    return dataset


def _leave(dataset: Any, path: Path) -> StoredImages:
    """Return the images of an HDF5 dataset, to be read on demand; their digest is not verified."""
    import h5py

    layout, offset = dataset.id.get_create_plist().get_layout(), dataset.id.get_offset()
    if layout != h5py.h5d.CONTIGUOUS or dataset.external or offset is None:
        raise ValueError(f"{dataset.name}: not stored in one piece, which is needed of images that do not fit in RAM")
    with path.open("rb") as file:
        return StoredImages(file.fileno(), dataset.shape, offset, name=str(path))


class _Sink:
    """A file for HDF5 to write to that hides errors from it, because an error can make HDF5 end the process.

    After the first error, kept in `error`, writing does nothing.

    Args:
        descriptor: Of an empty file, open for reading and writing.
    """

    def __init__(self, descriptor: int) -> None:
        self.error: OSError | None = None
        self._descriptor, self._at = descriptor, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, relative to the start or the end; HDF5 uses no other."""
        self._at = offset + (os.fstat(self._descriptor).st_size if whence == os.SEEK_END else 0)
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def read(self, size: int) -> bytes:
        """Read at the position; h5py only checks for this method and calls `readinto`."""
        data = os.pread(self._descriptor, size, self._at)
        self._at += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        """Read at the position into a buffer."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: memoryview) -> int:
        """Write at the position."""
        view = memoryview(data).cast("B")
        try:
            while view and self.error is None:
                written = os.pwrite(self._descriptor, view, self._at)
                view, self._at = view[written:], self._at + written
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int) -> int:
        """Set the file's size."""
        try:
            if self.error is None:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.error = error
        return size

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""
