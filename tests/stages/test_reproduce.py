"""`pipeline reproduce` and `pipeline record` on the recipe `smoke`: runs, records, slices of time."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import DataError, NumericalError
from stages import selection
from stages.record import Records, record_of
from stages.selection import compare
from stages.shared import fitting
from tests.stages.test_time_limits import ticking  # noqa: F401
from tests.support.finished_runs import finished
from tests.support.in_process import invoke
from tests.support.interruptions import files, small_project
from tests.support.project import ROOT, Project, unseal

DEIT = ("reproduce", "--recipe", "smoke", "--student", "deit")
RECORDS = "results/runs.jsonl"


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which one student and all that it takes have been reproduced."""
    project = small_project(tmp_path_factory.mktemp("reproduced") / "project")
    out = invoke(project, *DEIT)
    assert "5 of 5 jobs are done; 3 new records" in out
    assert "deit (job 5 of 5): epoch 1/2" in out and "left for all jobs" in out
    return project


@pytest.fixture
def project(reproduced: Project, tmp_path: Path) -> Project:
    shutil.copytree(reproduced.path, tmp_path / "project")
    return Project(tmp_path / "project")


def records(project: Project) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project.path / RECORDS).read_text().splitlines()]


def test_a_record_says_what_was_reached_and_how(reproduced: Project) -> None:
    by_name = {record["name"]: record for record in records(reproduced)}
    assert list(by_name) == ["squeezenet1_1", "mobilenet_v3_large", "deit"]
    deit, teacher = by_name["deit"], by_name["squeezenet1_1"]
    metrics = json.loads((reproduced.data / "students/deit/metrics.json").read_text())
    run = json.loads((reproduced.data / "students/deit/run.json").read_text())
    for epoch in ("best", "last", "test"):
        assert deit[epoch] == {key: metrics[epoch][key] for key in deit[epoch]}
        assert set(deit[epoch]) == {"epoch", "top1", "top5", "precision", "recall", "f1"}
    for key in ("commit", "device", "date", "seconds", "versions"):
        assert deit[key] == run[key]
    described, meta = deit["description"], json.loads((reproduced.data / "students/deit/best.json").read_text())
    assert described["dataset_sha256"] == json.loads((reproduced.data / "prepared/summary.json").read_text())["sha256"]
    assert described["inputs"]["teacher"] == json.loads((reproduced.data / "teacher/best.json").read_text())["sha256"]
    assert described["training"] == {**meta["training"], "precision": "fp32"} and described["seed"] == 0
    chosen = json.loads((reproduced.data / "selection.json").read_text())["winner"]
    assert deit["teacher"] == {"name": chosen, "top1": metrics["teacher"]["test_top1"], "split": "test"}
    kept = ("recipe", "kind", "overrides", "seed", "epochs", "views", "precision", "evaluated_on", "weights")
    assert [deit[key] for key in kept] == ["smoke", "student", {}, 0, 2, 4, "fp32", "val", "random"]
    assert (teacher["kind"], teacher["views"], teacher["teacher"], teacher["weights"]) == (
        "teacher",
        None,
        None,
        "none",
    )
    for name, record in by_name.items():
        folder = reproduced.data / ("students" if name == "deit" else "teachers") / name
        assert (reproduced.path / f"results/curves/{record['id']}.csv").read_bytes() == (
            folder / "curve.csv"
        ).read_bytes()


@pytest.mark.parametrize("place", ["smoke/students/titn", "smoke/teachers/titn", "runs/smoke/titn"])
def test_a_run_of_another_project_is_compared_with_the_data_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    digits = {"here": "e", "there": "d"}
    for name, digit in digits.items():
        prepared = tmp_path / name / "data/smoke/prepared"
        prepared.mkdir(parents=True)
        (prepared / "summary.json").write_text(json.dumps({"sha256": digit * 64, "class_names": []}))
        (prepared / "dataset.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    for name, digit in digits.items():
        out = tmp_path / name / "data" / place
        out.parent.mkdir(parents=True)
        finished(tmp_path / "made", "titn", [70.0], data=digit * 64).directory.rename(out)
        meta = json.loads((out / "best.json").read_text())
        (out / "best.json").write_text(json.dumps({**meta, "fingerprint": "f" * 64}))
        (out / "best.safetensors").touch()
        assert record_of(out)["name"] == "titn"
        assert record_of(Path("../..") / out.relative_to(tmp_path.parent))["name"] == "titn"
    elsewhere = tmp_path / "there/titn"
    shutil.copytree(tmp_path / "there/data" / place, elsewhere)
    with pytest.raises(DataError, match=r"than data/smoke/prepared/dataset.json \(SHA-256 eeee"):
        record_of(elsewhere)
    (tmp_path / "there/data/smoke/prepared/summary.json").write_text('{"sha256": "c", "class_names": []}')
    with pytest.raises(DataError, match="there/data/smoke/prepared/dataset.json"):
        record_of(tmp_path / "there/data" / place)


def test_what_is_done_costs_nothing_and_is_recorded_once(project: Project) -> None:
    before, lines = files(project.path), (project.path / RECORDS).read_bytes()
    assert "5 of 5 jobs are done\n" in invoke(project, *DEIT, "--dry-run")
    assert "5 of 5 jobs are done; 0 new records" in invoke(project, *DEIT)
    assert files(project.path) == before and (project.path / RECORDS).read_bytes() == lines
    (project.path / RECORDS).write_bytes(lines.splitlines(keepends=True)[0])
    assert "0 new" not in invoke(project, *DEIT)
    assert (project.path / RECORDS).read_bytes() == lines


@pytest.mark.usefixtures("ticking")
@pytest.mark.slow
def test_slices_of_time_end_as_an_unbroken_run(
    reproduced: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(step=100)
    monkeypatch.setattr("pipeline.training.resuming.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    project = small_project(tmp_path / "project")
    slices = 0
    while "time limit reached" in invoke(project, *DEIT, "--time-limit", "40s", code=None):
        slices += 1
        assert slices < 100
    assert slices > 2
    assert files(project.path) == files(reproduced.path)
    ids = [{record["id"] for record in records(one)} for one in (project, reproduced)]
    assert ids[0] == ids[1]
    assert max(record["seconds"] for record in records(project)) >= 200, "the sessions' seconds add up"


@pytest.mark.slow
def test_ablations_leave_their_runs_beside_the_recipes_own(project: Project) -> None:
    for ablation in ("labels", "views", "drop_path", "ensemble"):
        invoke(project, "reproduce", "--recipe", "smoke", "--ablation", ablation, "--student", "deit")
    trained_with = {json.dumps(record["overrides"]) for record in records(project) if record["name"] == "deit"}
    expected: list[dict[str, str]] = [{}, {"labels": "none"}, {"labels": "online"}, {"num_views": "1"}]
    expected += [{"num_views": "2"}, {"drop_path": "0.1"}, {"drop_path": "0.2"}, {"teacher_labels": "ensemble"}]
    assert trained_with == {json.dumps(overrides) for overrides in expected}
    online = next(record for record in records(project) if record["overrides"] == {"labels": "online"})
    assert online["teacher"] == records(project)[2]["teacher"]


def test_labels_hold_on_to_their_teacher(project: Project) -> None:
    selection = json.loads((project.data / "selection.json").read_text())
    chosen = selection["winner"]
    other = next(candidate["name"] for candidate in selection["candidates"] if candidate["name"] != chosen)
    better = unseal(project.data / "teachers" / other) / "metrics.json"
    metrics = json.loads(better.read_text())
    metrics["best"]["top1"], metrics["at_chance"] = 100.0, False
    better.write_text(json.dumps(metrics))
    before = files(project.path)
    out = invoke(project, *DEIT)
    assert f"done: {other} has the highest top1; labels and students stay with {chosen}'s" in out
    assert files(project.path) == before


def test_labels_without_their_teacher_are_enough(project: Project) -> None:
    chosen = json.loads((project.data / "selection.json").read_text())["winner"]
    for path in (project.data / "teacher", project.data / "teachers" / chosen, project.data / "students"):
        shutil.rmtree(path)
    out = invoke(project, *DEIT)
    assert f"teacher {chosen}: done elsewhere; its labels are here" in out and "5 of 5 jobs are done" in out
    assert not (project.data / "teacher").exists() and (project.data / "students/deit/best.json").exists()


def test_a_job_that_diverges_is_said_and_the_others_go_on(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise NumericalError("epoch 1, step 3: not finite")

    monkeypatch.setattr("stages.jobs.train_teacher", diverge)
    file = unseal(project.data / "teachers/mobilenet_v3_large") / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "at_chance": False}))  # so that it can be selected
    shutil.rmtree(project.data / "teachers" / "squeezenet1_1")
    shutil.rmtree(project.data / "labels")
    shutil.rmtree(project.data / "students")
    out = invoke(project, *DEIT, code=5)
    assert out.splitlines()[-1].endswith("smoke teacher squeezenet1_1: epoch 1, step 3: not finite")
    assert "4 of 5 jobs are done" in out
    for name in ("teachers", "labels"):
        shutil.rmtree(project.data / name)
    out = invoke(project, *DEIT, "--seeds", "1", code=5)
    assert "student deit, seed 1: left out, it takes labels of the views default" in out


def test_a_damaged_result_is_said_and_the_others_go_on(project: Project) -> None:
    file = unseal(project.data / "teachers/squeezenet1_1") / "curve.csv"
    file.write_text("epoch,top1\n")
    for path in (project.path / "results").rglob("*.*"):
        path.unlink()
    out = invoke(project, *DEIT, code=3)
    assert "2 new records" in out and "curve.csv: not a curve of 3 epochs; train the model again" in out


# Two at once


def test_what_another_run_finished_meanwhile_is_not_trained_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.forget()
    out, aside = project.data / "students/deit", project.path / "aside"
    out.rename(aside)
    whole, prepare = files(project.path), fitting.make_views

    def finish(*arguments: Any, **options: Any) -> Any:
        aside.rename(out)
        return prepare(*arguments, **options)

    monkeypatch.setattr(fitting, "make_views", finish)
    said = invoke(project, *DEIT)
    assert "train 2 epochs (not trained)" in said and "another run has finished it meanwhile" in said
    assert "epoch 1/2" not in said and "5 of 5 jobs are done; 0 new records" in said
    assert {path: files(project.path)[path] for path in whole} == whole


def test_the_last_of_two_selections_has_seen_the_newest_candidates(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []

    @contextlib.contextmanager
    def waiting(*arguments: Any, **options: Any) -> Iterator[None]:
        held.append(True)
        yield

    def seeing(*arguments: Any) -> dict[str, Any]:
        return {**compare(*arguments), "by": "loss" if held else "top1"}

    monkeypatch.setattr(selection, "lock", waiting)
    monkeypatch.setattr(selection, "compare", seeing)
    assert "by loss" in invoke(project, "select")


# Records


def test_what_a_killed_record_left_is_removed(project: Project) -> None:
    left = [project.path / f"results/{name}.0123456789abcdef.tmp" for name in (".runs.jsonl", "curves/.feed.csv")]
    for file in left:
        file.write_text("half")
    invoke(project, "record", "data/smoke/students/deit")
    assert not any(file.exists() for file in left)


def test_record_names_what_is_no_finished_run_and_records_the_rest(project: Project) -> None:
    arguments = ("data/smoke/students/deit", "data/smoke/labels", "--out", "other/kept.jsonl")
    out = invoke(project, "record", *arguments, code=3)
    assert "deit: recorded as" in out and "data/smoke/labels: no finished run" in out
    assert len((project.path / "other/kept.jsonl").read_text().splitlines()) == 1
    assert "is in other/kept.jsonl already" in invoke(project, "record", arguments[0], *arguments[2:])


def test_a_line_that_was_cut_is_left_out_and_another_that_is_none_is_refused(project: Project) -> None:
    file = project.path / RECORDS
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    assert len(Records(file).read()) == 2
    invoke(project, *DEIT)
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-1])
    invoke(project, *DEIT)
    assert file.read_bytes() == whole
    file.write_bytes(b"{}\n" + whole)
    assert "line 1 is no record" in invoke(project, *DEIT, code=3)
    with pytest.raises(DataError, match="line 1"):
        Records(file).add(project.data / "students/deit")


def test_the_records_of_this_repository_are_read_the_former_ones_without_a_description() -> None:
    kept = Records(ROOT / RECORDS).read()
    former = [record["recipe"] for record in kept if "description" not in record]
    assert len(former) == 28 and set(former) == {"cifar100-small", "mnist-small"}


def test_a_run_that_was_trained_again_is_another_record(project: Project) -> None:
    meta = unseal(project.data / "students/deit") / "best.json"
    before = record_of(project.data / "students/deit")["id"]
    meta.write_text(meta.read_text().replace(json.loads(meta.read_text())["sha256"], "0" * 64))
    assert record_of(project.data / "students/deit")["id"] != before
