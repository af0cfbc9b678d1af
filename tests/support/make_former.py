"""Make the fixtures in tests/support/former: `python -m tests.support.make_former`.

Run once, at commit fa353451fa8d on one CPU thread. Do not run it again: files that newer code wrote would prove
nothing. What a later commit adds to the formats gets fixtures of its own.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import h5py
import torch

from tests.support.commands import run
from tests.support.former import FORMER, IMAGES, STUDENT, TEACHER, TEACHER_WEIGHTS, machine, new_project, sha256
from tests.support.interruptions import stop_at_step
from tests.support.project import Project

CPU = ("--device", "cpu")
STOPPED_AT_STEP = 186  # of 220: in the ninth of ten epochs


def main() -> None:
    """Make them all."""
    torch.set_num_threads(1)
    for part in ("finished", "labelling", "training", "exported"):
        shutil.rmtree(FORMER / part, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        project = new_project(Path(scratch) / "project")
        do(project, "teacher-select", *CPU)
        do(project, "distill", "--student", STUDENT, *CPU)
        answers = do(project, "predict", f"data/tiny/students/{STUDENT}", *IMAGES, "--topk", "3", "--json", *CPU)
        do(project, "export", f"data/tiny/students/{STUDENT}", "--format", "safetensors", "--out", "exported")
        exported = do(project, "predict", "exported", *IMAGES, "--topk", "3", "--json", *CPU)
        assert exported == answers
        inspected = json.loads(do(project, "labels", "inspect", "data/tiny/labels/default.h5", "--json"))
        shutil.copytree(project.path / "exported", FORMER / "exported")
        keep(project, "finished", project.path.glob("data/tiny/[!p]*/**/*"))
        keep(project, "finished", [project.path / "data/tiny/selection.json"])

        labelling = new_project(Path(scratch) / "labelling")
        teach(labelling, project)
        for view in (1, 3):
            do(labelling, "label", "--views", f"{view}:{view + 1}", *CPU)
        keep(labelling, "labelling", labelling.path.glob("data/work/tiny/labels/**/*"))

        training = new_project(Path(scratch) / "training")
        teach(training, project)
        shutil.copytree(project.path / "data/tiny/labels", training.path / "data/tiny/labels")
        stop = functools.partial(stop_at_step, STOPPED_AT_STEP)
        ended = run(training.path, "distill", "--student", STUDENT, *CPU, before=stop)
        assert ended.code == 143, ended
        keep(training, "training", training.path.glob(f"data/work/tiny/students/{STUDENT}/**/*"))

        student, teacher = (
            json.loads((project.path / "data/tiny" / folder / "best.json").read_text())
            for folder in (f"students/{STUDENT}", f"teachers/{TEACHER}")
        )
        run_json = json.loads((project.path / f"data/tiny/students/{STUDENT}/run.json").read_text())
        facts = {
            "commit": run_json["commit"],
            "machine": machine(),
            "hdf5": h5py.version.hdf5_version,
            "versions": inspected["provenance"]["versions"],
            "dataset_sha256": inspected["identity"]["dataset_sha256"],
            "label_fingerprint": inspected["fingerprint"],
            "label_file_sha256": sha256(project.path / "data/tiny/labels/default.h5"),
            "teacher_weights_sha256": sha256(project.path / TEACHER_WEIGHTS),
            "run_fingerprints": {TEACHER: teacher["fingerprint"], STUDENT: student["fingerprint"]},
            "student_weights_sha256": student["sha256"],
            "answers": [json.loads(line) for line in answers.splitlines()],
        }
        (FORMER / "former.json").write_text(json.dumps(facts, indent=1) + "\n")


def do(project: Project, *arguments: str) -> str:
    """Run a command, which must succeed, and return what it printed."""
    ended = run(project.path, *arguments)
    assert ended.code == 0, ended.err
    print(ended.out)
    return ended.out


def teach(project: Project, former: Project) -> None:
    """Give a project the data and the selected teacher of another."""
    for folder in ("prepared", "teacher"):
        shutil.copytree(former.path / "data/tiny" / folder, project.path / "data/tiny" / folder)


def keep(project: Project, part: str, files: Iterable[Path]) -> None:
    """Copy files into a folder of the fixtures, except locks and weights that are stored already."""
    stored = {sha256(project.path / TEACHER_WEIGHTS), *(sha256(file) for file in FORMER.rglob("*.safetensors"))}
    for file in sorted(files):
        if not file.is_file() or file.suffix == ".lock" or (file.suffix == ".safetensors" and sha256(file) in stored):
            continue
        target = FORMER / part / file.relative_to(project.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        stored.add(sha256(file))


if __name__ == "__main__":
    main()
