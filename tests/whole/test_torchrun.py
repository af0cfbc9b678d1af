"""The commands under the real torchrun: the same results, and an end with a cause where a rank dies."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.labels.cache import LabelCache
from tests.support.commands import Command, Ended, run
from tests.support.project import Project, environment
from tests.support.ranks import Rendezvous

EPOCHS = 4
CPU = ("--device", "cpu")
DISTILL = ("distill", "--student", "vit", "--set", f"epochs={EPOCHS}")
OUT = Path(f"data/runs/smoke/vit-epochs-{EPOCHS}")
SECONDS_UNTIL_ENDED = 60
MINE = """
class Mine:
    def __init__(self, run):
        with open("made", "a") as file:
            file.write("made\\n")
"""


@contextlib.contextmanager
def torchrun(project: Project, world_size: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    with subprocess.Popen(
        [*launcher, "-m", "stages.cli", *arguments],
        cwd=project.path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def finish(project: Project, world_size: int, *arguments: str) -> str:
    """Run a command under torchrun to its end, and return what it printed."""
    with torchrun(project, world_size, *arguments) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def rows(project: Project, name: str, out: Path = OUT) -> list[dict[str, str]]:
    with (project.path / out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def curve(project: Project, out: Path = OUT) -> list[dict[str, str]]:
    return rows(project, "curve.csv", out)


def same_curve(first: list[dict[str, str]], second: list[dict[str, str]]) -> bool:
    """Whether two curves have the same accuracies, and losses that differ by no more than 1e-5."""
    return [row["top1"] for row in first] == [row["top1"] for row in second] and all(
        float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), abs=1e-5)
        for row, other in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def alone(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with labels, and a student that one process trained."""
    path = tmp_path_factory.mktemp("torchrun") / "project"
    shutil.copytree(taught.path, path)
    for command in (("label", *CPU), (*DISTILL, *CPU)):
        ended = run(path, *command)
        assert ended.code == 0, ended.err
    return Project(path)


@pytest.fixture
def project(alone: Project, tmp_path: Path) -> Project:
    """A copy of it without the student."""
    shutil.copytree(alone.path, tmp_path / "project")
    shutil.rmtree(tmp_path / "project" / OUT)
    return Project(tmp_path / "project")


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_student_of_several_ranks_is_that_of_one_process(alone: Project, project: Project, world_size: int) -> None:
    (project.path / "mine.py").write_text(MINE)
    said = finish(project, world_size, *DISTILL, *CPU, "--watch", "mine:Mine")
    assert same_curve(curve(project), curve(alone))
    assert (project.path / "made").read_text() == "made\n", "rank 0 alone is watched"
    started, *_ = [json.loads(line) for line in (project.path / OUT / "log.jsonl").read_text().splitlines()]
    assert started["ranks"] == world_size
    assert said.count(f"vit: epoch {EPOCHS}/{EPOCHS}") == 1, "rank 0 alone prints"
    assert f"{world_size} ranks (gloo) share each batch of 128" in said
    assert json.loads((project.path / OUT / "run.json").read_text())["ranks"] == world_size
    assert {file.name for file in (project.path / OUT).iterdir()} == {
        file.name for file in (alone.path / OUT).iterdir()
    }
    predicted, alone_predicted = (
        [(row["sample"], row["target"], row["prediction"]) for row in rows(place, "predictions.csv")]
        for place in (project, alone)
    )
    assert predicted == alone_predicted
    assert not list((project.path / "data/work/smoke/runs").glob("*/*"))


def stop_rank_1() -> None:
    """Send this process a signal at its ninth step, if it is rank 1."""
    from pipeline.report.progress import RunWatcher

    steps = 0

    def stepped(self: RunWatcher) -> None:
        nonlocal steps
        steps += 1
        if steps == 9 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    RunWatcher.stepped = stepped  # type: ignore[method-assign]


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Return torchrun's children that are ranks, in their order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks.update(
            {int(variable.removeprefix(b"RANK=")): child for variable in variables if variable.startswith(b"RANK=")}
        )
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_the_next_goes_on_to_the_same_result(
    alone: Project, project: Project
) -> None:
    rendezvous = Rendezvous()
    commands = [
        Command(project.path, *DISTILL, *CPU, before=stop_rank_1, **rendezvous.variables(rank, 2)) for rank in range(2)
    ]
    stopped = [command.finish() for command in commands]
    assert [ended.code for ended in stopped] == [128 + signal.SIGTERM] * 2, stopped
    assert all(f"stopped in epoch 2 of {EPOCHS} after step 3" in ended.err for ended in stopped)
    with torchrun(project, 2, *DISTILL, *CPU) as process:
        assert process.stdout is not None
        before = list(iter(process.stdout.readline, "vit: going on from epoch 2, step 3\n"))
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        died = time.monotonic()
        said, _ = process.communicate(timeout=SECONDS_UNTIL_ENDED)
    assert process.returncode != 0 and time.monotonic() - died < SECONDS_UNTIL_ENDED, before
    assert "SIGKILL" in said, "torchrun names the cause"
    assert not (project.path / OUT).exists()
    ended = run(project.path, *DISTILL, *CPU)
    assert ended.code == 0 and "going on from epoch 2, step 3" in ended.out
    assert same_curve(curve(project), curve(alone))


def hurry_rank_1() -> None:
    """Let every time limit of rank 1 be over at once."""
    from pipeline.system.stopping import StopSignal

    limit = StopSignal.limit

    def hurried(self: StopSignal, seconds: float) -> None:
        limit(self, -1.0 if os.environ["RANK"] == "1" else seconds)

    StopSignal.limit = hurried  # type: ignore[method-assign]


def test_ranks_reach_their_time_limit_together(project: Project) -> None:
    rendezvous, limited = Rendezvous(), (*DISTILL, *CPU, "--time-limit", "1h")
    commands = [
        Command(project.path, *limited, before=hurry_rank_1, **rendezvous.variables(rank, 2)) for rank in range(2)
    ]
    ended = [command.finish() for command in commands]
    assert [rank_end.code for rank_end in ended] == [75, 75], ended
    assert all(f"time limit reached in epoch 1 of {EPOCHS} after step 1" in rank_end.err for rank_end in ended)


def test_machines_with_equal_files_train_and_others_are_refused_before_the_first_step(
    project: Project, tmp_path: Path
) -> None:
    elsewhere = Project(tmp_path / "elsewhere")
    shutil.copytree(project.path, elsewhere.path)

    def distill(*options: str, only: tuple[str, ...] = ()) -> list[Ended]:
        """Train on both machines; `only` the second has some of the options."""
        rendezvous, command = Rendezvous(), ("distill", "--student", "deit", *CPU, *options)
        ranks = [(project, command), (elsewhere, (*command, *only))]
        started = [
            Command(machine.path, *words, **rendezvous.variables(rank, 2))
            for rank, (machine, words) in enumerate(ranks)
        ]
        return [rank.finish() for rank in started]

    def refused(*only: str) -> str:
        first, second = distill(only=only)
        assert (first.code, second.code) == (3, 3) and first.err == second.err, (first, second)
        assert first.err.startswith("Error: rank 1 is about to train another run than rank 0 (")
        assert "epoch" not in first.out
        assert not any((machine.data / "students").exists() for machine in (project, elsewhere))
        return first.err

    assert [ended.code for ended in distill("--set", "epochs=1")] == [0, 0]
    assert [(machine.path / "data/runs/smoke/deit-epochs-1").exists() for machine in (project, elsewhere)] == [
        True,
        False,
    ]
    file = elsewhere.data / "labels/default.h5"
    cache = LabelCache.open(file)
    labels = cache.labels.copy()
    labels[1, 7] = (labels[1, 7] + 1) % cache.num_classes  # the same teacher on another device
    file.write_bytes(dataclasses.replace(cache, labels=labels).to_bytes())
    assert "(other labels); give every machine" in refused()
    clean = {split: (row + 1) % cache.num_classes for split, row in cache.clean.items()}
    file.write_bytes(dataclasses.replace(cache, clean=clean).to_bytes())
    assert "(other labels of unaugmented images); give every machine" in refused()
    elsewhere.edit("batch_size: 128", "batch_size: 64")
    said = refused("--set", "alpha=0.25", "--fresh")
    assert "batch_size 64 where that has 128" in said and "alpha 0.25 where that has 0.5" in said, said


@pytest.mark.slow
def test_all_of_stage_one_ends_with_the_labels_of_one_process(project: Project) -> None:
    labels = project.data / "labels/default.h5"
    whole = labels.read_bytes()
    for world_size in (2, 3):
        project.forget("labels/default.h5")
        finish(project, world_size, "label", *CPU)
        assert labels.read_bytes() == whole
    project.forget("labels", "teachers", "teacher", "prepared")
    select = ("teacher-select", "--teachers", "squeezenet1_1,mobilenet_v3_large", *CPU)
    said = finish(project, 2, *select)
    assert "gloo cannot add up batch norm's statistics" in said
    assert said.count("Teachers on smoke") == 1 and "default.h5: 2 views" in said and "device 2 x " in said
    made = labels.read_bytes()
    project.forget("labels/default.h5")
    assert run(project.path, "label", *CPU).code == 0 and labels.read_bytes() == made
    assert "up to date" in finish(project, 2, *select)


def test_starting_over_under_torchrun_is_refused_before_anything_is_trained(project: Project) -> None:
    ended = run(project.path, "teacher-select", "--fresh", **Rendezvous().variables(0, 2))
    assert ended.code == 2 and ended.calls == () and "--fresh: not under torchrun" in ended.err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_the_student_of_one_process(alone: Project, project: Project) -> None:
    said = finish(project, 2, *DISTILL)
    assert "2 ranks (nccl) share each batch of 128" in said
    for row, other in zip(curve(project), curve(alone), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), abs=1e-2)
    said = finish(project, 2, "teacher", "mobilenet_v3_large")
    assert "mobilenet_v3_large: epoch 2/2" in said and "gloo" not in said
