"""--time-limit: a command stops after a step, saved, exits 75, and run again and again ends as an unbroken one."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.system.stopping import StopSignal
from stages.cli import run
from stages.shared.options import parse_duration
from tests.support.in_process import invoke
from tests.support.interruptions import files
from tests.support.project import Project

# Command, what is deleted before it, and the limit.
STAGES = {
    "distill": (("distill", "--student", "titn"), ("students/titn",), "7s"),
    "label": (("label", "--view-recipe", "mixup"), ("labels/mixup.h5",), "1s"),
    "teacher-select": (("teacher-select",), ("teachers", "teacher", "selection.json", "labels"), "15s"),
}


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock of time limits advance by two seconds at every reading."""
    seconds = itertools.count(step=2)
    monkeypatch.setattr("pipeline.system.stopping.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("stage", ["distill", "label", pytest.param("teacher-select", marks=pytest.mark.slow)])
def test_a_stage_cut_into_slices_ends_as_an_unbroken_one(small_labelled: Project, tmp_path: Path, stage: str) -> None:
    arguments, outputs, limit = STAGES[stage]
    project = Project(tmp_path / "project")
    shutil.copytree(small_labelled.path, project.path)
    for output in outputs:
        path = project.data / output
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before = files(project.path)
    invoke(project, *arguments)
    whole = files(project.path)
    assert whole != before
    for path in project.data.parent.rglob("*"):
        if path.is_file() and str(path.relative_to(project.data.parent)) not in before:
            path.unlink()
    slices = 0
    while "time limit reached" in (out := invoke(project, *arguments, "--time-limit", limit, code=None)):
        assert out.endswith("; run the same command again to go on")
        slices += 1
        assert slices < 100
    assert slices > 1
    assert files(project.path) == whole


def test_a_limit_is_reached_after_a_step_and_never_before_the_first() -> None:
    stop = StopSignal()
    assert (stop.before_step(), stop.after_step()) == (0, 0)
    stop.limit(-1.0)
    assert stop.before_step() == 0, "however short a limit is, each run does a step"
    assert stop.after_step() == 75
    assert stop.before_step() == 75
    stop.limit(1000.0)
    assert (stop.before_step(), stop.after_step()) == (0, 0)


def test_a_signal_goes_before_a_limit() -> None:
    stop = StopSignal()
    stop.limit(-1.0)
    stop.received = 15
    assert stop.after_step() == 143


@pytest.mark.parametrize("text", ["", "0s", "9", "m", "-1m", "1.5m", "9m ", "5s9m", "nan"])
def test_what_is_no_span_of_time_is_refused(small_labelled: Project, text: str) -> None:
    assert "write a span of time as 9m, 90s or 1h30m" in invoke(small_labelled, "label", "--time-limit", text, code=2)


@pytest.mark.parametrize(("text", "seconds"), [("9m", 540), ("90s", 90), ("1h30m", 5400), ("1h0m1s", 3601)])
def test_spans_of_time(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("stage", ["distill", "label"])
def test_a_run_that_began_anew_goes_on_without_fresh_although_a_result_stands(
    small_labelled: Project, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, outputs, limit = STAGES[stage]
    project = Project(tmp_path / "project")
    shutil.copytree(small_labelled.path, project.path)
    invoke(project, *arguments)
    (out,) = outputs
    whole, before = files(project.path), (project.data / out).stat().st_ino
    with contextlib.chdir(project.path):
        assert run([*arguments, "--fresh", "--time-limit", limit]) == 75
    assert capsys.readouterr().err.endswith("; run the same command without --fresh to go on\n")
    assert "--fresh was interrupted" in invoke(project, *arguments, "--dry-run")
    slices = 0
    while "time limit reached" in invoke(project, *arguments, "--time-limit", limit, code=None):
        slices += 1
        assert slices < 100
    assert "up to date" in invoke(project, *arguments) and files(project.path) == whole
    if stage == "label":
        assert (project.data / out).stat().st_ino != before


def test_labels_that_are_to_keep_more_are_made_anew_in_slices(
    small_labelled: Project, tmp_path: Path, ticking: None
) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(small_labelled.path, project.path)
    label = ("label", "--view-recipe", "mixup", "--keep", "topk=3")
    invoke(project, "label", "--view-recipe", "mixup")
    assert "--fresh` labels every view again" in invoke(project, *label, code=3)
    invoke(project, *label, "--fresh", "--time-limit", "1s", code=75)
    while "time limit reached" in invoke(project, *label, "--time-limit", "1s", code=None):
        pass
    assert "up to date" in invoke(project, *label)
