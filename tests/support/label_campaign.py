"""Everything that can happen to labels, in the numbers that stand in results/label-faults.json.

`python -m tests.support.label_campaign --json PATH` runs it and writes what came of it; `pytest -m slow` runs the same
parts, each as a test.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.support.campaign import run_campaigns
from tests.support.commands import teach
from tests.support.label_mutations import damage_files, damage_parts, read_forged
from tests.support.label_samples import sealed_pair
from tests.support.labelling_runs import (
    Labelling,
    damage_under_way,
    fail_at_calls,
    failures,
    kill_at_calls,
    kill_at_random,
    kill_ranks,
    limit_files,
    moments,
)
from tests.support.project import Project
from tests.support.tally import Tally

NUM_KILLS = 200
NUM_RANK_RUNS = 30
NUM_DAMAGED = 10_000
NUM_FORGED = 20_000
NUM_DAMAGED_RUNS = 40
# Below the lock's content, a part's and the sealed file's size.
LIMITS = (0, 20, 50, 500, 670, 770, 800, 5000, 8900)


def random_kills(project: Project) -> Tally:
    labelling = Labelling(project, 8)
    return kill_at_random(labelling, NUM_KILLS, random.Random(1), labelling.start)


def kills_at_every_call(project: Project) -> Tally:
    labelling = Labelling(project, 2)
    return kill_at_calls(labelling, None, moments(labelling.calls))


def kills_at_every_call_of_extending(project: Project) -> Tally:
    labelling, former = extending(project)
    return kill_at_calls(labelling, former, moments(labelling.run().calls))


def failures_of_every_call(project: Project) -> Tally:
    labelling = Labelling(project, 2)
    return fail_at_calls(labelling, None, failures(labelling.calls))


def failures_of_every_call_of_extending(project: Project) -> Tally:
    labelling, former = extending(project)
    return fail_at_calls(labelling, former, failures(labelling.run().calls))


def file_size_limits(project: Project) -> Tally:
    return limit_files(Labelling(project, 2), LIMITS)


def killed_ranks(project: Project) -> Tally:
    return kill_ranks(Labelling(project, 6), [1, 2, 3] * (NUM_RANK_RUNS // 3), random.Random(2))


def parts_damaged_under_way(project: Project) -> Tally:
    return damage_under_way(Labelling(project, 6), NUM_DAMAGED_RUNS, random.Random(3))


def extending(project: Project) -> tuple[Labelling, bytes]:
    """Prepare a project whose one labelled view is to become two."""
    former = Labelling(project, 1).whole
    labelling = Labelling(project, 2)
    labelling.reset(former)
    return labelling, former


LABELLING: dict[str, Callable[[Project], Tally]] = {
    campaign.__name__: campaign
    for campaign in (
        random_kills,
        kills_at_every_call,
        kills_at_every_call_of_extending,
        failures_of_every_call,
        failures_of_every_call_of_extending,
        file_size_limits,
        killed_ranks,
        parts_damaged_under_way,
    )
}


def _of_project(campaign: Callable[[Project], Tally]) -> Callable[[Path], Tally]:
    return lambda folder: campaign(teach(folder / "project"))


PARTS: dict[str, Callable[[Path], Tally]] = {
    **{name: _of_project(campaign) for name, campaign in LABELLING.items()},
    "damaged_files": lambda folder: damage_files(folder / "d.h5", *sealed_pair(folder), NUM_DAMAGED, random.Random(4)),
    "damaged_parts": lambda folder: damage_parts(folder / "damaged", NUM_DAMAGED, random.Random(5)),
    "forged_files": lambda folder: read_forged(*sealed_pair(folder), NUM_FORGED, random.Random(6)),
}


if __name__ == "__main__":
    run_campaigns(__doc__, PARTS)
