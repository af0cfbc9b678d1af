"""Files carried from one machine to the next in parts of a size that any transfer takes, checked by SHA-256.

`state.json` names the files, the SHA-256 of each content, and the parts; a content that several files have is carried
once. The parts, `state-<8 digits>-00.part` and so on, are the contents one after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import DataError
from pipeline.system.storage import read_json, sha256_file, write_atomic, write_json

PART_BYTES = 15_000_000
INDEX = "state.json"
CHUNK = 2**20


def pack(folder: Path, files: Iterable[Path], out: Path, *, part_bytes: int = PART_BYTES, **notes: Any) -> int:
    """Write files as parts, then the index, and delete former parts: a kill in between leaves what was there whole.

    Args:
        folder: What the files' paths are kept relative to.
        files: In it.
        out: Made if missing.
        part_bytes: The most that a part has.
        notes: Plain JSON values, which `read_index` gives back.

    Returns:
        The bytes of all parts.
    """
    out.mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, Any]] = []
    contents: dict[str, Path] = {}
    for file in sorted(files):
        digest = sha256_file(file)
        contents.setdefault(digest, file)
        listed.append({"path": file.relative_to(folder).as_posix(), "sha256": digest, "bytes": file.stat().st_size})
    parts: list[dict[str, Any]] = []
    mark = hashlib.sha256("".join(contents).encode()).hexdigest()[:8]
    for number, data in enumerate(_cut(contents.values(), part_bytes)):
        name = f"state-{mark}-{number:02d}.part"
        write_atomic(out / name, data)
        parts.append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    write_json(out / INDEX, {"files": listed, "contents": list(contents), "parts": parts, "notes": notes})
    for former in {*out.glob("state-*.part")} - {out / part["name"] for part in parts}:
        former.unlink()
    return sum(part["bytes"] for part in parts)


def read_index(source: Path) -> dict[str, Any]:
    """Return the index of a folder that `pack` wrote.

    Raises:
        DataError: There is none, or it is none.
    """
    if not (source / INDEX).is_file():
        raise DataError(f"{source / INDEX}: not found; give the folder that the last slice wrote")
    index = read_json(source / INDEX)
    if not isinstance(index, dict) or not {"files", "contents", "parts", "notes"} <= index.keys():
        raise DataError(f"{source / INDEX}: not the index of a slice's state")
    return index


def unpack(source: Path, folder: Path) -> None:
    """Put the files of a folder that `pack` wrote back into another folder.

    Every part is checked before anything is written, and every file's content before it is in place.

    Raises:
        DataError: A part or the index is missing or damaged.
    """
    index = read_index(source)
    for part in index["parts"]:
        path = source / part["name"]
        if not path.is_file():
            raise DataError(f"{path}: missing; copy it again from where the last slice ran")
        if sha256_file(path) != part["sha256"]:
            raise DataError(f"{path}: damaged, its SHA-256 is not the one in {INDEX}; copy it again")
    paths: dict[str, list[Path]] = {}
    sizes = {}
    for file in index["files"]:
        relative = PurePosixPath(file["path"])
        if relative.is_absolute() or ".." in relative.parts:
            raise DataError(f"{source / INDEX}: {file['path']!r} is outside the folder")
        paths.setdefault(file["sha256"], []).append(folder / relative)
        sizes[file["sha256"]] = file["bytes"]
    stream = _Stream(source / part["name"] for part in index["parts"])
    for digest in index["contents"]:
        data = stream.read(sizes[digest])
        if hashlib.sha256(data).hexdigest() != digest:
            raise DataError(f"{source}: {paths[digest][0].name} is not what {INDEX} says; copy all parts again")
        for path in paths[digest]:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)


def _cut(files: Iterable[Path], part_bytes: int) -> Iterator[bytes]:
    """Yield the contents of files, one after another, in pieces of a size; the last may be smaller."""
    waiting = bytearray()
    for file in files:
        with file.open("rb") as opened:
            while data := opened.read(CHUNK):
                waiting += data
                while len(waiting) >= part_bytes:
                    yield bytes(waiting[:part_bytes])
                    del waiting[:part_bytes]
    if waiting:
        yield bytes(waiting)


class _Stream:
    """Reads files as if they were one."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files, self._rest = iter(files), b""

    def read(self, size: int) -> bytes:
        """Return the next bytes; fewer where the files end."""
        pieces, missing = [], size
        while missing:
            if not self._rest and (file := next(self._files, None)) is not None:
                self._rest = file.read_bytes()
            piece, self._rest = self._rest[:missing], self._rest[missing:]
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)
