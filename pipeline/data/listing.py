"""What an image folder or a CSV file lists: its classes, its splits, and what of it is not used. No image is opened.

A folder holds `train/<class>/<image>`, and perhaps `val/...` (or `valid`, `validation`) and `test/...`, in any case of
letters; or `<class>/<image>` alone. A CSV file has the columns `path`, `label` and perhaps `split`. Classes, and the
images of a class, are ordered by the bytes of their names: a folder is the same data set under every locale and file
system, and a CSV file that lists its images too.
"""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pipeline.data.images import SUFFIXES, BadFile
from pipeline.errors import DataError, UsageError, printable
from pipeline.system.storage import read_bytes, storage_errors

# Names of splits in small letters, and what each means.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# What systems leave beside images (Synology, macOS, Windows), in small letters.
SYSTEM_NAMES = ("@eadir", "__macosx", "thumbs.db", "desktop.ini")
NOTE_SUFFIXES = (".txt", ".md")
DELIMITERS = (",", ";", "\t")
NUM_NAMED = 3
WAYS = "images go in train/<class>/<image>, or all in <class>/<image>"

Classes = dict[str, list[Path]]


@dataclass
class LeftOut:
    """What of a source is not used.

    Attributes:
        names: For each kind of entry, in the singular as `other folder`, the paths relative to the source.
    """

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, path: str) -> None:
        """Note an entry that is not used."""
        self.names.setdefault(kind, []).append(printable(path))

    def as_json(self) -> list[dict[str, object]]:
        """Return kind, number and the first names of each kind, as plain JSON values."""
        return [
            {"kind": kind, "count": len(names), "names": names[:NUM_NAMED]}
            for kind, names in sorted(self.names.items())
        ]


@dataclass
class Listing:
    """What a folder or a CSV file lists.

    Attributes:
        source: The folder or the file.
        class_names: K names, ascending by bytes.
        splits: `train`, perhaps `val` and `test`: for each class that has images there, its images, in order.
        bad: Entries that are in no class, or folders inside a class.
        left_out: What is not used.
        notes: What was decided, one line each.
    """

    source: Path
    class_names: tuple[str, ...] = ()
    splits: dict[str, Classes] = field(default_factory=dict)
    bad: list[BadFile] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def root(self) -> Path:
        """The folder that names of images are relative to."""
        return self.source.parent if self.source.is_file() else self.source

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each split."""
        return {name: sum(map(len, classes.values())) for name, classes in self.splits.items()}

    def add_bad(self, path: Path, reason: str) -> None:
        """Note a bad entry."""
        self.bad.append(BadFile(relative_name(path, self.root), reason))


def relative_name(path: Path, root: Path) -> str:
    """Name a file below `root` in one line that can be printed, with `/`."""
    return printable(relative_path(path, root))


def relative_path(path: Path, root: Path) -> str:
    """Return the path of a file below `root`, with `/`, as `in_utf8`."""
    text, folder = os.fspath(path), os.path.join(root, "")  # noqa: PTH118 - ten times as fast, for a million files
    if os.sep == "/" and text.startswith(folder):
        return in_utf8(text.removeprefix(folder))
    return in_utf8(path.relative_to(root).as_posix())


def in_utf8(name: str) -> str:
    """Return a file's name as its bytes say in UTF-8, whatever the locale takes them for."""
    return os.fsencode(name).decode(errors="surrogateescape")


def list_source(source: Path) -> Listing:
    """List the images of a folder or of a CSV file without opening them.

    Args:
        source: The folder, or a file with the columns `path` (relative to the file's folder), `label` and perhaps
            `split`, separated by commas, semicolons or tabs; see this module.

    Raises:
        UsageError: There is no such folder or file.
        DataError: It has no training images' folder, two folders for one split, a class of another split that `train`
            does not have, class names that are not UTF-8 or one name in two Unicode forms; or the file is no such list.
        StorageError: A folder cannot be listed, or the file cannot be read.
    """
    listing = Listing(source)
    if source.is_file():
        listed = _list_csv(listing)
    elif source.is_dir():
        listed = _list_folder(listing)
    else:
        raise UsageError(f"--from {source}: no such folder or file; {WAYS}, or are listed in a .csv file")
    listing.class_names = tuple(listed["train"])
    for name in ("train", "val", "test"):
        if name in listed:
            listing.splits[name] = _under_names_of_train(listing, name, listed)
    return listing


def one_form(name: str) -> str:
    """Return a class name in Unicode's form NFC: macOS writes `é` as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def by_one_form(names: Iterable[str], where: object) -> dict[str, str]:
    """Map class names from their form NFC.

    Raises:
        DataError: Two are the same but for the form.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(one_form(name), name)
        if other != name:
            raise DataError(
                f"{where}: the classes {other!a} and {name!a} are one name in two Unicode forms (NFC and "
                "NFD); merge them"
            )
    return known


def list_classes(listing: Listing, folder: Path) -> Classes:
    """List the images of each class of a folder, classes and images ascending by bytes.

    A class folder with nothing in it is left out; one without images that holds other things is a class without images.

    Args:
        listing: What is bad or not used is added to it.
        folder: Its source, or a folder in it.

    Raises:
        DataError: A class name is not UTF-8, or two names are one in two Unicode forms.
        StorageError: A folder cannot be listed.
    """
    classes: Classes = {}
    for entry in list_entries(listing, folder):
        if not entry.is_dir():
            if entry.suffix.lower() in SUFFIXES:
                listing.add_bad(entry, "not in a class folder")
            else:
                _leave_out(listing, entry)
            continue
        name = in_utf8(entry.name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{entry}: class name is not UTF-8; rename the folder") from None
        images: list[Path] = []
        others = 0
        for path in list_entries(listing, entry):
            if path.suffix.lower() in SUFFIXES and not path.is_dir():
                images.append(path)
                continue
            others += path.suffix.lower() not in NOTE_SUFFIXES
            if path.is_dir():
                listing.add_bad(path, "a folder inside a class folder")
            else:
                _leave_out(listing, path)
        if images or others:
            classes[name] = images
        else:
            listing.left_out.add("empty class folder", relative_path(entry, listing.root))
    by_one_form(classes, folder)
    return classes


def list_entries(listing: Listing, folder: Path) -> list[Path]:
    """List a folder, ascending by bytes; what is hidden or left by a system is left out.

    Raises:
        StorageError: It cannot be listed.
    """
    with storage_errors(f"list {folder}"):
        entries = sorted(folder.iterdir(), key=os.fsencode)
    kept = []
    for entry in entries:
        if is_clutter(entry):
            kind = "hidden file" if entry.name.startswith(".") else "system file"
            listing.left_out.add(kind, relative_path(entry, listing.root))
        else:
            kept.append(entry)
    return kept


def is_clutter(path: Path) -> bool:
    """Whether a file or folder is hidden, or one of those that systems leave beside images."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM_NAMES


def _leave_out(listing: Listing, path: Path) -> None:
    kind = f"{path.suffix.lower()} file" if path.suffix else "other file"
    listing.left_out.add(kind, relative_path(path, listing.root))


def _list_folder(listing: Listing) -> dict[str, Classes]:
    """List a folder's classes by split; a folder without splits is all `train`."""
    source = listing.source
    entries = list_entries(Listing(source), source)
    named: dict[str, Path] = {}
    for entry in entries:
        split = SPLIT_NAMES.get(entry.name.lower())
        if split is not None and entry.is_dir():
            if split in named:
                raise DataError(f"{source}: {named[split].name} and {entry.name} are both the split {split}; keep one")
            named[split] = entry
    # A class may be called `train` or `test`: it holds images and no folder, and lies beside other classes.
    others = set(entries) - set(named.values())
    if not any(map(_has_folders, named.values())) and any(map(_is_class, others)):
        classes = list_classes(listing, source)
        taken = [folder.name for folder in named.values() if folder.name in classes]
        if taken:
            listing.notes.append(f"{', '.join(taken)}: taken for a class, as for the folders beside it")
        return {"train": classes}
    if "train" not in named:
        beside = f" beside {' and '.join(folder.name for folder in named.values())}" if named else ""
        raise DataError(f"{source}: no folder `train` in it{beside}; {WAYS}")
    for entry in list_entries(listing, source):
        if entry in others and entry.is_dir():
            listing.left_out.add("other folder", in_utf8(entry.name))
        elif entry in others:
            _leave_out(listing, entry)
    return {split: list_classes(listing, folder) for split, folder in named.items()}


def _is_class(folder: Path) -> bool:
    """Whether a folder holds an image."""
    with storage_errors(f"list {folder}"):
        return folder.is_dir() and any(
            path.suffix.lower() in SUFFIXES and not is_clutter(path) for path in folder.iterdir()
        )


def _has_folders(folder: Path) -> bool:
    with storage_errors(f"list {folder}"):
        return any(path.is_dir() and not is_clutter(path) for path in folder.iterdir())


def _under_names_of_train(listing: Listing, split: str, listed: Mapping[str, Classes]) -> Classes:
    """Return a split's classes in the order of `train`, under the names that these have there."""
    known = by_one_form(listed["train"], listing.source)
    classes: Classes = {}
    for form, name in by_one_form(listed[split], f"{listing.source}: {split}").items():
        if form not in known:
            raise DataError(
                f"{listing.source}: {split}/{name}: a class that `train` does not have; rename it or remove it"
            )
        classes[known[form]] = listed[split][name]
    return {name: classes[name] for name in known.values() if name in classes}


def _list_csv(listing: Listing) -> dict[str, Classes]:
    """List the images that a CSV file names, by split and class, both in order."""
    source, root = listing.source, listing.root
    try:
        text = read_bytes(source).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not a CSV file in UTF-8 ({error}); give a folder or such a file") from None
    first = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=first.count), strict=True)
    listed: dict[str, dict[str, list[str]]] = {}
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        if columns.count("path") != 1 or columns.count("label") != 1 or columns.count("split") > 1:
            shown = ", ".join(map(printable, columns[:10])) or "none"
            raise DataError(f"{source} line 1: the columns are {shown}; path and label are needed, and perhaps split")
        for name in columns:
            if name not in ("path", "label", "split"):
                listing.left_out.add("column", name)
        for row in reader:
            if row:
                split, label, path = _parse_row(f"{source} line {reader.line_num}", columns, row)
                path = os.fsdecode(path.encode())  # where the locale is not UTF-8, files' names are other texts
                path = os.path.relpath(path, root) if Path(path).is_absolute() else os.path.normpath(path)
                listed.setdefault(split, {}).setdefault(label, []).append(path)
    except csv.Error as error:
        raise DataError(f"{source} line {reader.line_num}: not a CSV file ({error})") from None
    if "train" not in listed:
        raise DataError(f"{source}: no training image in it; each line is path,label[,split]")
    return {
        split: {
            label: [root / path for path in sorted(classes[label], key=os.fsencode)]
            for label in sorted(classes, key=str.encode)
        }
        for split, classes in listed.items()
    }


def _parse_row(where: str, columns: Sequence[str], row: Sequence[str]) -> tuple[str, str, str]:
    """Return a row's split, label and path."""
    cells = {name: value.strip() for name, value in zip(columns, row, strict=False)}
    if len(row) != len(columns) or not cells["path"] or not cells["label"] or "\0" in cells["path"]:
        raise DataError(f"{where}: not a path and a label for each column of line 1; mend the line")
    split = SPLIT_NAMES.get(cells.get("split", "train").lower())
    if split is None:
        raise DataError(f"{where}: split {cells['split']!r}; write train, val or test")
    return split, cells["label"], cells["path"]
