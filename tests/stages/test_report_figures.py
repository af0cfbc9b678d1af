"""Figures 4 to 8: which are drawn, of what, and what is said below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.report.tables import Figure
from stages.reports.figures import figures
from stages.reports.runs import FinishedRun
from tests.pipeline.report.test_figures import check
from tests.support.finished_runs import finished, finished_runs, recipe


def draw(*runs: Any, winner: str | None = None, of: str = "cifar100") -> dict[str, Figure]:
    items = figures(finished_runs(recipe(of), *runs, winner=winner))
    drawn = {item.name: item for item in items if isinstance(item, Figure)}
    for figure in drawn.values():
        check(figure.png)
    return drawn


def rows(figure: Figure) -> tuple[list[str], list[list[str]]]:
    assert figure.data is not None
    return list(figure.data.columns), [list(row) for row in figure.data.rows]


def test_nothing_is_drawn_of_what_has_not_been_run() -> None:
    assert draw() == {}


def test_what_is_there_of_the_teachers_is_drawn_beside_the_papers(tmp_path: Path) -> None:
    teachers = [
        finished(tmp_path, name, curve, kind="teacher")
        for name, curve in (("vgg19", [20.0, 60.0]), ("vgg16_bn", [30.0, None, 70.5]))
    ]
    drawn = draw(*teachers, winner="vgg16_bn")
    assert list(drawn) == ["figure-4"]
    figure = drawn["figure-4"]
    assert rows(figure) == (
        ["epoch", "vgg16_bn", "vgg19"],
        [["1", "30.0000", "20.0000"], ["2", "", "60.0000"], ["3", "70.5000", ""]],
    )
    assert figure.title == "Figure 4. Teachers on cifar100 by epoch"
    assert "vgg16_bn 70.50" in figure.alt and "dotted: the paper's" in figure.note


@pytest.mark.parametrize(
    ("of", "name"), [("cifar100", "figure-6"), ("cifar10", "figure-7"), ("mnist", "figure-8"), ("digits", "students")]
)
def test_students_are_the_papers_figure_of_the_same_data(tmp_path: Path, of: str, name: str) -> None:
    drawn = draw(finished(tmp_path, "titn", [10.0, 50.0]), of=of)
    assert list(drawn) == [name]
    assert ("dotted" in drawn[name].note) == (of != "digits")


def test_several_seeds_are_a_mean_with_a_band(tmp_path: Path) -> None:
    seeds = [finished(tmp_path, "titn", [10.0, 60.0 + 2 * seed], seed=seed) for seed in range(3)]
    other = finished(tmp_path, "titn", [99.0] * 5, seed=3)  # from before the recipe's epochs changed
    figure = draw(*seeds, other)["figure-6"]
    assert rows(figure)[0] == ["epoch", "titn, seed 0", "titn, seed 1", "titn, seed 2"]
    assert "a band of one standard deviation" in figure.note
    assert "Highest, in percent: titn 62.00 ± 2.00 (3)." in figure.alt


def test_the_winners_optimisers_are_figure_5(tmp_path: Path) -> None:
    winner = finished(tmp_path, "vgg16_bn", [30.0, 70.0], kind="teacher")
    loser = finished(tmp_path, "vgg19", [30.0, 60.0], kind="teacher")
    sweep = [
        finished(
            tmp_path, "vgg16_bn", [20.0, top1], kind="teacher", optimizer=optimizer, lr=lr,
            differs={"optimizer": optimizer, "lr": str(lr)},
        )
        for optimizer, lr, top1 in (("rmsprop", 0.0001, 55.0), ("adam", 0.001, 58.0))
    ]  # fmt: skip
    longer = finished(tmp_path, "vgg16_bn", [1.0] * 3, kind="teacher", differs={"epochs": "3"})
    figure = draw(winner, loser, *sweep, longer, winner="vgg16_bn")["figure-5"]
    assert rows(figure) == (
        ["epoch", "sgd, lr 0.1", "adam, lr 0.001", "rmsprop, lr 0.0001"],
        [["1", "30.0000", "20.0000", "20.0000"], ["2", "70.0000", "58.0000", "55.0000"]],
    )
    assert "figure-5" not in draw(winner, loser, longer, winner="vgg16_bn"), "the sweep was not run"


def test_optimisers_beside_adamw_have_a_weight_decay_of_their_own(tmp_path: Path) -> None:
    def run(optimizer: str, lr: float, decay: float, /, **differs: str) -> FinishedRun:
        trained, top1 = {"weight_decay": decay}, {"sgd": 40.0, "adamw": 50.0}[optimizer]
        return finished(
            tmp_path, "vgg16_bn", [top1], kind="teacher", optimizer=optimizer, lr=lr, trained=trained, differs=differs
        )

    winner = run("adamw", 0.001, 0.05)
    sgd = run("sgd", 0.1, 0.0001, optimizer="sgd", lr="0.1", weight_decay="0.0001")
    more = run("sgd", 0.1, 0.001, optimizer="sgd", lr="0.1", weight_decay="0.001")
    other = run("adamw", 0.001, 0.3, weight_decay="0.3")

    def names(*runs: FinishedRun) -> list[str]:
        return rows(draw(winner, other, *runs, winner="vgg16_bn")["figure-5"])[0][1:]

    assert names(sgd) == ["sgd, lr 0.1", "adamw, lr 0.001"]
    assert names(sgd, more) == ["sgd, lr 0.1, decay 0.0001", "sgd, lr 0.1, decay 0.001", "adamw, lr 0.001"]


def test_accuracy_is_said_to_be_of_the_split_that_it_is_of(tmp_path: Path) -> None:
    figure = draw(finished(tmp_path, "titn", [10.0, 50.0], evaluated_on="val"), of="folder")["students"]
    assert figure.alt.startswith("Lines: validation accuracy") and "validation images" in figure.note


def test_a_damaged_curve_is_named(tmp_path: Path) -> None:
    run = finished(tmp_path, "titn", [10.0, 50.0])
    for text in ("epoch,top1\n1,10\n", "epoch\n1\n2\n", "epoch,top1\n1,x\n2,3\n"):
        (run.directory / "curve.csv").write_text(text)
        with pytest.raises(DataError, match=r"curve\.csv: not a curve of 2 epochs"):
            draw(run)
