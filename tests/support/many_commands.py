"""What the commands take for a folder of N small JPEGs: `python -m tests.support.many_commands FOLDER N...`.

JSON on standard output has, for each N and command, the most memory, bytes, and seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.support.many_files import small_jpegs
from tests.support.project import environment

NUM_CLASSES, NUM_TEST = 100, 1000
LABELS = "labels.npy"
PARAMS = """
recipe: many
teachers: [squeezenet1_1]
view_recipes: [default]
students: {vit: default}
recipes:
  many:
    dataset: {source: folder, path: images, store: encoded, image_size: 16, val_fraction: 0.0}
    views:
      default: {count: 1, seed: 0, operations: {crop: 2, flip: true, partner: paired, mixing: cutmix}}
    teacher: {epochs: 1, batch_size: 32, optimizer: adamw, lr: 0.001, weights: none}
    teachers: {squeezenet1_1: {}}
    select: {by: top1}
    label: {}
    student: {epochs: 1, batch_size: 1000, optimizer: adamw, lr: 0.001}
    students: {vit: {patch_size: 16, width: 24, depth: 1, num_heads: 3}}
"""


COMMANDS = {
    "prepare": (),
    "label": ("--from", LABELS, "--as", "given"),
    "distill": ("--student", "vit", "--teacher-labels", "given"),
}


class Taken(NamedTuple):
    """What a command took: the most memory, bytes, and seconds."""

    memory: int
    seconds: float


def write(project: Path, num_images: int) -> None:
    """Write a project with a folder of N training images, all of other bytes, and labels as a teacher would give."""
    kinds = small_jpegs()
    project.mkdir()
    (project / "params.yaml").write_text(PARAMS)
    for split, count in (("train", num_images), ("test", NUM_TEST)):
        folders = [project / "images" / split / f"{number:02}" for number in range(NUM_CLASSES)]
        for folder in folders:
            folder.mkdir(parents=True)
        for number in range(count):  # what follows a JPEG's end is none of its pixels
            content = kinds[number % len(kinds)] + split.encode() + number.to_bytes(4)
            (folders[number % NUM_CLASSES] / f"{number:08}.jpg").write_bytes(content)
    np.save(project / LABELS, np.arange(num_images)[None] % NUM_CLASSES)


def measure(project: Path, num_images: int) -> dict[str, Taken]:
    """Run all commands on N images in a new folder, and remove it."""
    write(project, num_images)
    taken = {command: _run(project, command, *arguments) for command, arguments in COMMANDS.items()}
    shutil.rmtree(project)
    return taken


def _run(project: Path, *arguments: str) -> Taken:
    """Run a command; images are decoded for every batch, as those of photographs, which are more than memory holds."""
    began = time.monotonic()
    with (project / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.cli", *arguments],
            cwd=project,
            env=environment() | {"TITN_MAX_RESIDENT_BYTES": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)  # of this process alone, not of all that have ended
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (project / "output.txt").read_text()[-2000:]
    return Taken(usage.ru_maxrss * 1024, time.monotonic() - began)


if __name__ == "__main__":
    measured = {count: measure(Path(sys.argv[1]) / count, int(count)) for count in sys.argv[2:]}
    plain = {count: {name: taken._asdict() for name, taken in every.items()} for count, every in measured.items()}
    print(json.dumps(plain, indent=2))
