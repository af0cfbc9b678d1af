"""Tables of figures by model, the paper's beside each of ours with the difference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.tables import Table, difference, number, spread
from stages.reports.runs import FinishedRun

NOT_RUN = "not run"


@dataclass(frozen=True)
class Column:
    """One figure of every model.

    Attributes:
        heading: With its unit.
        of: The figure of a run's metrics.json; None where the run has none.
        reported: Model, then the paper's figure; the paper's columns are left out where it has none at all.
        digits: After the point.
        optional: Whether a terminal too narrow for all columns leaves it out; the last such column goes first.
        varies: Whether runs of several seeds differ in it.
    """

    heading: str
    of: Callable[[Mapping[str, Any]], float | None]
    reported: Mapping[str, float] | None = None
    digits: int = 2
    optional: bool = False
    varies: bool = True

    @property
    def headings(self) -> list[str]:
        """Its own heading, and those of the paper's figure and the difference."""
        return [self.heading, *([f"paper: {self.heading}", f"{self.heading}: difference"] if self.reported else [])]

    def cells(self, name: str, runs: Sequence[FinishedRun]) -> list[str]:
        """Return the cells of a model that has been run."""
        values = [self.of(run.metrics) for run in runs]
        cells = [spread(values if self.varies else values[:1], self.digits)]
        if self.reported:
            known = [value for value in values if value is not None]
            paper = self.reported.get(name)
            cells += [number(paper), difference(statistics.fmean(known), paper) if known else "-"]
        return cells


@dataclass(frozen=True)
class Model:
    """A row of a table.

    Attributes:
        name: In the recipe.
        runs: Its runs, one for each seed; none where it has not been run.
        mark: What is said behind the name.
    """

    name: str
    runs: Sequence[FinishedRun]
    mark: str = ""


def score_table(title: str, heading: str, models: Sequence[Model], columns: Sequence[Column], note: str) -> Table:
    """Return a row for each model, also of those that have not been run, and a column for its best epoch.

    Args:
        title: The table's.
        heading: Of the first column.
        models: The rows.
        columns: The figures.
        note: Below it.
    """
    rows = [[f"{model.name}{model.mark}", *_figures(model, columns), _best_epoch(model.runs)] for model in models]
    optional = [heading for column in reversed(columns) if column.optional for heading in reversed(column.headings)]
    headings = [heading, *(heading for column in columns for heading in column.headings), "best epoch"]
    return Table(title, headings, rows, note, optional)


def _figures(model: Model, columns: Sequence[Column]) -> list[str]:
    if model.runs:
        return [cell for column in columns for cell in column.cells(model.name, model.runs)]
    cells = []
    for column in columns:
        cells += ["-", *([number(column.reported.get(model.name)), "-"] if column.reported else [])]
    return [NOT_RUN, *cells[1:]]


def _best_epoch(runs: Sequence[FinishedRun]) -> str:
    if not runs:
        return "-"
    best = ", ".join(str(run.metrics["best"]["epoch"]) for run in runs)
    return f"{best} of {runs[0].metrics['epochs']}"
