"""A number that is not finite ends a run with one line, costs no earlier result, and leaves no trace in a rerun."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import numerical_faults
from tests.support.commands import Ended, run
from tests.support.interruptions import Interruptions, files, save_often
from tests.support.numerical_faults import TRAINING
from tests.support.project import Project

TITN = ("distill", "--student", "titn", "--set", "epochs=2")
# Commands of two epochs, each with its steps in one of them.
COMMANDS: dict[str, tuple[tuple[str, ...], int]] = {
    "student over a former result": (("distill", "--student", "deit"), 6),
    "student in micro-batches": ((*TITN, "--set", "micro_batch=48"), 6),
    "student in bf16": ((*TITN, "--set", "precision=bf16"), 6),
    "student asking its teacher": ((*TITN, "--labels", "online", "--teacher", "data/smoke/teacher"), 6),
    "teacher": (("teacher", "squeezenet1_1", "--set", "epochs=2"), 21),
    "teacher with batch norm": (("teacher", "mobilenet_v3_large", "--set", "epochs=2"), 11),
}
MOMENTS = tuple((epoch, where) for epoch in (1, 2) for where in ("first", "middle", "last"))
EVERY = [(command, fault, *moment) for command in COMMANDS for fault in TRAINING for moment in MOMENTS]
SOME = [
    ("student over a former result", "NaN in the optimiser's state", 2, "last"),
]


class Setting:
    """A project with labels and a former result, and each command's undisturbed end."""

    def __init__(self, labelled: Project, folder: Path) -> None:
        self.project = Project(folder / "project")
        shutil.copytree(labelled.path, self.project.path)
        assert run(self.project.path, "distill", "--student", "deit").code == 0
        self.project.edit("deit: {}", "deit: {epochs: 2, lr: 0.05}")
        self._scratch = folder / "scratch"
        self._undisturbed: dict[tuple[str, ...], Interruptions] = {}

    def fail(self, arguments: tuple[str, ...], fault: Any) -> Ended:
        """Run a command with a fault; check its end and what it leaves, and that it succeeds without the fault."""
        if arguments not in self._undisturbed:
            self._undisturbed[arguments] = Interruptions(self.project, self._scratch, *arguments)
        undisturbed = self._undisturbed[arguments]
        shutil.copytree(self.project.path, self._scratch)
        ended = run(self._scratch, *arguments, before=functools.partial(meet, fault))
        assert ended.code == 5, ended
        assert len(ended.err.splitlines()) == 1 and ended.err.startswith("Error: "), ended.err
        work = [path for path in (self._scratch / "data/work/smoke").rglob("*") if path.suffix == ".safetensors"]
        for path in work:
            assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path
        assert [path.name for path in work if "last-good" in path.name and str(path)[-40:] in ended.err] == (
            ["last-good.safetensors"] if "is kept in" in ended.err else []
        )
        visible = {path: digest for path, digest in files(self._scratch).items() if not path.startswith("work/")}
        assert visible == undisturbed.former, "nothing that others see has changed"
        assert list(undisturbed.check_end(run(self._scratch, *arguments))) == []
        shutil.rmtree(self._scratch)
        return ended


def meet(fault: Any) -> None:
    """Install the fault, and save often, so that spoiled values would reach a saved state."""
    save_often()
    fault()


@pytest.fixture(scope="module")
def setting(small_labelled: Project, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(small_labelled, tmp_path_factory.mktemp("faults"))


def fail_in_training(setting: Setting, command: str, fault: str, epoch: int, where: str) -> None:
    arguments, steps = COMMANDS[command]
    step = {"first": 1, "middle": steps // 2, "last": steps}[where]
    kind, value = TRAINING[fault]
    if kind is numerical_faults.moment and (epoch, step) == (1, 1):
        return  # there is no state yet
    spoil = functools.partial(kind, value)
    ended = setting.fail(arguments, functools.partial(numerical_faults.at_step, (epoch - 1) * steps + step, spoil))
    if kind is not numerical_faults.moment:
        assert f"epoch {epoch}, step {step}, lr " in ended.err
    assert f"epoch {epoch}, " in ended.err and "lower lr or set clip to 1.0" in ended.err
    kept = "no epoch was finished before" if epoch == 1 else "the best epoch so far (1) is kept in data/work/"
    assert kept in ended.err


@pytest.mark.parametrize(("command", "fault", "epoch", "where"), SOME)
def test_a_number_that_is_not_finite_ends_training(
    setting: Setting, command: str, fault: str, epoch: int, where: str
) -> None:
    fail_in_training(setting, command, fault, epoch, where)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "fault", "epoch", "where"), EVERY)
def test_every_number_at_every_moment_of_every_command_ends_training(
    setting: Setting, command: str, fault: str, epoch: int, where: str
) -> None:
    fail_in_training(setting, command, fault, epoch, where)


@pytest.mark.parametrize(
    ("number", "value", "words"),
    [
        pytest.param(
            1, math.nan, ("epoch 1, evaluation: a logit", "no epoch was finished before"), marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            math.inf,
            ("epoch 2, evaluation: a logit", "the best epoch so far (1) is kept in data/work/"),
            marks=pytest.mark.slow,
        ),
        (3, math.nan, ("test split, evaluation: a logit", "is kept in data/work/")),
    ],
)
def test_a_logit_that_is_not_finite_ends_an_evaluation(
    setting: Setting, number: int, value: float, words: tuple[str, ...]
) -> None:
    arguments, _ = COMMANDS["student over a former result"]
    ended = setting.fail(arguments, functools.partial(numerical_faults.evaluation, number, value))
    for word in words:
        assert word in ended.err


@pytest.mark.slow
def test_a_teacher_that_is_asked_and_fails_ends_its_student(setting: Setting) -> None:
    arguments, _ = COMMANDS["student asking its teacher"]  # which has labelled the clean images in 5 batches before
    ended = setting.fail(arguments, functools.partial(numerical_faults.teacher, 5 + 6 + 2, math.nan))
    assert "epoch 2, labelling: a logit of the teacher" in ended.err and "is kept in data/work/" in ended.err


@pytest.mark.slow
def test_variances_that_overflow_are_neither_kept_nor_evaluated(setting: Setting) -> None:
    """Batch norm divides by an infinite variance, so its output is 0 and finite."""
    arguments, steps = COMMANDS["teacher with batch norm"]
    spoil = functools.partial(numerical_faults.pixel, 1e30)
    ended = setting.fail(arguments, functools.partial(numerical_faults.at_step, 2 * steps, spoil))
    assert "epoch 2, " in ended.err and "is not finite" in ended.err


@pytest.mark.parametrize(
    ("batch", "value", "finished"),
    [
        (6, math.inf, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, math.nan, 0), (12, math.nan, 3))),
    ],
)
def test_a_view_whose_logits_are_not_finite_has_no_part(
    setting: Setting, tmp_path: Path, batch: int, value: float, finished: int
) -> None:
    shutil.copytree(setting.project.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    file, parts = project.data / "labels/default.h5", project.path / "data/work/smoke/labels/default"
    whole = file.read_bytes()
    project.forget("labels/default.h5")
    ended = run(project.path, "label", before=functools.partial(numerical_faults.teacher, batch, value))
    assert ended.code == 5, ended
    assert ended.err == (
        f"Error: view {finished}, labelling: a logit of the teacher is not finite; train the teacher again\n"
    )
    assert not file.exists()
    assert sorted(path.name for path in parts.glob("*")) == [f"{view:06d}.part" for view in range(finished)]
    again = run(project.path, "label")
    assert again.code == 0 and f"labelled {4 - finished}/{4 - finished} views" in again.out
    assert file.read_bytes() == whole


@pytest.mark.slow
def test_a_teacher_at_chance_is_warned_about_recorded_and_never_selected(setting: Setting, tmp_path: Path) -> None:
    shutil.copytree(setting.project.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    for name, old, new in (
        ("mobilenet_v3_large", "{epochs: 1, batch_size: 64,", "{epochs: 1, batch_size: 64, lr: 0.000000001,"),
        ("squeezenet1_1", "{epochs: 3}", "{epochs: 1, lr: 0.000000001}"),
    ):
        project.edit(f"{name}: {old}", f"{name}: {new}")
        ended = run(project.path, "teacher", name)
        assert ended.code == 0 and f"{name}: warning: epoch 1 is still at chance" in ended.out
        metrics = json.loads((project.data / "teachers" / name / "metrics.json").read_text())
        assert metrics["at_chance"] and "lower lr" in metrics["warnings"][0]
        ended = run(project.path, "select")
        if name == "squeezenet1_1":
            assert ended.code == 3 and "has learned anything" in ended.err
        else:
            assert ended.code == 0 and json.loads((project.data / "selection.json").read_text())["winner"] != name
