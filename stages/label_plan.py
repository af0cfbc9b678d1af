"""What a labelling run has to do: which views, how many classes it keeps of each answer, what it goes on from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, UsageError
from pipeline.labels import LabelCache
from pipeline.recipes import MAX_VIEWS, Recipe
from stages.context import Context

ViewSlice = tuple[int, int | None]
"""First view and the one behind the last; None is the recipe's number of views."""


def wanted_views(recipe: Recipe, view_recipe: str, part: ViewSlice | None) -> range:
    """Return the views to label: those of a slice, or all that the recipe asks for.

    Raises:
        UsageError: The slice is empty, or goes beyond what a recipe may ask for.
    """
    count = recipe.views[view_recipe].count
    if part is None:
        return range(count)
    start, stop = part[0], count if part[1] is None else part[1]
    if not start < stop <= MAX_VIEWS:
        end = f"{count}, recipes.{recipe.name}.views.{view_recipe}.count" if part[1] is None else f"{stop}"
        raise UsageError(
            f"--views: the slice from {start} to {end} holds no view, or one beyond {MAX_VIEWS}; write A:B with A < B"
        )
    return range(start, stop)


def asked_topk(recipe: Recipe, keep: int | None, num_classes: int) -> int:
    """Return how many classes to keep of each sample, 0 for the argmax alone; `keep` goes before the recipe's.

    Raises:
        UsageError: There are fewer classes.
    """
    topk = recipe.label.topk if keep is None else keep
    if topk > num_classes:
        raise UsageError(
            f"{_key(recipe, keep)}: topk={topk}, but the data set has {num_classes} classes; keep at most that many"
        )
    return topk


def reusable_cache(
    context: Context, path: Path, identity: Mapping[str, Any], checkpoint_sha256: str
) -> LabelCache | None:
    """Open the sealed file that a run goes on from: one of this data, view recipe and teacher; others get replaced."""
    if not path.exists():
        return None
    try:
        return LabelCache.open(
            path, expected_identity=identity, expected_provenance={"checkpoint_sha256": checkpoint_sha256}
        )
    except DataError as error:
        context.say(f"labelling every view again: {error}")
        return None


def topk_beside(context: Context, path: Path, cache: LabelCache, asked: int, keep: int | None) -> int:
    """Return the K with which a sealed file goes on: its own, since what it keeps is never dropped.

    Args:
        context: The command's setting.
        path: The file.
        cache: Its content.
        asked: What the command asks for.
        keep: As given on the command line.

    Raises:
        DataError: It holds less than is asked for.
    """
    if cache.topk > asked:
        context.say(f"{path}: keeps {kept_name(cache.topk)} and goes on with it; {kept_name(asked)} was asked for")
    if cache.topk < asked:
        option = "" if keep is None else f" --keep {kept_name(keep)}"
        raise DataError(
            f"{path}: keeps {kept_name(cache.topk)}, {_key(context.recipe, keep)} asks for {kept_name(asked)}; "
            f"`pipeline label{option} --fresh` labels every view again"
        )
    return cache.topk


def kept_name(topk: int) -> str:
    """Return what is kept of each answer, as --keep names it."""
    return f"topk={topk}" if topk else "argmax"


def slices(views: Sequence[int]) -> str:
    """Write ascending views as --views takes them: `0:4, 7:8`."""
    groups = itertools.groupby(enumerate(views), key=lambda pair: pair[1] - pair[0])
    runs = [[view for _, view in group] for _, group in groups]
    return ", ".join(f"{run[0]}:{run[-1] + 1}" for run in runs)


def _key(recipe: Recipe, keep: int | None) -> str:
    return f"recipes.{recipe.name}.label.topk" if keep is None else "--keep"
