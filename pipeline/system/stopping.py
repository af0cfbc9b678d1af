"""SIGINT, SIGTERM, SIGHUP and a time limit: a run ends at once, or after the current step if it would lose work.

Imports nothing slow, so that the handler is installed before torch is loaded.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from pipeline.errors import Interrupted

SECONDS_OF_ONE_SIGNAL = 5.0
SECONDS_BEFORE_AGAIN = 0.01
TIME_LIMIT_REACHED = 75  # EX_TEMPFAIL of sysexits.h: try again
_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([] if _HANGUP is None else [_HANGUP]))


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into `Interrupted`, raised at a point where state can be saved.

    Outside `deferred` the exception is raised when the signal arrives. Inside, the signal is only recorded, and the
    work asks for it after each step. A second signal raises at once, for it is a person's who does not want to wait.
    SIGHUP is nobody's, and comes twice where kernel and shell both send it: it is no second signal, nor has one.

    A time limit never interrupts. It applies only when the work asks, and after this process has done a step: however
    short the limit, repeating the command finishes the run.

    Attributes:
        received: The signal received, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = -math.inf
        self._patience = 0.0
        self._deferred = False
        self._is_lost = False
        self._deadline = math.inf
        self._has_stepped = False

    def install(self, *, is_rank: bool = False) -> None:
        """Take over SIGINT, SIGTERM and, unless `nohup` has it ignored, SIGHUP; call in the main thread.

        Args:
            is_rank: Whether torchrun started this process. torchrun forwards signals that a scheduler may also send to
                every process, so all within SECONDS_OF_ONE_SIGNAL count as one.
        """
        self._patience = SECONDS_OF_ONE_SIGNAL if is_rank else 0.0
        for number in _SIGNALS:
            if number != _HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        tell = sys.unraisablehook

        def send_again(dropped: Any) -> None:
            if not isinstance(dropped.exc_value, Interrupted):
                tell(dropped)
            elif self.received is not None:
                self._is_lost = True
                threading.Timer(SECONDS_BEFORE_AGAIN, os.kill, (os.getpid(), self.received)).start()

        # A signal may arrive in a weak reference's callback or a `__del__`, which Python lets raise nothing.
        sys.unraisablehook = send_again

    def limit(self, seconds: float) -> None:
        """Start a time limit of `seconds` from now, or infinity for none, in place of any earlier one."""
        self._deadline, self._has_stepped = time.monotonic() + seconds, False

    def after_step(self) -> int:
        """Return the exit code to end with after a step that can be saved; 0 to go on."""
        self._has_stepped = True
        return self.before_step()

    def before_step(self) -> int:
        """Return the exit code to end with before a long step; 0 to begin it."""
        if self.received is not None:
            return 128 + self.received
        return TIME_LIMIT_REACHED if self._has_stepped and time.monotonic() > self._deadline else 0

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Record signals instead of raising them, until the outermost such block ends.

        Raises:
            Interrupted: At the end of the outermost block, if a signal came and the work ended without error.
        """
        outer, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = outer
        if not outer:
            self.check()

    def check(self) -> None:
        """Raise if a signal came; code that catches all errors may have swallowed the exception.

        Raises:
            Interrupted: A signal came.
        """
        if self.received is not None:
            raise self.error("stopped; what was finished is saved; run the same command again to go on")

    @contextlib.contextmanager
    def taking_ctrl_c(self) -> Iterator[None]:
        """Take over SIGINT alone until the block ends, as a function of a library may; only in the main thread.

        Raises:
            KeyboardInterrupt: A signal came, and the work is saved where it can be.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        except Interrupted as error:
            raise KeyboardInterrupt(str(error)) from error
        finally:
            signal.signal(signal.SIGINT, former)

    def end(self) -> None:
        """Ignore signals while the interpreter shuts down."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def error(self, message: str) -> Interrupted:
        """Return the exception that ends a run for the signal received."""
        return Interrupted(message, 128 + (self.received or signal.SIGTERM))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_lost, self._is_lost = self._is_lost, False
        if (
            self.received is not None
            and not is_lost
            and (number == _HANGUP or now - self._received_at < self._patience)
        ):
            return
        again = self.received not in (None, _HANGUP)
        self.received, self._received_at = number, now
        if again or is_lost or not self._deferred:
            raise Interrupted(f"stopped by {signal.Signals(number).name}; run the same command again", 128 + number)


def stopped(exit_code: int, where: str) -> Interrupted:
    """Return the exception that ends a run whose work is saved.

    Args:
        exit_code: From `StopSignal.after_step`, not 0.
        where: How far the run is, such as `in epoch 3 of 12`.
    """
    what = "time limit reached" if exit_code == TIME_LIMIT_REACHED else "stopped"
    return Interrupted(f"{what} {where}; run the same command again to go on", exit_code)
