"""The SHA-256 of what a folder or CSV file lists: has anything changed since it was prepared?

Of each image the relative path, the size and the content count, not the time at which it was written. A content is read
again only where size or time differ from what is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from pipeline.data.listing import Listing, relative_path
from pipeline.errors import StorageError
from pipeline.system.storage import sha256_file
from pipeline.system.threads import grouped, in_order

Seen = tuple[int, int, str]
"""Size in bytes, time of the last change in nanoseconds, SHA-256."""

NOT_A_FILE: Seen = (-1, 0, "")


def digest_listing(
    listing: Listing, remembered: Mapping[str, Seen], *, collected: bool = False
) -> tuple[str, dict[str, Seen]]:
    """Return the SHA-256 of the images that a source lists, with their splits and classes.

    Args:
        listing: The source's images; those in no class count by their names.
        remembered: By relative path, what was returned the last time.
        collected: Whether these very files have been collected, so that what they are now does not matter.

    Returns:
        64 hexadecimal digits, and what to remember.

    Raises:
        StorageError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for file in listing.bad:
        digest.update(_line("", "", file.path))
    seen: dict[str, Seen] = {}

    def look(files: list[tuple[str, str, Path]]) -> list[tuple[str, Seen, bytes]]:
        looked = []
        for split, name, path in files:
            relative = relative_path(path, listing.root)
            found = remembered[relative] if collected else _look(path, remembered.get(relative))
            looked.append((relative, found, _line(split, name, relative, found[0], found[2])))
        return looked

    files = (
        (split, name, path)
        for split, classes in listing.splits.items()
        for name, paths in classes.items()
        for path in paths
    )
    with contextlib.closing(in_order(grouped(files), look)) as groups:  # hashing releases the interpreter's lock
        for relative, found, line in itertools.chain.from_iterable(groups):
            seen[relative] = found
            digest.update(line)
    return digest.hexdigest(), seen


def status_of(path: Path) -> tuple[int, int]:
    """Return a file's size and time of change; those of NOT_A_FILE where it is none, as a pipe, or is not there."""
    try:
        status = os.stat(path)  # noqa: PTH116 - half the time, for a million files
    except OSError:
        return NOT_A_FILE[:2]
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else NOT_A_FILE[:2]


def _look(path: Path, former: Seen | None) -> Seen:
    """Return a file's size, time and SHA-256, which is taken over from before where the other two are the same."""
    status = status_of(path)
    if status == NOT_A_FILE[:2]:
        return NOT_A_FILE  # reading a named pipe would wait for its writer
    if former is not None and tuple(former[:2]) == status:
        return *status, former[2]
    try:
        return *status, sha256_file(path)
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError):
            return NOT_A_FILE  # a bad file; a failing disk is another matter
        raise


def _line(*values: str | int) -> bytes:
    return (json.dumps(values) + "\n").encode()
