"""Ranks share the views of a labelling; whichever of them die, the others end and the file is the same."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.support.commands import Ended
from tests.support.fault_injection import Fault
from tests.support.labelling_runs import Labelling, kill_ranks, start_ranks
from tests.support.project import Project


@pytest.fixture(scope="module")
def labelling(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Labelling:
    """A project to label in, and what one process makes of it."""
    path = tmp_path_factory.mktemp("ranks") / "project"
    shutil.copytree(taught.path, path)
    return Labelling(Project(path), 6)


def rank_variables(rank: int, world_size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}


def test_each_rank_labels_its_share_and_the_file_is_that_of_one_process(labelling: Labelling) -> None:
    labelling.reset()
    ended = [rank.finish() for rank in start_ranks(labelling, 3)]
    assert list(labelling.check((), *ended)) == []
    assert set.union(*(rank_end.views for rank_end in ended)) == set(range(6))
    for rank in (1, 2):
        assert ended[rank].views <= {rank, rank + 3} and ended[rank].out == ""


@pytest.mark.slow
def test_two_of_three_ranks_killed_at_random_moments_change_nothing(labelling: Labelling) -> None:
    tally = kill_ranks(labelling, [1, 2, 3] * 10, random.Random(10))
    assert tally.wrong == [] and tally.counts["kills"] >= 30


def test_rank_0_labels_the_views_of_ranks_that_never_come(labelling: Labelling) -> None:
    labelling.reset()
    ended = labelling.run(**rank_variables(0, 3))
    assert list(labelling.check((), ended)) == []
    assert ended.views == set(range(6))
    assert "labelled 2/2 views" in ended.out and "labelled 4 views of ranks that were not at work" in ended.out


@pytest.mark.slow
def test_a_rank_without_rank_0_labels_its_share_and_ends(labelling: Labelling) -> None:
    labelling.reset()
    ended = labelling.run(**rank_variables(2, 3))
    assert ended.code == 0 and ended.views == {2, 5} and not labelling.file.exists()
    assert list(labelling.check(ended.views, labelling.run())) == []


@pytest.mark.slow
def test_rank_0_waits_for_a_rank_that_is_at_work(labelling: Labelling) -> None:
    labelling.reset()
    second = labelling.start(**rank_variables(1, 2), before=slow_views)
    while not labelling.parts():
        time.sleep(0.01)
    first = labelling.run(**rank_variables(0, 2))
    assert list(labelling.check((), first, second.finish())) == []
    assert first.views == {0, 2, 4}


@pytest.mark.slow
def test_a_rank_left_over_from_a_larger_group_is_waited_for_too(labelling: Labelling) -> None:
    labelling.reset()
    left_over = labelling.start(**rank_variables(2, 3), before=slow_views)
    while not labelling.parts():
        time.sleep(0.01)
    alone, last = labelling.run(), left_over.finish()
    assert list(labelling.check((), alone, last)) == [], "its file under way has not been deleted under its hands"


@pytest.mark.slow
def test_ranks_whose_parts_are_of_no_use_keep_nobody_waiting(labelling: Labelling) -> None:
    labelling.reset()
    other = labelling.run(**rank_variables(1, 2), before=other_versions)
    assert other.code == 0 and other.views == {1, 3, 5}
    assert list(labelling.check((), labelling.run(**rank_variables(0, 2)))) == []


@pytest.mark.slow
def test_a_rank_that_comes_while_rank_0_seals_labels_nothing_again(labelling: Labelling) -> None:
    labelling.reset()
    assert labelling.run(fault=Fault(labelling.seals_at)).code < 0
    assert len(labelling.parts()) == 6 and not labelling.file.exists()
    sealing = labelling.start(**rank_variables(0, 2), before=seal_when_rank_1_has_begun)
    late = labelling.start(**rank_variables(1, 2), before=begin_when_rank_0_seals)
    ended: list[Ended] = [sealing.finish(), late.finish()]
    (labelling.path / "sealing").unlink()
    (labelling.path / "begun").unlink()
    assert list(labelling.check(range(6), *ended)) == []


def test_a_second_writer_is_refused_and_the_first_is_unharmed(labelling: Labelling) -> None:
    labelling.reset()
    first = labelling.start(before=slow_views)
    while not labelling.parts():
        time.sleep(0.01)
    for arguments in ((), ("--fresh",)):
        ended = labelling.run(*arguments)
        assert ended.code == 4 and ended.calls[2:] == (("close", "work/smoke/labels/default-0.lock"),)
        assert len(ended.err.splitlines()) == 1 and "held by another run (pid " in ended.err
    assert first.is_alive()
    assert list(labelling.check((), first.finish())) == []


# What is done to a command before it begins, in its own process


def slow_views() -> None:
    import pipeline.labels.teacher

    real = pipeline.labels.teacher.label_view

    def slow(*args):
        time.sleep(0.3)
        return real(*args)

    pipeline.labels.teacher.label_view = slow


def other_versions() -> None:
    import stages.shared.labelling

    stages.shared.labelling.versions = lambda: {"torch": "0.0"}


def seal_when_rank_1_has_begun() -> None:
    import stages.label

    real = stages.label.seal

    def seal(*args, **kwargs):
        Path("sealing").touch()
        wait_for(lambda: Path("begun").exists())
        return real(*args, **kwargs)

    stages.label.seal = seal


def begin_when_rank_0_seals() -> None:
    """Let rank 1 list the parts late: rank 0 has not seen it, and has sealed and deleted them by then."""
    import stages.label
    from pipeline.labels.parts import LabelParts

    real_lock, real_missing = stages.label.lock, LabelParts.missing

    def lock(path):
        wait_for(lambda: Path("sealing").exists())
        return real_lock(path)

    def missing(self, *args):
        Path("begun").touch()
        wait_for(lambda: not self.directory.exists())
        return real_missing(self, *args)

    stages.label.lock, LabelParts.missing = lock, missing


def wait_for(condition) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
