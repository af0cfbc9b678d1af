"""The labels that lie here already, and whose they are."""

from __future__ import annotations

from pipeline.errors import DataError
from pipeline.labels.cache import LabelCache
from pipeline.training.checkpoints import read_meta
from stages.shared.context import Context
from stages.shared.teacher_labels import open_labels


def labels_of(context: Context, view_recipe: str) -> LabelCache | None:
    """Open a view recipe's labels; None where there are none of these data, these views and the selected teacher."""
    if not context.paths.labels(view_recipe).exists():
        return None
    try:
        return open_labels(context.paths, context.recipe, context.dataset(), view_recipe)
    except DataError:
        return None


def any_labels(context: Context) -> LabelCache | None:
    """Open the labels of the first view recipe that has any, as `labels_of`."""
    found = (labels_of(context, name) for name in context.recipe.views)
    return next((cache for cache in found if cache is not None), None)


def selected(context: Context) -> str:
    """Return the name of the selected teacher, or of the one that labelled what is here.

    Raises:
        DataError: There is none.
    """
    chosen = read_meta(context.paths.winner)
    if chosen is not None:
        return str(chosen["model"])
    cache = any_labels(context)
    if cache is None:
        raise DataError(f"{context.paths.winner}: no teacher is selected")
    return str(cache.provenance["teacher"])
