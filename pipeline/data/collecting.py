"""Image files are collected into one, on all cores, so that a killed process goes on where it was.

A journal beside the file has a line for each image, in the order in which they are listed. Both are only appended to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.arrays import StoredFile
from pipeline.data.decoding import EXIF_RULE, TOO_NARROW, decoders, no_file, opened
from pipeline.data.digests import NOT_A_FILE, Seen, status_of
from pipeline.data.encoded import FIXED_POINT, QUALITY, EncodedImages, Index
from pipeline.data.listing import relative_path
from pipeline.errors import DataError, printable
from pipeline.system.storage import FULL, sha256_file, storage_errors
from pipeline.system.threads import GROUP, grouped, in_order

MAX_BYTES = 2**29  # of a file, which is read whole
FORMAT = 1
GROUP_BYTES = 2**22  # of files that a thread reads before it hands them on, unless one has more
FLUSHED = 2**23  # bytes that the system is asked to bring to the disk while others are read
GRID = 8  # the mean and std of an image are those of at most so many rows and columns of it
_BYTES, _JOURNAL = "files.bin", "files.jsonl"


# How files begin whose bytes are kept as they are.
_KEPT = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


@dataclass(frozen=True)
class Collected:
    """What was collected of some files.

    Attributes:
        images: As many as there are files; those that cannot be read are empty.
        bad: By row, why a file cannot be read.
        noted: Rows of files of which something was noticed, see pipeline.data.decoding.in_rgb.
    """

    images: EncodedImages
    bad: dict[int, str]
    noted: list[int]


@dataclass
class _Found:
    """A line of the journal: an image file, and what was made of it.

    Attributes:
        name: Its path relative to the folder.
        seen: Its size, time of change and SHA-256.
        problem: Why it cannot be read; None if it can.
        is_noted: See `Collected`.
        length: Bytes that are kept of it.
        sha256: Of these, hexadecimal.
        size: Width and height of the upright image, pixels.
        moments: Three means and three of squares, see `moments`.
    """

    name: str
    seen: Seen
    problem: str | None = None
    is_noted: bool = False
    length: int = 0
    sha256: str = "00" * 32
    size: tuple[int, ...] = (0, 0)
    moments: tuple[int, ...] = (0,) * 6


class Collector:
    """Collects the files of a folder; use it as a context.

    What is there of an earlier process, with the same rules and decoders, is taken over as far as the files are listed
    in the same order, have the same size and time of change, and what is kept of them is whole.

    Args:
        folder: For the file and its journal, made where missing. One process at a time may use it.
        image_size: Side of the images that come of the files, pixels.
        resize: See `EncodedImages`.
        max_side: See `DatasetRecipe`.

    Attributes:
        seen: What is to be remembered of each file that was collected, see pipeline.data.digests.

    Raises:
        StorageError: Reading or writing there failed.
    """

    def __init__(self, folder: Path, *, image_size: int, resize: str, max_side: int) -> None:
        self._folder, self._path, self._max_side = folder, folder / _BYTES, max_side
        self._rules: dict[str, Any] = {"image_size": image_size, "resize": resize, "max_side": max_side}
        self.seen: dict[str, Seen] = {}
        self._size = self._journal_size = self._flushed = 0
        self._flush: Future[None] | None = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Collector:
        """Open or make the file and its journal."""
        journal = self._folder / _JOURNAL
        with storage_errors(f"write {self._path}", FULL):
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in (self._path, journal):
                if path.exists() and path.stat().st_nlink > 1:  # its other name is a finished data set's
                    path.unlink()
            self._bytes, self._journal = (
                self._held.enter_context(path.open("a+b", buffering=0)) for path in (self._path, journal)
            )
            self._flusher = self._held.enter_context(ThreadPoolExecutor(1, "flush"))
            self._former: Iterator[bytes] = self._held.enter_context(journal.open("rb"))
            rules = {"format": FORMAT, "max_side": self._max_side, "quality": QUALITY, "exif": EXIF_RULE, **decoders()}
            first = json.dumps(rules).encode() + b"\n"
            if next(self._former, b"") != first:
                self._former = iter(())  # a part of it may have been read ahead
                self._forget()
                _write(self._journal, first)
            self._journal_size = len(first)
        return self

    def __exit__(self, *_: object) -> None:
        """Close both."""
        self._held.close()

    def collect(
        self, groups: Mapping[str, list[Path]], root: Path, advance: Callable[[], object] = lambda: None
    ) -> dict[str, Collected]:
        """Collect files, all at once.

        Args:
            groups: The files by split.
            root: The folder that their names are relative to.
            advance: Called after each file.

        Raises:
            StorageError: A file cannot be read, or the disk is full or failed.
        """
        bad, noted, names = dict[int, str](), list[int](), list[bytes]()
        ends, sizes, sums, digests = array("q"), array("i"), array("q"), bytearray()
        with warnings.catch_warnings(action="ignore"):  # of damaged metadata, which does not concern the pixels
            for place, found in enumerate(self._found([*itertools.chain(*groups.values())], root)):
                advance()
                self.seen[found.name] = found.seen
                if found.problem is not None:
                    bad[place] = found.problem
                if found.is_noted:
                    noted.append(place)
                ends.append(self._size)
                sizes.extend(found.size)
                sums.extend(found.moments)
                names.append(printable(found.name).encode())
                digests += bytes.fromhex(found.sha256)
        with storage_errors(f"write {self._path}", FULL):
            if self._flush is not None:
                self._flush.result()  # the system tells of a failure once
            self._bytes.truncate(self._size)
            os.fsync(self._bytes.fileno())
        stops = np.array(ends, np.int64)
        index = Index(
            np.stack([np.concatenate([np.zeros(1, np.int64), stops])[:-1], stops], axis=1),
            np.array(sizes, np.int32).reshape(-1, 2),
            np.frombuffer(digests, np.uint8).reshape(-1, 32),
            np.array(names, np.bytes_),
            np.array(sums, np.int64).reshape(-1, 6),
        )
        file = StoredFile(self._bytes.fileno(), self._size, str(self._path))
        images, start, collected = EncodedImages(file, self._path, index, **self._rules), 0, {}
        for place in images.too_narrow().tolist():
            width, height = images.sizes[place]
            bad[place] = f"{width} x {height} pixels, {TOO_NARROW} {images.image_size}"
        for name, paths in groups.items():
            stop = start + len(paths)
            collected[name] = Collected(
                images.select(np.arange(start, stop)),
                {place - start: reason for place, reason in bad.items() if start <= place < stop},
                [place - start for place in noted if start <= place < stop],
            )
            start = stop
        return collected

    def _found(self, paths: list[Path], root: Path) -> Iterator[_Found]:
        """Yield what is found of each file, in order; what the journal lacks is appended."""
        done = 0
        for found, num_bytes in self._taken_over(paths, root):
            self._size, self._journal_size, done = self._size + found.length, self._journal_size + num_bytes, done + 1
            yield found
        with storage_errors(f"write {self._path}", FULL):
            self._forget()  # what is behind is of other files, or torn

        def group_size() -> int:
            return min(GROUP, max(1, GROUP_BYTES * done // max(1, self._size)))

        groups = grouped(paths[done:], group_size)
        with contextlib.closing(in_order(groups, lambda group: self._read_group(group, root))) as read:
            for every, content, lines in read:
                with storage_errors(f"write {self._path}", FULL):
                    _write(self._bytes, content)
                    _write(self._journal, lines)
                    self._start_flush()
                for found in every:
                    self._size, done = self._size + found.length, done + 1
                    yield found

    def _start_flush(self) -> None:
        """Have what was appended brought to the disk in a thread: all of it at the end would take a tenth longer."""
        if self._size - self._flushed >= FLUSHED and (self._flush is None or self._flush.done()):
            if self._flush is not None:
                self._flush.result()
            self._flushed, self._flush = self._size, self._flusher.submit(os.fsync, self._bytes.fileno())

    def _forget(self) -> None:
        """Cut off what is not taken over."""
        self._bytes.truncate(self._size)
        self._journal.truncate(self._journal_size)

    def _taken_over(self, paths: list[Path], root: Path) -> Iterator[tuple[_Found, int]]:
        """Yield what the journal has of the first files and is still so, with the length of each line."""
        stored = StoredFile(self._bytes.fileno(), 0, str(self._path))

        def parts() -> Iterator[tuple[Path, _Found | None, int, int]]:
            start = 0
            for path, line in zip(paths, self._former, strict=False):
                found = _parsed(line)
                yield path, found, start, len(line)
                start += found.length if found is not None else 0

        def check(path: Path, found: _Found | None, start: int, num_bytes: int) -> tuple[_Found, int] | None:
            if found is None or found.name != relative_path(path, root) or found.seen[:2] != status_of(path):
                return None
            if found.problem is None:
                if start + found.length > stored.size:
                    return None
                if hashlib.sha256(stored.part(start, found.length)).hexdigest() != found.sha256:
                    return None
            return found, num_bytes

        groups = grouped(parts())
        with contextlib.closing(in_order(groups, lambda group: [check(*part) for part in group])) as checked:
            for found in itertools.chain.from_iterable(checked):
                if found is None:
                    return
                yield found

    def _read_group(self, paths: list[Path], root: Path) -> tuple[list[_Found], bytes, bytes]:
        """Read and decode files; return what is found, and what to append to the file and to the journal."""
        every, contents, grids = zip(*(self._read(path, root) for path in paths), strict=True)
        decoded = [found for found in every if found.problem is None]
        for found, values in zip(decoded, moments([grid for grid in grids if grid]).tolist(), strict=True):
            found.moments = tuple(values)
        lines = (json.dumps(list(vars(found).values())) + "\n" for found in every)
        return list(every), b"".join(contents), "".join(lines).encode()

    def _read(self, path: Path, root: Path) -> tuple[_Found, bytes, bytes]:
        """Read and decode one file; return what is found but for the moments, the bytes to keep, and its grid."""
        name, status, notes = relative_path(path, root), status_of(path), list[str]()
        if status == NOT_A_FILE[:2]:
            return _Found(name, NOT_A_FILE, no_file(path)), b"", b""
        if not os.access(path, os.R_OK):
            return _Found(name, NOT_A_FILE, f"cannot be read: {os.strerror(errno.EACCES)}"), b"", b""
        if status[0] > MAX_BYTES:
            return _Found(name, (*status, sha256_file(path)), f"{status[0]} bytes, more than {MAX_BYTES}"), b"", b""
        with storage_errors(f"read {path}"), path.open("rb") as file:
            content = file.read(status[0])  # as much as would be allowed is allocated for it
        seen = *status, hashlib.sha256(content).hexdigest()
        try:
            with opened(content, notes) as image:
                kept, shown = self._kept(content, image)
                size, grid = shown.size, grid_of(shown)
        except DataError as error:
            return _Found(name, seen, str(error)), b"", b""
        sha256 = seen[2] if kept is content else hashlib.sha256(kept).hexdigest()
        return _Found(name, seen, None, bool(notes), len(kept), sha256, size), kept, grid

    def _kept(self, content: bytes, image: Image.Image) -> tuple[bytes, Image.Image]:
        """Return the bytes to keep of a file, and the image that they hold."""
        longest, file = max(image.size), io.BytesIO()
        if self._max_side and longest > self._max_side:
            width, height = (max(1, round(side * self._max_side / longest)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            image.save(file, "JPEG", quality=QUALITY)
        elif content.startswith(_KEPT) or (content[:4], content[8:12]) == (b"RIFF", b"WEBP"):
            return content, image
        else:
            image.save(file, "PNG")
        return file.getvalue(), image


def grid_of(image: Image.Image) -> bytes:
    """Return pixels of an image of mode RGB: GRID rows and columns evenly apart, or all where it has no more."""
    pixels: Any = image.load()  # resizing would give the interpreter's lock away, and wait for it as long as this takes
    rows, columns = (
        [(2 * step + 1) * side // (2 * count) for step in range(count)]
        for side, count in ((image.height, min(image.height, GRID)), (image.width, min(image.width, GRID)))
    )
    return bytes(itertools.chain.from_iterable(pixels[column, row] for row in rows for column in columns))


def moments(grids: Sequence[bytes]) -> NDArray[np.int64]:
    """Return the mean of each channel and of its square over the grids of N images, in levels and fixed point.

    Returns:
        `(N, 6)`: three means, three of squares, each times 2^FIXED_POINT, rounded down.
    """
    if not grids:
        return np.empty((0, 6), np.int64)
    counts = np.array([len(grid) // 3 for grid in grids])
    pixels = np.frombuffer(b"".join(grids), np.uint8).reshape(-1, 3).astype(np.int64)
    sums = np.add.reduceat(np.concatenate([pixels, pixels**2], axis=1), np.cumsum(counts) - counts)
    means: NDArray[np.int64] = (sums << FIXED_POINT) // counts[:, None]
    return means


def _parsed(line: bytes) -> _Found | None:
    """Return what a line of the journal says; None where it is torn."""
    with contextlib.suppress(ValueError, TypeError):
        name, (size, time, digest), *others = json.loads(line)
        if line.endswith(b"\n"):
            return _Found(name, (size, time, digest), *others)
    return None


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
