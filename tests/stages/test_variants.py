"""What a recipe's variants of a student are worth: which they are, and their differences by seed."""

from __future__ import annotations

from pathlib import Path

from stages.reports.variants import variants, variants_tables
from tests.support.finished_runs import finished, finished_runs, recipe


def test_variants_are_later_students_of_the_same_model() -> None:
    found = variants(recipe("cifar100"))
    assert found == {
        "titn": {"titn-large-patch": "patch_size 8 -> 16, pixel_size 2 -> 4", "titn-mixup": "views default -> mixup"}
    }


def test_every_variant_of_our_own_recipe_names_what_it_leaves_out() -> None:
    found = variants(recipe("cifar100-best"))["titn"]
    assert found["titn-hard"] == "soft 2 -> 0"
    assert found["titn-no-ema"] == "ema 0.9995 -> 0"
    assert all(found.values())


def test_a_variants_difference_is_paired_by_seed(tmp_path: Path) -> None:
    runs = finished_runs(
        recipe("cifar100-best"),
        *(finished(tmp_path, "titn", [value], seed=seed) for seed, value in enumerate((70.0, 72.0, 74.0))),
        *(finished(tmp_path, "titn-hard", [value], seed=seed) for seed, value in enumerate((69.0, 71.5, 72.5))),
        finished(tmp_path, "titn-sgd", [71.0]),
    )
    (table,) = variants_tables(runs)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["titn"] == ["-", "72.00 ± 2.00 (3)", "-", "-"]
    # -1, -0.5, -1.5: mean -1, deviation 0.5, t of 2 degrees 4.3027, so 4.3027 x 0.5 / sqrt(3) on both sides.
    assert rows["titn-hard"] == ["soft 2 -> 0", "71.00 ± 1.80 (3)", "-1.00 ± 0.50 (3)", "-2.24 to +0.24"]
    assert rows["titn-sgd"][1:] == ["71.00", "+1.00", "-"]
    assert rows["titn-long"] == ["epochs 300 -> 600", "not run", "-", "-"]
    assert table.note is not None and "A single seed has no interval" in table.note


def test_test_scores_stand_beside_where_a_validation_split_decides(tmp_path: Path) -> None:
    own = [finished(tmp_path, name, [50.0], evaluated_on="val") for name in ("titn", "titn-hard")]
    (table,) = variants_tables(finished_runs(recipe("cifar100-best"), *own))
    assert [column for column in table.columns if column.startswith("test")] == [
        "test top-1 %",
        "test top-1 %: less titn",
    ]


def test_without_a_variants_run_there_is_no_table(tmp_path: Path) -> None:
    assert variants_tables(finished_runs(recipe("cifar100"), finished(tmp_path, "titn", [70.0]))) == []
    assert variants_tables(finished_runs(recipe("cifar100"), finished(tmp_path, "titn-mixup", [70.0]))) == []
