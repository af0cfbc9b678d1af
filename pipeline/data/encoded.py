"""Images that are kept as their files' own bytes, one after another in one file, and decoded on demand."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config.recipes import SQUEEZE
from pipeline.data.arrays import StoredFile, check_rows
from pipeline.data.decoding import MAX_PIXELS, cut, fit, opened, shorter_side
from pipeline.errors import DataError
from pipeline.system.neighbours import num_ranks_here, usable_cores

QUALITY = 90
"""Of the JPEG that an image larger than `max_side` is kept as; part of a data set's identity."""
FIXED_POINT = 20  # bits behind the point of moments: their sums are exact, in any order


@dataclass(frozen=True, eq=False)
class Index:
    """What is known of each of N files without decoding it.

    Attributes:
        offsets: `(N, 2)` int64, where it begins and ends.
        sizes: `(N, 2)` int32, width and height of the upright image, pixels.
        sha256: `(N, 32)` uint8, of its bytes.
        names: `(N,)` UTF-8, its path relative to the folder that it comes from.
        moments: `(N, 6)` int64, see pipeline.data.collecting.moments; None where mean and std of the whole are known.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int32]
    sha256: NDArray[np.uint8]
    names: NDArray[np.bytes_]
    moments: NDArray[np.int64] | None = None

    def take(self, rows: NDArray[np.int64]) -> Index:
        """Return that of the files at `rows`, `(n,)` int64."""
        moments = None if self.moments is None else self.moments[rows]
        return Index(self.offsets[rows], self.sizes[rows], self.sha256[rows], self.names[rows], moments)


class EncodedImages:
    """Images that are decoded on demand; satisfies pipeline.data.arrays.Images.

    The bytes of a file are verified when a process reads it for the first time.

    Args:
        file: Holds the bytes of all files.
        path: Where it lies now.
        index: Of N files.
        image_size: Side of the images, pixels, S.
        resize: How an image becomes a square, one of pipeline.config.recipes.RESIZES.
        max_side: See `DatasetRecipe`; part of the identity.
    """

    def __init__(
        self, file: StoredFile, path: Path, index: Index, *, image_size: int, resize: str = "squeeze", max_side: int = 0
    ) -> None:
        self.path, self.index, self.image_size, self.resize, self.max_side = path, index, image_size, resize, max_side
        self.shape = (len(index.offsets), image_size, image_size, 3)
        self.file = file
        self._is_verified = np.zeros(len(index.offsets), bool)

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels, once they are decoded."""
        return len(self) * self.image_size**2 * 3

    @property
    def sizes(self) -> NDArray[np.int32]:
        """`(N, 2)`, width and height of the upright images, pixels."""
        return self.index.sizes

    def __len__(self) -> int:
        """Return N."""
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> NDArray[np.uint8]:
        """Return the evaluation pixels of a slice, or of an `(n,)` int64 array; see `read`."""
        return self.read(np.arange(len(self))[rows] if isinstance(rows, slice) else rows)

    def read(self, rows: NDArray[np.int64], boxes: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """Decode images, on all cores; safe in several threads.

        Args:
            rows: `(n,)` int64 in [0, N), in any order.
            boxes: `(n, 4)` int64, left, top, right and bottom in pixels of the upright image, the last two exclusive:
                what of each becomes the square. None gives the evaluation pixels, under the resize rule.

        Returns:
            `(n, S, S, 3)` uint8.

        Raises:
            DataError: A file is damaged; the message names it.
            StorageError: The file has changed since it was opened, or cannot be read.
        """
        check_rows(rows, len(self))
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)

        def make(place: int) -> None:
            row = int(rows[place])
            content = self._content(row)
            try:
                with opened(content) as image:
                    if boxes is None:
                        images[place] = fit(image, self.image_size, self.resize)
                    else:
                        images[place] = cut(image, self.image_size, boxes[place].tolist())
            except DataError as error:
                raise self._damaged(row, str(error)) from None

        self.file.announce(self._parts(rows))
        _for_each(range(len(rows)), make)
        self.file.check()
        return images

    def verify(self) -> None:
        """Read every file once.

        Raises:
            DataError: One is damaged; the message names it.
        """
        for start in range(0, len(self), 4096):
            _for_each(range(start, min(start + 4096, len(self))), self._content)
            self.file.check()

    def too_narrow(self) -> NDArray[np.int64]:
        """Return the rows of images that the resize rule cannot make squares of, see pipeline.data.decoding.fit."""
        if self.resize == SQUEEZE:
            return np.empty(0, np.int64)
        shorter, sides = shorter_side(self.image_size), np.maximum(self.sizes, 1).astype(np.int64)
        return np.flatnonzero(shorter * (shorter * sides.max(axis=1) // sides.min(axis=1)) > MAX_PIXELS)

    def select(self, rows: NDArray[np.int64]) -> EncodedImages:
        """Return the images at `rows`, `(n,)` int64, in their order."""
        return self._of(self.index.take(rows), self.image_size, self.resize)

    def shown(self, image_size: int, resize: str) -> EncodedImages:
        """Return the same images at another size, or under another rule."""
        return self._of(self.index, image_size, resize)

    def _of(self, index: Index, image_size: int, resize: str) -> EncodedImages:
        max_side = self.max_side
        return EncodedImages(self.file, self.path, index, image_size=image_size, resize=resize, max_side=max_side)

    def _parts(self, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return place and size of some files."""
        return [(start, stop - start) for start, stop in self.index.offsets[rows].tolist()]

    def _content(self, row: int) -> bytes:
        """Return a file's bytes; verify them unless that has been done. The caller asks whether all has changed."""
        start, stop = self.index.offsets[row].tolist()
        content = self.file.part(start, stop - start)
        if not self._is_verified[row]:
            if hashlib.sha256(content).digest() != self.index.sha256[row].tobytes():
                raise self._damaged(row, "its bytes are not those that were prepared")
            self._is_verified[row] = True
        return content

    def _damaged(self, row: int, reason: str) -> DataError:
        self.file.check()
        name = self.index.names[row].decode()
        return DataError(f"{self.file.name}: {name}: damaged ({reason}); run `pipeline prepare` again")


def _for_each(parts: Iterable[int], work: Callable[[int], object]) -> None:
    for _ in _pool().map(work, parts):  # raises what a thread raised
        pass


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, usable_cores() // num_ranks_here()), "decode")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
