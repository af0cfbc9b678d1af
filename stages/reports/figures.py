"""The paper's Figures 4 to 8: accuracy over the epochs, of teachers, of optimisers, of students."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.report import paper
from pipeline.report.figures import Series, lines, smoothing
from pipeline.report.tables import Figure, Table, number, spread
from stages.reports.conditions import conditions
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.shared.context import Context

STUDENTS = {"cifar100": "Figure 6", "cifar10": "Figure 7", "mnist": "Figure 8"}
"""Data set to the paper's figure of its students."""
SPLITS = {"test": "test", "val": "validation"}


@dataclass(frozen=True)
class Curve:
    """What one line of a figure is drawn from.

    Attributes:
        name: Of the model or optimiser.
        runs: At least one; several differ by their seeds alone.
        reference: The paper's highest test accuracy, percent; None where it gives none.
    """

    name: str
    runs: Sequence[FinishedRun]
    reference: float | None

    def accuracies(self) -> NDArray[np.float64]:
        """Return top-1 by run and epoch, `(R, E)` percent; NaN where there is none.

        Raises:
            DataError: A curve is damaged.
        """
        return np.stack([_accuracies(run) for run in self.runs])

    def highest(self) -> str:
        """Return the highest top-1 in percent, of several runs the mean of theirs with its standard deviation."""
        values = self.accuracies()
        return spread([float(np.nanmax(row)) if np.isfinite(row).any() else None for row in values])


def figures(context: Context, runs: FinishedRuns) -> list[Figure]:
    """Draw Figures 4 to 8 from whatever has been run.

    Args:
        context: The command's setting.
        runs: What has been run.

    Returns:
        In the paper's order; without what has not been run, and with one of Figures 6 to 8, that of the recipe's data.

    Raises:
        UsageError: matplotlib is not installed.
        DataError: A curve is damaged.
    """
    drawn = [_teachers(runs), _optimizers(runs), _students(runs)]
    return [figure for figure in drawn if figure is not None]


def _teachers(runs: FinishedRuns) -> Figure | None:
    """Figure 4: the teachers over the epochs."""
    reported = paper.TEACHERS.get(runs.recipe.dataset.source, {})
    curves = _curves(runs, runs.recipe.teachers, reported)
    title = f"Figure 4. Teachers on {runs.recipe.name} by epoch"
    return _figure("figure-4", title, "teacher", curves) if curves else None


def _optimizers(runs: FinishedRuns) -> Figure | None:
    """Figure 5: the selected teacher under several optimisers."""
    if runs.winner is None:
        return None
    found: dict[str, list[FinishedRun]] = {}
    for run in [*runs.seeds(runs.winner), *runs.others.values()]:
        is_sweep = "optimizer" in run.differs and set(run.differs) <= {"optimizer", "lr"}
        if run.name == runs.winner and run.kind == "teacher" and (is_sweep or not run.differs):
            optimizer = f"{run.metrics['optimizer']}, lr {run.metrics['lr']:g}"
            if run not in found.setdefault(optimizer, []):
                found[optimizer].append(run)
    found = {name: [run for run in each if run.basis == each[0].basis] for name, each in found.items()}
    if not any("optimizer" in run.differs for each in found.values() for run in each):
        return None
    is_papers = runs.recipe.dataset.source == "cifar100"
    curves = [
        Curve(name, each, paper.OPTIMIZERS.get(name.split(",")[0]) if is_papers else None)
        for name, each in sorted(found.items(), key=lambda item: _rank(item[0]))
    ]
    return _figure("figure-5", f"Figure 5. {runs.winner} on {runs.recipe.name} by optimiser", "optimiser", curves)


def _rank(name: str) -> tuple[int, str]:
    """Sort the optimisers as the paper does, others behind."""
    order = list(paper.OPTIMIZERS)
    optimizer = name.split(",")[0]
    return order.index(optimizer) if optimizer in order else len(order), name


def _students(runs: FinishedRuns) -> Figure | None:
    """Figure 6, 7 or 8: the students over the epochs; the same of data that the paper has no figure of."""
    source = runs.recipe.dataset.source
    curves = _curves(runs, runs.recipe.students, paper.STUDENTS.get(source, {}))
    number_ = STUDENTS.get(source)
    title = f"{f'{number_}. ' if number_ else ''}Students on {runs.recipe.name} by epoch"
    name = number_.lower().replace(" ", "-") if number_ else "students"
    return _figure(name, title, "student", curves) if curves else None


def _curves(runs: FinishedRuns, names: Iterable[str], reported: Mapping[str, paper.Reported]) -> list[Curve]:
    """Return a curve for each name that has been run."""
    found = [(name, runs.seeds(name)) for name in names]
    return [Curve(name, each, reported[name].top1 if name in reported else None) for name, each in found if each]


def _accuracies(run: FinishedRun) -> NDArray[np.float64]:
    """Return a run's top-1 by epoch, `(E,)` percent; NaN where there is none."""
    values = [row["top1"] for row in run.curve()]
    return np.array([np.nan if value is None else value for value in values])


def _figure(name: str, title: str, kind: str, curves: Sequence[Curve]) -> Figure:
    """Draw curves, with the table of their values."""
    every = [run for curve in curves for run in curve.runs]
    split = SPLITS[every[0].metrics["evaluated_on"]]
    series = [_series(curve) for curve in curves]
    has_paper = any(curve.reference is not None for curve in curves)
    legend = "highest, % (hollow: the paper's)" if has_paper else "highest, %"
    png = lines(series, x_label="epoch", y_label=f"{split} accuracy, %", legend=legend)
    best = ", ".join(f"{curve.name} {curve.highest()}" for curve in curves)
    alt = f"Lines: {split} accuracy over the epochs, one line for each {kind}. Highest, in percent: {best}."
    return Figure(name, title, png, alt, _note(curves, split, has_paper), _data(title, curves))


def _series(curve: Curve) -> Series:
    """Return a curve's mean over seeds, with one standard deviation as its band."""
    values = curve.accuracies()
    mean = values.mean(axis=0)
    band = values.std(axis=0, ddof=1) if len(values) > 1 else None
    detail = curve.highest() + ("" if curve.reference is None else f", paper {curve.reference:.2f}")
    return Series(curve.name, np.arange(1.0, len(mean) + 1), mean, band, curve.reference, detail)


def _note(curves: Sequence[Curve], split: str, has_paper: bool) -> str:
    """Say how the figure came about."""
    every = [run for curve in curves for run in curve.runs]
    parts = [f"Top-1 on {split} images after each epoch"]
    if any(len(curve.runs) > 1 for curve in curves):
        parts.append("of several seeds the mean, and a band of one standard deviation to either side")
    widths = {smoothing(run.metrics["epochs"]) for run in every} - {1}
    if widths:
        parts.append(f"bold: running mean of {' or '.join(map(str, sorted(widths)))} epochs")
    if has_paper:
        parts.append("dotted: the paper's highest test accuracies")
    return f"{'; '.join(parts)}. {conditions(every)}"


def _data(title: str, curves: Sequence[Curve]) -> Table:
    """Return the figure's values: a row for each epoch, a column for each run."""
    columns, values = ["epoch"], []
    for curve in curves:
        columns += [curve.name if len(curve.runs) == 1 else f"{curve.name}, seed {run.seed}" for run in curve.runs]
        values += list(curve.accuracies())
    length = max(map(len, values))
    padded = [[*one, *[np.nan] * (length - len(one))] for one in values]
    rows = [
        [str(epoch), *("" if np.isnan(value) else number(value, 4) for value in row)]
        for epoch, row in enumerate(zip(*padded, strict=True), start=1)
    ]
    return Table(title, columns, rows)
