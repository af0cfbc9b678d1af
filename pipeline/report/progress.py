"""Progress of a run, for people: a bar on a terminal, one line an epoch in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
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


class RunWatcher:
    """Shows a run: a progress bar with rate and ETA on a terminal, one plain line per epoch in a log.

    Args:
        console: Where to print.
        name: What is being trained.
        num_samples: Images of an epoch, for the rate.
    """

    def __init__(self, console: Console, name: str, num_samples: int) -> None:
        self._console, self._name, self._num_samples = console, name, num_samples
        self._epochs = 0
        self._epoch_began = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> RunWatcher:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Begin at `step` of `epoch`, both counted from 0."""
        self._epochs, self._epoch_began = epochs, time.monotonic()
        if epoch or step:
            self._console.print(f"{self._name}: going on from epoch {epoch + 1}, step {step}", highlight=False)
        if self._console.is_terminal:
            self._bar = progress_bar(self._console)
            self._task = self._bar.add_task(
                self._name, total=epochs * steps_per_epoch, completed=epoch * steps_per_epoch + step
            )
            self._bar.start()

    def stepped(self) -> None:
        """Advance the bar by one step."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def epoch_ended(self, row: Mapping[str, Any]) -> None:
        """Print one line."""
        seconds = time.monotonic() - self._epoch_began
        self._epoch_began = time.monotonic()
        agreement = "" if row["agreement"] is None else f", agreement {row['agreement']:.2f} %"
        self._console.print(
            f"{self._name}: epoch {row['epoch']}/{self._epochs}, lr {row['lr']:.2e}, "
            f"train loss {row['train_loss']:.4f}, top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %{agreement}, "
            f"{seconds:.1f} s, {self._num_samples / max(seconds, 1e-9):.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )

    def warned(self, message: str) -> None:
        """Print a warning."""
        self._console.print(f"{self._name}: warning: {message}", style="yellow", highlight=False, soft_wrap=True)


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
