"""Training that is killed or stopped at random moments and run again ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.support.interruption_campaign import CAMPAIGNS, DISTILL, NUM_TRIALS
from tests.support.interruptions import Interruptions, interrupt_at_random, kill_at_calls
from tests.support.project import Project


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_no_interruption_changes_what_comes_out(tmp_path: Path, name: str) -> None:
    tally = CAMPAIGNS[name](tmp_path)
    assert tally.wrong == []
    assert tally.counts["trials"] == NUM_TRIALS.get(name, 0)
    assert tally.counts["resumed"] > 0 or name not in NUM_TRIALS


@pytest.mark.slow
def test_a_student_interrupted_at_random_moments_ends_like_an_undisturbed_one(
    small_labelled: Project, tmp_path: Path
) -> None:
    interruptions = Interruptions(small_labelled, tmp_path / "scratch", *DISTILL)
    tally = interrupt_at_random(interruptions, 1, random.Random(0))
    assert tally.wrong == [] and tally.counts["trials"] == 1
    assert interruptions.stopped_at_step(13, moved=True) == []
    tally = kill_at_calls(interruptions, range(interruptions.num_calls())[20::160])
    assert tally.wrong == [] and tally.counts["kills"] > 0


@pytest.mark.slow
def test_stage_one_interrupted_at_random_moments_ends_like_an_undisturbed_one(
    small_labelled: Project, tmp_path: Path
) -> None:
    shutil.copytree(small_labelled.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    # Leaves what the other teacher needs.
    project.forget("teachers/squeezenet1_1", "teacher", "labels", "selection.json")
    tally = interrupt_at_random(Interruptions(project, tmp_path / "scratch", "teacher-select"), 1, random.Random(5))
    assert tally.wrong == []
