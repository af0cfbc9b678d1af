"""SIGINT and SIGTERM: end at once where nothing is lost, after the step where something would be.

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


class StopSignal:
    """Turns SIGINT and SIGTERM into `Interrupted`, raised at a point where state can be saved.

    Outside `deferred` the exception is raised where the signal arrives. Inside, the signal is only noted, and the
    work that is going on asks for `received` between its steps. A second signal is raised at once in any case.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = -math.inf
        self._patience = 0.0
        self._deferred = False

    def install(self, *, is_rank: bool = False) -> None:
        """Take over SIGINT and SIGTERM; call in the main thread.

        Args:
            is_rank: Whether torchrun started this process. It passes on what a scheduler may already have sent to all
                processes, so what comes within SECONDS_OF_ONE_SIGNAL is one signal.
        """
        self._patience = SECONDS_OF_ONE_SIGNAL if is_rank else 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

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
        return Interrupted(message, self.received or signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.received is not None
        if again and now - self._received_at < self._patience:
            return
        self.received, self._received_at = number, now
        if again or not self._deferred:
            raise Interrupted(f"stopped by {signal.Signals(number).name}; run the same command again", number)
