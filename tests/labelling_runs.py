"""Labelling a project's views again and again, interrupted in every way, and counting what became of the labels."""

from __future__ import annotations

import dataclasses
import errno
import functools
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.labels import LabelCache
from pipeline.params import load_params
from tests.commands import HUNG, Command, Ended, run
from tests.fault_injection import CHANGING, FILLING, Fault, limit_file_size
from tests.project import Project

LABEL = ("label", "--device", "cpu")
# May fail without harm: a directory that is there already, an empty one that stays, and a free lock that goes on naming
# its last holder.
HARMLESS = ("mkdir", "rmdir", "ftruncate")


class Running(Protocol):
    """A command under way, in a forked process or in one of its own."""

    def kill(self) -> None: ...

    def is_alive(self) -> bool: ...

    def finish(self) -> Ended: ...


class Labelling:
    """A project with a teacher, in which labels are made.

    Args:
        project: The project; its labels and their parts are deleted.
        num_views: As its recipe is set to ask for.
    """

    def __init__(self, project: Project, num_views: int) -> None:
        self.path, self.num_views = project.path, num_views
        self.file = project.data / "labels/default.h5"
        self.work = project.path / "data/work/smoke/labels"
        former = load_params(project.path / "params.yaml").select("smoke").views["default"].count
        project.edit(f"count: {former}\n", f"count: {num_views}\n")
        self.reset()
        run(self.path, "--version")  # starts the process that the others are forked from
        began = time.monotonic()
        self.calls = self.run().calls
        self.seconds = time.monotonic() - began
        self.whole = self.file.read_bytes()
        assert LabelCache.from_bytes(self.whole).num_views == num_views

    def start(self, *arguments: str, **options: Any) -> Command:
        return Command(self.path, *LABEL, *arguments, **options)

    def run(self, *arguments: str, **options: Any) -> Ended:
        return self.start(*arguments, **options).finish()

    def reset(self, former: bytes | None = None) -> None:
        """Delete every label, or let a former sealed file be all there is."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.file.parent, ignore_errors=True)
        if former is not None:
            self.file.parent.mkdir()
            self.file.write_bytes(former)

    def parts(self) -> dict[int, tuple[int, int]]:
        """Finished views, each with what changes when its part is written again."""
        found = {}
        for file in self.work.glob("default/*.part"):
            status = file.stat()
            found[int(file.stem)] = (status.st_ino, status.st_mtime_ns)
        return found

    def finished(self) -> set[int]:
        """Views that are finished, in a part or in the sealed file."""
        num_sealed = LabelCache.open(self.file).num_views if self.file.exists() else 0
        return {*range(num_sealed), *self.parts()}

    def leftovers(self) -> list[Path]:
        """Files beside the sealed one and the locks."""
        files = [file for folder in (self.work, self.file.parent) for file in folder.rglob("*") if file.is_file()]
        return [file for file in files if file != self.file and file.suffix != ".lock"]

    def check(self, finished: Iterable[int], *ended: Ended) -> Iterator[str]:
        """Say what is wrong after the last of some runs that began with some finished views."""
        for each in ended:
            if each.code == HUNG:
                yield "hung"
            elif each.code or each.err:
                yield f"failed: exit {each.code}, {each.err}"
            if again := each.views & set(finished):
                yield f"lost: views {sorted(again)} were labelled again"
        if not self.file.exists() or self.file.read_bytes() != self.whole:
            yield "differs"
        elif self.leftovers():
            yield f"leftovers: {self.leftovers()}"


@dataclasses.dataclass
class Tally:
    """What was done, and what went wrong.

    Attributes:
        counts: What was done, by name.
        wrong: What went wrong, each in a line that begins with its kind.
    """

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def note(self, what: str, wrong: Iterator[str]) -> None:
        self.wrong += [f"{each} ({what})" for each in wrong]

    def summary(self) -> dict[str, Any]:
        """Return plain JSON values."""
        kinds = Counter(each.partition(":")[0].split(" ")[0] for each in self.wrong)
        return {**self.counts, "wrong": dict(kinds), "examples": self.wrong[:5]}


def kill_at_random(labelling: Labelling, num_kills: int, rng: random.Random, launch: Callable[[], Running]) -> Tally:
    """Kill labelling at random moments; run it again, to be killed again or to the end."""
    tally = Tally()
    labelling.reset()
    while tally.counts["kills"] < num_kills:
        before = labelling.parts()
        command = launch()
        wait(labelling, command, rng)
        command.kill()
        ended = command.finish()
        tally.counts["kills"] += ended.code == -signal.SIGKILL
        after = labelling.parts()
        sealed = labelling.file.exists()
        if not sealed:
            changed = [view for view, status in before.items() if after.get(view) != status]
            tally.note(f"views {changed}", iter(["lost: labelled again"] if changed else []))
        if sealed or rng.random() < 0.5 or tally.counts["kills"] == num_kills:
            tally.note("after a kill", labelling.check(after, labelling.run()))
            tally.counts["files"] += 1
            labelling.reset()
    return tally


def wait(labelling: Labelling, command: Running, rng: random.Random) -> None:
    """Wait for a random moment of labelling: some views later, and somewhere within a view."""
    number = len(labelling.parts()) + rng.randrange(labelling.num_views // 2)
    while command.is_alive() and len(labelling.parts()) < number and not labelling.file.exists():
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 1.2 * labelling.seconds / labelling.num_views))


def kill_at_calls(labelling: Labelling, former: bytes | None, calls: list[tuple[int, str]]) -> Tally:
    """Kill labelling at chosen calls, (number, when), each time beginning with a former file or none."""
    tally = Tally()
    for at, when in calls:
        labelling.reset(former)
        ended = labelling.run(fault=Fault(at, when))
        what = f"killed {when} call {at}"
        tally.note(what, iter([] if ended.code == -signal.SIGKILL else [f"alive: exit {ended.code}"]))
        if labelling.file.exists() and labelling.file.read_bytes() not in (former, labelling.whole):
            tally.note(what, iter(["torn"]))
        tally.note(what, labelling.check(labelling.finished(), labelling.run()))
        tally.counts["kills"] += 1
    return tally


def moments(calls: tuple[tuple[str, str], ...]) -> list[tuple[int, str]]:
    """Every moment of a kill: before and after each call, and half way through each write."""
    whens = {"write": ("before", "half", "after")}
    return [(at, when) for at, (name, _) in enumerate(calls) for when in whens.get(name, ("before", "after"))]


def failures(calls: tuple[tuple[str, str], ...]) -> list[Fault]:
    """Every call failing once, by a full disk and by a broken one; and from every call on a disk that stays so."""
    once = [Fault(at, number=number) for at in range(len(calls)) for number in (errno.ENOSPC, errno.EIO)]
    staying = [(errno.ENOSPC, FILLING), (errno.EROFS, CHANGING)]
    stays = [
        Fault(at, number=number, calls=names)
        for at, (name, _) in enumerate(calls)
        for number, names in staying
        if name in names
    ]
    return once + stays


def fail_at_calls(labelling: Labelling, former: bytes | None, faults: list[Fault]) -> Tally:
    """Let the disk fail at chosen calls: one line, exit 4, nothing lost, and the next run finishes."""
    tally = Tally()
    for fault in faults:
        labelling.reset(former)
        ended = labelling.run(fault=fault)
        what = f"{errno.errorcode[fault.number or 0]} at call {fault.at}, {labelling.calls[fault.at]}, {fault.calls}"
        tally.note(what, _check_failure(labelling, former, ended, harmless=ended.calls[fault.at][0] in HARMLESS))
        tally.note(what, labelling.check(labelling.finished(), labelling.run()))
        tally.counts["faults"] += 1
    return tally


def limit_files(labelling: Labelling, limits: list[int]) -> Tally:
    """Let files end at chosen sizes, the kernel itself refusing more."""
    tally = Tally()
    for limit in limits:
        labelling.reset()
        ended = labelling.run(before=functools.partial(limit_file_size, limit))
        tally.note(f"limit {limit}", _check_failure(labelling, None, ended, harmless=False))
        tally.note(f"limit {limit}", labelling.check(labelling.finished(), labelling.run()))
        tally.counts["limits"] += 1
    return tally


def _check_failure(labelling: Labelling, former: bytes | None, ended: Ended, *, harmless: bool) -> Iterator[str]:
    found = labelling.file.read_bytes() if labelling.file.exists() else None
    if ended.code == 0 and harmless and found == labelling.whole:
        return
    if ended.code != 4:
        yield f"code: exit {ended.code}, {ended.err or ended.out}"
    if len(ended.err.splitlines()) != 1 or not ended.err.startswith("Error: "):
        yield f"message: {ended.err}"
    if found not in (former, labelling.whole):
        yield "torn"


def kill_ranks(labelling: Labelling, resume_with: Sequence[int], rng: random.Random) -> Tally:
    """Let three ranks label, kill two at random moments, and go on with another number of them."""
    tally = Tally()
    for world_size in resume_with:
        labelling.reset()
        group = start_ranks(labelling, 3)
        victims = rng.sample(range(3), 2)
        for rank in victims:
            wait(labelling, group[rank], rng)
            group[rank].kill()
        tally.counts["kills"] += sum(group[rank].finish().code == -signal.SIGKILL for rank in victims)
        [survivor] = {0, 1, 2} - set(victims)
        what = f"rank {survivor} survived, {world_size} went on"
        overlap = rng.random() < 0.5
        if not overlap:
            ended = group[survivor].finish()
            tally.note(what, iter([f"failed: exit {ended.code}, {ended.err}"] if ended.code else []))
        finished = labelling.finished()
        resumed = [rank.finish() for rank in start_ranks(labelling, world_size)]
        if overlap:
            # The survivor keeps its lock: who comes in its place is refused, and the others do the work.
            tally.counts["overlaps"] += 1
            tally.counts["refused"] += sum(each.code == 4 for each in resumed)
            # Some of what it wrote was there before.
            resumed.append(dataclasses.replace(group[survivor].finish(), calls=()))
            resumed = [each for each in resumed if each.code != 4 or "held by another run" not in each.err]
            resumed.append(labelling.run())
        tally.note(what, labelling.check(finished, *resumed))
        tally.counts["files"] += 1
    return tally


def start_ranks(labelling: Labelling, world_size: int) -> list[Command]:
    """Start a group of ranks, as torchrun would but for ending them together."""
    return [labelling.start(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0") for rank in range(world_size)]
