"""Image files wherever they lie: found in folders of any depth, and decoded a batch ahead in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import stat
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, UsageError
from pipeline.image_folders import SUFFIXES, BadFile, is_ignored, list_classes, printable, read_image
from pipeline.prefetch import prefetch

NUM_NAMED = 10


@dataclass(frozen=True, eq=False)
class ImageFile:
    """An image to be read, or that has been.

    Attributes:
        path: Where it lies, or how it is called.
        content: Its bytes, where they are not to be read from `path`.
        label: Its class, where that is known.
        pixels: `(image_size, image_size, 3)` uint8 RGB, once it has been read.
        problem: Why it cannot be read, one line; None where it can, or has not been tried yet.
    """

    path: Path
    content: bytes | None = None
    label: int | None = None
    pixels: NDArray[np.uint8] | None = None
    problem: str | None = None


def find_images(path: Path, left_out: Counter[str]) -> Iterator[ImageFile]:
    """Find the images of a folder and of all folders in it, in the order of their names' bytes.

    An image is what has one of the suffixes of pipeline.image_folders. Names that start with a dot are passed over.
    Symbolic links are followed; a folder that several lead to is entered once.

    Args:
        path: A folder; or a file, which alone is found, whatever its suffix.
        left_out: Counts the other files by suffix, but for those that desktops and authors leave beside images.

    Yields:
        The images, with a `problem` where there is no such file or a folder can't be listed or has no image at all.
    """
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        yield ImageFile(path, problem="no such file or folder" if missing else f"cannot be read: {error.strerror}")
        return
    if not is_folder:
        yield ImageFile(path)
        return
    none_found = True
    for found in _walk(path, left_out):
        none_found = False
        yield found
    if none_found:
        yield ImageFile(path, problem=f"no image in it ({' '.join(SUFFIXES)})")


def find_labelled_images(folder: Path, class_names: Sequence[str]) -> tuple[list[ImageFile], list[BadFile]]:
    """Find images that lie in a folder for each class, whose name says which.

    Args:
        folder: Holds `test/<class>/<image>` or, where it has no `test` or that is a class, `<class>/<image>`. Other
            folders beside `test` are left alone.
        class_names: The classes there may be; a label is an index into them. Any may be absent.

    Returns:
        The images, by class and then by name in the order of their bytes, and what is in no class or no image.

    Raises:
        UsageError: There is no such folder.
        DataError: A folder has the name of no class, or there is no image.
        StorageError: A folder cannot be listed.
    """
    if not folder.is_dir():
        raise UsageError(f"{printable(folder)}: no such folder; it must hold <class>/<image>, or test/<class>/<image>")
    split = "test" if "test" not in class_names and (folder / "test").is_dir() else ""
    bad: list[BadFile] = []
    classes = list_classes(folder, split, bad)
    labels = {name: label for label, name in enumerate(class_names)}
    for name in classes:
        if name not in labels:
            known = ", ".join(map(printable, class_names[:NUM_NAMED])) + (
                ", ..." if len(class_names) > NUM_NAMED else ""
            )
            path = printable(folder / split / name)
            raise DataError(f"{path}: not one of the model's {len(class_names)} classes ({known}); rename or remove it")
    files = [ImageFile(path, label=labels[name]) for name, paths in classes.items() for path in paths]
    if not files:
        raise DataError(f"{printable(folder)}: no image in it; they go in <class>/<image>, or test/<class>/<image>")
    return files, bad


def read_images(files: Iterable[ImageFile], image_size: int, batch_size: int) -> Generator[list[ImageFile], None, None]:
    """Read images on threads, the next batch while the caller works on the last.

    At most three batches of resized images are in memory, and one image in full for each thread. What Pillow warns of,
    damaged metadata for the most part, does no harm; the caller decides whether to show it.

    Args:
        files: What to read. Those with a problem are passed on as they are.
        image_size: Side of the pixels, pixels.
        batch_size: Files a batch; the last has what is left.

    Yields:
        The files in order, each with its pixels or its problem. Closing the iterator ends the threads.
    """

    def read(file: ImageFile) -> ImageFile:
        if file.problem is not None:
            return file
        try:
            pixels = read_image(file.path if file.content is None else file.content, image_size)
        except DataError as error:
            return dataclasses.replace(file, problem=str(error))
        return dataclasses.replace(file, content=None, pixels=pixels)

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        batches = prefetch(_batches(files, batch_size), lambda batch: list(pool.map(read, batch)))
        with contextlib.closing(batches):
            yield from batches


def _walk(folder: Path, left_out: Counter[str]) -> Iterator[ImageFile]:
    """Yield the images below a folder."""
    pending, entered = [folder], set[tuple[int, int]]()
    while pending:
        path = pending.pop()
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                if (status.st_dev, status.st_ino) not in entered:
                    entered.add((status.st_dev, status.st_ino))
                    entries = sorted(path.iterdir(), key=os.fsencode, reverse=True)
                    pending += (entry for entry in entries if not is_ignored(entry))
                continue
        except OSError as error:
            yield ImageFile(path, problem=f"cannot be read: {error.strerror}")
            continue
        if path.suffix.lower() in SUFFIXES:
            yield ImageFile(path)
        else:
            left_out[path.suffix.lower()] += 1


def _batches(files: Iterable[ImageFile], batch_size: int) -> Iterator[list[ImageFile]]:
    files = iter(files)
    while batch := list(itertools.islice(files, batch_size)):
        yield batch
