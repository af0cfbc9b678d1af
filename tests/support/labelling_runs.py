"""Labelling a project's views again and again, interrupted in every way, and counting what became of the labels."""

from __future__ import annotations

import dataclasses
import errno
import functools
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.params import load_params
from pipeline.labels.cache import LabelCache
from pipeline.labels.parts import LabelParts
from tests.support.commands import HUNG, Command, Ended, run
from tests.support.fault_injection import CHANGING, FILLING, Fault, limit_file_size
from tests.support.label_mutations import damage
from tests.support.project import Project
from tests.support.tally import Tally

LABEL = ("label", "--device", "cpu")
# These may fail without harm: a directory exists already, an empty one stays, a free lock still names its last holder,
# or finished labels get no second name.
HARMLESS = ("mkdir", "rmdir", "ftruncate", "link")
KEPT = Path("data/work/kept")  # there too: the labels are finished


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
        shutil.rmtree(self.path / KEPT, ignore_errors=True)
        shutil.rmtree(self.file.parent, ignore_errors=True)
        if former is not None:
            self.file.parent.mkdir()
            self.file.write_bytes(former)

    def parts(self) -> dict[int, tuple[int, int]]:
        """Finished views, each with what changes when its part is written again."""
        status_of = {}
        for file in self.work.glob("default/*.part"):
            status = file.stat()
            status_of[int(file.stem)] = (status.st_ino, status.st_mtime_ns)
        return status_of

    def finished(self) -> set[int]:
        """Views that are finished, in a part or in the sealed file."""
        num_sealed = LabelCache.open(self.file).num_views if self.file.exists() else 0
        return {*range(num_sealed), *self.parts()}

    @property
    def seals_at(self) -> int:
        """The call with which sealing begins, every view being finished."""
        return self.calls.index(("mkdir", "smoke/labels"))

    def part(self, view: int) -> Path:
        return self.work / f"default/{view:06d}.part"

    def leftovers(self) -> list[Path]:
        """Files beside the sealed one and the locks."""
        files = [file for folder in (self.work, self.file.parent) for file in folder.rglob("*") if file.is_file()]
        return [file for file in files if file != self.file and file.suffix != ".lock"]

    def check(self, finished: Iterable[int], *ended: Ended) -> Iterator[str]:
        """Say what is wrong after the last of some runs that began with some finished views."""
        for rank in ended:
            if rank.code == HUNG:
                yield "hung"
            elif rank.code or rank.err:
                yield f"failed: exit {rank.code}, {rank.err}"
            if again := rank.views & set(finished):
                yield f"lost: views {sorted(again)} were labelled again"
        if not self.file.exists() or self.file.read_bytes() != self.whole:
            yield "differs"
        elif self.leftovers():
            yield f"leftovers: {self.leftovers()}"


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
            tally.note(f"views {changed}", ["lost: labelled again"] if changed else [])
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


def kill_at_calls(labelling: Labelling, former: bytes | None, calls: Sequence[tuple[int, str]]) -> Tally:
    """Kill labelling at chosen calls, (number, when), each time beginning with a former file or none."""
    tally = Tally()
    for at, when in calls:
        labelling.reset(former)
        ended = labelling.run(fault=Fault(at, when))
        what = f"killed {when} call {at}"
        tally.note(what, [] if ended.code == -signal.SIGKILL else [f"alive: exit {ended.code}"])
        if labelling.file.exists() and labelling.file.read_bytes() not in (former, labelling.whole):
            tally.note(what, ["torn"])
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


def fail_at_calls(labelling: Labelling, former: bytes | None, faults: Sequence[Fault]) -> Tally:
    """Let the disk fail at chosen calls: one line, exit 4, nothing lost, and the next run finishes."""
    tally = Tally()
    for fault in faults:
        labelling.reset(former)
        ended = labelling.run(fault=fault)
        name, path = ended.calls[fault.at]
        what = f"{errno.errorcode[fault.number or 0]} at call {fault.at}, {name} {path}, {fault.calls}"
        tally.note(what, _check_failure(labelling, former, ended, harmless=name in HARMLESS or _is_kept(path)))
        tally.note(what, labelling.check(labelling.finished(), labelling.run()))
        tally.counts["faults"] += 1
    return tally


def _is_kept(path: str) -> bool:
    return (Path("data") / path).is_relative_to(KEPT)


def limit_files(labelling: Labelling, limits: Sequence[int]) -> Tally:
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
    written = labelling.file.read_bytes() if labelling.file.exists() else None
    if ended.code == 0 and harmless and written == labelling.whole:
        return
    if ended.code != 4:
        yield f"code: exit {ended.code}, {ended.err or ended.out}"
    if len(ended.err.splitlines()) != 1 or not ended.err.startswith("Error: "):
        yield f"message: {ended.err}"
    if written not in (former, labelling.whole):
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
            tally.note(what, [f"failed: exit {ended.code}, {ended.err}"] if ended.code else [])
        finished = labelling.finished()
        resumed = [rank.finish() for rank in start_ranks(labelling, world_size)]
        if overlap:
            # The survivor keeps its lock: its replacement is refused, and the other ranks do the work.
            tally.counts["overlaps"] += 1
            tally.counts["refused"] += sum(rank_end.code == 4 for rank_end in resumed)
            # Some of what it wrote was there before.
            resumed.append(dataclasses.replace(group[survivor].finish(), calls=()))
            resumed = [
                rank_end for rank_end in resumed if rank_end.code != 4 or "held by another run" not in rank_end.err
            ]
            resumed.append(labelling.run())
        tally.note(what, labelling.check(finished, *resumed))
        tally.counts["files"] += 1
    return tally


def start_ranks(labelling: Labelling, world_size: int) -> list[Command]:
    """Start a group of ranks as torchrun would, without ending them together."""
    return [labelling.start(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0") for rank in range(world_size)]


def damage_under_way(labelling: Labelling, count: int, rng: random.Random) -> Tally:
    """Damage, exchange or replace finished parts; exactly those views must be labelled again."""
    tally = Tally()
    labelling.reset()
    labelling.run(fault=Fault(labelling.seals_at))
    honest = {view: labelling.part(view).read_bytes() for view in range(labelling.num_views)}
    cache = LabelCache.from_bytes(labelling.whole)
    stale = []
    for changes in ({"identity": {**cache.identity, "dataset_sha256": "d" * 64}}, {"provenance": _stale(cache)}):
        owner = {"identity": cache.identity, "provenance": cache.provenance, **changes}
        LabelParts(labelling.work / "default", **owner).write(0, cache.labels[0])
        stale.append(labelling.part(0).read_bytes())
    for number in range(count):
        labelling.reset()
        (labelling.work / "default").mkdir(parents=True)
        chosen = set(rng.sample(range(labelling.num_views), rng.randrange(1, labelling.num_views)))
        for view, data in honest.items():
            other = honest[(view + 1) % labelling.num_views]
            kinds = [damage(data, other, rng), other, *stale, b""]
            labelling.part(view).write_bytes(rng.choice(kinds) if view in chosen else data)
        ended = labelling.run()
        again = [] if ended.views == chosen else [f"found: {ended.views} of {chosen}"]
        tally.note(f"run {number}", [*again, *labelling.check(set(honest) - chosen, ended)])
        tally.counts["parts"] += len(chosen)
        tally.counts["found"] += len(ended.views & chosen)
    tally.counts["files"] = count
    return tally


def _stale(cache: LabelCache) -> dict[str, Any]:
    return {**cache.provenance, "checkpoint_sha256": "e" * 64}
