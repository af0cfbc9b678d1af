"""A time limit for code that might never end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Hung(BaseException):
    """Raised where the time is up; no handler of ordinary errors catches it."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise Hung in the main thread if the block takes longer."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Hung

    former = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
