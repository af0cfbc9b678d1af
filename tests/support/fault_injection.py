"""What can happen between a program and its disk, made to happen at a chosen call.

Every function of `os` that changes files is replaced by one that notes the call. Then the call runs, fails, or kills
the program. An audit hook notes the same calls as the interpreter sees them: where the two lists agree, nothing
that Python writes has been missed. What compiled code writes past Python is for strace to see.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "pwrite", "fsync", "ftruncate", "close", "link", "replace", "unlink", "mkdir", "rmdir")
# What fails for want of space; the rest works on a full disk.
FILLING = ("open", "write", "pwrite", "fsync", "link", "mkdir")
# What fails on a file system mounted read-only.
CHANGING = ("open", "link", "replace", "unlink", "mkdir", "rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_BY_DESCRIPTOR = ("write", "pwrite", "fsync", "ftruncate", "close")
_AUDITED = {"os.rename": "replace", "os.remove": "unlink", "os.truncate": "ftruncate"}
_READING = ("os.listdir", "os.scandir", "os.chdir", "os.walk", "os.fwalk")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens, and at which call.

    Attributes:
        at: Number of the call that it happens to, from 0.
        when: Of a kill: `before` the call, `half` way through a write, `after` it.
        number: The errno that the call fails with; None kills.
        calls: A failure that stays happens to all later calls of these names too; empty happens once.
    """

    at: int
    when: str = "before"
    number: int | None = None
    calls: tuple[str, ...] = ()


class Disk:
    """The calls that change files below a folder, noted, and one of them struck by a fault."""

    def __init__(self, folder: Path, fault: Fault | None = None) -> None:
        self.folder = os.path.abspath(folder)  # noqa: PTH100 - of pathlib only calls under test
        self.fault = fault
        self.calls: list[tuple[str, str]] = []
        self.audited: list[tuple[str, str]] = []
        self._descriptors: dict[int, str] = {}

    def install(self) -> None:
        """Take over the functions of this process, for good."""
        for name in CALLS:
            setattr(os, name, self._replacement(name, getattr(os, name)))
        sys.addaudithook(self._audit)

    def _replacement(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = self._concerned(name, args)
            if path is None:
                return real(*args, **kwargs)
            number = len(self.calls)
            noted = "opendir" if name == "open" and args[1] & os.O_DIRECTORY else name
            self.calls.append((noted, path))
            self._strike(noted, number, real, args, "before")
            try:
                result = real(*args, **kwargs)
            finally:
                self._strike(noted, number, real, args, "after")
            if name == "open":
                self._descriptors[result] = path
            elif name == "close":
                del self._descriptors[args[0]]
            return result

        return call

    def _strike(self, name: str, number: int, real: Any, args: Any, moment: str) -> None:
        """Fail or kill where the fault says so; `moment` is `before` or `after` the call."""
        fault = self.fault
        if fault is None or (number != fault.at and not (number > fault.at and name in fault.calls)):
            return
        if fault.number is None:
            if moment == ("after" if fault.when == "after" else "before"):
                if fault.when == "half":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        elif moment == "before":
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            elif name == "close":  # a descriptor is closed even where flushing fails
                real(args[0])
                del self._descriptors[args[0]]
            raise OSError(fault.number, os.strerror(fault.number))

    def _concerned(self, name: str, args: Any) -> str | None:
        """The path below the folder that a call changes, if it does."""
        if name in _BY_DESCRIPTOR:
            return self._descriptors.get(args[0])
        if name == "open" and not args[1] & (_WRITES | os.O_DIRECTORY):
            return None
        return self._below(args[0])

    def _below(self, path: Any) -> str | None:
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        return os.path.relpath(full, self.folder) if full.startswith(self.folder + os.sep) else None

    def _audit(self, event: str, args: Any) -> None:
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & _WRITES:
                return
        elif not event.startswith(("os.", "shutil.", "tempfile.")) or event in _READING:
            return
        target = self._descriptors.get(args[0]) if event == "os.truncate" else None
        path = target or next((below for argument in args if (below := self._below(argument)) is not None), None)
        if path is not None:
            self.audited.append((_AUDITED.get(event, event.removeprefix("os.")), path))


def limit_file_size(num_bytes: int) -> None:
    """Let writing beyond a size fail, as on a file system that knows no larger files (EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
