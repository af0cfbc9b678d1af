"""`pipeline labels inspect|verify`: what a label file holds, and whether its teacher would answer the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.labels.cache import RELABEL, LabelCache
from pipeline.labels.replay import OTHER_MARGIN, SAME_MARGIN, Replay, check_canaries, replay
from pipeline.system.canonical import require_equal
from stages.shared.context import Context
from stages.shared.fitting import make_views
from stages.shared.labelling import identity_of, load_teacher


def inspect(path: Path) -> dict[str, Any]:
    """Return what a label file holds, as plain JSON values.

    Raises:
        DataError: It is missing or not valid.
    """
    cache = LabelCache.open(path)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "num_views": cache.num_views,
        "num_samples": cache.num_samples,
        "num_classes": cache.num_classes,
        "dtype": str(cache.labels.dtype),
        "topk": cache.topk,
        "fingerprint": cache.fingerprint,
        "clean": {split: len(rows) for split, rows in cache.clean.items()},
        "identity": cache.identity,
        "provenance": cache.provenance,
    }


def verify(
    context: Context,
    path: Path,
    *,
    teacher: Path | None = None,
    num_samples: int = 1000,
    margin: float | None = None,
) -> tuple[Replay, float]:
    """Replay the teacher on some cached labels.

    Args:
        context: The command's setting.
        path: The label file, of this recipe.
        teacher: The checkpoint; None takes the selected teacher.
        num_samples: How many (view, sample) pairs, drawn at a fixed seed over all views.
        margin: Largest logit margin of a difference that is tolerated; None takes SAME_MARGIN on the recorded kind of
            device and precision, else OTHER_MARGIN.

    Returns:
        The differences, and the margin that was applied.

    Raises:
        DataError: The file is not valid or belongs to other data, views or another teacher.
    """
    cache, dataset = LabelCache.open(path), context.dataset()
    names = [name for name, recipe in context.recipe.views.items() if identity_of(dataset, recipe) == cache.identity]
    if not names:
        own = context.recipe.views.get(path.stem, context.recipe.views["default"])
        require_equal(str(path), cache.identity, identity_of(dataset, own), RELABEL)
    model, checkpoint = load_teacher(context, dataset, teacher or context.paths.winner)
    recorded = cache.provenance
    if checkpoint.sha256 != recorded["checkpoint_sha256"]:
        raise DataError(
            f"{path}: labelled by checkpoint {recorded['checkpoint_sha256'][:12]}..., not by {checkpoint.path} "
            f"({checkpoint.sha256[:12]}...); name the right one with --teacher"
        )
    views = make_views(context, dataset, names[0])
    changed = check_canaries(cache, views)
    if changed is not None:
        raise DataError(f"{path}: the pixels of view {changed} are not those that were labelled; label again")
    if margin is None:
        now = (model.precision, context.device.type, model.compiled)
        same = now == (recorded["precision"], recorded["device"], recorded["compiled"])
        margin = SAME_MARGIN if same else OTHER_MARGIN
    total = cache.num_views * cache.num_samples
    chosen = np.random.default_rng(0).choice(total, size=min(num_samples, total), replace=False)
    pairs = [divmod(int(index), cache.num_samples) for index in chosen]
    return replay(cache, model, views, pairs), margin
