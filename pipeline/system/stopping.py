"""SIGINT, SIGTERM and a time limit: end at once where nothing is lost, after the step where something would be.

Imports nothing slow, so that the handler stands before torch is loaded.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from types import FrameType

from pipeline.errors import Interrupted

SECONDS_OF_ONE_SIGNAL = 5.0
TIME_LIMIT_REACHED = 75  # EX_TEMPFAIL of sysexits.h: try again


class StopSignal:
    """Turns SIGINT and SIGTERM into `Interrupted`, raised at a point where state can be saved.

    Outside `deferred` the exception is raised where the signal arrives. Inside, the signal is only noted, and the
    work that is going on asks after each of its steps. A second signal is raised at once in any case.

    A time limit never interrupts: it only answers those who ask, and only once this process has done a step, so that
    however short it is, repeating the command comes to an end.

    Attributes:
        received: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = -math.inf
        self._patience = 0.0
        self._deferred = False
        self._deadline = math.inf
        self._has_stepped = False

    def install(self, *, is_rank: bool = False) -> None:
        """Take over SIGINT and SIGTERM; call in the main thread.

        Args:
            is_rank: Whether torchrun started this process. It passes on what a scheduler may already have sent to all
                processes, so what comes within SECONDS_OF_ONE_SIGNAL is one signal.
        """
        self._patience = SECONDS_OF_ONE_SIGNAL if is_rank else 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def limit(self, seconds: float) -> None:
        """Begin to count a time limit, in place of any before.

        Args:
            seconds: From now on; infinity for none.
        """
        self._deadline, self._has_stepped = time.monotonic() + seconds, False

    def after_step(self) -> int:
        """Return the exit code with which the run is to end now that a step is done and can be saved; 0 to go on."""
        self._has_stepped = True
        return self.before_step()

    def before_step(self) -> int:
        """Return the exit code with which the run is to end before it begins what takes long; 0 to begin."""
        if self.received is not None:
            return 128 + self.received
        return TIME_LIMIT_REACHED if self._has_stepped and time.monotonic() > self._deadline else 0

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Note signals instead of raising them, until the outermost such block is left.

        Raises:
            Interrupted: At the end of the outermost block, where a signal came and the work has ended all the same.
        """
        outer, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = outer
        if not outer:
            self.check()

    def check(self) -> None:
        """Raise where a signal came; code that catches every error may have kept it from ending the run.

        Raises:
            Interrupted: A signal came.
        """
        if self.received is not None:
            raise self.error("stopped; what was finished is saved; run the same command again to go on")

    def end(self) -> None:
        """Leave no signal a chance to disturb the interpreter's end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def error(self, message: str) -> Interrupted:
        """Return the exception that ends a run for the signal received."""
        return Interrupted(message, 128 + (self.received or signal.SIGTERM))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.received is not None
        if again and now - self._received_at < self._patience:
            return
        self.received, self._received_at = number, now
        if again or not self._deferred:
            raise Interrupted(f"stopped by {signal.Signals(number).name}; run the same command again", 128 + number)


def stopped(exit_code: int, where: str) -> Interrupted:
    """Return the exception that ends a run whose work is saved.

    Args:
        exit_code: As `StopSignal.after_step` returns it, not 0.
        where: How far the run is, as `in epoch 3 of 12`.
    """
    what = "time limit reached" if exit_code == TIME_LIMIT_REACHED else "stopped"
    return Interrupted(f"{what} {where}; run the same command again to go on", exit_code)
