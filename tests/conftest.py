"""What every test shares: the option that rewrites golden files, and one thread for reproducible sums."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden instead of comparing with it")


def pytest_configure() -> None:
    torch.set_num_threads(1)
