"""Work that is killed, or finds the disk full, at each of its calls that change files, in this process."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

CALLS = ("link", "open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
FILLING = ("open", "write", "fsync")


class Killed(BaseException):
    """Ends the process, as far as the files are concerned."""


def killed_at_each_call(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None], check: Callable[[], None]) -> int:
    """Let `work` be killed before its first call that changes files, its second, and so on, and check each time."""
    return _struck(monkeypatch, work, check, CALLS, lambda: Killed(), Killed, stays=True)


def full_at_each_call(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], None], check: Callable[[], None], error: type[Exception]
) -> int:
    """Let `work` find the disk full at its first call that takes space, its second, and so on, and check each time."""
    return _struck(
        monkeypatch, work, check, FILLING, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), error, stays=False
    )


def _struck(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], None], check: Callable[[], None], calls: tuple[str, ...],
    make: Callable[[], BaseException], ends: type[BaseException], *, stays: bool,
) -> int:  # fmt: skip
    for number in range(1000):
        left = number

        def strike(real: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == -1 or (left < 0 and stays):
                    raise make()
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, strike(getattr(os, name)))
            with contextlib.suppress(ends):
                work()
        if left >= 0:
            return number
        check()
    raise AssertionError("it does not end")
