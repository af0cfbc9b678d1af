"""Labelling survives kills at any moment and disks that fail at any call: nothing is lost, torn or labelled twice."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.commands import Ended
from tests.labelling_runs import (
    LABEL,
    Labelling,
    kill_at_random,
)
from tests.project import Project

LIMITS = (0, 20, 50, 500, 1150, 1250, 1300, 5000, 9000)


class Started:
    """The real command, in an interpreter of its own."""

    def __init__(self, project: Project) -> None:
        self._process = project.start(*LABEL)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def finish(self) -> Ended:
        out, err = self._process.communicate(timeout=300)
        return Ended(self._process.returncode, out, err)


@pytest.fixture(scope="module")
def project(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    path = tmp_path_factory.mktemp("faults") / "project"
    shutil.copytree(taught.path, path)
    return Project(path)


@pytest.fixture(scope="module")
def one_view(project: Project) -> bytes:
    """A sealed file of the first view alone."""
    return Labelling(project, 1).whole


@pytest.fixture(scope="module")
def many(project: Project) -> Labelling:
    return Labelling(project, 8)


@pytest.fixture
def two(project: Project, one_view: bytes) -> Labelling:
    return Labelling(project, 2)


# Kills


def test_the_real_command_survives_kills_at_random_moments(project: Project) -> None:
    labelling = Labelling(project, 8)
    tally = kill_at_random(labelling, 10, random.Random(0), lambda: Started(project))
    assert tally.wrong == [] and tally.counts["kills"] == 10


@pytest.mark.slow
def test_labelling_survives_hundreds_of_kills_at_random_moments(project: Project) -> None:
    labelling = Labelling(project, 8)
    tally = kill_at_random(labelling, 200, random.Random(1), labelling.start)
    assert tally.wrong == [] and tally.counts["kills"] == 200
