"""Image files and folders, damaged and hostile: right pixels, or the file named with the reason."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fuzz_campaign import NUM_FOLDERS, NUM_IMAGES
from tests.support.fuzz_folders import fuzz_folders
from tests.support.fuzz_images import STARTED, fuzz_images
from tests.support.project import Project

# Pillow warns of damaged metadata, and of sizes below those that it refuses.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("count", [600, pytest.param(NUM_IMAGES, marks=pytest.mark.slow)])
def test_an_image_gives_its_pixels_or_is_refused_and_starts_nothing(tmp_path: Path, count: int) -> None:
    tally = fuzz_images(tmp_path, count, random.Random(count))
    assert tally.wrong == []
    assert tally.counts["read"] > count // 5 and tally.counts["refused"] > count // 3


@pytest.mark.parametrize("count", [2, pytest.param(NUM_FOLDERS, marks=pytest.mark.slow)])
def test_a_folder_is_prepared_without_its_bad_files_or_not_at_all(tmp_path: Path, count: int) -> None:
    tally = fuzz_folders(Project.create(tmp_path / "project"), count, random.Random(count))
    assert tally.wrong == []
    assert tally.counts["bad files"] > count and tally.counts["good files"] > count


def test_the_audit_sees_a_program_that_is_started() -> None:
    with STARTED as started:
        subprocess.run([sys.executable, "-c", ""], check=True)
    assert started.events
