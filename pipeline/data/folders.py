"""Folders of images: as a data set (`read_folder`), or found and read batch by batch (`find_images`, `read_images`).

A data set's folder holds `train/<class>/<image>` and perhaps `test/<class>/<image>`; without `test` a split is cut off
train. Other entries beside `train` and `test` are left alone. Classes, and the images of a class, are ordered by the
bytes of their names: a folder is the same data set under every locale and file system.

Names that start with a dot and the files `Thumbs.db`, `desktop.ini`, `*.txt` and `*.md` are ignored silently.
Any other file that cannot be decoded is a bad file, and reported by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import stat
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.arrays import Images, Spill, SpilledImages
from pipeline.data.datasets import Split
from pipeline.data.images import SUFFIXES, BadFile, read_image, refusal
from pipeline.errors import DataError, UsageError, printable
from pipeline.system.storage import storage_errors
from pipeline.system.threads import prefetch

MAX_CLASSES_NAMED = 10
IGNORED_NAMES = ("thumbs.db", "desktop.ini")
IGNORED_SUFFIXES = (".txt", ".md")
READ_AT_ONCE = 4096


def list_folder(folder: Path, bad: list[BadFile]) -> dict[str, dict[str, list[Path]]]:
    """List the images of an image folder without opening them.

    Args:
        folder: See `read_folder`.
        bad: Files that are in no class or are no images are appended to it.

    Returns:
        For each split, the paths of each class by its name.

    Raises:
        UsageError: There is no such folder.
        DataError: It has no `train`, a class of `test` is not in `train`, or a class name is not UTF-8.
        StorageError: A folder cannot be listed.
    """
    if not folder.is_dir():
        raise UsageError(f"--from {folder}: no such folder; it must hold train/<class>/<image>")
    if not (folder / "train").is_dir():
        raise DataError(f"{folder}: no folder `train` in it; images go in train/<class>/<image>")
    listed = {name: _list_classes(folder, name, bad) for name in ("train", "test") if (folder / name).is_dir()}
    for name in listed.get("test", {}):
        if name not in listed["train"]:
            raise DataError(f"{folder / 'test' / name}: a class that `train` does not have; rename or remove it")
    return listed


def read_folder(
    folder: Path, image_size: int, *, skip_bad: bool, spill: Spill | None = None
) -> tuple[tuple[str, ...], Split, Split | None, list[BadFile]]:
    """Read an image folder.

    Args:
        folder: Holds `train/<class>/<image>` and perhaps `test/<class>/<image>`.
        image_size: Side of the result's images, pixels.
        skip_bad: Leave bad files out; otherwise one is enough to refuse the folder.
        spill: Where images go that are too many for RAM; None keeps any number in RAM.

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
    splits = {
        name: _read_split(folder, classes, class_names, image_size, bad, spill) for name, classes in listed.items()
    }
    if bad and not skip_bad:
        raise refusal(folder, bad)
    for split_name, split in splits.items():
        empty = [name for name in listed[split_name] if class_names.index(name) not in split.labels]
        if empty or not len(split):
            path = folder.joinpath(split_name, *empty[:1])
            raise DataError(f"{path}: no image in it; add some or remove the folder")
    return class_names, splits["train"], splits.get("test"), bad


def _list_classes(folder: Path, split: str, bad: list[BadFile]) -> dict[str, list[Path]]:
    """List each class's images.

    Args:
        folder: An image folder.
        split: The folder in it that holds the classes' folders; empty where that is `folder` itself.
        bad: Files that are in no class or are no images are appended to it.

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
            raise DataError(f"{entry}: class name is not UTF-8; rename the folder") from None
        classes[entry.name] = []
        for path in _list(entry):
            if path.is_dir():
                bad.append(_bad_file(folder, path, "a folder inside a class folder"))
            elif path.suffix.lower() not in SUFFIXES:
                bad.append(_bad_file(folder, path, f"not one of {' '.join(SUFFIXES)}"))
            else:
                classes[entry.name].append(path)
    return classes


def _is_ignored(path: Path) -> bool:
    """Whether a file is one of those that desktops and authors leave beside images."""
    if path.name.startswith("."):
        return True
    is_known = path.name.lower() in IGNORED_NAMES or path.suffix.lower() in IGNORED_SUFFIXES
    return is_known and not path.is_dir()


def _list(folder: Path) -> list[Path]:
    """List a folder, ascending by bytes, without ignored files."""
    with storage_errors(f"list {folder}"):
        return [entry for entry in sorted(folder.iterdir(), key=os.fsencode) if not _is_ignored(entry)]


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
        undecoded = _decode(folder, paths, image_size, images)
    else:
        with SpilledImages(spill.folder, shape) as spilled:
            undecoded = _decode(folder, paths, image_size, spilled)
            images = spilled.read()
    bad += undecoded.values()
    split = Split(images, labels)
    return split.take(np.setdiff1d(np.arange(len(paths)), list(undecoded))) if undecoded else split


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

    # Decoding releases the interpreter's lock. Pillow's warnings, of damaged metadata, do not concern the pixels.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        # In blocks: the pool makes a record of a kilobyte for each image that it is to read.
        for start in range(0, len(paths), READ_AT_ONCE):
            block = range(start, min(start + READ_AT_ONCE, len(paths)))
            for index, problem in zip(block, pool.map(read, block), strict=True):
                if problem is not None:
                    bad[index] = problem
    return bad


@dataclass(frozen=True, eq=False)
class ImageFile:
    """An image file, before or after it is read.

    Attributes:
        path: The file, or a name for it in messages.
        content: Its bytes; None reads them from `path`.
        label: Its class, if known.
        pixels: `(image_size, image_size, 3)` uint8 RGB after it is read.
        problem: Why it cannot be read, one line; None if it can, or before it is read.
    """

    path: Path
    content: bytes | None = None
    label: int | None = None
    pixels: NDArray[np.uint8] | None = None
    problem: str | None = None


def find_images(path: Path, left_out: Counter[str]) -> Iterator[ImageFile]:
    """Find the images of a folder and of all folders in it, in the order of their names' bytes.

    A file is an image if it has one of SUFFIXES. Names that start with a dot are left out. Symbolic links are followed;
    a folder that several links lead to is entered once.

    Args:
        path: A folder; or a single file, whatever its suffix.
        left_out: Counts the other files by suffix, without those that desktops and authors leave beside images.

    Yields:
        The images. One has a `problem` if there is no such file, or a folder cannot be listed or holds no image.
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
    is_empty = True
    for file in _walk(path, left_out):
        is_empty = False
        yield file
    if is_empty:
        yield ImageFile(path, problem=f"no image in it ({' '.join(SUFFIXES)})")


def find_labelled_images(folder: Path, class_names: Sequence[str]) -> tuple[list[ImageFile], list[BadFile]]:
    """Find images that lie in one folder for each class, named after it.

    Args:
        folder: Holds `test/<class>/<image>`; without `test`, or where a class is called so, `<class>/<image>`. Other
            folders beside `test` are left alone.
        class_names: The model's classes; a label is an index into them. A class may have no folder.

    Returns:
        The images, by class and then by name in the order of their bytes; and the files that are in no class or are no
        images.

    Raises:
        UsageError: There is no such folder.
        DataError: A folder has the name of no class, or there is no image.
        StorageError: A folder cannot be listed.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; it must hold <class>/<image>, or test/<class>/<image>")
    split = "test" if "test" not in class_names and (folder / "test").is_dir() else ""
    bad: list[BadFile] = []
    classes = _list_classes(folder, split, bad)
    labels = {name: label for label, name in enumerate(class_names)}
    for name in classes:
        if name not in labels:
            more = ["..."] if len(class_names) > MAX_CLASSES_NAMED else []
            known = ", ".join([*class_names[:MAX_CLASSES_NAMED], *more])
            path = folder / split / name
            raise DataError(f"{path}: not one of the model's {len(class_names)} classes ({known}); rename or remove it")
    files = [ImageFile(path, label=labels[name]) for name, paths in classes.items() for path in paths]
    if not files:
        raise DataError(f"{folder}: no image in it; they go in <class>/<image>, or test/<class>/<image>")
    return files, bad


def read_images(files: Iterable[ImageFile], image_size: int, batch_size: int) -> Generator[list[ImageFile], None, None]:
    """Read images on threads, the next batch while the caller works on the last.

    At most three batches of resized images are in memory, and one image in full for each thread. Pillow may warn of
    damaged metadata, which does not concern the pixels; the caller decides whether to show it.

    Args:
        files: What to read. A file with a problem is passed on as it is.
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
                    pending += (entry for entry in entries if not _is_ignored(entry))
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
