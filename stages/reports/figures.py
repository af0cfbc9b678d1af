"""The paper's Figures 4 to 8: accuracy over the epochs of teachers, optimisers and students."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.report import paper
from pipeline.report.figures import Series, lines, smoothing
from pipeline.report.page import Missing
from pipeline.report.tables import Figure, Table, number, spread
from stages.reports.conditions import LEFT_OUT, NOT_RUN
from stages.reports.runs import FinishedRun, FinishedRuns

SPLITS = {"test": "test", "val": "validation"}


@dataclass(frozen=True)
class Curve:
    """A line of a figure.

    Attributes:
        name: The model or optimiser.
        runs: At least one; they differ by their seeds alone.
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
        rows = [[row["top1"] for row in run.curve()] for run in self.runs]
        return np.array([[np.nan if value is None else value for value in row] for row in rows])

    def highest(self) -> str:
        """Return the highest top-1 in percent; of several runs its mean and standard deviation."""
        values = self.accuracies()
        return spread([float(np.nanmax(row)) if np.isfinite(row).any() else None for row in values])


def figures(runs: FinishedRuns, *, with_figures: bool = True) -> list[Figure | Missing]:
    """Draw teachers, optimisers and students by epoch: Figure 4, Figure 5 and the one of Figures 6 to 8 on these data.

    Returns:
        All three, also those that are missing; on data that the paper lacks they have no numbers.

    Raises:
        UsageError: matplotlib is not installed.
        DataError: A curve is damaged.
    """
    recipe, source = runs.recipe.name, runs.recipe.dataset.source
    teachers = _curves(runs, "teacher", runs.recipe.teachers, paper.TEACHERS.get(source, {}))
    students = _curves(runs, "student", runs.recipe.students, paper.STUDENTS.get(source, {}))
    winner, select = runs.winner or "The selected teacher", f"pipeline teacher-select --recipe {recipe}"
    sweep = f"{select} --optimizers {','.join(paper.OPTIMIZERS)}"
    distill = f"pipeline distill --recipe {recipe} --student {next(iter(runs.recipe.students))}"

    def draw(number_: str, what: str, kind: str, curves: Sequence[Curve], command: str) -> Figure | Missing:
        figure = number_ if source in paper.FIGURES else ""
        title = f"{figure}. {what}" if figure else what
        if not with_figures:
            return Missing(title, LEFT_OUT)
        if not curves:
            return Missing(title, NOT_RUN, command)
        return _figure(figure.lower().replace(" ", "-") if figure else f"{kind}s", title, kind, curves)

    return [
        draw("Figure 4", f"Teachers on {recipe} by epoch", "teacher", teachers, select),
        draw("Figure 5", f"{winner} on {recipe} by optimiser", "optimiser", _optimizer_curves(runs), sweep),
        draw(paper.FIGURES.get(source, ""), f"Students on {recipe} by epoch", "student", students, distill),
    ]


def _optimizer_curves(runs: FinishedRuns) -> list[Curve]:
    """Return a curve for each optimiser and rate of the selected teacher; none unless several optimisers were run."""
    swept = runs.sweep()
    names = [f"{of[0].metrics['optimizer']}, lr {of[0].metrics['lr']:g}" for of in swept]
    by_name = {
        f"{name}, decay {of[0].weight_decay:g}" if names.count(name) > 1 else name: of
        for name, of in zip(names, swept, strict=True)
    }
    if len({of[0].metrics["optimizer"] for of in by_name.values()}) < 2:
        return []
    reported = paper.OPTIMIZERS if runs.recipe.dataset.source == "cifar100" else {}
    return [Curve(name, by_name[name], reported.get(name.split(",")[0])) for name in sorted(by_name, key=_rank)]


def _rank(name: str) -> tuple[int, str]:
    """Return the key that sorts optimisers as the paper does, others last."""
    order = list(paper.OPTIMIZERS)
    optimizer = name.split(",")[0]
    return order.index(optimizer) if optimizer in order else len(order), name


def _curves(runs: FinishedRuns, kind: str, names: Iterable[str], reported: Mapping[str, paper.Reported]) -> list[Curve]:
    """Return a curve for each name that has been run; a finished teacher, which was not trained, has none."""
    trained = {name: [run for run in runs.seeds(kind, name) if run.metrics["epochs"]] for name in names}
    return [Curve(name, of, reported[name].top1 if name in reported else None) for name, of in trained.items() if of]


def _figure(name: str, title: str, kind: str, curves: Sequence[Curve]) -> Figure:
    """Draw curves, with the table of their values."""
    split = SPLITS[curves[0].runs[0].metrics["evaluated_on"]]
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
    """Return the figure's note."""
    runs = [run for curve in curves for run in curve.runs]
    parts = [f"Top-1 on {split} images after each epoch"]
    if any(len(curve.runs) > 1 for curve in curves):
        parts.append("of several seeds the mean, and a band of one standard deviation to either side")
    widths = {smoothing(run.metrics["epochs"]) for run in runs} - {1}
    if widths:
        parts.append(f"bold: running mean of {' or '.join(map(str, sorted(widths)))} epochs")
    if has_paper:
        parts.append("dotted: the paper's highest test accuracies")
    return f"{'; '.join(parts)}."


def _data(title: str, curves: Sequence[Curve]) -> Table:
    """Return the figure's values: a row for each epoch, a column for each run."""
    columns, values = ["epoch"], []
    for curve in curves:
        columns += [curve.name if len(curve.runs) == 1 else f"{curve.name}, seed {run.seed}" for run in curve.runs]
        values += list(curve.accuracies())
    length = max(map(len, values))
    padded = [[*curve, *[np.nan] * (length - len(curve))] for curve in values]
    rows = [
        [str(epoch), *("" if np.isnan(value) else number(value, 4) for value in row)]
        for epoch, row in enumerate(zip(*padded, strict=True), start=1)
    ]
    return Table(title, columns, rows)
