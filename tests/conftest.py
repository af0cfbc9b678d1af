"""What every test shares: the option that rewrites golden files, and one thread for reproducible sums."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from tests.support import label_samples
from tests.support.commands import teach
from tests.support.project import Project

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
def taught(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with prepared data and a selected teacher, and no labels. Tests that change anything copy it."""
    return teach(tmp_path_factory.mktemp("taught") / "project")
