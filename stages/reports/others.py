"""Runs that differ from the recipe, beside its own; Figure 5's optimisers among them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean

from pipeline.config.recipes import Recipe
from pipeline.report import paper
from pipeline.report.tables import Table, difference, number, spread
from stages.reports.conditions import conditions
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.reports.scores import NOT_RUN

OPTIMIZERS = tuple(paper.OPTIMIZERS)


def others_table(runs: FinishedRuns) -> Table | None:
    """Return the runs of data/runs that differ by more than their seed, those alike in one row; None without any.

    Each row is compared with the recipe's own runs of the same model, by test accuracy at the best epoch.
    """
    shown = [run for run in runs.others.values() if run not in runs.seeds(run.name)]
    if not shown:
        return None
    alike: dict[str, list[FinishedRun]] = {}
    for run in sorted(shown, key=lambda run: run.seed):
        alike.setdefault(json.dumps([run.name, run.differs, run.basis]), []).append(run)
    columns = ["model", "differs in", "seeds", "epochs", "best top-1 %", "last top-1 %", "test top-1 %"]
    columns += ["the recipe's own", "difference"]
    rows = [_other(group, runs.seeds(group[0].name)) for group in alike.values()]
    note = "Compared by test accuracy at the best epoch. " + conditions(shown)
    return Table(f"Other runs on {runs.recipe.name}", columns, rows, note, ("epochs", "last top-1 %", "best top-1 %"))


def _other(group: Sequence[FinishedRun], own: Sequence[FinishedRun]) -> list[str]:
    """Return the row of runs that differ by their seeds alone."""
    best, last, test = ([run.metrics[key]["top1"] for run in group] for key in ("best", "last", "test"))
    reference = [run.metrics["test"]["top1"] for run in own]
    differs = ", ".join(f"{key} {value}" for key, value in group[0].differs.items())
    return [
        group[0].name,
        differs or "settings that the recipe has changed since",
        " ".join(str(run.seed) for run in group),
        str(group[0].metrics["epochs"]),
        *map(spread, (best, last, test)),
        spread(reference) if reference else NOT_RUN,
        difference(fmean(test), fmean(reference)) if reference else "-",
    ]


def optimizers_table(
    recipe: Recipe, winner: str, outcomes: Mapping[str, FinishedRun | str], rates: Mapping[str, float]
) -> Table:
    """Return Figure 5's figures: the selected teacher by optimiser.

    Args:
        recipe: Its recipe.
        winner: The teacher.
        outcomes: Optimiser, then its run, or in a word why there is none.
        rates: Learning rates of the optimisers that have no run.
    """
    reported = paper.OPTIMIZERS if recipe.dataset.source == "cifar100" else {}
    columns = ["optimiser", "lr", "best top-1 %", "test top-1 %"]
    columns += ["paper: top-1 %", "difference"] if reported else []
    columns += ["last top-1 %", "top-5 %", "best epoch"]
    rows = []
    for optimizer, outcome in outcomes.items():
        value = reported.get(optimizer)
        if isinstance(outcome, str):
            beside = [number(value), "-"] if reported else []
            rate = f"{rates[optimizer]:g}" if optimizer in rates else "-"
            rows.append([optimizer, rate, outcome, "-", *beside, "-", "-", "-"])
            continue
        best, last, test = (outcome.metrics[key] for key in ("best", "last", "test"))
        cells = [optimizer, f"{outcome.metrics['lr']:g}", number(best["top1"]), number(test["top1"])]
        cells += [number(value), difference(test["top1"], value)] if reported else []
        rows.append(
            [*cells, number(last["top1"]), number(test["top5"]), f"{best['epoch']} of {outcome.metrics['epochs']}"]
        )
    trained = [outcome for outcome in outcomes.values() if isinstance(outcome, FinishedRun)]
    note = (
        conditions(trained) + " " if trained else ""
    ) + "The paper's teacher is VGG16_bn; it gives no figure for Adam."
    return Table(f"Figure 5 in figures. {winner} by optimiser, {recipe.name}", columns, rows, note, ("top-5 %",))


def optimizer_runs(runs: FinishedRuns) -> dict[str, FinishedRun | str]:
    """Return the selected teacher's runs by optimiser; those that the paper compares are there in any case.

    Of several rates of an optimiser the one with the best epoch counts.
    """
    own = runs.teachers.get(runs.winner or "")
    found: dict[str, FinishedRun | str] = {name: NOT_RUN for name in OPTIMIZERS}
    if own is None:
        return found
    for run in runs.others.values():
        optimizer = run.differs.get("optimizer")
        if run.name == own.name and optimizer and set(run.differs) <= {"optimizer", "lr"} and run.seed == own.seed:
            former = found.get(optimizer)
            if not isinstance(former, FinishedRun) or former.metrics["best"]["top1"] < run.metrics["best"]["top1"]:
                found[optimizer] = run
    return found | {own.metrics["optimizer"]: own}
