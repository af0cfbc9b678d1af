"""Who follows a run beside the console: its log, TensorBoard, and classes of the user's. docs/watching.md is the page.

What they are told is pipeline.training.fit.Watcher. Like all of this package it decides no result.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Interrupted, StorageError, UsageError, one_line
from pipeline.system.storage import append_line, read_bytes, read_if_exists, write_atomic

LOG = "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class WatchedRun:
    """What is trained, as a watcher is told when it is made.

    Attributes:
        name: Of the model in the recipe.
        kind: `teacher` or `student`.
        recipe: The name of the recipe.
        seed: Of initialisation and order.
        fingerprint: SHA-256 of everything that decides the result, 64 hexadecimal digits. A run that goes on after a
            stop has the same one.
        folder: Where the result will lie.
        settings: The fields of the model's recipe as it is trained, plain JSON values.
        device: The device's name.
        precision: `fp32` or `bf16`.
        ranks: Number of processes that train it together.
    """

    name: str
    kind: str
    recipe: str
    seed: int
    fingerprint: str
    folder: Path
    settings: Mapping[str, Any]
    device: str
    precision: str
    ranks: int = 1


class Watchers:
    """Several watchers that are told the same, in their order, each by those methods of a watcher that it has.

    One of a user's that raises an error is told nothing more, and a warning names it: the training goes on. Used as a
    context, it tells them of an error that ends the block.

    Args:
        own: Of this package; their errors are ours.
        guests: Those that the user asked for, by the name that messages call them.
    """

    def __init__(self, *own: object, guests: Mapping[str, object] | None = None) -> None:
        self._own, self._guests = own, dict(guests or {})

    def __enter__(self) -> Watchers:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.stopped(str(error) if isinstance(error, Interrupted) else describe(error))

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Tell them."""
        self._tell("started", epochs, steps_per_epoch, epoch, step)

    def stepped(self) -> None:
        """Tell them."""
        self._tell("stepped")

    def trained(self, images: int, seconds: float) -> None:
        """Tell them."""
        self._tell("trained", images, seconds)

    def epoch_ended(self, row: Mapping[str, Any]) -> None:
        """Tell them; each has a copy of its own, for the row is part of the result."""
        self._tell("epoch_ended", row)

    def warned(self, message: str) -> None:
        """Tell them."""
        self._tell("warned", message)

    def ended(self, metrics: Mapping[str, Any]) -> None:
        """Tell them."""
        self._tell("ended", metrics)

    def stopped(self, reason: str) -> None:
        """Tell them."""
        self._tell("stopped", reason)

    def _tell(self, event: str, *arguments: Any) -> None:
        for watcher in self._own:
            getattr(watcher, event, _ignore)(*arguments)
        for name, watcher in list(self._guests.items()):
            copies = (dict(argument) if isinstance(argument, Mapping) else argument for argument in arguments)
            try:
                getattr(watcher, event, _ignore)(*copies)
            except Interrupted:
                raise
            except (Exception, SystemExit) as error:
                self._guests.pop(name, None)
                self.warned(f"--watch {name}: {event} failed ({describe(error)}); it is told nothing more")


def _ignore(*arguments: object) -> None:
    """Stands for a method that a watcher does not have."""


def describe(error: BaseException) -> str:
    """Return an error of somebody else's code as one line."""
    text = " ".join(str(error).split())
    return one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__)


class RunLog:
    """Appends a JSON line for each event to a file, readable while the run goes on and after it.

    A run that goes on appends to its log, and a last line that a kill has torn is cut off before. The log of another
    run in its place is replaced. A disk that is full or fails costs lines, never the run: it is said once.

    Args:
        path: The file; its folder is made with the first line.
        run: What is trained.
        warn: Shows people a warning.
    """

    def __init__(self, path: Path, run: WatchedRun, warn: Callable[[str], None]) -> None:
        self._path, self._run, self._warn = path, run, warn
        self._epoch_began = time.monotonic()
        self._rate: float | None = None
        self._early: list[str] | None = []  # warnings until `started`, whose line comes first
        self._is_failing = self._is_finished = False

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Write what is trained, and from where."""
        self._epoch_began = time.monotonic()
        run = {**dataclasses.asdict(self._run), "folder": self._run.folder.as_posix()}
        where = {"epochs": epochs, "steps_per_epoch": steps_per_epoch, "epoch": epoch, "step": step}
        self._append("started", {**where, **run}, anew=self._is_anothers())
        early, self._early = self._early, None
        for message in early or []:
            self.warned(message)

    def trained(self, images: int, seconds: float) -> None:
        """Take the rate from the epoch's steps, without its evaluation."""
        self._rate = round(images / max(seconds, 1e-9), 1) if images else None

    def epoch_ended(self, row: Mapping[str, Any]) -> None:
        """Write the row, the seconds since the last one, evaluation among them, and the images trained in a second."""
        now = time.monotonic()
        self._append("epoch", {**row, "seconds": round(now - self._epoch_began, 3), "images_per_second": self._rate})
        self._epoch_began = now

    def warned(self, message: str) -> None:
        """Write the warning."""
        if self._early is None:
            self._append("warned", {"message": message})
        else:
            self._early.append(message)

    def stopped(self, reason: str) -> None:
        """Write why."""
        self._append("stopped", {"reason": reason})

    def finished(self, metrics: Mapping[str, Any], seconds: float, folder: Path) -> None:
        """Write the last line, and a copy of the log beside the result.

        Args:
            metrics: The run's metrics.json.
            seconds: Work on the run, earlier processes' too.
            folder: Of the result.
        """
        last = {key: metrics[key] for key in ("evaluated_on", "best", "last", "test")}
        self._append("ended", {"seconds": round(seconds, 1), **last})
        self._is_finished = True
        try:
            write_atomic(folder / LOG, read_bytes(self._path))
        except StorageError as error:
            self._fail(folder / LOG, error)

    def _is_anothers(self) -> bool:
        """Tell whether the file is the log of a run that other settings decided."""
        try:
            content = read_if_exists(self._path)
            return (
                content is not None and json.loads(content.partition(b"\n")[0])["fingerprint"] != self._run.fingerprint
            )
        except (StorageError, KeyError, TypeError, ValueError):  # none that was written here
            return True

    def _append(self, event: str, fields: Mapping[str, Any], *, anew: bool = False) -> None:
        if self._is_finished:
            return
        moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            if anew:
                self._path.unlink(missing_ok=True)
            append_line(self._path, json.dumps({"event": event, "time": moment, **fields}).encode())
        except (OSError, TypeError, ValueError) as error:
            self._fail(self._path, error)

    def _fail(self, path: Path, error: Exception) -> None:
        if not self._is_failing:
            self._warn(f"{path}: the log lacks lines ({describe(error)}); the run goes on")
        self._is_failing = True


class TensorBoard:
    """Writes the curve, the rate and the test scores for TensorBoard; the step is the epoch.

    Args:
        folder: Of the event files. Those of former runs may lie there: what they say of epochs to come is hidden.
        run: What is trained.

    Raises:
        UsageError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path, run: WatchedRun) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(f"{describe(error)}; run `pip install 'titn-pipeline[tensorboard]'`") from error
        self._open, self._run, self._folder = SummaryWriter, run, folder
        self._writer: Any = None
        self._rate: float | None = None

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Write the settings."""
        self._writer = self._open(str(self._folder), purge_step=epoch + 1)
        rows = [f"| {key} | {value} |" for key, value in self._run.settings.items()]
        self._writer.add_text("settings", "\n".join(["| field | value |", "|---|---|", *rows]), epoch + 1)
        self._writer.flush()

    def trained(self, images: int, seconds: float) -> None:
        """Take the rate."""
        self._rate = images / max(seconds, 1e-9) if images else None

    def epoch_ended(self, row: Mapping[str, Any]) -> None:
        """Write the row."""
        self._write({**row, "images_per_second": self._rate}, int(row["epoch"]))

    def ended(self, metrics: Mapping[str, Any]) -> None:
        """Write the test scores of the best epoch."""
        test = metrics["test"]
        self._write({f"test/{key}": value for key, value in test.items() if key != "epoch"}, int(test["epoch"]))
        self._writer.close()

    def stopped(self, reason: str) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, values: Mapping[str, float | None], epoch: int) -> None:
        for name, value in values.items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()
