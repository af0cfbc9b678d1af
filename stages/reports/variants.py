"""What each choice of a recipe is worth: its variants of a student beside the student itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pipeline.config.recipes import Recipe
from pipeline.report.intervals import paired_difference
from pipeline.report.tables import Table, spread
from stages.reports.compared import difference_cells
from stages.reports.conditions import conditions, is_held_out
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.shared.runs import differences


def variants(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return each student that others of the recipe are variants of: those of its model that come after it.

    Returns:
        Its name, then each variant's name and in what it differs, as `soft 2 -> 0`.
    """
    found: dict[str, dict[str, str]] = {}
    bases: dict[str, str] = {}
    for name, student in recipe.students.items():
        base = bases.setdefault(student.model, name)
        if base != name:
            former, own = ({"student": dataclasses.asdict(each)} for each in (recipe.students[base], student))
            found.setdefault(base, {})[name] = ", ".join(differences(former, own))
    return found


def variants_tables(runs: FinishedRuns) -> list[Table]:
    """Return a table for each student of which it and a variant have been run."""
    tables = [_table(runs, base, of) for base, of in variants(runs.recipe).items()]
    return [table for table in tables if table is not None]


def _table(runs: FinishedRuns, base: str, of: Mapping[str, str]) -> Table | None:
    own = runs.seeds(base)
    ran = {name: runs.seeds(name) for name in of}
    if not own or not any(ran.values()):
        return None
    trained = [*own, *(run for each in ran.values() for run in each)]
    measures = {"best": "best top-1 %", "test": "test top-1 %"} if is_held_out(trained) else {"best": "best top-1 %"}
    columns = ["student", "differs in"]
    for heading in measures.values():
        columns += [heading, f"{heading}: less {base}", "95 % interval"]
    rows = []
    for name, seeds in {base: own, **ran}.items():
        row = [name, of.get(name, "-")]
        for measure in measures:
            row += _figures(seeds, own, measure, is_base=name == base) if seeds else ["not run", "-", "-"]
        rows.append(row)
    note = f"Each differs from {base} in what is named, so its difference is what that is worth; paired by seed. "
    if any(len(seeds) == 1 for seeds in (own, *ran.values())):
        note += "A single seed has no interval: the difference may be chance. "
    return Table(f"Variants of {base}", columns, rows, note + conditions(trained))


def _figures(seeds: Sequence[FinishedRun], own: Sequence[FinishedRun], measure: str, *, is_base: bool) -> list[str]:
    values, base = _top1(seeds, measure), _top1(own, measure)
    less = None if is_base else paired_difference(values, base)
    return [spread(list(values.values())), *difference_cells(less)]


def _top1(runs: Sequence[FinishedRun], measure: str) -> dict[int, float]:
    return {run.seed: float(run.metrics[measure]["top1"]) for run in runs}
