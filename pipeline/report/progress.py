"""Progress of a run, for people: a bar on a terminal, one line an epoch in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Position:
    """A run's place among those of its command.

    Attributes:
        label: Kind of the runs, in the singular, such as `teacher`.
        index: The run's number, from 1.
        count: Number of runs.
        epochs_after: Epochs of the runs that follow.
    """

    label: str
    index: int
    count: int
    epochs_after: int


class RunWatcher:
    """Shows a run: a progress bar with rate and ETA on a terminal, one plain line per epoch in a log.

    Once a whole epoch has been timed, the line also shows the time left for the command. It assumes that every epoch to
    come takes as long, those of other models too, and does not count other work such as labelling.

    Args:
        console: Where to print.
        name: Of the model.
        split: That the scores are on, such as `test`.
        position: Its place among the command's runs; None where it is the only one.

    Attributes:
        name: Of the model, with its position.
    """

    def __init__(self, console: Console, name: str, split: str, position: Position | None = None) -> None:
        self.name = name if position is None else f"{name} ({position.label} {position.index} of {position.count})"
        self._console, self._split, self._position = console, split, position
        self._epochs, self._rate = 0, ""
        self._epoch_began = time.monotonic()
        self._is_whole = True
        self._bar: Progress | None = None

    def __enter__(self) -> RunWatcher:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Begin at `step` of `epoch`, both counted from 0."""
        self._epochs, self._epoch_began, self._is_whole = epochs, time.monotonic(), step == 0
        if epoch or step:
            where = f"epoch {epoch + 1}, step {step}"
            self._console.print(f"{self.name}: going on from {where}", highlight=False, markup=False)
        if self._console.is_terminal:
            self._bar = progress_bar(self._console)
            self._task = self._bar.add_task(
                self.name, total=epochs * steps_per_epoch, completed=epoch * steps_per_epoch + step
            )
            self._bar.start()

    def stepped(self) -> None:
        """Advance the bar by one step."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def trained(self, images: int, seconds: float) -> None:
        """Take the rate from the images that were trained and the seconds of their steps: evaluation is not in it."""
        self._rate = f", {images / max(seconds, 1e-9):.0f} images/s" if images else ""

    def epoch_ended(self, row: Mapping[str, Any]) -> None:
        """Print one line; on a terminal it leaves out what does not fit, what matters least first."""
        now = time.monotonic()
        seconds = now - self._epoch_began
        epochs, runs = self._epochs - row["epoch"], ""
        if self._position is not None:
            epochs, runs = epochs + self._position.epochs_after, f" for all {self._position.label}s"
        left = f"about {_span(epochs * seconds)} left" if epochs and self._is_whole else ""
        self._epoch_began, self._is_whole = now, True
        parts = {
            "epoch": f": epoch {row['epoch']}/{self._epochs}",
            "lr": f", lr {row['lr']:.2e}" if row["epoch"] else "",
            "loss": "" if row["train_loss"] is None else f", train loss {row['train_loss']:.4f}",
            "top1": f", {self._split} top-1 {row['top1']:.2f} %",
            "top5": f", top-5 {row['top5']:.2f} %",
            "agreement": "" if row["agreement"] is None else f", agreement {row['agreement']:.2f} %",
            "seconds": f", {seconds:.1f} s",
            "rate": self._rate,
            "left": left and f", {left}{runs}",
        }
        name = self.name
        if self._console.is_terminal:
            least_first = ("lr", "rate", "top5", "agreement", "seconds")
            shorter = [
                *((part, "") for part in least_first),
                ("left", left and f", {left}"),
                ("loss", ""),
                ("left", ""),
            ]
            for part, text in shorter:
                if len(name) + sum(map(len, parts.values())) > self._console.width:
                    parts[part] = text
            room = max(1, self._console.width - sum(map(len, parts.values())))
            name = name if len(name) <= room else f"{name[: room - 1]}…"
        self._console.print(name + "".join(parts.values()), highlight=False, markup=False, soft_wrap=True)

    def warned(self, message: str) -> None:
        """Print a warning."""
        text = f"{self.name}: warning: {message}"
        self._console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


class CountWatcher:
    """Shows how many of some things are done: a bar on a terminal, elsewhere a line at intervals.

    Args:
        console: Where the bar is shown; None shows lines alone.
        say: Prints a line.
        title: Of the bar, such as `labelling views`.
        done: What a line begins with, such as `labelled`.
        things: What is counted, in the plural.
        total: How many there are.
        rate: A unit, and how many of it each thing is; by default the things themselves.
        ends: Whether the last line is printed however soon it comes.
    """

    def __init__(
        self,
        console: Console | None,
        say: Callable[[str], None],
        title: str,
        done: str,
        things: str,
        total: int,
        *,
        rate: tuple[str, int] | None = None,
        ends: bool = False,
    ) -> None:
        self._say, self._done, self._things, self._total, self._ends = say, done, things, total, ends
        self._unit, self._each = (things, 1) if rate is None else rate
        self._count, self._began = 0, time.monotonic()
        self._said = self._began
        self._bar = None if console is None or not console.is_terminal else progress_bar(console)
        self._task = None if self._bar is None else self._bar.add_task(title, total=total)

    def __enter__(self) -> CountWatcher:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """Count one more."""
        self._count += 1
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)
            return
        now = time.monotonic()
        if now - self._said > SECONDS_BETWEEN_LINES or (self._ends and self._count == self._total):
            rate = self._count * self._each / max(now - self._began, 1e-9)
            left = (self._total - self._count) * (now - self._began) / self._count
            end = f", about {_span(left)} left" if self._count < self._total else ""
            self._say(f"{self._done} {self._count}/{self._total} {self._things}, {rate:.0f} {self._unit}/s{end}")
            self._said = now


def _span(seconds: float) -> str:
    """Write a duration in whole numbers of the unit that fits."""
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if seconds < limit:
            return f"{max(1, round(seconds / divisor))} {unit}"
    return f"{round(seconds / 86_400)} days"


class _RateColumn(ProgressColumn):
    """Steps done per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def progress_bar(console: Console) -> Progress:
    """Return a progress bar with count, rate and ETA."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console,
    )
