"""`pipeline select`: compare the candidates and copy the winner's checkpoint to data/<recipe>/teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline import paper
from pipeline.checkpoints import load_checkpoint
from pipeline.errors import DataError, UsageError
from pipeline.recipes import Recipe
from pipeline.reporting import Table, difference, number
from pipeline.storage import lock, read_bytes, read_json, remove_leftovers, write_atomic, write_json
from stages.context import Context
from stages.paths import Paths


def select(context: Context, teachers: Sequence[str] | None = None) -> dict[str, Any]:
    """Choose the best of the trained candidates by the recipe's rule.

    Args:
        context: The command's setting.
        teachers: Names of the candidates; None takes `teachers` of params.yaml, as far as the recipe has them.

    Returns:
        The comparison, as written to selection.json.

    Raises:
        UsageError: The recipe has no such teacher.
        DataError: A candidate is not trained, its checkpoint is damaged, or none has learned anything.
    """
    recipe, paths = context.recipe, context.paths
    names = tuple(teachers or context.params.candidates(recipe))
    for name in names:
        if name not in recipe.teachers:
            raise UsageError(
                f"--teachers {name}: not in recipe {recipe.name}; choose from {', '.join(recipe.teachers)}"
            )
    candidates = [read_metrics(paths, name) for name in names]
    able = [
        candidate
        for candidate in candidates
        if not candidate["at_chance"] and math.isfinite(candidate["best"][recipe.select.by])
    ]
    if not able:
        raise DataError(f"none of {', '.join(names)} has learned anything; lower recipes.{recipe.name}.teacher.lr")
    winner = max(able, key=lambda candidate: candidate["best"][recipe.select.by])["name"]
    checkpoint = load_checkpoint(paths.teacher(winner))
    comparison = {"winner": winner, "by": recipe.select.by, "candidates": candidates}
    files = [checkpoint.path, checkpoint.path.with_suffix(".json")]
    with lock(paths.work("select.lock")):
        for path in (*(paths.winner / file.name for file in files), paths.selection):
            remove_leftovers(path)
        for file in files:
            write_atomic(paths.winner / file.name, read_bytes(file))
        write_json(paths.selection, comparison)
    context.changed("select")
    return comparison


def read_metrics(paths: Paths, name: str) -> dict[str, Any]:
    """Read a candidate's metrics.json.

    Raises:
        DataError: It is not there.
    """
    file = paths.teacher(name) / "metrics.json"
    if not file.is_file():
        raise DataError(f"{file}: missing; run `pipeline teacher {name} --recipe {paths.recipe}`")
    metrics: dict[str, Any] = read_json(file)
    return metrics


def teachers_table(recipe: Recipe, comparison: dict[str, Any], note: str) -> Table:
    """Return Table 2: the candidates, the paper's figures beside ours where it has any."""
    reported = paper.TEACHERS.get(recipe.dataset.source, {})
    held_out = any(candidate["evaluated_on"] != "test" for candidate in comparison["candidates"])
    rows = []
    for candidate in comparison["candidates"]:
        name, best = candidate["name"], candidate["best"]
        row = reported.get(name)
        mark = " (selected)" if name == comparison["winner"] else " (at chance)" if candidate["at_chance"] else ""
        test = candidate["test"]
        figures = [f"{name}{mark}", number(best["top1"]), *([number(test["top1"])] if held_out else [])]
        if reported:
            figures += [number(row.top1 if row else None), difference(test["top1"], row.top1 if row else None)]
        figures.append(number(test["top5"]))
        if reported:
            figures += [number(row.top5 if row else None), difference(test["top5"], row.top5 if row else None)]
        figures += [number(test[key], 3) for key in ("precision", "recall", "f1")]
        figures += [f"{candidate['parameters'] / 1e6:.2f}", number(candidate["paper_gmacs_1024"])]
        figures += [str(best["epoch"]), str(candidate["epochs"])]
        rows.append(figures)
    beside = ["paper", "difference"] if reported else []
    columns = ["teacher", "top-1 %", *(["test top-1 %"] if held_out else []), *beside, "top-5 %", *beside]
    columns += ["precision", "recall", "F1", "parameters, M", "paper GMACs, batch 1024", "best epoch", "epochs"]
    optional = ("precision", "recall", "parameters, M", "paper GMACs, batch 1024", "F1", "best epoch")
    return Table(f"Table 2. Teachers on {recipe.name}", columns, rows, note, optional)
