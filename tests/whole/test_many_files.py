"""Very many small JPEGs: memory is that of the arrays that are needed, and time grows with their number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import many_commands
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


# Bytes of the arrays for an image: offsets, sizes, SHA-256 and name of its file, its class, a label; the draws of crop,
# flip and CutMix, its box, partner twice, lambda, and its place in the order.
ARRAYS = (2 * 8 + 2 * 4 + 32 + len("train/00/00000000.jpg") + 8 + 2) + (7 * 8 + 4 * 8 + 2 * 8 + 4 + 8)
PREPARING = 2000  # a list of paths, and what is remembered of each file


@pytest.mark.slow
def test_from_the_folder_to_a_student_every_image_takes_the_same(tmp_path: Path) -> None:
    few, many = 20_000, 100_000
    first, second = (many_commands.measure(tmp_path / str(number), number) for number in (few, many))
    for command in many_commands.COMMANDS:
        most = PREPARING if command == "prepare" else 1.5 * ARRAYS
        assert second[command].memory - first[command].memory <= most * (many - few), command
        assert second[command].seconds <= 1.5 * many / few * first[command].seconds, command
