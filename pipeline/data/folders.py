"""Folders of images: as a data set (`read_folder`), or found and read batch by batch (`find_images`, `read_images`).

pipeline.data.listing says which files of a data set's folder are images. One that cannot be decoded is a bad file, and
reported by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.recipes import SQUEEZE
from pipeline.data.arrays import Images, Spill, SpilledImages
from pipeline.data.collecting import Collected, Collector
from pipeline.data.datasets import Split
from pipeline.data.images import SUFFIXES, BadFile, read_image, refusal
from pipeline.data.listing import (
    NOTE_SUFFIXES,
    LeftOut,
    Listing,
    is_clutter,
    list_classes,
    list_entries,
    one_form,
    relative_name,
)
from pipeline.errors import DataError, UsageError
from pipeline.system.threads import grouped, in_order, prefetch

MAX_CLASSES_NAMED = 10


@dataclass
class Findings:
    """What a user should know of what was read.

    Attributes:
        bad: The bad files that were skipped.
        left_out: What of a folder is not used.
        unused_alpha: The images whose alpha is 0 everywhere, which was ignored.
        notes: What was decided, one line each.
    """

    bad: list[BadFile] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    unused_alpha: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_folder(
    listing: Listing,
    image_size: int,
    *,
    skip_bad: bool,
    resize: str = SQUEEZE,
    spill: Spill | None = None,
    collector: Collector | None = None,
    advance: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Split], Findings]:
    """Read what an image folder or a CSV file lists.

    Args:
        listing: From `pipeline.data.listing.list_source`.
        image_size: Side of the result's images, pixels.
        skip_bad: Leave bad files out; otherwise one is enough to refuse the folder.
        resize: See pipeline.data.decoding.fit.
        spill: Where images go that are too many for RAM; None keeps any number in RAM.
        collector: Collects the files themselves instead.
        advance: Called after each file.

    Returns:
        `train`, and `val` and `test` where they are listed, with the images' paths; and what was found.

    Raises:
        DataError: A class has no image, or there are bad files.
        StorageError: Images cannot be spilled, or files cannot be collected.
    """
    findings = Findings(list(listing.bad), listing.left_out, notes=list(listing.notes))
    if spill is not None and sum(listing.counts.values()) * image_size * image_size * 3 <= spill.max_bytes:
        spill = None
    collected: dict[str, Collected] = {}
    if collector is not None:
        paths = {name: list(itertools.chain(*classes.values())) for name, classes in listing.splits.items()}
        collected = collector.collect(paths, listing.root, advance)
    splits = {
        name: _read_split(listing, name, image_size, resize, findings, spill, collected.get(name), advance)
        for name in listing.splits
    }
    if findings.bad and not skip_bad:
        raise refusal(listing.source, findings.bad)
    require_images(
        listing,
        {name: {listing.class_names[label] for label in np.unique(split.labels)} for name, split in splits.items()},
    )
    return splits, findings


def require_images(listing: Listing, found: Mapping[str, AbstractSet[str]]) -> None:
    """Check that each class of a source has an image in each of its splits.

    Args:
        listing: The source.
        found: The classes with images, by split.

    Raises:
        DataError: One has none.
    """
    for split, classes in listing.splits.items():
        empty = [name for name in classes if name not in found[split]]
        if empty or not found[split]:
            name = "/".join([split, *empty[:1]])
            raise DataError(f"{listing.source}: {name}: no image in it; add some, or remove it")


def _read_split(
    listing: Listing,
    name: str,
    image_size: int,
    resize: str,
    findings: Findings,
    spill: Spill | None,
    collected: Collected | None,
    advance: Callable[[], object],
) -> Split:
    """Read the images of a split, in order; add to the findings those that cannot be read."""
    classes = listing.splits[name]
    paths = [path for class_paths in classes.values() for path in class_paths]
    labels = np.array([listing.class_names.index(name) for name in classes], np.int64)
    labels = np.repeat(labels, [len(class_paths) for class_paths in classes.values()])
    shape = (len(paths), image_size, image_size, 3)
    if collected is not None:
        images: Images = collected.images
        names = collected.images.index.names
        undecoded = {row: BadFile(names[row].decode(), reason) for row, reason in collected.bad.items()}
        findings.unused_alpha += (names[row].decode() for row in collected.noted)
    elif spill is None or not paths:
        images = np.empty(shape, np.uint8)
        undecoded = _decode(listing, paths, image_size, resize, images, findings, advance)
    else:
        with SpilledImages(spill.folder, shape) as spilled:
            undecoded = _decode(listing, paths, image_size, resize, spilled, findings, advance)
            images = spilled.read()
    if collected is None:
        names = np.array([relative_name(path, listing.root).encode() for path in paths], np.bytes_)
    findings.bad += undecoded.values()
    split = Split(images, labels, names)
    return split.take(np.setdiff1d(np.arange(len(paths)), list(undecoded))) if undecoded else split


def _decode(
    listing: Listing,
    paths: list[Path],
    image_size: int,
    resize: str,
    images: Any,
    findings: Findings,
    advance: Callable[[], object],
) -> dict[int, BadFile]:
    """Read each image into its row of `images`; return those that cannot be read, by row."""
    bad: dict[int, BadFile] = {}
    notes: dict[int, list[str]] = {}

    def read(index: int) -> BadFile | None:
        noted: list[str] = []
        try:
            image = read_image(paths[index], image_size, noted, resize)
        except DataError as error:
            return BadFile(relative_name(paths[index], listing.root), str(error))
        images[index] = image
        if noted:
            notes[index] = noted
        return None

    # Decoding releases the interpreter's lock. Pillow's warnings, of damaged metadata, do not concern the pixels.
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.closing(in_order(grouped(range(len(paths))), lambda group: list(map(read, group)))) as groups,
    ):
        for index, problem in enumerate(itertools.chain.from_iterable(groups)):
            advance()
            if problem is not None:
                bad[index] = problem
    findings.unused_alpha += (relative_name(paths[index], listing.root) for index in sorted(notes))
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
        notes: What was noticed as it was read, see pipeline.data.images.read_image.
    """

    path: Path
    content: bytes | None = None
    label: int | None = None
    pixels: NDArray[np.uint8] | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()


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
        folder: Holds `test/<class>/<image>`, in any case of letters; without `test`, or where a class is called so,
            `<class>/<image>`. Other folders beside `test` are left alone.
        class_names: The model's classes; a label is an index into them. A class may have no folder. Names are compared
            by their Unicode form NFC.

    Returns:
        The images, by class and then by name in the order of their bytes; and the files that are in no class.

    Raises:
        UsageError: There is no such folder.
        DataError: A folder has the name of no class, two have one name, or there is no image.
        StorageError: A folder cannot be listed.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; it must hold <class>/<image>, or test/<class>/<image>")
    listing = Listing(folder)
    labels = {one_form(name): label for label, name in enumerate(class_names)}
    tests = [entry for entry in list_entries(listing, folder) if entry.name.lower() == "test" and entry.is_dir()]
    within = tests[0] if tests and tests[0].name not in class_names else folder
    classes = list_classes(listing, within)
    for name in classes:
        if one_form(name) not in labels:
            more = ["..."] if len(class_names) > MAX_CLASSES_NAMED else []
            known = ", ".join([*class_names[:MAX_CLASSES_NAMED], *more])
            path = within / name
            raise DataError(f"{path}: not one of the model's {len(class_names)} classes ({known}); rename or remove it")
    files = [ImageFile(path, label=labels[one_form(name)]) for name, paths in classes.items() for path in paths]
    if not files:
        raise DataError(f"{folder}: no image in it; they go in <class>/<image>, or test/<class>/<image>")
    return files, listing.bad


def read_images(
    files: Iterable[ImageFile], image_size: int, batch_size: int, resize: str = SQUEEZE
) -> Generator[list[ImageFile], None, None]:
    """Read images on threads, the next batch while the caller works on the last.

    At most three batches of resized images are in memory, and one image in full for each thread, or as many as memory
    allows. Pillow may warn of damaged metadata, which does not concern the pixels; the caller decides whether to show
    it.

    Args:
        files: What to read. A file with a problem is passed on as it is.
        image_size: Side of the pixels, pixels.
        batch_size: Files a batch; the last has what is left.
        resize: See pipeline.data.decoding.fit.

    Yields:
        The files in order, each with its pixels or its problem. Closing the iterator ends the threads.
    """

    def read(file: ImageFile) -> ImageFile:
        if file.problem is not None:
            return file
        notes: list[str] = []
        try:
            pixels = read_image(file.path if file.content is None else file.content, image_size, notes, resize)
        except DataError as error:
            return dataclasses.replace(file, problem=str(error))
        return dataclasses.replace(file, content=None, pixels=pixels, notes=tuple(notes))

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        batches = prefetch(_batches(files, batch_size), lambda batch: list(pool.map(read, batch)))
        with contextlib.closing(batches):
            yield from batches


def _is_left_alone(path: Path) -> bool:
    """Whether a file or folder is one of those that systems and authors leave beside images."""
    return is_clutter(path) or (path.suffix.lower() in NOTE_SUFFIXES and not path.is_dir())


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
                    pending += (entry for entry in entries if not _is_left_alone(entry))
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
