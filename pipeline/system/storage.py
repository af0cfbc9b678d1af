"""Files that are whole or absent: atomic writing, JSON, digests and the lock of a run.

A file is written beside its destination, flushed to the device and renamed over it, so that a kill, a power
cut or a full disk leaves either the old content or the new, never a mixture. No file is opened for writing in place: a
destination may be a link into DVC's cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, StorageError, UsageError

try:
    import fcntl
except ImportError:  # on Windows, where models are loaded, asked and exported without a lock
    fcntl = None  # type: ignore[assignment]

NO_LOCKS_VARIABLE = "TITN_NO_LOCKS"
# What the lock of a file ends with where its file system, often a network's, has none.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_BINARY = getattr(os, "O_BINARY", 0)  # without it Windows changes line ends
LOCK_ATTEMPTS = 4
SECONDS_BETWEEN_ATTEMPTS = 0.05
FULL = "; free space or rights, then run again"
# Another disk, a file system or mount without links, too many of them, or a file that is not ours.
_NO_LINKS = (
    errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL,
)  # fmt: skip
_COPIED_AT_ONCE = 2**22


@contextlib.contextmanager
def storage_errors(action: str, way_out: str = "") -> Iterator[None]:
    """Turn an OSError of a block into a StorageError, `cannot <action>: <reason><way_out>`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {action}: {error.strerror or error}{way_out}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Write a file so that it is seen either whole or not at all, also after a power cut.

    Missing parent directories are made. A link at `path` is replaced, never followed. A killed process may
    leave its hidden sibling behind (see `remove_leftovers`).

    Args:
        path: Destination.

    Yields:
        The descriptor of an empty file beside it, for reading and writing. The file replaces `path` when the block ends
        without an error.

    Raises:
        StorageError: The disk is full, rights are missing, or the device failed. The old content of `path` is unharmed,
            unless the last flush fails, that of the directory: then the new content is there, but not yet safe from a
            power cut.
    """
    temporary = beside(path, secrets.token_hex(8))
    with storage_errors(f"write {path}", FULL):
        _make_directory(path.parent)
        try:
            with _new_file(temporary) as descriptor:
                yield descriptor
            temporary.replace(path)
        except BaseException:
            _remove(temporary)
            raise
        _sync_directory(path.parent)


def write_atomic(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write a whole file as `replacing` does, with its errors."""
    with replacing(path) as descriptor:
        _write_all(descriptor, data)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a log, in place: only for a file without a second name. Readers see it at once.

    A last line that was torn by a kill or a full disk is cut off before. Missing parent directories are made.

    Args:
        path: The file, made where missing. One process writes it.
        line: Without its line break.

    Raises:
        OSError: Writing failed; the line may be torn.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
    try:
        size = end = os.lseek(descriptor, 0, os.SEEK_END)
        while end and os.pread(descriptor, 1, end - 1) != b"\n":
            end -= 1
        if end < size:
            os.ftruncate(descriptor, end)
        _write_all(descriptor, line + b"\n")
    finally:
        os.close(descriptor)


def write_together(
    files: Mapping[Path, bytes | Path | Iterable[bytes | memoryview]], *, may_move: bool = False
) -> None:
    """Write files that belong together: all of them beside their destinations, and only then in their places.

    So a full disk, or a kill before all are written, leaves every old file. A kill in the instant of the renames leaves
    some new ones beside old ones, and the rest beside their places, for `put_in_place` to find by their common token.
    The last file replaces the old one last: it should name the SHA-256 of the others, so that a mixture is told.

    Args:
        files: By destination their contents, in the order in which they take their places: bytes, parts that are made
            when it is a file's turn, or a finished file, which gets a second name (where there are no links, a copy).
        may_move: Whether finished files are nobody else's: where there are no links they are moved rather than copied,
            once all else is written.

    Raises:
        StorageError: The disk is full, rights are missing, or the device failed.
    """
    token, moved = secrets.token_hex(8), dict[Path, Path]()
    with contextlib.ExitStack() as undone:
        for path, content in files.items():
            with storage_errors(f"write {path}", FULL):
                _make_directory(path.parent)
                undone.callback(_remove, beside(path, token))
                if isinstance(content, Path):
                    if path.exists() and path.samefile(content):  # a rename between its names would leave both
                        continue
                    if not _link(content, beside(path, token), may_move=may_move):
                        moved[path] = content
                    continue
                with _new_file(beside(path, token)) as descriptor:
                    for part in [content] if isinstance(content, bytes) else content:
                        _write_all(descriptor, part)
        for path, content in moved.items():
            with storage_errors(f"write {path}", FULL):
                content.replace(beside(path, token))
                undone.callback(beside(path, token).replace, content)
        undone.pop_all()
    put_in_place(files, token)


def put_in_place(paths: Iterable[Path], token: str) -> None:
    """Let files that `write_together` wrote beside their destinations replace these, the last one last.

    Those that are in their places already are passed over.

    Raises:
        StorageError: A rename or flush failed.
    """
    *others, last = paths
    for group in (others, [last]):
        for path in group:
            with storage_errors(f"write {path}", FULL), contextlib.suppress(FileNotFoundError):
                beside(path, token).replace(path)
        for folder in dict.fromkeys(path.parent for path in group):
            with storage_errors(f"write {folder}", FULL):
                _sync_directory(folder)


def beside(path: Path, token: str) -> Path:
    """Return the hidden sibling to which what replaces a file is written; `remove_leftovers` knows its name."""
    return path.with_name(f".{path.name}.{token}.tmp")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """Yield the descriptor of a new file, and flush it to the device at the end."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def duplicate(source: Path, path: Path) -> None:
    """Give a file a second name, a hard link, or a copy where links fail; what is at `path` is replaced whole.

    Both names lead to the same content until one of them is replaced, so neither may be written in place.

    Raises:
        StorageError: The file cannot be read, or the second name cannot be made; the old content of `path` is unharmed.
    """
    temporary = beside(path, secrets.token_hex(8))
    with storage_errors(f"keep {source} as {path}"):
        _make_directory(path.parent)
        if path.exists() and path.samefile(source):
            return  # a rename between two names of one file would leave both
        try:
            _link(source, temporary)
            temporary.replace(path)
        except BaseException:
            _remove(temporary)
            raise
        _sync_directory(path.parent)


def _link(source: Path, path: Path, *, may_move: bool = False) -> bool:
    """Make a hard link, or a copy where links fail.

    Returns:
        Whether it is made. Not so where links fail on the same disk and the file may be moved: that is left to do.
    """
    try:
        os.link(source.resolve(strict=True), path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if may_move and error.errno != errno.EXDEV:
            return False
        _copy(source, path)
    return True


def _copy(source: Path, path: Path) -> None:
    with source.open("rb") as file, _new_file(path) as descriptor:
        while block := file.read(_COPIED_AT_ONCE):
            _write_all(descriptor, block)


def _write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def remove_leftovers(path: Path) -> None:
    """Remove the hidden siblings that killed writers of `path` left behind.

    Only for a caller that holds the run's lock: the sibling of a writer still at work is removed too.

    Args:
        path: The destination of the writes; a folder stands for all files in it.

    Raises:
        StorageError: Listing or removing failed.
    """
    with storage_errors(f"clean up beside {path}"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        folder, name = (path, ".+") if path.is_dir() else (path.parent, re.escape(path.name))
        for entry in folder.iterdir():
            if re.fullmatch(rf"\.{name}\.[0-9a-f]+\.tmp", entry.name):
                entry.unlink(missing_ok=True)


def has_file(path: Path) -> bool:
    """Tell whether a file is there as far as this user can see: not so where a folder of its path may not be searched.

    `Path.is_file` raises PermissionError then, before Python 3.14.
    """
    return os.path.isfile(path)  # noqa: PTH113


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        StorageError: It is missing or cannot be read.
    """
    data = read_if_exists(path)
    if data is None:
        raise StorageError(f"cannot read {path}: {os.strerror(errno.ENOENT)}")
    return data


def read_if_exists(path: Path, num_bytes: int = -1) -> bytes | None:
    """Read a file that may be missing.

    Args:
        path: The file.
        num_bytes: Read at most this many from its start; -1 reads all.

    Returns:
        The content, or None where there is no such file.

    Raises:
        StorageError: The file exists and cannot be read.
    """
    with storage_errors(f"read {path}"), contextlib.suppress(FileNotFoundError):
        # Reading a named pipe would wait for its writer, and reading a device might not end.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise StorageError(f"cannot read {path}: not a regular file")
        with path.open("rb") as file:
            return file.read(num_bytes)
    return None


def write_json(path: Path, obj: Any) -> None:
    """Write an object as JSON, atomically: sorted keys, two spaces, UTF-8, one newline at the end.

    Args:
        path: Destination.
        obj: Dicts with string keys, lists, strings, finite numbers, booleans and None.

    Raises:
        ValueError: A number is not finite; JSON has no such value.
        StorageError: Writing failed; the old content of `path` is unharmed.
    """
    write_atomic(path, to_json(obj))


def to_json(obj: Any) -> bytes:
    """Return the bytes that `write_json` writes; ValueError where a number is not finite."""
    return (json.dumps(obj, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a JSON file as dicts, lists and scalars, strictly: no duplicate keys, no NaN or infinity.

    Raises:
        DataError: The content is not valid JSON.
        StorageError: The file is missing or cannot be read.
    """
    return parse_json(read_bytes(path), path)


def parse_json(data: bytes, path: Path) -> Any:
    """Parse the content of a JSON file as `read_json` does, with its DataError, which names the path."""
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not valid JSON: {reason}; delete it and make it again") from error


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256, 64 hexadecimal digits in lower case, without holding the file in memory.

    Raises:
        StorageError: The file is missing or cannot be read.
    """
    with storage_errors(f"read {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(path: Path, *, attempts: int = LOCK_ATTEMPTS) -> Iterator[None]:
    """Hold a run's lock, without waiting for it.

    The kernel releases the lock when its holder dies. The file stays, because removing it would let two runs hold
    locks on two files of the same name. Keep it outside of what a fresh start deletes. Where the user wants no locks
    (`uses_locks`) nothing is done.

    Args:
        path: The lock file, made where missing. It names its holder while held.
        attempts: How often to try, SECONDS_BETWEEN_ATTEMPTS apart, where others hold the lock for an instant.

    Raises:
        StorageError: Another run holds it, or the file system refuses.
    """
    with storage_errors(f"lock {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not uses_locks():
        yield
        return
    with storage_errors(f"lock {path}"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _acquire(descriptor, path, attempts)
        try:
            yield
        finally:
            # A forked data loader shares this open file: closing our descriptor alone would leave it locked.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def uses_locks() -> bool:
    """Tell whether files are locked; not so where the environment variable NO_LOCKS_VARIABLE is 1.

    Raises:
        UsageError: It is neither 0 nor 1.
    """
    text = os.environ.get(NO_LOCKS_VARIABLE) or "0"
    if text not in ("0", "1"):
        raise UsageError(f"{NO_LOCKS_VARIABLE}={text}: write 1 for no locks, or unset it")
    return text == "0"


def cannot_lock(path: Path, reason: object) -> StorageError:
    """Return the error of a file on a file system without locks, or of a system without."""
    return StorageError(
        f"cannot lock {path}: {reason}; put it on another file system, or set {NO_LOCKS_VARIABLE}=1 and never run two "
        "commands at once on it"
    )


def is_locked(path: Path) -> bool:
    """Tell whether a run holds the lock of a file given to `lock`; a missing file is not locked.

    Raises:
        StorageError: The file system refuses, or has no locks.
    """
    if not uses_locks():
        return False
    with storage_errors(f"read {path}"), contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _flock(descriptor, "LOCK_SH", path)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def is_busy(path: Path) -> bool:
    """Tell whether another program holds a lock on a file, as HDF5 does while it has one open for writing.

    What looks damaged then may be half written. Where that cannot be asked the answer is no.
    """
    with contextlib.suppress(StorageError):
        return is_locked(path)
    return False


def busy(path: Path) -> StorageError:
    """Return the error of a file that is held by another program."""
    return StorageError(f"{path}: another program holds it, perhaps to write; close it there, then run again")


def _acquire(descriptor: int, path: Path, attempts: int) -> None:
    """Lock an open file and write its holder into it."""
    with storage_errors(f"lock {path}"):
        for attempt in reversed(range(attempts)):
            try:
                _flock(descriptor, "LOCK_EX", path)
                break
            except BlockingIOError as error:
                # `is_locked` holds it for an instant.
                if attempt:
                    time.sleep(SECONDS_BETWEEN_ATTEMPTS)
                    continue
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                raise StorageError(f"{path} is held by another run ({holder}); wait for it, or stop it") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)


def _flock(descriptor: int, kind: str, path: Path) -> None:
    """Lock an open file by LOCK_SH or LOCK_EX without waiting; it raises as `flock`, and StorageError without locks."""
    if fcntl is None:
        raise cannot_lock(path, "this system has no flock")
    try:
        fcntl.flock(descriptor, getattr(fcntl, kind) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            raise cannot_lock(path, error.strerror) from error
        raise


def _make_directory(directory: Path) -> None:
    """Make a directory and its missing parents so that they survive a power cut."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        _sync_directory(folder.parent)


def _sync_directory(directory: Path) -> None:
    """Flush a directory's entries to the device, where the system can: Windows cannot."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a directory; the rename is then all the safety there is.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict, refusing duplicate keys, of which Python would silently keep the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
