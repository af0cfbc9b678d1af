"""`pipeline select`: compare the candidates and copy the winner's checkpoint to data/<recipe>/teacher."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.config.recipes import deciding_values
from pipeline.errors import DataError, UsageError
from pipeline.system.canonical import fingerprint, seal
from pipeline.system.storage import lock, read_bytes, read_json, remove_leftovers, to_json, write_together
from pipeline.training.checkpoints import read_meta, read_weights
from pipeline.training.manifest import MANIFEST, Manifest, read_json_checked
from pipeline.training.standing import standing
from stages.reports.tables import candidates_table
from stages.shared import kept
from stages.shared.context import Context
from stages.shared.options import open_context, recipe_option, teachers_option
from stages.shared.runs import CHECKPOINTS
from stages.shared.trained import require_same_data


@click.command("select")
@recipe_option
@teachers_option
def command(recipe: str | None, teachers: tuple[str, ...] | None) -> None:
    """Compare the candidates and copy the winner."""
    context = open_context(recipe)
    comparison = select(context, teachers)
    context.show(candidates_table(context, comparison))
    context.say(f"selected {comparison['winner']} by {comparison['by']}")
    context.end()


def select(
    context: Context, teachers: Sequence[str] | None = None, outs: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Choose the best of the trained candidates by the recipe's rule; of equals the one of lower loss, then the first.

    A choice that is gone is put back if candidates are gone too, so that it cannot be made again.

    Args:
        context: The command's setting.
        teachers: Names of the candidates; None takes those that `Params.candidates` returns.
        outs: Where the candidates are that are not the recipe's own runs, by name.

    Returns:
        The comparison, as written to selection.json.

    Raises:
        UsageError: The recipe has no such teacher.
        DataError: A candidate is not trained, or on other data than are prepared; its checkpoint is damaged; or none
            has learned anything.
    """
    teachers = _candidates(context, teachers)
    result = _kept_selection(context, teachers, outs)
    if _are_gone(context, teachers, outs) and kept.put_back(context, result):
        return dict(read_json(context.paths.selection))
    paths = context.paths
    compare(context, teachers, outs)  # refuses before a lock is written
    with lock(paths.work("select.lock")):  # the last of two to select has seen the newest candidates
        comparison = compare(context, teachers, outs)
        names = [row["name"] for row in comparison["candidates"]]
        trained = {name: (outs or {}).get(name, paths.teacher(name)) for name in names}
        for name, out in trained.items():
            if (meta := read_meta(out)) is not None:
                way_out = f"run `pipeline teacher {name} --recipe {context.recipe.name}`"
                require_same_data(meta, out, paths, way_out)
        file, weights = read_weights(trained[comparison["winner"]])
        described = file.with_suffix(".json")
        copies = {paths.winner / file.name: weights, paths.winner / described.name: read_bytes(described)}
        manifest = Manifest({path.name: hashlib.sha256(data).hexdigest() for path, data in copies.items()})
        # The selection has a seal of its own: it changes with each candidate, and labels depend on the winner's folder.
        copies |= {paths.winner / MANIFEST: manifest.to_bytes(), paths.selection: to_json(seal(comparison))}
        for path in copies:
            remove_leftovers(path)
        write_together(copies)
        kept.keep(context, result)
    context.changed("select")
    return comparison


def compare(
    context: Context, teachers: Sequence[str] | None = None, outs: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Compare candidates as `select` does, and write nothing; arguments, result and errors are the same."""
    recipe, paths = context.recipe, context.paths
    names = _candidates(context, teachers)
    candidates: list[dict[str, Any]] = []
    for name in names:
        file = (outs or {}).get(name, paths.teacher(name)) / "metrics.json"
        if not file.is_file():
            raise DataError(f"{file}: missing; run `pipeline teacher {name} --recipe {recipe.name}`")
        candidates.append(read_json_checked(file))
    learned = [row for row in candidates if not row["at_chance"] and math.isfinite(row["best"][recipe.select.by])]
    if not learned:
        path = f"recipes.{recipe.name}"
        raise DataError(
            f"none of {', '.join(names)} has learned anything; lower {path}.teacher.lr, or, where one class is far "
            f"more common than the others, train more epochs and write {path}.select: {{by: f1}}"
        )
    best = max(learned, key=lambda row: standing(row["best"], recipe.select.by))  # the first of equals
    return {"winner": best["name"], "by": recipe.select.by, "candidates": candidates}


def _candidates(context: Context, teachers: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the candidates, each in the recipe."""
    recipe = context.recipe
    names = tuple(teachers or context.params.candidates(recipe))
    for name in names:
        if name not in recipe.teachers:
            raise UsageError(
                f"--teachers {name}: not in recipe {recipe.name}; choose from {', '.join(recipe.teachers)}"
            )
    return names


def _are_gone(context: Context, teachers: Sequence[str], outs: Mapping[str, Path] | None) -> bool:
    """Tell whether there is no selection, and not every candidate that one could be made of."""
    paths = context.paths
    candidates = [(outs or {}).get(name, paths.teacher(name)) for name in teachers]
    return not paths.selection.exists() and not all((path / "metrics.json").is_file() for path in candidates)


def _kept_selection(context: Context, teachers: Sequence[str], outs: Mapping[str, Path] | None) -> kept.Result:
    """Describe the selection as it is kept: rule and candidates decide whether it fits."""
    paths, recipe = context.paths, context.recipe
    candidates = {name: str((outs or {}).get(name, "")) for name in teachers}
    decides = fingerprint({"select": deciding_values(recipe.select), "teachers": candidates})
    files = (*(paths.winner / name for name in (*CHECKPOINTS[:2], MANIFEST)), paths.selection)
    claim = paths.work("select.lock")
    return kept.Result(recipe.name, "select", decides, paths.selection, files, lock=claim, project=context.project)
