"""What differs between runs: which are compared, their differences by seed, and what is said of them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.page import Item, Missing
from pipeline.report.tables import Figure, Table
from stages.reports.compare import (
    Comparison,
    as_json,
    comparison_items,
    find_comparisons,
    others_table,
    variants,
    variants_tables,
)  # fmt: skip
from stages.reports.runs import FinishedRun, FinishedRuns, pools
from stages.shared.paths import Paths
from tests.pipeline.report.test_figures import check
from tests.support import report_project
from tests.support.finished_runs import finished, finished_runs, recipe
from tests.support.in_process import invoke

TEACHER = {"name": "vgg16_bn", "sha256": "a" * 64, "top1": 78.0}
LABELS, VIEWS = "Does the teacher's label help? ", "How does the number of views matter? "


def run(folder: Path, last: float, seed: int = 0, *, name: str = "titn", **changes: Any) -> FinishedRun:
    """Make a student whose best epoch is one point above its last. `differs` decides what it learns from."""
    differs = changes.get("differs", {})
    views = int(differs.get("num_views", 12))
    is_taught = differs.get("labels") != "none"
    given = {"teacher": TEACHER, "distilled": is_taught, "views": views, **changes}
    return finished(
        folder / str(len(list(folder.iterdir()))), name, [last + 1, last], seed=seed, last=scores(last), **given
    )


def scores(top1: float) -> dict[str, Any]:
    return {
        "epoch": 2, "top1": top1, "top5": 90.0, "precision": 0.5, "recall": 0.5, "f1": 0.5, "class_top1": 50.0,
        "distillation_top1": None, "agreement": None,
    }  # fmt: skip


def find(*runs: FinishedRun) -> list[Comparison]:
    return find_comparisons(finished_runs(recipe("cifar100"), *runs))


def tables(comparisons: Sequence[Comparison]) -> dict[str, Table]:
    items = comparison_items(comparisons, with_figures=False)
    return {item.title: item for item in items if isinstance(item, Table)}


def row(table: Table, index: int) -> dict[str, str]:
    return dict(zip(table.columns, table.rows[index], strict=True))


def labelled(folder: Path, none: Sequence[float], cached: Sequence[float], online: Sequence[float] = ()) -> list[Any]:
    """Runs of each kind, of seeds 0, 1, ..."""
    made = [run(folder, value, seed, differs={"labels": "none"}) for seed, value in enumerate(none)]
    made += [run(folder, value, seed) for seed, value in enumerate(cached)]
    return made + [run(folder, value, seed, differs={"labels": "online"}) for seed, value in enumerate(online)]


def test_labels_are_compared_by_seed_against_hand_arithmetic(tmp_path: Path) -> None:
    comparison = find(*labelled(tmp_path, [40.0, 42.0, 44.0], [41.0, 43.1, 45.2], [40.5]))
    table = tables(comparison)[f"{LABELS}titn"]
    assert [row[:2] for row in table.rows] == [
        [labels, score]
        for score in ("top-1 %, last epoch, on test", "top-1 %, best epoch, on test", "agreement on test %")
        for labels in ("none", "cached", "online")
    ]
    cached = row(table, 1)
    assert cached["seeds"] == "0 1 2" and cached["mean"] == "43.10 ± 2.10 (3)"
    assert cached["95 % interval"] == "37.88 to 48.32", "43.1 -+ 4.3027 * 2.1 / sqrt(3)"
    assert cached["difference to none"] == "+1.10 ± 0.10 (3)"
    assert cached["difference to none: 95 % interval"] == "+0.85 to +1.35"
    assert list(table.rows[2][2:]) == ["0", "40.50", "-", "+0.50", "-"]
    assert table.rows[4][3] == "44.10 ± 2.10 (3)", "the best epoch's"
    assert (
        "Cached minus none: last epoch, on test +1.10 points (more than the seeds scatter: the interval excludes 0)"
        in table.note
    )
    assert "Online minus none: last epoch, on test +0.50 points (one pair of seeds, no interval)" in table.note
    assert "over 3 seeds, which change initialisation and order, not the data" in table.note
    assert "A single seed has no interval." in table.note and "left out" not in table.note


def test_what_the_seeds_scatter_is_no_difference(tmp_path: Path) -> None:
    table = tables(find(*labelled(tmp_path, [40.0, 42.0, 44.0], [44.0, 41.0, 43.0])))[f"{LABELS}titn"]
    assert (
        "Cached minus none: last epoch, on test +0.67 points (no more than the seeds scatter: the interval includes 0)"
        in table.note
    )


def test_seeds_that_have_no_partner_have_no_difference(tmp_path: Path) -> None:
    none = run(tmp_path, 40.0, 5, differs={"labels": "none"})
    table = tables(find(none, run(tmp_path, 41.0), run(tmp_path, 42.0, 1)))[f"{LABELS}titn"]
    assert list(table.rows[1][3:]) == ["41.50 ± 0.71 (2)", "35.15 to 47.85", "-", "-"]
    assert "Cached minus none: no seed in common, no difference." in table.note


OTHER_SETTINGS = [
    ({"lr": 0.2}, "lr 0.1 -> 0.2"),
    ({"batch_size": 64}, "batch_size 1024 -> 64"),
    ({"optimizer": "adamw"}, "optimizer sgd -> adamw"),
    ({"trained": {"alpha": 0.9}}, "alpha 0.5 -> 0.9"),
    ({"trained": {"label_smoothing": 0.1}}, "label_smoothing none -> 0.1"),
    ({"trained": {"weight_decay": 0.01}}, "weight_decay none -> 0.01"),
    ({"trained": {"clip": 1.0}}, "clip none -> 1"),
    ({"trained": {"warmup_epochs": 5.0}}, "warmup_epochs none -> 5"),
    ({"view_recipe": {"crop": 2}}, "views.crop none -> 2"),
    ({"data": "e" * 64}, "other data"),
    ({"precision": "bf16"}, "precision fp32 -> bf16"),
    ({"rules": 2}, "judged by other rules"),
    ({"is_described": False}, "its checkpoint does not say how it was trained"),
]


@pytest.mark.parametrize(("change", "why"), OTHER_SETTINGS)
def test_runs_under_other_settings_are_no_seeds_of_the_others(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    """They would have made 56 of 42 and 70, and -28 of the difference."""
    runs = labelled(tmp_path, [40.0, 42.0], [41.0, 43.0])
    stranger = run(tmp_path, 85.0, 2, **change)
    table = tables(find(*runs, stranger))[f"{LABELS}titn"]
    assert table.rows[1][2:4] == ["0 1", "42.00 ± 1.41 (2)"]
    assert f"Left out, titn: seed 2 ({why})." in table.note
    finished_ = finished_runs(recipe("cifar100"), *runs, stranger)
    assert finished_.seeds("student", "titn") == [runs[2], runs[3]]
    other = others_table(finished_)
    assert other is not None and [row[2] for row in other.rows] == ["0 1", "2"]
    cell = other.rows[1][1]
    assert cell == why or (why.startswith("its checkpoint") and cell == f"unknown ({why})")


def test_a_control_under_former_settings_is_none(tmp_path: Path) -> None:
    """50 under the former rate and 60 with labels made +10; under the same rate the control has 70."""
    former = run(tmp_path, 50.0, differs={"labels": "none"}, lr=0.2)
    cached = run(tmp_path, 60.0)
    assert find(former, cached) == []
    comparison = find(former, cached, run(tmp_path, 70.0, differs={"labels": "none"}))
    (table,) = tables(comparison).values()
    assert table.rows[1][3:6] == ["60.00", "-", "-10.00"]
    assert "Left out, titn: seed 0 (lr 0.1 -> 0.2, labels cached -> none)." in table.note


def test_each_set_of_settings_has_its_own_control(tmp_path: Path) -> None:
    runs = [*labelled(tmp_path, [40.0], [41.0]), run(tmp_path, 60.0, 1, lr=0.2)]
    runs.append(run(tmp_path, 63.0, 1, differs={"labels": "none"}, lr=0.2))
    shown = tables(find(*runs))
    assert {title: table.rows[1][5] for title, table in shown.items()} == {
        f"{LABELS}titn": "+1.00", f"{LABELS}titn, lr 0.2": "-3.00",
    }  # fmt: skip
    assert "Left out" not in shown[f"{LABELS}titn"].note


def test_runs_of_another_teacher_are_left_out_but_no_control_for_its(tmp_path: Path) -> None:
    """A control learns from no teacher, so it is compared with the labels of any."""
    other = {**TEACHER, "sha256": "b" * 64}
    none = [run(tmp_path, 40.0 + seed, seed, differs={"labels": "none"}, teacher=other) for seed in range(2)]
    cached = [run(tmp_path, 41.0 + seed, seed) for seed in range(2)]
    shown = tables(find(*none, *cached, run(tmp_path, 90.0, 2, teacher=other)))
    table = shown[f"{LABELS}titn"]
    assert (table.rows[0][2], table.rows[1][2]) == ("0 1", "0 1") and table.rows[1][3] == "41.50 ± 0.71 (2)"
    assert list(shown) == [f"{LABELS}titn", f"{LABELS}titn, another teacher"]
    assert shown[f"{LABELS}titn, another teacher"].rows[1][2:] == ["2", "90.00", "-", "-", "-"], "no seed in common"


def test_the_same_run_under_another_spelling_counts_once(tmp_path: Path) -> None:
    changed = {"lr": 0.2, "trained": {"alpha": 0.9}}
    runs = [
        run(tmp_path, 41.0),
        run(tmp_path, 50.0, differs={"lr": "0.2", "alpha": "0.9"}, **changed),
        run(tmp_path, 50.0, differs={"alpha": "0.90", "lr": "0.20"}, **changed),
        run(tmp_path, 52.0, 1, differs={"alpha": ".9", "lr": "2e-1"}, **changed),
    ]
    table = others_table(finished_runs(recipe("cifar100"), *runs))
    assert table is not None and len(table.rows) == 1
    shown = dict(zip(table.columns, table.rows[0], strict=True))
    assert (shown["differs in"], shown["seeds"]) == ("lr 0.1 -> 0.2, alpha 0.5 -> 0.9", "0 1")
    assert shown["last test top-1 %"] == "51.00 ± 1.41 (2)", "50 and 52; with 50 twice 50.67 ± 1.15"


def test_a_copied_run_counts_once(tmp_path: Path) -> None:
    runs = labelled(tmp_path, [40.0, 42.0], [41.0, 43.0])
    copy = run(tmp_path, 90.0, 1)
    finished_ = finished_runs(recipe("cifar100"), *runs)
    (comparison,) = find_comparisons(replace(finished_, others={**finished_.others, "copy": copy}))
    assert comparison.arms[1].scores("last") == {0: 41.0, 1: 43.0}
    assert comparison.left_out == " Left out, titn: seed 1 (the same run again)."


def learned(run: FinishedRun, labels: str) -> FinishedRun:
    """Let a run's checkpoint name the labels that it learned from."""
    return replace(run, meta={**(run.meta or {}), "labels_sha256": labels * 64})


def test_seeds_that_learned_from_other_labels_are_no_seeds_of_one_setting(tmp_path: Path) -> None:
    """The labels of one file were computed again in between: 80 is no third seed of 40 and 42."""
    controls = [run(tmp_path, 40.0 + seed, seed, differs={"labels": "none"}) for seed in range(3)]
    former = run(tmp_path, 41.0, 3)  # of a version that named none: it may belong to the first
    taught = [learned(run(tmp_path, 40.0 + 2 * seed, seed), "1") for seed in range(2)]
    stranger = learned(run(tmp_path, 80.0, 2), "2")
    runs = finished_runs(recipe("cifar100"), *controls, former, *taught, stranger)
    assert runs.seeds("student", "titn") == [*taught, former]
    assert pools([former, stranger, *taught]) == [[former, stranger], taught]
    assert pools([former, stranger, *taught], "inputs.views.count") == [[former, stranger, *taught]]
    table = tables(find_comparisons(runs))[f"{LABELS}titn"]
    assert table.rows[1][2] == "0 1 3" and "Left out, titn: seed 2 (other labels)." in table.note
    other = others_table(runs)
    assert other is not None and [row[1:3] for row in other.rows] == [
        ["labels cached -> none", "0 1 2"], ["other labels", "2"],
    ]  # fmt: skip


def test_runs_without_a_description_stand_alone(tmp_path: Path) -> None:
    """Two of them, alike as far as is known, are neither a mean nor compared with anything."""
    runs = [run(tmp_path, 40.0 + seed, seed, is_described=False) for seed in range(3)]
    runs += [run(tmp_path, 50.0, seed, differs={"lr": "0.2"}, lr=0.2, is_described=False) for seed in range(2)]
    finished_ = finished_runs(recipe("cifar100"), *runs)
    assert find_comparisons(finished_) == [] and finished_.seeds("student", "titn") == runs[:1]
    table = others_table(finished_)
    assert table is not None and [row[2] for row in table.rows] == ["0", "1", "1", "2"]
    assert not any("±" in cell for row in table.rows for cell in row)
    assert {row[-1] for row in table.rows} == {"-"}


def test_runs_on_other_data_are_in_no_table(tmp_path: Path) -> None:
    """Most runs are on the data `d`, so these count while nothing is prepared."""
    project = report_project.create(tmp_path / "project", seeds=1)
    report_project.add(project, "tnt", 99.0, seed=1, data="e" * 64)
    shutil.rmtree(project.path / "data/cifar100/students/deit")
    report_project.add(project, "deit", 99.0, data="e" * 64)
    with contextlib.chdir(project.path):
        runs = FinishedRuns.read(recipe("cifar100"), Paths("cifar100"))
    assert "deit" not in runs.students and [run.seed for run in runs.seeds("student", "tnt")] == [0]
    assert list(runs.left_out) == ["data/cifar100/students/deit", "data/runs/cifar100/tnt-seed-1"]
    out = invoke(project, "report", "--recipe", "cifar100", "--no-figures")
    assert "students/deit: trained on other data (recipe cifar100, SHA-256 eeeeeeeeeeee) than most runs" in out
    text = (project.path / "data/cifar100/reports/report.md").read_text()
    assert (
        "Left out, for other data are prepared now: data/cifar100/students/deit, data/runs/cifar100/tnt-seed-1." in text
        and "99.00" not in text
    )


def test_what_differs_otherwise_is_a_comparison_of_its_own(tmp_path: Path) -> None:
    """Without teacher labels, settings of the labels change nothing; other settings do."""
    runs = labelled(tmp_path, [40.0, 42.0], [41.0, 43.0])
    runs += [run(tmp_path, 50.0 + seed, seed, differs={"soft": "2"}, soft=2.0) for seed in range(2)]
    runs += [run(tmp_path, 60.0, differs={"lr": "0.2"}, lr=0.2), run(tmp_path, 70.0, differs={"num_views": "5"})]
    runs += [run(tmp_path, 61.0, differs={"labels": "none", "lr": "0.2"}, lr=0.2)]
    shown = tables(find(*runs))
    assert list(shown) == [f"{LABELS}titn", f"{LABELS}titn, soft 2", f"{LABELS}titn, lr 0.2", f"{VIEWS}titn"]
    assert shown[f"{LABELS}titn, soft 2"].rows[1][5] == "+9.50 ± 0.71 (2)"
    assert shown[f"{LABELS}titn, lr 0.2"].rows[1][5] == "-1.00"


def test_a_student_that_learns_from_no_teacher_has_nothing_to_compare(tmp_path: Path) -> None:
    runs = [run(tmp_path, 40.0, name="vit", distilled=False)]
    runs.append(run(tmp_path, 41.0, name="vit", differs={"labels": "none"}))
    assert find(*runs) == find() == []
    assert comparison_items([]) == [] and as_json([]) == {"labels": [], "views": []}


def test_views_are_compared_with_the_loss_that_shows_overfitting(tmp_path: Path) -> None:
    runs = [run(tmp_path, 30.0 + seed, seed, differs={"num_views": "1"}) for seed in range(3)]
    runs += [run(tmp_path, 35.0, differs={"num_views": "5"})]
    runs += [run(tmp_path, 40.0 + 2 * seed, seed) for seed in range(3)]
    runs += [run(tmp_path, 37.0, seed, differs={"labels": "none"}) for seed in range(2)]
    curve = runs[0].directory / "curve.csv"
    curve.write_text(curve.read_text().replace("1.0,30.0", "0.25,30.0"))
    table = tables(find(*runs))[f"{VIEWS}titn"]
    arms = ["1", "5", "12 (the recipe's)", "12 (the recipe's), no teacher"]
    assert [row[0] for row in table.rows] == 4 * arms, "by top-1 twice, loss and agreement"
    one, loss, untaught = row(table, 0), row(table, 8), row(table, 11)
    assert one["mean"] == "31.00 ± 1.00 (3)" and one["95 % interval"] == "28.52 to 33.48"
    assert row(table, 2)["difference to 1 view"] == "+11.00 ± 1.00 (3)"
    assert loss["score"] == "train loss, last epoch" and loss["mean"] == "0.750 ± 0.433 (3)"
    assert untaught["difference to 1 view"] == "-", "of other targets"
    assert row(table, 12)["score"] == "agreement on test %" and row(table, 12)["mean"] == "-"
    assert "12 views minus 1: last epoch, on test +11.00 points (more than the seeds scatter" in table.note
    assert "over 2 or 3 seeds" in table.note and "without a teacher it is of other targets" in table.note
    assert table.rows[7][3:5] == ["38.00 ± 0.00 (2)", "38.00 to 38.00"]
    assert tables(find(*runs[:3], *runs[7:])) == {}, "one number of views"


def test_views_without_a_teacher_are_compared_by_themselves(tmp_path: Path) -> None:
    alone = [run(tmp_path, 40.0, differs={"labels": "none", **views}) for views in ({}, {"num_views": "1"})]
    assert list(tables(find(*alone))) == [f"{VIEWS}titn, labels none"]
    taught = [run(tmp_path, 50.0, differs=differs) for differs in ({}, {"num_views": "1"})]
    shown = tables(find(*alone, *taught))
    assert [title for title in shown if title.startswith(VIEWS)] == [f"{VIEWS}titn"]
    assert [row[0] for row in shown[f"{VIEWS}titn"].rows][2:4] == ["1, no teacher", "12 (the recipe's), no teacher"]


def test_where_test_decides_no_epoch_its_scores_stand_apart(tmp_path: Path) -> None:
    test = {"test": {**scores(33.0), "agreement": 80.0}, "evaluated_on": "val"}
    runs = [run(tmp_path, 40.0, differs=differs, **test) for differs in ({}, {"labels": "none"}, {"num_views": "2"})]
    shown = tables(find(*runs))
    top1 = ["top-1 %, last epoch, on val", "top-1 %, best epoch, on val", "top-1 %, best epoch, on test"]
    assert [row[1] for row in shown[f"{LABELS}titn"].rows][::2] == [*top1, "agreement on test %"]
    few = {row[1]: row[3] for row in shown[f"{VIEWS}titn"].rows if row[0] == "2"}
    assert (few["top-1 %, best epoch, on test"], few["agreement on test %"]) == ("33.00", "80.00")


@pytest.mark.parametrize("seeds", [1, 3, 9])
def test_figures_show_every_seed(tmp_path: Path, seeds: int) -> None:
    runs = labelled(tmp_path, [40.0 + seed for seed in range(seeds)], [43.0 - seed / 2 for seed in range(seeds)])
    runs += [run(tmp_path, 30.0 + seed, seed, differs={"num_views": "1"}) for seed in range(seeds)]
    items: list[Item] = comparison_items(find(*runs))
    drawn = {item.name: item for item in items if isinstance(item, Figure)}
    assert list(drawn) == ["labels-titn", "views-titn"]
    for figure in drawn.values():
        check(figure.png)
        assert figure.data is not None
    assert len(drawn["labels-titn"].data.rows) == 2 * seeds and len(drawn["views-titn"].data.rows) == 3 * seeds
    assert list(drawn["views-titn"].data.rows[0]) == ["1", "cached", "0", "30.000000", "31.000000", "1.000000", "-"]
    missing = [item for item in comparison_items(find(*runs), with_figures=False) if isinstance(item, Missing)]
    assert [item.title for item in missing] == [figure.title for figure in drawn.values()]


def test_the_report_has_the_section_and_its_figures_for_machines(tmp_path: Path) -> None:
    project = report_project.create(tmp_path / "project")
    for seed in range(2):
        report_project.add(
            project, "titn", 60.0 + seed, seed=seed, differs={"num_views": "1"}, teacher=report_project.TEACHER,
            distilled=True, views=1,
        )  # fmt: skip
    shown = invoke(project, "report", "--recipe", report_project.RECIPE, "--out", "out", "--no-figures")
    assert f"{LABELS}titn" in shown and f"{VIEWS}titn" in shown
    text = (project.path / "out/report.md").read_text()
    assert text.index("## Students") < text.index("## Comparisons") < text.index("## By class")
    content = json.loads((project.path / "out/report.json").read_text())
    labels, views = content["comparisons"]["labels"][0], content["comparisons"]["views"][0]
    assert "tables/does-the-teacher-s-label-help-titn.csv" in content["files"]
    none, cached = labels["ways"]
    assert (none["seeds"], none["last"]["interval"], none["last"]["mean"]) == ([0], None, 70.75)
    assert cached["last"]["values"] == [74.75, 75.75, 76.75] and cached["last"]["sd"] == pytest.approx(1.0)
    assert cached["last"]["difference"] == {"count": 1, "interval": None, "mean": 4.0, "sd": None}
    assert labels["budget"]["epochs"] == 20 and labels["teacher"]["name"] == "vgg16_bn"
    assert views["reference"] == {"labels": "cached", "views": 1} and "difference" not in views["ways"][1]["best"]
    invoke(project, "report", "--recipe", report_project.RECIPE, "--out", "out", "--no-figures", "--tracked-only")
    assert "## Comparisons" not in (project.path / "out/report.md").read_text(), "they need data/runs"


# The recipe's variants


def test_variants_are_later_students_of_the_same_model() -> None:
    assert variants(recipe("cifar100")) == {"titn": ["titn-large-patch", "titn-mixup"]}


def test_a_variant_differs_in_what_it_was_trained_with_whatever_params_yaml_says_now(tmp_path: Path) -> None:
    base = finished(tmp_path, "titn", [70.0], trained={"alpha": 0.7})
    mixup = finished(tmp_path, "titn-mixup", [71.0], view_recipe={"mixing": "mixup"}, trained={"alpha": 0.6})
    (table,) = variants_tables(finished_runs(recipe("cifar100"), base, mixup))
    assert [row[:2] for row in table.rows] == [
        ["titn", "-"], ["titn-mixup", "alpha 0.7 -> 0.6, views.mixing cutmix -> mixup"],
    ]  # fmt: skip
    assert table.rows[1][3] == "+1.00" and "Not run: titn-large-patch." in table.note


@pytest.mark.parametrize("change", [{"rules": 2}, {"data": "e" * 64}, {"is_described": False}])
def test_a_variant_that_was_scored_otherwise_has_no_difference(tmp_path: Path, change: dict[str, Any]) -> None:
    runs = [finished(tmp_path, "titn", [70.0]), finished(tmp_path, "titn-mixup", [71.0], **change)]
    (table,) = variants_tables(finished_runs(recipe("cifar100"), *runs))
    assert table.rows[1][2:] == ["71.00", "-", "-"]


def test_a_variants_difference_is_paired_by_seed(tmp_path: Path) -> None:
    runs = finished_runs(
        recipe("cifar100-best"),
        *(finished(tmp_path, "titn", [value], seed=seed, soft=1.0) for seed, value in enumerate((70.0, 72.0, 74.0))),
        *(finished(tmp_path, "titn-hard", [value], seed=seed) for seed, value in enumerate((69.0, 71.5, 72.5))),
        finished(tmp_path, "titn-sgd", [71.0], soft=1.0, optimizer="sgd", lr=0.2),
    )
    (table,) = variants_tables(runs)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["titn"] == ["-", "72.00 ± 2.00 (3)", "-", "-"]
    # -1, -0.5, -1.5: mean -1, deviation 0.5, t of 2 degrees 4.3027, so 4.3027 x 0.5 / sqrt(3) on both sides.
    assert rows["titn-hard"] == ["soft 1 -> none", "71.00 ± 1.80 (3)", "-1.00 ± 0.50 (3)", "-2.24 to +0.24"]
    assert rows["titn-sgd"][1:] == ["71.00", "+1.00", "-"]
    assert "titn-ema" not in rows and "titn-ema" in table.note.partition("Not run: ")[2]
    assert "A single seed has no interval" in table.note


def test_test_scores_stand_beside_where_a_validation_split_decides(tmp_path: Path) -> None:
    made = [finished(tmp_path, name, [50.0], evaluated_on="val") for name in ("titn", "titn-hard")]
    (table,) = variants_tables(finished_runs(recipe("cifar100-best"), *made))
    assert [column for column in table.columns if column.startswith("test")] == [
        "test top-1 %",
        "test top-1 %: difference to titn",
    ]


def test_without_a_variants_run_there_is_no_table(tmp_path: Path) -> None:
    assert variants_tables(finished_runs(recipe("cifar100"), finished(tmp_path, "titn", [70.0]))) == []
    assert variants_tables(finished_runs(recipe("cifar100"), finished(tmp_path, "titn-mixup", [70.0]))) == []
