"""A directory's manifest.json: the SHA-256 of its files, so that damage, and old and new mixed, are told by who reads.

    {"files": {"best.json": SHA-256, ...}, "fingerprint": of the run, "seal": SHA-256 of the rest of this JSON}

It is written last. Whoever reads a file that it names compares the file's bytes with it, which costs little: SHA-256
runs at some hundred megabytes a second, and a student's checkpoint has 23. No file's date is trusted instead. A
directory without a manifest was made by an older version: its files are taken as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pipeline.errors import DataError, StorageError, UsageError, printable
from pipeline.system.canonical import is_sha256, is_whole, seal
from pipeline.system.storage import (
    parse_json,
    put_in_place,
    read_bytes,
    read_if_exists,
    sha256_file,
    storage_errors,
    to_json,
    write_atomic,
    write_together,
)

MANIFEST = "manifest.json"
EVALUATED = ("predictions.csv", "metrics.json")
"""Files of a run that follow from its weights, and that `pipeline evaluate DIR --mend` writes again."""


class Manifest(NamedTuple):
    """What a manifest.json says.

    Attributes:
        files: SHA-256 by file name.
        fingerprint: Of the run that made the directory; None where it is no run's.
    """

    files: Mapping[str, str]
    fingerprint: str | None = None

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return to_json(seal({"files": dict(self.files), "fingerprint": self.fingerprint}))


def read_manifest(directory: Path) -> Manifest | None:
    """Return a directory's manifest; None where there is none.

    Raises:
        DataError: It is damaged.
    """
    file = directory / MANIFEST
    data = read_if_exists(file)
    if data is None:
        return None
    manifest = _parse(data, file)
    if manifest is None:
        ways = f"{_ways_out(file)}; deleted, it checks nothing: the files beside it are taken as they are"
        raise DataError(f"{printable(file)}: damaged, its content has not its SHA-256; {ways}")
    return manifest


def write_with_manifest(
    directory: Path,
    files: Mapping[str, bytes],
    fingerprint: str | None = None,
    *,
    digests: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Replace files of a directory together, see `write_together`, its manifest last, which names these alone.

    Args:
        directory: Made if it does not exist.
        files: Their content by name.
        fingerprint: Of the run that made them.
        digests: The SHA-256 of those for which it is known: a teacher has up to 540 MB.

    Raises:
        StorageError: Writing failed.
    """
    digests = {name: digests.get(name) or hashlib.sha256(data).hexdigest() for name, data in files.items()}
    contents = {directory / name: data for name, data in files.items()}
    write_together({**contents, directory / MANIFEST: Manifest(digests, fingerprint).to_bytes()})


def finish_replacing(directory: Path) -> None:
    """Put in place what a killed `write_with_manifest` had already written beside, so that it is not lost.

    Only for a caller that holds the lock of the directory's writers.
    """
    for staged in directory.glob(f".{MANIFEST}.*.tmp"):
        token = staged.name.removeprefix(f".{MANIFEST}.").removesuffix(".tmp")
        manifest = _parse(read_bytes(staged), staged)
        if manifest is not None:  # else the kill came while it was written
            put_in_place([directory / name for name in (*manifest.files, MANIFEST)], token)


def is_being_replaced(directory: Path) -> bool:
    """Tell whether new files lie beside their places, because they are being put there, or because that was killed."""
    return any(directory.glob(f".{MANIFEST}.*.tmp"))


def adopt(directory: Path, names: tuple[str, ...], fingerprint: str | None) -> None:
    """Write the manifest of a directory of an older version that has none, for those of the files that are there.

    Raises:
        StorageError: Reading or writing failed.
    """
    files = {name: sha256_file(directory / name) for name in names if (directory / name).is_file()}
    write_atomic(directory / MANIFEST, Manifest(files, fingerprint).to_bytes())


def read_checked(path: Path) -> bytes:
    """Read a whole file and compare it with the manifest beside it, if that names it.

    Raises:
        DataError: It is not what the manifest says; the message names what can be done, the cheapest first.
        StorageError: It is missing or cannot be read.
    """
    data = read_bytes(path)
    check_digest(path, hashlib.sha256(data).hexdigest())
    return data


def read_json_checked(path: Path) -> Any:
    """Read a JSON file as `read_checked` does; a DataError also where it is no JSON."""
    return parse_json(read_checked(path), path)


def check_digest(path: Path, sha256: str) -> None:
    """Compare a file's SHA-256 with the manifest beside it, with the DataError of `read_checked`."""
    manifest = read_manifest(path.parent)
    if manifest is not None and manifest.files.get(path.name, sha256) != sha256:
        raise damage(path)


def check_all(directory: Path, *, but: tuple[str, ...] = ()) -> None:
    """Compare all files that a directory's manifest names, and that are there, with it.

    Args:
        directory: One without a manifest passes.
        but: Names of files that are left out.

    Raises:
        DataError: See `read_checked`; of the first that differs.
    """
    manifest = read_manifest(directory)
    for name in [] if manifest is None else list(manifest.files):
        if name not in but and (directory / name).is_file():
            check_digest(directory / name, sha256_file(directory / name))


def damage(path: Path) -> DataError:
    """Return the error of a file that is not what the manifest beside it says."""
    why = "changed, cut, or mixed with other files since it was written"
    if is_being_replaced(path.parent):
        why = "its directory is being replaced, or a kill came in between"
    return DataError(f"{printable(path)}: not what {MANIFEST} says: {why}; {_ways_out(path)}")


def refuse_writing(path: Path) -> None:
    """Refuse a user's file that would replace one of a run's, and so make its manifest false, or a device or folder.

    Raises:
        UsageError: The manifest beside it names it, or there is something else than a file.
        StorageError: That cannot be told.
    """
    with storage_errors(f"write {path}"):
        if not path.is_file() and (path.exists() or path.is_symlink()):
            raise UsageError(f"{printable(path)}: there is something that is no file; name a file")
    names: list[str] = [MANIFEST]
    with contextlib.suppress(DataError, StorageError):
        manifest = read_manifest(path.parent)
        names += [] if manifest is None else list(manifest.files)
    if path.name in names:
        raise UsageError(f"{printable(path)}: one of a run's own files; name another")


def _ways_out(path: Path) -> str:
    """Name what can be done about a damaged file, the cheapest first."""
    ways = [f"`dvc checkout {printable(path)}` where DVC has it", "the command that made it puts a kept copy back"]
    if path.name in EVALUATED:
        ways.append(f"`pipeline evaluate {printable(path.parent)} --mend` computes it again")
    return f"{'; '.join(ways)}; --fresh of that command makes everything again, which may take days"


def _parse(data: bytes, file: Path) -> Manifest | None:
    """Return what a manifest's bytes say; None where they are damaged."""
    try:
        content = parse_json(data, file)
    except DataError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict) or "seal" not in content:
        return None
    files, fingerprint = content["files"], content.get("fingerprint")
    names_files = all(Path(name).name == name and is_sha256(digest) for name, digest in files.items())
    if not names_files or not is_whole(content) or not isinstance(fingerprint, str | None):
        return None
    return Manifest(files, fingerprint)
