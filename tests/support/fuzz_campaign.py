"""Bad input of every kind, in the numbers that stand in results/fuzz.json.

`python -m tests.support.fuzz_campaign --json PATH` runs it and writes what came of it; `pytest -m slow` runs the same
parts, each as a test.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.support.campaign import run_campaigns
from tests.support.tally import Tally

NUM_PARAMS = 10_000
NUM_IMAGES = 10_000
NUM_FOLDERS = 60
NUM_CHECKPOINTS = 1_000
NUM_PREPARED = 500
NUM_RESULTS = 1_000


def command_lines(folder: Path, kind: str) -> Tally:
    """Give every option of every command bad values, in a folder with nothing, params.yaml, or a teacher."""
    from tests.support.fuzz_cli import cases, fuzz_cli, odd_files
    from tests.support.project import Project

    path = folder / "project"
    if kind == "teacher":
        _copy_shared(folder)
    elif kind == "empty":
        Project.create(path)
    else:
        path.mkdir()
    odd_files(path)
    return fuzz_cli(Project(path), cases())


def params(folder: Path) -> Tally:
    from tests.support.fuzz_params import fuzz_params

    return fuzz_params(folder, NUM_PARAMS, random.Random(1))


def images(folder: Path) -> Tally:
    from tests.support.fuzz_images import fuzz_images

    return fuzz_images(folder, NUM_IMAGES, random.Random(2))


def folders(folder: Path) -> Tally:
    from tests.support.fuzz_folders import fuzz_folders
    from tests.support.project import Project

    return fuzz_folders(Project.create(folder / "project"), NUM_FOLDERS, random.Random(3))


def checkpoints(folder: Path) -> Tally:
    from tests.support.fuzz_checkpoints import fuzz_checkpoints
    from tests.support.project import Project

    _copy_shared(folder)
    return fuzz_checkpoints(Project(folder / "project"), NUM_CHECKPOINTS, random.Random(4))


def prepared_data(folder: Path) -> Tally:
    from tests.support.fuzz_checkpoints import fuzz_prepared
    from tests.support.project import Project

    _copy_shared(folder)
    return fuzz_prepared(Project(folder / "project"), NUM_PREPARED, random.Random(5))


def results(folder: Path) -> Tally:
    from tests.support import report_project
    from tests.support.fuzz_results import fuzz_results

    return fuzz_results(report_project.create(folder / "project"), NUM_RESULTS, random.Random(6))


PARTS: dict[str, Callable[[Path], Tally]] = {
    "params": params,
    "command_lines_outside_a_project": lambda folder: command_lines(folder, "nothing"),
    "command_lines_in_an_empty_project": lambda folder: command_lines(folder, "empty"),
    "command_lines_beside_a_teacher": lambda folder: command_lines(folder, "teacher"),
    "images": images,
    "folders": folders,
    "checkpoints": checkpoints,
    "prepared_data": prepared_data,
    "results": results,
}


def _copy_shared(folder: Path) -> None:
    """Copy the shared project; the first part that needs it makes it."""
    from tests.support.untrained import untrained

    shared = folder.parent / "shared"
    if not shared.exists():
        untrained(shared)
    shutil.copytree(shared, folder / "project")


if __name__ == "__main__":
    run_campaigns(__doc__, PARTS)
