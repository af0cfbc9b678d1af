"""A million small JPEGs: memory is that of the arrays that are needed, and time grows with their number."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.many_files import LABELS, Taken, arrays, run, write

COMMANDS = (
    ("prepare",),
    ("label", "--from", LABELS, "--as", "given"),
    ("distill", "--student", "vit", "--teacher-labels", "given"),
)
A_VIEW = 8 * (2 + 1 + 1 + 1 + 2 + 4 + 1 + 1 + 1) + 4
"""Bytes of an image's draws (crop, flip, partner, lambda, the box's centre), box, partner, place and lambda."""
LISTED = 700
"""Bytes that `prepare` has of an image while it lists and reads: its path, the file's SHA-256, size and time."""


@pytest.mark.slow
def test_a_million_files_take_what_their_arrays_need_from_the_folder_to_a_student(tmp_path: Path) -> None:
    taken: dict[int, list[Taken]] = {}
    needed: dict[int, int] = {}
    for number in (100_000, 1_000_000):
        project = tmp_path / str(number)
        write(project, number)
        taken[number] = [run(project, *command) for command in COMMANDS]
        needed[number] = arrays(project)
        shutil.rmtree(project)
    few, many = taken.values()
    more, more_arrays = 900_000, needed[1_000_000] - needed[100_000]
    for command, first, second, each in zip(COMMANDS, few, many, (LISTED, A_VIEW, A_VIEW), strict=True):
        print(*command, first, second, needed)
        assert second.memory - first.memory <= 1.5 * (more_arrays + more * each), command
        assert second.seconds <= 13 * first.seconds, command
