"""Both stages interrupted at random moments, in the numbers that stand in results/interruptions.json.

`python -m tests.support.interruption_campaign --json PATH` runs it and writes what came of it;
`pytest -m slow` runs the same parts, each as a test.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.support.campaign import run_campaigns
from tests.support.interruptions import (
    Interruptions,
    give_former_result,
    interrupt_at_random,
    kill_at_calls,
    small_project,
    small_project_with_labels,
)
from tests.support.tally import Tally

DISTILL = ("distill", "--student", "titn", "--set", "epochs=4")
NUM_TRIALS = {"teacher_select": 30, "distill": 60, "distill_over_a_former_result": 30}


def teacher_select(folder: Path) -> Tally:
    project = small_project(folder / "project")
    project.data.mkdir(parents=True)
    interruptions = Interruptions(project, folder / "scratch", "teacher-select")
    return interrupt_at_random(interruptions, NUM_TRIALS["teacher_select"], random.Random(1))


def distill(folder: Path) -> Tally:
    interruptions = Interruptions(small_project_with_labels(folder / "project"), folder / "scratch", *DISTILL)
    return interrupt_at_random(interruptions, NUM_TRIALS["distill"], random.Random(2))


def distill_over_a_former_result(folder: Path) -> Tally:
    trials = NUM_TRIALS["distill_over_a_former_result"]
    return interrupt_at_random(over_a_former_result(folder), trials, random.Random(3))


def kills_at_every_call_of_distill(folder: Path) -> Tally:
    interruptions = over_a_former_result(folder)
    return kill_at_calls(interruptions, range(interruptions.num_calls()))


def over_a_former_result(folder: Path) -> Interruptions:
    """A student's run that resumes from a state and replaces another recipe's result."""
    project = small_project_with_labels(folder / "project")
    give_former_result(project)
    return Interruptions(project, folder / "scratch", "distill", "--student", "deit")


CAMPAIGNS: dict[str, Callable[[Path], Tally]] = {
    campaign.__name__: campaign
    for campaign in (teacher_select, distill, distill_over_a_former_result, kills_at_every_call_of_distill)
}


if __name__ == "__main__":
    run_campaigns(__doc__, CAMPAIGNS)
