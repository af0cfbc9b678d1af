"""A slice of the paper's CIFAR-100 in seconds that are given: `python -m benchmarks.paper --out DIR --seconds 300`.

VGG16_bn, its labels of every view, then TITN, by the command line and the recipe `cifar100`. What is unfinished when
the time is up is carried to the next slice in `--out`, see benchmarks.carried, and goes on there with `--state`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import carried
from benchmarks.measure import ROOT, Report, Row, alone, begin, option_parser, positive
from benchmarks.synthetic import NUM_CLASSES, images_and_labels
from pipeline.config.params import load_yaml
from pipeline.errors import DataError, PipelineError
from pipeline.system.storage import read_json

RECIPE, TEACHER, STUDENT = "cifar100", "vgg16_bn", "titn"
TIME_IS_UP = 75
LEAST = 10  # seconds, under which no command is begun
FOR_THE_STATE = 0.1  # of the time, to save a state and to carry it; at least LEAST
SYNTHETIC = (50_000, 10_000)  # images to train on and to test
# With --quick: a run of seconds on a CPU.
TOY_TEACHER = "shufflenet"
TOY_IMAGES = (32, 9)
TOY: dict[str, Any] = {
    "teachers": {"model": "torchvision/shufflenet_v2_x0_5", "bn_momentum": 0.5},
    "teacher": {"epochs": 3, "batch_size": 8, "lr": 0.01, "optimizer": "adamw", "clip": 1.0, "precision": "fp32"},
    "student": {"epochs": 2, "batch_size": 16, "width": 48, "depth": 1, "precision": "fp32", "inner_block": "plain"},
    "views": {"count": 2, "operations": {"crop": 4, "mixing": "none"}},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is unfinished."""
    parser = option_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where what is unfinished is carried to")
    parser.add_argument("--seconds", type=positive, required=True, help="after which all is written")
    parser.add_argument("--state", type=Path, help="the folder that the last slice has written with --out")
    parser.add_argument("--data", type=Path, help="CIFAR-100 as `pipeline prepare --from` takes it; default: synthetic")
    parser.add_argument("--weights", type=Path, help="the teacher's state dict at the start; default: random weights")
    parser.add_argument("--work", type=Path, help="the project's folder, which stays; default: one that is deleted")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the commands; default: this one")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.seconds
    report = begin("The paper's CIFAR-100", options)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        try:
            run(Project(work, options), ends, report)
        except PipelineError as error:
            raise SystemExit(str(error)) from None
    report.finish(Console(), options.json)
    if "failed" in report.extra:
        raise SystemExit(f"a command failed: {report.extra['failed']['said']}")


class Project:
    """A folder in which the commands work.

    Args:
        path: The folder, made if missing.
        options: Of the command line.
    """

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.options = path.resolve(), options
        self.teacher = TOY_TEACHER if options.quick else TEACHER
        self.data, self.work = (self.path / "data" / part for part in (RECIPE, f"work/{RECIPE}"))
        self.labels = self.data / "labels" / "default.h5"
        self.said: list[str] = []
        self.num_views = 0

    def write_params(self) -> None:
        """Write params.yaml: the recipe with one teacher and one student, random weights unless others are given."""
        tree = load_yaml((ROOT / "params.yaml").read_text(encoding="utf-8"), "params.yaml")
        recipe = tree["recipes"][RECIPE]
        weights = self.options.weights
        recipe["teacher"]["weights"] = "none" if weights is None else str(weights.resolve())
        recipe["teachers"] = {self.teacher: TOY["teachers"] if self.options.quick else recipe["teachers"][self.teacher]}
        recipe["students"] = {STUDENT: recipe["students"][STUDENT]}
        recipe["views"] = {"default": recipe["views"]["default"]}
        if self.options.quick:
            for section in ("teacher", "student"):
                recipe[section] |= TOY[section]
            recipe["views"]["default"] |= TOY["views"]
        self.num_views = recipe["views"]["default"]["count"]
        tree = {
            "recipe": RECIPE,
            "teachers": [self.teacher],
            "view_recipes": ["default"],
            "students": {STUDENT: "default"},
            "recipes": {RECIPE: recipe},
        }
        (self.path / "params.yaml").write_text(json.dumps(tree, indent=1))

    def prepare(self) -> str:
        """Prepare the images, and return the SHA-256 of the data set."""
        if self.options.data is not None:
            if self.command("prepare", "--from", str(self.options.data.resolve())):
                raise DataError(f"prepare: {' '.join(self.said[-1].split()[-60:])}")
        else:
            self._prepare_synthetic()
        return str(read_json(self.data / "prepared" / "summary.json")["sha256"])

    def command(self, name: str, *arguments: str, seconds: float | None = None) -> int:
        """Run a command of the pipeline, with a time limit where seconds are given, and return its exit code."""
        limit = () if seconds is None else ("--time-limit", f"{int(seconds)}s")
        device = () if name == "prepare" else ("--device", str(self.options.device))
        done = subprocess.run(
            [self.options.python, "-m", "stages.cli", name, "--recipe", RECIPE, *arguments, *device, *limit],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout, end="", flush=True)
        self.said.append(done.stdout.strip())
        return done.returncode

    def num_labelled(self) -> int:
        """Return how many views are labelled."""
        return self.num_views if self.labels.exists() else len([*(self.work / "labels").rglob("*.part")])

    def unfinished(self) -> Iterator[Path]:
        """Yield the files that the next slice needs to go on. Once every view is labelled, none is of the teacher."""
        finished = ["labels", f"students/{STUDENT}"] if self.labels.exists() else ["teachers", "teacher", "labels"]
        under_way = ["students"] if self.labels.exists() else ["teachers", "labels"]
        folders = [*(self.data / name for name in finished), *(self.work / name for name in under_way)]
        files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
        if not self.labels.exists():
            files += self.data.glob("selection.json")
        former = {former for file in files if file.name.startswith("state-") for former in _former_state(file.parent)}
        yield from (file for file in files if file not in former and file.suffix != ".lock")
        yield from (file for file in (self.path / "records").rglob("*") if file.is_file())

    def keep_records(self) -> None:
        """Copy what tells how the training went to where it is carried along: logs, metrics."""
        for kind in ("teachers", "students"):
            for root in (self.work, self.data):  # a finished run's last
                for file in (root / kind).rglob("*"):
                    if file.name in ("log.jsonl", "metrics.json", "run.json"):
                        target = self.path / "records" / kind / file.parent.name / file.name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(file, target)

    def _prepare_synthetic(self) -> None:
        from pipeline.config.params import load_params
        from pipeline.data.datasets import Split, assemble
        from pipeline.system.stopping import StopSignal
        from stages.prepare import take_dataset
        from stages.shared.context import Context

        params = load_params(self.path / "params.yaml")
        recipe = params.select(None)
        splits = []
        for seed, count in enumerate(TOY_IMAGES if self.options.quick else SYNTHETIC):
            images, labels = tinted(count, seed, spacing=NUM_CLASSES // 3 if self.options.quick else 1)
            splits.append(Split(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()), labels.numpy()))
        names = tuple(f"class {number:02d}" for number in range(NUM_CLASSES))
        train, test = splits
        dataset = assemble(recipe.dataset.source, names, train, test, recipe.dataset)
        take_dataset(Context(params, recipe, Console(quiet=True), StopSignal(), project=self.path), dataset)


def tinted(num_images: int, seed: int, *, spacing: int = 1) -> tuple[Tensor, Tensor]:
    """Make images whose colour names their class, since a teacher that learns nothing is not selected.

    Args:
        num_images: N.
        seed: Of the images.
        spacing: From one class that occurs to the next.

    Returns:
        `(N, 3, 32, 32)` uint8, and `(N,)` int64 in [0, NUM_CLASSES).
    """
    images, labels = images_and_labels(num_images, seed=seed)
    labels = labels // spacing * spacing
    tints = torch.stack([labels % 5, labels // 5 % 5, labels // 25], dim=1).to(torch.uint8) * 47
    return images // 4 + tints[:, :, None, None], labels


def run(project: Project, ends: float, report: Report) -> None:
    """Go on from the state that is given, do what there is time for, and carry what is unfinished."""
    options = project.options
    notes: dict[str, Any] = {"data": "CIFAR-100" if options.data else "synthetic", "seconds": 0, "slices": 0}
    if options.state is not None:
        notes |= carried.read_index(options.state)["notes"]
        carried.unpack(options.state, project.path)
    project.write_params()
    digest = project.prepare()
    if notes.get("sha256", digest) != digest:
        raise DataError(f"--state {options.state}: it is of other images; give the --data of the slice before")
    began, reserve = time.monotonic(), max(LEAST, FOR_THE_STATE * float(options.seconds))

    def left() -> float:
        return ends - reserve - time.monotonic()

    code = 0
    for name, arguments, is_done in (
        ("teacher-select", (), project.labels.exists()),
        ("distill", ("--student", STUDENT), False),
    ):
        if is_done or code:
            continue
        code = project.command(name, *arguments, seconds=left()) if left() >= LEAST else TIME_IS_UP
    if code not in (0, TIME_IS_UP):
        report.extra["failed"] = {"exit_code": code, "said": project.said[-1][-2000:]}
    project.keep_records()
    notes |= {"sha256": digest, "slices": notes["slices"] + 1, "is_finished": code == 0}
    notes["seconds"] += round(time.monotonic() - began, 1)
    size = carried.pack(project.path, project.unfinished(), options.out, **notes)
    parts = len(carried.read_index(options.out)["parts"])
    report.extra |= {
        "slice": notes,
        "weights": str(options.weights or "none"),
        "state": {"bytes": size, "parts": parts},
    }
    report.rows += progress(project.path / "records" / "teachers")
    report.rows.append(alone(f"views labelled, of {project.num_views}", [project.num_labelled()], "views"))
    report.rows += progress(project.path / "records" / "students")


def progress(records: Path) -> list[Row]:
    """Return what the logs of a kind of runs tell: epochs, accuracy, the time of an epoch, images a second."""
    rows = []
    for log in sorted(records.glob("*/log.jsonl")):
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        epochs = [line for line in lines if line["event"] == "epoch"]
        started = next((line for line in reversed(lines) if line["event"] == "started"), None)
        if not epochs or started is None:
            continue
        done, planned, name = epochs[-1]["epoch"], started["epochs"], log.parent.name
        at: Mapping[str, Any] = {"epoch": done, "epochs": planned, "precision": started["precision"]}
        rows.append(alone(f"{name}, epochs done of {planned}", [done], "epochs", **at))
        rows.append(alone(f"{name}, top-1 after epoch {done} of {planned}", [epochs[-1]["top1"]], "%", **at))
        for key, unit in (("seconds", "s"), ("images_per_second", "images/s")):
            values = [line[key] for line in epochs[1:] or epochs if line.get(key)]
            if values:
                what = "an epoch, its evaluation included" if key == "seconds" else "training"
                rows.append(alone(f"{name}, {what}", values, unit, **at))
    return rows


def _former_state(folder: Path) -> list[Path]:
    """Return the files of the older of a run's two saved states, which the newer makes superfluous."""
    states = []
    for file in folder.glob("state-?.json"):
        meta = read_json(file)
        if file.with_suffix(".safetensors").exists():
            states.append((meta["serial"], file, meta["best"]))
    if len(states) < 2:
        return []
    (_, old, best), (_, _, newest_best) = sorted(states, key=lambda state: state[0])
    files = [old, old.with_suffix(".safetensors")]
    if best is not None and best != newest_best:
        files += folder.glob(f"best-{best[:12]}.safetensors")
    return files


if __name__ == "__main__":
    main()
