"""What a report opens with, of runs made up for it: against arithmetic by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.page import Missing
from pipeline.report.tables import Table
from stages.report import _as_json as as_json
from stages.reports.compare import find_comparisons, others_table
from stages.reports.conditions import conditions
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.reports.tables import all_teachers, students_tables
from stages.reports.verdict import lead, verdict_table
from tests.support.finished_runs import SCORES, finished, finished_runs, recipe

TEACHER = {"name": "vgg16_bn", "sha256": "0" * 64, "top1": 71.0}


def scores(top1: float, agreement: float | None = None) -> dict[str, Any]:
    return {**SCORES, "epoch": 1, "top1": top1, "agreement": agreement}


def student(folder: Path, top1: float, seed: int = 0, *, name: str = "titn", **changes: Any) -> FinishedRun:
    test = {"test": scores(top1, 80.0), "evaluated_on": "val"}
    return finished(folder, name, [top1 + 1], seed=seed, **{"distilled": True, "teacher": TEACHER, **test, **changes})


def taking(run: FinishedRun, seconds: float) -> FinishedRun:
    environment = {**json.loads((run.directory / "run.json").read_text()), "seconds": seconds}
    (run.directory / "run.json").write_text(json.dumps(environment))
    again = FinishedRun.read(run.directory)
    assert again is not None
    return again


def teacher(folder: Path, top1: float = 72.0, **changes: Any) -> FinishedRun:
    costs = {"parameters": 20_000_000, "flops_per_image": 800_000_000}
    run = finished(folder, "vgg16_bn", [70.0], kind="teacher", **{"test": scores(top1), **costs, **changes})
    (run.directory / "best.safetensors").write_bytes(b"x" * 2_000_000)
    return run


def test_teacher_and_student_stand_side_by_side(tmp_path: Path) -> None:
    costs = {"parameters": 5_000_000, "flops_per_image": 200_000_000}
    titn = [student(tmp_path, value, seed, **costs) for seed, value in enumerate((70.0, 72.0))]
    titn = [taking(run, seconds) for run, seconds in zip(titn, (100.0, 300.0), strict=True)]
    (titn[0].directory / "best.safetensors").write_bytes(b"x" * 500_000)
    worse = student(tmp_path, 70.5, name="deit")
    runs = finished_runs(recipe("digits"), taking(teacher(tmp_path), 400.0), *titn, worse, winner="vgg16_bn")
    table = verdict_table(runs, {"teacher": 100.0, "student": 250.0}, "")
    assert isinstance(table, Table)
    assert [list(table.columns), *map(list, table.rows)] == [
        ["", "teacher vgg16_bn", "student titn", "the student's"],
        ["test top-1, %", "72.00", "71.00 ± 1.41 (2)", "-1.00 points"],
        ["agreement with the teacher on test, %", "-", "80.00 ± 0.00 (2)", "-"],
        ["parameters, M", "20.00", "5.00", "0.25 times"],
        ["FLOPs of one image, M", "800.0", "200.0", "0.25 times"],
        ["file of weights, MB", "2.0", "0.5", "0.25 times"],
        ["images/s here", "100", "250", "2.50 times"],
        ["training, s", "400", "200 ± 141 (2)", "0.50 times"],
    ]
    assert "device a processor, 2 threads" in table.note


def test_scores_by_other_rules_are_not_subtracted(tmp_path: Path) -> None:
    runs = finished_runs(recipe("digits"), teacher(tmp_path, rules=2), student(tmp_path, 70.0), winner="vgg16_bn")
    table = verdict_table(runs, {}, "They were not measured.")
    assert isinstance(table, Table) and table.rows[0] == ["test top-1, %", "72.00", "70.00", "-"]
    assert table.rows[4][1:] == ["2.0", "-", "-"] and table.rows[5][1:] == ["-", "-", "-"]
    assert table.note.startswith("They were not measured. Conditions")


def test_a_teacher_that_was_trained_again_is_not_the_students(tmp_path: Path) -> None:
    taught = student(tmp_path, 70.0, teacher={**TEACHER, "sha256": "b" * 64})
    runs = finished_runs(recipe("digits"), teacher(tmp_path), taught, winner="vgg16_bn")
    assert runs.best_student is taught and runs.teacher_beside(taught) is None
    table = verdict_table(runs, {}, "")
    assert isinstance(table, Table) and table.rows[0][1:] == ["-", "70.00", "-"]


def test_the_split_that_decides_chooses_the_best_student(tmp_path: Path) -> None:
    """titn is better on validation, vit on test: to choose by test would flatter."""
    titn, vit = student(tmp_path, 70.0, best=scores(75.0)), student(tmp_path, 73.0, name="vit", best=scores(74.0))
    assert finished_runs(recipe("digits"), vit, titn).best_student is titn


def test_a_student_without_seed_0_may_be_the_best(tmp_path: Path) -> None:
    titn = [student(tmp_path, 70.0 + seed, seed) for seed in (1, 2)]
    runs = finished_runs(recipe("digits"), *titn)
    assert runs.best_student is titn[0] and isinstance(verdict_table(runs, {}, ""), Table)
    assert "Best student: titn, 71.50 ± 0.71 % (2 seeds) on test" in lead(runs, [], tracked_only=False)
    both = finished_runs(recipe("digits"), teacher(tmp_path), student(tmp_path, 60.0, name="deit"), *titn)
    assert both.best_student is titn[0]


def test_runs_that_differ_from_the_recipe_are_not_called_nothing(tmp_path: Path) -> None:
    runs = finished_runs(recipe("digits"), student(tmp_path, 70.0, differs={"lr": "0.2"}))
    shown, text = verdict_table(runs, {}, ""), lead(runs, [], tracked_only=False)
    assert isinstance(shown, Missing) and "what has been run is below" in shown.why
    assert "No student's run follows the recipe" in text and "Nothing has been run" not in text
    assert "Nothing has been run yet: " in lead(finished_runs(recipe("digits")), [], tracked_only=False)


def namesakes(folder: Path) -> FinishedRuns:
    """A teacher and a student of one name, each with the seeds 0 and 1; only the student is another one now."""
    of = recipe("digits")
    student_, teacher_ = of.students["titn"], replace(of.teachers["vgg16_bn"], epochs=1)
    of = replace(of, teachers={"vgg16_bn": teacher_}, students={"vgg16_bn": replace(student_, epochs=77)})
    students = [student(folder / "students", 50.0 + seed, seed, name="vgg16_bn") for seed in (0, 1)]
    teachers = [finished(folder, "vgg16_bn", [90.0 + seed], kind="teacher", seed=seed) for seed in (0, 1)]
    return finished_runs(of, *teachers, *students, winner="vgg16_bn")


def test_a_student_may_have_its_teachers_name(tmp_path: Path) -> None:
    runs = namesakes(tmp_path)
    assert runs.best_student is runs.students["vgg16_bn"]
    table = verdict_table(runs, {}, "")
    assert isinstance(table, Table) and table.rows[0] == ["test top-1, %", "90.00", "50.50 ± 0.71 (2)", "-39.50 points"]
    assert "Best student: vgg16_bn, 50.50" in lead(runs, [], tracked_only=False)
    rows = students_tables(runs)[0].rows
    assert [row[0] for row in rows] == ["vgg16_bn (teacher)", "vgg16_bn"]
    assert [row[2] for row in rows] == ["90.50 ± 0.71 (2)", "50.50 ± 0.71 (2)"]
    assert all_teachers(runs).rows[0][1] == "90.50 ± 0.71 (2)"
    assert others_table(runs) is None, "all are seeds of the recipe's"
    models = as_json(runs)["models"]
    kinds = {name: model["kind"] for name, model in models.items()}
    assert kinds == {"vgg16_bn": "teacher", "vgg16_bn (student)": "student"}


def test_of_namesakes_only_the_one_that_changed_is_outdated(tmp_path: Path) -> None:
    runs = namesakes(tmp_path)
    assert "epochs 1 -> 77" in students_tables(runs)[0].note and "-> 77" not in all_teachers(runs).note


def test_the_first_paragraph_says_whether_the_label_helped(tmp_path: Path) -> None:
    cached = [student(tmp_path, 70.0 + seed, seed) for seed in range(2)]
    none = [student(tmp_path, 69.0 + 2 * seed, seed, differs={"labels": "none"}, distilled=False) for seed in range(2)]
    runs = finished_runs(recipe("digits"), teacher(tmp_path), *cached, *none, winner="vgg16_bn")
    text = lead(runs, find_comparisons(runs), tracked_only=False)
    assert "Teacher: vgg16_bn, 72.00 % on test." in text
    assert "Best student: titn, 70.50 ± 0.71 % (2 seeds) on test" in text
    # 1 and 0: mean 0.5, deviation 0.7071, t of one degree 12.706: 12.706 x 0.7071 / sqrt(2) = 6.353.
    assert "changed its top-1 by +0.50 points (95 % interval -5.85 to +6.85), 2 seeds." in text and "paper" not in text
    alone = finished_runs(recipe("digits"), teacher(tmp_path / "again"), *cached, winner="vgg16_bn")
    assert "pipeline distill --recipe digits --student titn --labels none." in lead(alone, [], tracked_only=False)


def test_without_any_run_it_says_what_to_run() -> None:
    runs = finished_runs(recipe("folder"))
    shown = verdict_table(runs, {}, "")
    assert isinstance(shown, Missing) and "pipeline teacher-select --recipe folder" in shown.command


def test_conditions_of_teachers_and_students_are_told_apart_where_they_differ(tmp_path: Path) -> None:
    runs = [teacher(tmp_path, batch_size=32), finished(tmp_path, "titn", [1.0, 2.0], batch_size=32)]
    said = conditions(runs)
    assert "epochs 1 of the teachers and 2 of the students; effective batch 32; " in said
    assert "epochs 2; effective batch 32; " in conditions(runs[1:])


def test_copies_among_the_images_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = Path("data/digits/prepared")
    prepared.mkdir(parents=True)
    (prepared / "dataset.json").touch()
    (prepared / "summary.json").write_text('{"copies": {"in_train": {"val": 0, "test": 3}, "in_two_classes": 2}}')
    shown = verdict_table(finished_runs(recipe("digits"), teacher(tmp_path / "runs"), winner="vgg16_bn"), {}, "")
    assert isinstance(shown, Table)
    assert shown.note.endswith(
        " Warning: 3 test images are copies of training images; scores on them are too high."
        " Warning: 2 images are under two classes."
    )


@pytest.mark.parametrize("winner", [None, "vgg16_bn"])
def test_a_teacher_alone_is_shown(tmp_path: Path, winner: str | None) -> None:
    shown = verdict_table(finished_runs(recipe("digits"), teacher(tmp_path), winner=winner), {}, "")
    assert isinstance(shown, Table if winner else Missing)
