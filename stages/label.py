"""`pipeline label`: label every view of the training set once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, UsageError
from pipeline.labels.cache import LabelCache
from pipeline.labels.parts import LabelParts, seal
from pipeline.labels.replay import make_canaries
from pipeline.labels.teacher import Teacher, label_view
from pipeline.report.progress import progress_bar
from pipeline.system.runtime import current_ranks
from pipeline.system.stopping import stopped
from pipeline.system.storage import lock, remove_leftovers
from pipeline.views.views import Views
from stages.shared.context import Context
from stages.shared.fitting import make_views
from stages.shared.labelling import (
    ViewSlice,
    asked_topk,
    identity_of,
    kept_name,
    label_clean,
    label_for_others,
    load_teacher,
    lock_of,
    provenance_of,
    ranks_at_work,
    reusable_cache,
    slices,
    topk_beside,
    wanted_views,
)

SECONDS_BETWEEN_LINES = 10.0


def label(
    context: Context,
    view_recipe: str = "default",
    *,
    teacher: Path | None = None,
    fresh: bool = False,
    keep: int | None = None,
    part: ViewSlice | None = None,
) -> Path:
    """Label the views of a view recipe that are not labelled yet, and seal them into one file.

    Under torchrun, or wherever RANK and WORLD_SIZE are set, rank r of W labels the views v with v mod W = r. Rank 0
    then labels what ranks that are not at work have left, waits for those that are, and seals. So it ends whatever
    becomes of the others, and whoever is killed, any number of ranks goes on to the same file.

    Args:
        context: The command's setting.
        view_recipe: Which view recipe.
        teacher: A checkpoint; None takes the selected teacher.
        fresh: Whether to leave existing labels aside.
        keep: Classes to keep of each sample with their probabilities, K, 0 for the argmax alone; None takes the
            recipe's. A sealed file that keeps more goes on keeping it.
        part: A slice of the views to label. They are sealed once no view before them is missing, together with the
            finished ones that follow; until then they stay parts.

    Returns:
        The sealed file; it is not there yet where a slice left views before it to other runs.

    Raises:
        UsageError: There is no such view recipe, no such slice, or fewer classes than are to be kept.
        DataError: There is no teacher; the sealed file keeps less than is asked for; or views are to be added to
            labels that another precision, device or version made.
    """
    recipe, paths = context.recipe, context.paths
    wanted = check_request(context, view_recipe, teacher=teacher, fresh=fresh, part=part)
    ranks, path, work = current_ranks(), paths.labels(view_recipe), paths.work("labels", view_recipe)
    with lock(lock_of(work, ranks.rank)):
        dataset = context.dataset()
        topk = asked_topk(recipe, keep, dataset.num_classes)
        model, checkpoint = load_teacher(context, dataset, teacher or paths.winner)
        identity = identity_of(dataset, recipe.views[view_recipe])
        provenance = provenance_of(context, dataset, checkpoint, topk)
        parts, missing, cache = begin(context, view_recipe, identity, provenance, wanted, fresh=fresh, keep=keep)
        if cache is not None:
            if cache.num_views >= wanted.stop:
                _clean_up(path, parts, cache)
                context.say(f"{path}: up to date, {cache.num_views} views; --fresh labels them again")
                return path
            parts.adopt(cache)
        if missing and (code := context.stop.before_step()):
            raise stopped(code, f"before the labels of {view_recipe}")
        views = make_views(context, dataset, view_recipe)
        _label_share(context, model, views, parts, [view for view in missing if view >= parts.num_sealed])
        if ranks.is_main:
            label_for_others(
                context.say,
                work,
                wanted,
                is_finished=lambda view: parts.read(view) is not None,
                label=lambda view: _label_view(context, model, views, parts, view),
            )
            count = wanted.stop if part is None else _end_of_finished(parts, wanted.stop)
            if part is not None and (gaps := parts.missing(count)):
                context.say(f"{path}: not sealed yet, the views {slices(gaps)} are missing; label them with --views")
                return path
            clean = label_clean(context, dataset, model)
            seal(path, parts=parts, count=count, clean=clean, canaries=make_canaries(views, count))
            context.say(f"{path}: {count} views of {len(dataset.train)} images, {kept_name(parts.topk)}, sealed")
            context.changed(f"label@{view_recipe}")
    return path


def check_request(
    context: Context, view_recipe: str, *, teacher: Path | None, fresh: bool, part: ViewSlice | None
) -> range:
    """Refuse what `label` cannot do, before any data is looked for, and return the views wanted.

    Raises:
        UsageError: As of `label`.
        DataError: There is no teacher.
    """
    recipe, paths = context.recipe, context.paths
    if view_recipe not in recipe.views:
        raise UsageError(f"--view-recipe {view_recipe}: not in {recipe.name}; choose from {', '.join(recipe.views)}")
    if teacher is None and not paths.winner.exists():
        raise DataError(f"{paths.winner}: no teacher is selected; run `pipeline teacher-select --recipe {recipe.name}`")
    wanted = wanted_views(recipe, view_recipe, part)
    if fresh and (current_ranks().world_size > 1 or part is not None):
        why = "under torchrun, whose ranks would" if part is None else "with --views, whose slices would"
        raise UsageError(f"--fresh: not {why} delete each other's work; delete {paths.labels(view_recipe)} first")
    return wanted


def begin(
    context: Context,
    view_recipe: str,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    wanted: range,
    *,
    fresh: bool = False,
    keep: int | None = None,
) -> tuple[LabelParts, list[int], LabelCache | None]:
    """Return the parts, the wanted views that have none, and the sealed file to go on from."""
    path, work = context.paths.labels(view_recipe), context.paths.work("labels", view_recipe)
    teacher, seen = provenance["checkpoint_sha256"], _inode(path)
    cache = None if fresh else reusable_cache(context, path, identity, teacher)
    if cache is not None:
        provenance = {**provenance, "topk": topk_beside(context, path, cache, provenance["topk"], keep)}
    parts = LabelParts(work, identity=identity, provenance=provenance)
    if fresh:
        parts.delete()
    missing = parts.missing(wanted.stop, wanted.start)
    # Rank 0 deletes the parts only once the file is there, so what they no longer hold has been sealed meanwhile.
    if not fresh and _inode(path) != seen:
        cache = reusable_cache(context, path, identity, teacher)
    return parts, missing, cache


def _inode(path: Path) -> int | None:
    """Tell a file from the one that replaces it; None where there is none."""
    return path.stat().st_ino if path.exists() else None


def _clean_up(path: Path, parts: LabelParts, cache: LabelCache) -> None:
    """Delete what a run left that was killed between sealing the file and deleting the parts."""
    if current_ranks().is_main and not ranks_at_work(parts.directory):
        remove_leftovers(path)
        parts.delete(below=cache.num_views)


def _label_share(context: Context, teacher: Teacher, views: Views, parts: LabelParts, missing: list[int]) -> None:
    """Label this rank's share of the missing views, telling how far it is."""
    ranks = current_ranks()
    mine = [view for view in missing if view % ranks.world_size == ranks.rank]
    if num_invalid := parts.num_invalid(mine):
        what = "are damaged, or of another teacher, precision, device, version or --keep"
        context.say(f"{parts.directory}: {num_invalid} finished views {what}; labelling them again")
    began = said = time.monotonic()
    console = context.console
    with progress_bar(console) as bar:
        bar.disable = not (console.is_terminal and ranks.is_main)
        task = bar.add_task("labelling views", total=len(mine))
        for done, view in enumerate(mine, start=1):
            _label_view(context, teacher, views, parts, view)
            bar.advance(task)
            now = time.monotonic()
            if bar.disable and (done == len(mine) or now - said > SECONDS_BETWEEN_LINES):
                rate = done * views.num_samples / (now - began)
                left = (len(mine) - done) * (now - began) / done
                context.say(f"labelled {done}/{len(mine)} views, {rate:.0f} images/s, {left:.0f} s left")
                said = now


def _label_view(context: Context, teacher: Teacher, views: Views, parts: LabelParts, view: int) -> None:
    """Label a view whole, or not at all.

    Raises:
        Interrupted: A signal came, or the time limit has been reached; this view is saved.
    """
    with context.stop.deferred():
        parts.write(view, label_view(teacher, views, view, parts.topk))
        code = context.stop.after_step()
    if code:
        raise stopped(code, f"after view {view}")


def _end_of_finished(parts: LabelParts, stop: int) -> int:
    """Return the first view from `stop` on that is not finished: other slices may have got ahead."""
    while parts.read(stop) is not None:
        stop += 1
    return stop
