"""Pairs of students on the same test images: against counts and arithmetic by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.report.page import Missing
from pipeline.report.tables import Figure, Table
from stages.reports.compare import find_comparisons
from stages.reports.pairs import Pair, pair_items, students_in_pairs
from stages.reports.runs import FinishedRun
from stages.reports.verdict import lead
from tests.pipeline.report.test_figures import check
from tests.support.finished_runs import finished, finished_runs, recipe

TEACHER = {"name": "vgg16_bn", "sha256": "0" * 64, "top1": 71.0}


def student(folder: Path, name: str, right: str, seed: int = 0, **changes: Any) -> FinishedRun:
    """Make a student that is right on the test images whose letter in `right` is R."""
    rows = [
        [index, "cat", "cat" if letter == "R" else "dog", 0.5, "cat", "cat", ""] for index, letter in enumerate(right)
    ]
    top1 = 100 * right.count("R") / len(right)
    given = {"teacher": TEACHER, "distilled": True, **changes}
    return finished(folder, name, [top1], seed=seed, predictions=rows, **given)


def test_a_pair_is_told_apart_by_the_images_that_only_one_gets_right(tmp_path: Path) -> None:
    first = student(tmp_path, "titn", "R" * 20 + "." * 10 + "R" * 70)
    second = student(tmp_path, "vit", "." * 20 + "R" * 80)
    pair = Pair.of([first], [second])
    assert pair is not None and (pair.first, pair.second, pair.num_images) == ("titn", "vit", 100)
    assert (pair.only_first, pair.only_second, pair.over_seeds.mean) == (20, 10, pytest.approx(10.0))
    # (20 - 10) / 102 -+ 1.95996 sqrt(31 - 10^2 / 102) / 102
    assert pair.over_images == pytest.approx((-0.7242, 20.3320), abs=1e-3)
    assert pair.over_seeds.interval is None and not pair.differs


def test_over_several_seeds_both_intervals_decide(tmp_path: Path) -> None:
    """Both seeds' differences point the same way for images; the seeds' own scatter, +16 and +4, includes 0."""
    better, worse = "R" * 40 + "." * 10, "R" * 32 + "." * 18
    titn = [student(tmp_path, "titn", better, seed) for seed in range(2)]
    vit = [student(tmp_path, "vit", right, seed) for seed, right in enumerate((worse, "R" * 38 + "." * 12))]
    pair = Pair.of(titn, vit)
    assert pair is not None and pair.over_seeds.count == 2 and pair.over_seeds.mean == pytest.approx(10.0)
    assert (pair.only_first, pair.only_second) == (5, 0), "8 and 2 images"
    # Mean by image: 1 of two images, 1/2 of six. 5 / 52 -+ 1.95996 sqrt((2 + 6/4 + 1) / 52 - (5/52)^2) / sqrt(52)
    assert pair.over_images == pytest.approx((2.059, 17.172), abs=1e-3)
    assert pair.over_seeds.interval is not None and pair.over_seeds.interval[0] < 0 and not pair.differs
    alike = Pair.of(titn, [vit[0], student(tmp_path, "vit", worse, 1)])
    assert alike is not None and alike.differs


def test_only_equal_images_by_equal_rules_and_common_seeds_are_compared(tmp_path: Path) -> None:
    titn = student(tmp_path, "titn", "RR.")
    assert Pair.of([titn], [student(tmp_path, "vit", "R..", data="e" * 64)]) is None
    assert Pair.of([titn], [student(tmp_path, "deit", "R..", rules=2)]) is None
    assert Pair.of([titn], [student(tmp_path, "tnt", "R..", seed=1)]) is None
    assert Pair.of([titn], [finished(tmp_path, "none", [1.0])]) is None, "without predictions"
    with pytest.raises(DataError, match="not as many images"):
        Pair.of([titn], [student(tmp_path, "vit", "R.")])


def test_the_reports_pairs_have_the_better_one_first_and_the_papers_difference(tmp_path: Path) -> None:
    deit = student(tmp_path, "deit", "R" * 70 + "." * 30)
    titn = student(tmp_path, "titn", "R" * 50 + "." * 50)
    vit = student(tmp_path, "vit", "." * 50 + "R" * 49 + ".")
    runs = finished_runs(recipe("cifar100"), titn, vit, deit)
    pairs = students_in_pairs(runs)
    figure, table = pair_items(runs, pairs)
    assert isinstance(figure, Figure) and isinstance(table, Table)
    check(figure.png)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["students"] for row in rows] == ["deit - titn", "deit - vit", "titn - vit"]
    assert [row["differ"] for row in rows] == ["yes", "yes", "not shown"]
    assert [row["the paper's difference"] for row in rows] == ["-0.80", "+3.12", "+3.92"]
    assert rows[0]["only the first right"] == "20" and rows[0]["only the second right"] == "0"
    assert rows[2]["difference, points"] == "+1.00" and rows[2]["95 % interval over seeds"] == "-"
    assert "A single seed does not say" in table.note and "100 test images" in table.note
    assert [pair.as_json()["differs"] for pair in pairs] == [True, True, False]
    left_out, _ = pair_items(runs, pairs, with_figures=False)
    assert isinstance(left_out, Missing)
    assert pair_items(runs, []) == []


def test_one_seed_says_over_the_test_images_whether_the_label_helped(tmp_path: Path) -> None:
    cached = student(tmp_path, "titn", "R" * 20 + "." * 10 + "R" * 70)
    none = student(tmp_path, "titn", "." * 20 + "R" * 80, differs={"labels": "none"}, distilled=False)
    runs = finished_runs(recipe("digits"), cached, none)
    comparisons = find_comparisons(runs)
    text = lead(runs, comparisons, tracked_only=False)
    assert "by +10.00 points (95 % interval over test images -0.72 to +20.33), 1 seed." in text
    arm = comparisons[0].arms[1]
    assert comparisons[0].pair(arm) is not None and comparisons[0].pair(comparisons[0].arms[0]) is None
