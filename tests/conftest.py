"""What every test shares: the option that rewrites golden files, and one thread for reproducible sums."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from tests import label_samples
from tests.commands import run
from tests.project import Project

# Machines differ and are shared: how long an example takes is no property of the code under test.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden instead of comparing with it")


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sealed label cache of four views."""
    directory = tmp_path_factory.mktemp("sealed")
    label_samples.label(directory / "parts", directory / "labels.h5", 4)
    return (directory / "labels.h5").read_bytes()


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with prepared data and a selected teacher, and no labels. Tests that change anything copy it."""
    project = Project.create(tmp_path_factory.mktemp("taught") / "project")
    for command in (("prepare",), ("teacher", "squeezenet1_1"), ("select", "--teachers", "squeezenet1_1")):
        ended = run(project.path, *command)
        assert ended.code == 0, ended.err
    return project
