"""C++ libraries, compiled for this processor on first use.

A compiled library is kept in the user's cache directory. Its name has a digest of all that decides its content, so it
is compiled once, in a few seconds, and another processor's library is never loaded. Its SHA-256 lies beside it: a
library that was cut short would kill the process, and one with a flipped bit would compute something else. So a library
is loaded only where it has this digest and nobody but the user or root could have written it; otherwise it is compiled
again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.system.home import WAY_OUT, cache_folder
from pipeline.system.storage import read_bytes, read_if_exists, replacing, write_atomic

COMPILERS = ("c++", "g++", "clang++")
# A compiler in a package of PyPI, which the extra `fast` installs.
ZIG = (sys.executable, "-m", "ziglang", "c++", "-nostdlib++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
TWO_ROUNDINGS = "-ffp-contract=off"
"""Lets products and sums be rounded one after another, as NumPy does."""
# The OpenMP runtimes that PyTorch may bring.
OPENMP = ("libgomp*.so*", "libiomp5*.so*", "libomp*.so*")
SECONDS_TO_COMPILE = 300
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotAvailable(Exception):
    """The library cannot be compiled or loaded here; the message says why in a phrase."""


def load_library(source: Path, *options: str, header: Path | None = None) -> ctypes.CDLL:
    """Load a library; compile it first if it is not in the cache.

    Args:
        source: The file, `NAME.cpp`.
        options: Of the compiler, beside FLAGS.
        header: What the source includes beside the compiler's own headers.

    Raises:
        NotAvailable: There is no compiler, or it fails; or the system is Windows.
    """
    if not hasattr(os, "fchmod"):
        raise NotAvailable("nothing is compiled on Windows")
    compiler = _compiler()
    command = [*compiler, *FLAGS, str(source), *options]  # libraries behind what needs them
    texts = [path.read_text(encoding="utf-8") for path in (source, header) if path is not None]
    parts = [*texts, " ".join(command), _version(compiler), _processor()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    if (cache := cache_folder()) is None:
        raise NotAvailable(f"no home directory to keep the compiled library in; {WAY_OUT}")
    path = cache / "titn-pipeline" / f"{source.stem}-{digest}.so"
    try:
        _make_own(path.parent)
        if not _is_sealed(path):
            _compile(command, path)
        return ctypes.CDLL(str(path))
    except StorageError as error:
        raise NotAvailable(str(error)) from error
    except OSError as error:
        raise NotAvailable(f"{path}: {error.strerror or error}") from error


def _make_own(folder: Path) -> None:
    """Make the folder of the libraries, where it is missing, one that only its owner can write.

    Raises:
        NotAvailable: It is another user's, or stays open to others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = folder.stat()
    if _is_ours(found) and found.st_mode & WRITABLE_BY_OTHERS:
        with contextlib.suppress(OSError):  # root's, or a mount without rights
            folder.chmod(stat.S_IMODE(found.st_mode) & ~WRITABLE_BY_OTHERS)
        found = folder.stat()
    if not _is_ours(found) or found.st_mode & WRITABLE_BY_OTHERS:
        raise NotAvailable(f"others can write {folder}; set XDG_CACHE_HOME to a folder that only you can write")


def _is_ours(found: os.stat_result) -> bool:
    """Tell whether a file is the user's or root's; where users have no numbers, all are."""
    return not hasattr(os, "geteuid") or found.st_uid in (os.geteuid(), 0)


def _seal(path: Path) -> Path:
    """Return where a library's digest lies."""
    return path.with_name(f"{path.name}.sha256")


def _sealing(path: Path, content: bytes) -> bytes:
    """Return what a digest's file holds, as `sha256sum --check` reads it."""
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()


def _is_sealed(path: Path) -> bool:
    """Tell whether there is a library with its digest beside it that nobody else could have written."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    if not _is_ours(found) or found.st_mode & WRITABLE_BY_OTHERS:
        return False
    return read_if_exists(_seal(path)) == _sealing(path, read_bytes(path))


def _compile(command: list[str], path: Path) -> None:
    """Compile, and write the library and then its digest, each whole, so that no process ever loads half a library."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        library = Path(directory) / path.name
        try:
            subprocess.run(
                [*command, "-o", str(library)],
                capture_output=True,
                text=True,
                errors="replace",
                check=True,
                timeout=SECONDS_TO_COMPILE,
            )
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise NotAvailable(f"{command[0]} fails: {reason}") from error
        except subprocess.TimeoutExpired as error:
            raise NotAvailable(f"{command[0]} takes more than {SECONDS_TO_COMPILE} s") from error
        content = library.read_bytes()
    with replacing(path) as descriptor, open(descriptor, "wb", closefd=False) as file:
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) & ~WRITABLE_BY_OTHERS)
        file.write(content)
    write_atomic(_seal(path), _sealing(path, content))


def _compiler() -> tuple[str, ...]:
    """Return the compiler's command: $CXX, or the first of COMPILERS on the PATH, or ZIG."""
    if chosen := os.environ.get("CXX", "").split():
        return tuple(chosen)
    for name in COMPILERS:
        if path := shutil.which(name):
            return (path,)
    if importlib.util.find_spec("ziglang") is not None:
        return ZIG
    raise NotAvailable("no C++ compiler; install one, or the extra `fast`, or set CXX")


def _version(compiler: Sequence[str]) -> str:
    """Return what a compiler prints as its version."""
    try:
        return subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NotAvailable(f"{' '.join(compiler)} does not run") from error


def openmp() -> str:
    """Return the path of the OpenMP runtime that PyTorch computes with, an option for `load_library`.

    Raises:
        NotAvailable: There is none.
    """
    import torch  # takes seconds

    directory = Path(torch.__file__).parent / "lib"
    for pattern in OPENMP:
        for path in sorted(directory.glob(pattern)):
            return str(path)
    raise NotAvailable(f"no OpenMP runtime in {directory}")


def _processor() -> str:
    """Return the model and features of the processor, which decide what -march=native compiles."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
