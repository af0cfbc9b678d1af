"""The split that a score is on: named in headings and notes, and test where a score on it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.reports.conditions import conditions
from stages.reports.tables import drops_table, optimizer_runs, optimizers_table, students_tables
from tests.support.finished_runs import finished, finished_runs, recipe

FORMER = {"name": "vgg16_bn", "sha256": "0" * 64, "top1": 90.0}
TEACHER = {**FORMER, "test_top1": 80.0}
"""Without and with its score on test, which earlier versions did not keep."""


def student(folder: Path, teacher: Any, *, evaluated_on: str = "val") -> Any:
    return finished(folder, "titn", [75.0, 70.0], teacher=teacher, distilled=True, evaluated_on=evaluated_on)


def test_the_best_and_the_last_epochs_heading_names_the_split_that_chose_it(tmp_path: Path) -> None:
    scores, _ = students_tables(finished_runs(recipe("cifar100-best"), student(tmp_path / "val", TEACHER)))
    assert list(scores.columns[1:3]) == ["best val top-1 %", "test top-1 %"] and "last val top-1 %" in scores.columns
    runs = finished_runs(recipe("cifar100-best"), student(tmp_path / "test", TEACHER, evaluated_on="test"))
    scores, _ = students_tables(runs)
    assert scores.columns[1] == "best test top-1 %" and "test top-1 %" not in scores.columns
    teacher = finished(tmp_path, "vgg16_bn", [60.0], kind="teacher", evaluated_on="val")
    chosen = finished_runs(recipe("cifar100-best"), teacher, winner="vgg16_bn")
    columns = optimizers_table(chosen.recipe, "vgg16_bn", optimizer_runs(chosen), {}).columns
    assert {"best val top-1 %", "test top-1 %", "last val top-1 %"} <= set(columns)


def test_the_teachers_accuracy_is_that_on_test_or_names_its_split(tmp_path: Path) -> None:
    assert "learned from vgg16_bn at 80.00 % on test" in conditions([student(tmp_path / "new", TEACHER)])
    assert "learned from vgg16_bn at 90.00 % on val" in conditions([student(tmp_path / "former", FORMER)])


def test_no_accuracy_on_val_is_taken_for_a_drop_on_test(tmp_path: Path) -> None:
    def row(name: str, teacher: Any, evaluated_on: str) -> tuple[str, str]:
        run = student(tmp_path / name, teacher, evaluated_on=evaluated_on)
        table = drops_table(finished_runs(recipe("cifar100"), run))
        columns = list(table.columns)
        [cells] = [cells for cells in table.rows if cells[1] == "titn" and cells[0] == "vgg16_bn"][:1]
        return cells[columns.index("teacher top-1 %")], cells[columns.index("change")]

    assert row("new", TEACHER, "val") == ("80.00", "-5.00")
    assert row("former", FORMER, "val") == ("-", "-")
    assert row("without-val", FORMER, "test") == ("90.00", "-15.00")
