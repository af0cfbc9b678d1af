"""`pipeline select`: compare the candidates and copy the winner's checkpoint to data/<recipe>/teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click

from pipeline.errors import DataError, UsageError
from pipeline.system.storage import lock, read_bytes, read_json, remove_leftovers, write_atomic, write_json
from stages.shared.context import Context
from stages.shared.options import open_context, recipe_option, teachers_option
from stages.shared.trained import require_same_data


@click.command("select")
@recipe_option
@teachers_option
def command(recipe: str | None, teachers: tuple[str, ...] | None) -> None:
    """Compare the candidates and copy the winner."""
    from stages.reports.tables import candidates_table

    context = open_context(recipe)
    comparison = select(context, teachers)
    context.show(candidates_table(context, comparison))
    context.say(f"selected {comparison['winner']} by {comparison['by']}")
    context.end()


def select(context: Context, teachers: Sequence[str] | None = None) -> dict[str, Any]:
    """Choose the best of the trained candidates by the recipe's rule; of equals the one of lower loss, then the first.

    Args:
        context: The command's setting.
        teachers: Names of the candidates; None takes those of `teachers` in params.yaml that the recipe has.

    Returns:
        The comparison, as written to selection.json.

    Raises:
        UsageError: The recipe has no such teacher.
        DataError: A candidate is not trained, or on other data than are prepared; its checkpoint is damaged; or none
            has learned anything.
    """
    from pipeline.training.checkpoints import load_checkpoint, read_meta

    paths, comparison = context.paths, compare(context, teachers)
    for name in (row["name"] for row in comparison["candidates"]):
        if (meta := read_meta(paths.teacher(name))) is not None:
            way_out = f"run `pipeline teacher {name} --recipe {context.recipe.name}`"
            require_same_data(meta, paths.teacher(name), paths, way_out)
    checkpoint = load_checkpoint(paths.teacher(comparison["winner"]))
    files = [checkpoint.path, checkpoint.path.with_suffix(".json")]
    with lock(paths.work("select.lock")):
        for path in (*(paths.winner / file.name for file in files), paths.selection):
            remove_leftovers(path)
        for file in files:
            write_atomic(paths.winner / file.name, read_bytes(file))
        write_json(paths.selection, comparison)
    context.changed("select")
    return comparison


def compare(context: Context, teachers: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare candidates as `select` does, and write nothing; arguments, result and errors are the same."""
    from pipeline.training.metrics import standing

    recipe, paths = context.recipe, context.paths
    names = tuple(teachers or context.params.candidates(recipe))
    for name in names:
        if name not in recipe.teachers:
            raise UsageError(
                f"--teachers {name}: not in recipe {recipe.name}; choose from {', '.join(recipe.teachers)}"
            )
    candidates: list[dict[str, Any]] = []
    for name in names:
        file = paths.teacher(name) / "metrics.json"
        if not file.is_file():
            raise DataError(f"{file}: missing; run `pipeline teacher {name} --recipe {recipe.name}`")
        candidates.append(read_json(file))
    learned = [row for row in candidates if not row["at_chance"] and math.isfinite(row["best"][recipe.select.by])]
    if not learned:
        raise DataError(f"none of {', '.join(names)} has learned anything; lower recipes.{recipe.name}.teacher.lr")
    best = max(learned, key=lambda row: standing(row["best"], recipe.select.by))  # the first of equals
    return {"winner": best["name"], "by": recipe.select.by, "candidates": candidates}
