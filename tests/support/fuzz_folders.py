"""Image folders with whatever can lie in one, through `pipeline prepare --from`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data.datasets import Dataset
from pipeline.data.images import read_image
from pipeline.errors import DataError
from tests.support.fuzz_cli import Case as Line
from tests.support.fuzz_cli import judge
from tests.support.fuzz_images import SIDE, STARTED, Whole, damaged, disguises, originals
from tests.support.project import Project
from tests.support.tally import Tally

CLASSES = ("a", "b")
NUM_WHOLE = 4  # of each class, and as many files as that again which are damaged or disguised


class Made(NamedTuple):
    """What was put into a folder.

    Attributes:
        good: Files that can be read, of either class.
        bad: Files that cannot.
    """

    good: list[Path]
    bad: list[Path]


def fuzz_folders(project: Project, count: int, rng: random.Random) -> Tally:
    """Prepare folders: refused with 3 where a file is bad, or made of the others with --skip-bad."""
    tally, images = Tally(), originals()
    for number in range(count):
        folder = project.path / "images"
        made = make_folder(folder, images, rng)
        wrong = _prepare(project, folder, made)
        shutil.rmtree(folder)
        shutil.rmtree(project.path / "data", ignore_errors=True)
        tally.counts["folders"] += 1
        tally.counts["good files"] += len(made.good)
        tally.counts["bad files"] += len(made.bad)
        tally.note(f"folder {number}", wrong)
    return tally


def make_folder(folder: Path, images: list[Whole], rng: random.Random) -> Made:
    """Write whole, damaged and disguised images, and things that are no files at all."""
    made = Made([], [])
    hidden = list(disguises().values())
    for name in CLASSES:
        (folder / "train" / name).mkdir(parents=True)
        for number in range(2 * NUM_WHOLE):
            image = rng.choice(images)
            path = folder / "train" / name / f"{number}-{rng.choice(NAMES)}{image.name}"
            whole = number < NUM_WHOLE
            path.write_bytes(image.data if whole else rng.choice([rng.choice(hidden), damaged(image, images, rng)]))
            _sort(path, made)
    odd = folder / "train" / "a"
    for make in rng.sample(ODD, k=4):
        with contextlib.suppress(PermissionError):  # making a device takes rights
            made.bad.extend(path for path in make(odd) if _sort_odd(path, made))
    for ignored in (".ipynb_checkpoints", "b/.ipynb_checkpoints", ".git"):
        (folder / "train" / ignored).mkdir()
        (folder / "train" / ignored / "x.png").write_bytes(b"not an image")
    return made


NAMES = (
    "",
    "a\nb",
    "\udcff",
    "é",
    "\x1b[31m",
    " ",
    "-",
    "%s",
    "x" * 200,
    "\u202e",
    "a'b",
    'a"b',
    "{0}",
    "$(touch executed)",
)


def _sort(path: Path, made: Made) -> None:
    try:
        read_image(path, SIDE)
    except DataError:
        made.bad.append(path)
    else:
        made.good.append(path)


def _sort_odd(path: Path, made: Made) -> bool:
    """Tell whether an odd thing is bad; a link to an image is good."""
    if path.name.startswith("good"):
        made.good.append(path)
        return False
    return True


def _pipe(folder: Path) -> list[Path]:
    os.mkfifo(folder / "pipe.png")
    return [folder / "pipe.png"]


def _loop(folder: Path) -> list[Path]:
    (folder / "loop.png").symlink_to("loop.png")
    return [folder / "loop.png"]


def _up(folder: Path) -> list[Path]:
    (folder / "up.png").symlink_to("..")
    (folder / "around").symlink_to(".")
    return [folder / "up.png", folder / "around"]


def _zero(folder: Path) -> list[Path]:
    (folder / "zero.png").symlink_to("/dev/zero")
    return [folder / "zero.png"]


def _device(folder: Path) -> list[Path]:
    os.mknod(folder / "null.png", 0o600 | 0o020000, os.makedev(1, 3))
    return [folder / "null.png"]


def _dangling(folder: Path) -> list[Path]:
    (folder / "dangling.png").symlink_to("nowhere")
    return [folder / "dangling.png"]


def _socket(folder: Path) -> list[Path]:
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    return [folder / "socket.png"]


def _outside(folder: Path) -> list[Path]:
    outside = folder.parent.parent / "outside.png"
    outside.write_bytes(originals()[0].data)
    (folder / "good-link.png").symlink_to(outside)
    return [folder / "good-link.png"]


def _nested(folder: Path) -> list[Path]:
    (folder / "nested.png").mkdir()
    return [folder / "nested.png"]


def _passwords(folder: Path) -> list[Path]:
    (folder / "passwords.png").symlink_to("/etc/passwd")
    return [folder / "passwords.png"]


ODD = (_pipe, _loop, _up, _zero, _device, _dangling, _socket, _outside, _nested, _passwords)


def _prepare(project: Project, folder: Path, made: Made) -> list[str]:
    prepared = project.path / "data" / "folder" / "prepared"
    line = ("prepare", "--recipe", "folder", "--from", str(folder))
    with STARTED as started:
        code, _, wrong = judge(project.path, Line(line, frozenset({3 if made.bad else 0})))
        if code == 3 and prepared.exists() and list(prepared.iterdir()):
            wrong.append(f"wrote: {list(prepared.iterdir())}")
        skipping = judge(project.path, Line((*line, "--skip-bad"), frozenset({0})))
    wrong += [*skipping.wrong, *(f"executed: {event}" for event in started.events)]
    if skipping.code == 0:
        wrong += _check(prepared, made)
    return wrong


def _check(prepared: Path, made: Made) -> list[str]:
    """Compare what was prepared with what was made, in any order."""
    wrong = []
    summary = json.loads((prepared / "summary.json").read_text())
    if summary["num_skipped"] != len(made.bad) or not all(
        skipped["reason"].isprintable() for skipped in summary["skipped"]
    ):
        wrong.append(f"counted: {summary['num_skipped']} bad files of {len(made.bad)}")
    dataset = Dataset.load(prepared / "dataset.json")
    images = sorted(image.tobytes() for split in dataset.splits.values() for image in split.images[:])
    expected = sorted(read_image(path, dataset.image_size).tobytes() for path in made.good)
    if images != expected:
        wrong.append(f"pixels: {len(images)} images, expected {len(expected)}, or others")
    if sum(len(np.asarray(split.labels)) for split in dataset.splits.values()) != len(made.good):
        wrong.append("labels: of another number")
    return wrong
