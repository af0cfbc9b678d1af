"""Commands stopped at random moments, several times in a row, and run again: they end as if nothing had happened."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.training.manifest import check_all
from tests.support.commands import CONTEXT, HUNG, Command, Ended, run
from tests.support.fault_injection import Fault
from tests.support.project import Project
from tests.support.tally import Tally

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
# Instead of a minute, so that runs of seconds have states to resume from.
SECONDS_BETWEEN_SAVES = 0.1
UNEQUAL = ("run.json", "log.jsonl", "manifest.json")


@dataclass
class Trial:
    """How a command ended that was interrupted and run again.

    Attributes:
        signals: Those sent, each with whether it came before the command's end.
        resumed: Whether a run went on in the midst of training.
        wrong: What went wrong.
    """

    signals: list[tuple[signal.Signals, bool]]
    resumed: bool
    wrong: list[str]


class Interruptions:
    """A command, in a project where it has something to do.

    Args:
        project: The project as the command finds it; it is copied for every trial.
        scratch: A folder that does not exist.
        arguments: The command.
    """

    def __init__(self, project: Project, scratch: Path, *arguments: str) -> None:
        self.project, self.scratch, self.arguments = project, scratch, arguments
        self.former = files(project.path)
        shutil.copytree(project.path, scratch)
        command, began = self._start(), time.monotonic()
        ended = command.finish()
        assert ended.code == 0, ended.err
        self.seconds = time.monotonic() - began
        self.whole = files(scratch)
        assert self.whole != self.former
        shutil.rmtree(scratch)

    def trial(self, rng: random.Random) -> Trial:
        """Interrupt the command one to three times, each at a random moment of its whole duration; let it end."""
        shutil.copytree(self.project.path, self.scratch)
        trial, outs = Trial([], False, []), []
        for _ in range(rng.choice((1, 1, 2, 3))):
            number, moment = rng.choice(SIGNALS), rng.uniform(0, self.seconds)
            ended = self._interrupt(number, moment)
            outs.append(ended.out)
            trial.signals.append((number, ended.code != 0))
            trial.wrong += [f"{problem} at {moment:.3f} s" for problem in self._check_stopped(number, ended)]
        ended = run(self.scratch, *self.arguments, before=save_often)
        trial.wrong += self.check_end(ended)
        trial.resumed = any("going on from epoch" in out for out in (*outs, ended.out))
        shutil.rmtree(self.scratch)
        return trial

    def stopped_at_step(self, step: int, *, moved: bool = False) -> list[str]:
        """Stop the command in a step of training, and let it go on; return what went wrong.

        Args:
            step: Counted from 1.
            moved: Whether it goes on in another copy of the project, which is given the run's directory in data/work.
        """
        shutil.copytree(self.project.path, self.scratch)
        ended = run(self.scratch, *self.arguments, before=functools.partial(stop_at_step, step))
        wrong = [] if ended.code == 128 + signal.SIGTERM else [f"code: exit {ended.code}"]
        wrong += self._check_stopped(signal.SIGTERM, ended)
        if moved:
            self._move()
        ended = run(self.scratch, *self.arguments)
        wrong += [] if "going on from epoch" in ended.out else ["lost: begins anew"]
        wrong += self.check_end(ended)
        shutil.rmtree(self.scratch)
        return wrong

    def _move(self) -> None:
        """Replace the project by a fresh copy, and bring nothing but the directory of the run under way."""
        left = self.scratch.rename(self.scratch.with_name("left"))
        shutil.copytree(self.project.path, self.scratch)
        [folder] = {file.parent for file in left.glob("data/work/**/state-?.json")}
        shutil.copytree(folder, self.scratch / folder.relative_to(left))
        shutil.rmtree(left)

    def killed_at(self, at: int) -> list[str]:
        """Kill the command before a call that changes files, and let it run again; return what went wrong."""
        shutil.copytree(self.project.path, self.scratch)
        ended = run(self.scratch, *self.arguments, fault=Fault(at))
        wrong = [] if ended.code == -signal.SIGKILL else [f"alive: exit {ended.code}"]
        wrong += self._check_stopped(signal.SIGKILL, ended)
        wrong += self.check_end(run(self.scratch, *self.arguments))
        shutil.rmtree(self.scratch)
        return wrong

    def num_calls(self) -> int:
        """Count the calls by which the undisturbed command changes files when it saves no state."""
        shutil.copytree(self.project.path, self.scratch)
        ended = run(self.scratch, *self.arguments)
        shutil.rmtree(self.scratch)
        return len(ended.calls)

    def _start(self) -> Command:
        """Start the command, and return it as it begins."""
        began = CONTEXT.Event()
        command = Command(self.scratch, *self.arguments, before=functools.partial(begin, began))
        began.wait()
        return command

    def _interrupt(self, number: int, seconds: float) -> Ended:
        """Start the command, and send it a signal some seconds after it has begun."""
        command, began = self._start(), time.monotonic()
        command.wait(seconds)
        elapsed = time.monotonic() - began
        command.send(number)
        ended = command.finish()
        if ended.code == 0 and "going on from" not in ended.out and "up to date" not in ended.out:
            # The machine was busier when the duration was measured: most signals would come after the end.
            self.seconds = elapsed
        return ended

    def _check_stopped(self, number: signal.Signals, ended: Ended) -> Iterator[str]:
        """List what is wrong with the command's stop and with the files that it left for others."""
        stopped = -number if number == signal.SIGKILL else 128 + number
        if ended.code == HUNG:
            yield "hung"
        elif ended.code not in (0, stopped):
            yield f"code: exit {ended.code} after {number.name}, {ended.err}"
        elif len(ended.err.splitlines()) != (ended.code > 0):
            yield f"message: {ended.err!r} after {number.name}"
        present = {path: digest for path, digest in files(self.scratch).items() if not path.endswith(".tmp")}
        for path, digest in present.items():
            if not path.startswith("work/") and digest not in (self.former.get(path), self.whole.get(path)):
                yield f"torn: {path}"
        for path in (path for path in present if path.endswith("/metrics.json")):
            folder = path.removesuffix("metrics.json")
            if is_told(self.scratch / "data" / folder):
                continue
            if not any(
                all(present.get(path) == digest for path, digest in all_of.items() if path.startswith(folder))
                for all_of in (self.former, self.whole)
                if path in all_of
            ):
                yield f"mixed: {folder}"

    def check_end(self, ended: Ended) -> Iterator[str]:
        """List what is wrong after the last run."""
        if ended.code or ended.err:
            yield f"failed: exit {ended.code}, {ended.err}"
        present = files(self.scratch)
        for path in sorted(present.keys() | self.whole.keys()):
            if present.get(path) != self.whole.get(path):
                yield f"differs: {path}" if path in self.whole else f"leftovers: {path}"


def is_told(folder: Path) -> bool:
    """Tell whether a run's manifest says that its files are not what was written, as between two renames."""
    try:
        check_all(folder)
    except DataError:
        return True
    return False


def files(project: Path) -> dict[str, str]:
    """Map each file below a project's data to its SHA-256, except locks, and what has times or digests of such.

    These are run.json, log.jsonl, a run's manifest, and what is kept.
    """
    data = project / "data"
    return {
        str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(data.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and path.name not in UNEQUAL and "kept" not in path.parts
    }


def save_often() -> None:
    """Save states of training as often as they can be written."""
    from pipeline.training import fit as training

    training.SECONDS_BETWEEN_SAVES = SECONDS_BETWEEN_SAVES
    training.SAVING_SHARE = 1.0
    training.ASSUMED_BYTES_PER_SECOND = float("inf")


def stop_at_step(step: int, numbers: Iterable[int] = (signal.SIGTERM,)) -> None:
    """Let signals, by default SIGTERM, arrive in a step of training, counted from 1."""
    from pipeline.training import fit as training

    train_step, steps = training.train_step, itertools.count(1)

    def stopping(*arguments: Any, **options: Any) -> Any:
        if next(steps) == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return train_step(*arguments, **options)

    training.train_step = stopping


def begin(began: Event) -> None:
    """Hold signals back until the command's own handler is installed; earlier ones would meet the test's handler."""
    from stages.shared.options import STOP

    signals = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    install = STOP.install

    def installing(**options: Any) -> None:
        install(**options)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    STOP.install = installing  # type: ignore[method-assign]
    save_often()
    began.set()


def interrupt_at_random(interruptions: Interruptions, count: int, rng: random.Random) -> Tally:
    """Do a number of trials, and count."""
    tally = Tally()
    for number in range(count):
        trial = interruptions.trial(rng)
        tally.note(f"trial {number} of {' '.join(interruptions.arguments)}", trial.wrong)
        tally.counts["trials"] += 1
        tally.counts["resumed"] += trial.resumed
        for signalled, in_time in trial.signals:
            tally.counts[signalled.name if in_time else "after the end"] += 1
    return tally


def kill_at_calls(interruptions: Interruptions, calls: Iterable[int]) -> Tally:
    """Kill the command before chosen calls that change files, and count."""
    tally = Tally()
    for at in calls:
        tally.note(f"call {at}", interruptions.killed_at(at))
        tally.counts["kills"] += 1
    return tally


def small_project(path: Path) -> Project:
    """Make a project whose stages take a second or two each, and whose students ask for four views."""
    project = Project.create(path, alone=True)
    project.edit("{crop: 2, flip: false, autoaugment: cifar10, mixing: cutmix}", "{crop: 1, mixing: none}")
    project.edit("squeezenet1_1: {epochs: 8}", "squeezenet1_1: {epochs: 3}")
    project.edit("epochs: 1, batch_size: 8", "epochs: 1, batch_size: 64")
    project.edit("count: 2", "count: 4")
    return project


def small_project_with_labels(path: Path) -> Project:
    """As `small_project`, its first stage done."""
    project = small_project(path)
    ended = run(path, "teacher-select")
    assert ended.code == 0, ended.err
    return project


def give_former_result(project: Project) -> None:
    """Train deit, change its recipe, and stop the new run in its second epoch: there is a result and a state."""
    ended = run(project.path, "distill", "--student", "deit")
    assert ended.code == 0, ended.err
    project.edit("deit: {}", "deit: {epochs: 4, batch_size: 64}")
    ended = run(project.path, "distill", "--student", "deit", before=functools.partial(stop_at_step, 15))
    assert ended.code == 128 + signal.SIGTERM, ended.err
