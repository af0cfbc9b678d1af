"""What every test shares: the option that rewrites golden files, and one thread for reproducible sums."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.support import label_samples
from tests.support.commands import teach
from tests.support.interruptions import small_project_with_labels
from tests.support.project import Project

MakeOnce = Callable[[Callable[[Path], Project]], Project]

# No deadline: the time of an example depends on the machine and its load.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/whole/golden instead of comparing with it"
    )


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sealed_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The bytes of a sealed label cache of four views, and of another."""
    return label_samples.sealed_pair(tmp_path_factory.mktemp("sealed"))


@pytest.fixture(scope="session")
def sealed(sealed_pair: tuple[bytes, bytes]) -> bytes:
    """The bytes of a sealed label cache of four views."""
    return sealed_pair[0]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """What calls a function that makes a project, once for all processes of a test run, and returns its project."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(make: Callable[[Path], Project]) -> Project:
        folder, made = base / make.__name__, base / f"{make.__name__}.made"
        with (base / f"{make.__name__}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a test run that was killed meanwhile
                make(folder)
                made.touch()
        return Project(folder)

    return once


@pytest.fixture(scope="session")
def taught(make_once: MakeOnce) -> Project:
    """A project with prepared data and a selected teacher, and no labels. Tests that change anything copy it."""
    return make_once(teach)


@pytest.fixture(scope="session")
def small_labelled(make_once: MakeOnce) -> Project:
    """A small project with labels, see `small_project_with_labels`. Tests that change anything copy it."""
    return make_once(small_project_with_labels)
