"""A million small JPEGs: memory is that of the arrays that are needed, and time grows with their number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import ROOT, environment

ROOM = 100_000_000  # for batches on their way, and for what the threads of the decoders keep


def measured(folder: Path, num_images: int) -> dict[str, float]:
    """Write a store in one process, and measure in another."""
    folder.mkdir()
    for arguments in ([str(num_images)], []):
        command = [sys.executable, "-m", "tests.support.many_files", str(folder), *arguments]
        ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    return dict(json.loads(ended.stdout))


@pytest.mark.slow
def test_a_million_files_take_what_their_arrays_need(tmp_path: Path) -> None:
    few, many = (measured(tmp_path / str(number), number) for number in (100_000, 1_000_000))
    assert many["arrays"] > 9 * few["arrays"] > 1e7
    for taken in (few, many):
        assert taken["peak"] <= 1.5 * taken["arrays"] + ROOM, taken
    assert many["peak"] - few["peak"] <= 1.5 * (many["arrays"] - few["arrays"])
    assert many["opening"] + many["drawing"] <= 15 * (few["opening"] + few["drawing"])
    assert many["walking"] <= 1.5 * few["walking"] + 1, "of the same number of images"
