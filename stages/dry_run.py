"""What --dry-run says: what a command would do, what is up to date, and why. Nothing here writes anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.recipes import Recipe, deciding_values
from pipeline.data.folders import list_folder
from pipeline.data.images import BadFile, printable
from pipeline.system.storage import read_json
from stages.shared.paths import Paths

if TYPE_CHECKING:
    from stages.shared.context import Context
    from stages.shared.labelling import ViewSlice
    from stages.shared.runs import Run


def plan_run(run: Run, *, fresh: bool = False) -> str:
    """Say what training a model would do."""
    from pipeline.training.checkpoints import RunState

    why = "--fresh" if fresh else run.why_stale()
    if why is None:
        return f"{run.name}: up to date ({run.out})"
    state = None if fresh else RunState(run.work, run.fingerprint).peek()
    epochs = f"{run.recipe.epochs} epochs" if run.recipe.epochs > 1 else "1 epoch"
    if state is None:
        return f"{run.name}: train {epochs} ({why}); writes {run.out}"
    where = f"epoch {state['epoch'] + 1} of {run.recipe.epochs}, step {state['step']}"
    return f"{run.name}: interrupted, goes on from {where} ({why}); writes {run.out}"


@dataclass(frozen=True)
class LabelPlan:
    """What labelling a view recipe would do.

    Attributes:
        text: The same in one line.
        missing: The views that would be labelled, ascending.
    """

    text: str
    missing: list[int]


def plan_labels(
    context: Context,
    view_recipe: str = "default",
    *,
    teacher: Path | None = None,
    fresh: bool = False,
    keep: int | None = None,
    part: ViewSlice | None = None,
) -> LabelPlan:
    """Say what `stages.label.label` would do; arguments and errors are the same."""
    from pipeline.inference.loading import load_checkpoint_of
    from pipeline.labels.parts import LabelParts
    from stages.label import begin, check_request
    from stages.shared.labelling import asked_topk, check_teacher, identity_of, kept_name, provenance_of, slices

    wanted = check_request(context, view_recipe, teacher=teacher, fresh=fresh, part=part)
    dataset, path = context.dataset(), context.paths.labels(view_recipe)
    checkpoint = load_checkpoint_of(teacher or context.paths.winner, "teacher")
    check_teacher(context, dataset, checkpoint)
    identity = identity_of(dataset, context.recipe.views[view_recipe])
    provenance = provenance_of(context, dataset, checkpoint, asked_topk(context.recipe, keep, dataset.num_classes))
    if fresh:
        parts, missing, cache = LabelParts(path, identity=identity, provenance=provenance), list(wanted), None
    else:
        parts, missing, cache = begin(context, view_recipe, identity, provenance, wanted, keep=keep)
    if cache is not None:
        if cache.num_views >= wanted.stop:
            return LabelPlan(f"{path}: up to date, {cache.num_views} views", [])
        parts.adopt(cache)
        missing = [view for view in missing if view >= cache.num_views]
    if not missing:
        return LabelPlan(f"{path}: every view is labelled; seals them", [])
    why = "--fresh" if fresh else "no labels yet" if len(missing) == len(wanted) else "the others are labelled"
    what = f"the views {slices(missing)} of {len(dataset.train)} images, {kept_name(parts.topk)}"
    how = f"by {checkpoint.meta['model']} in {provenance['precision']}"
    return LabelPlan(f"{path}: label {what}, {how} ({why})", missing)


def plan_prepare(recipe: Recipe, paths: Paths, *, folder: Path | None, download: bool, skip_bad: bool) -> list[str]:
    """Say what `stages.prepare.prepare` would do; arguments are the same.

    Raises:
        UsageError: As there.
        DataError: Files are missing, or the folder is no image folder. Images are not opened.
    """
    from pipeline.data.sources import check_source
    from stages.prepare import check_request

    check_request(folder, download=download)
    source = recipe.dataset.source
    if folder is not None:
        bad: list[BadFile] = []
        listed = list_folder(folder, bad)
        counts = {split: sum(map(len, classes.values())) for split, classes in listed.items()}
        found = ", ".join(f"{count} {split}" for split, count in counts.items())
        what = f"{found} images of {len(listed['train'])} classes in {printable(folder)}, which are not opened yet"
        if bad:
            what += f"; {len(bad)} other files, " + ("left out" if skip_bad else "for which it is refused")
    elif download and source not in ("digits", "folder"):
        what = f"{source} in {paths.raw}, downloading what is missing"
    else:
        check_source(recipe, paths.raw)
        what = "scikit-learn's digits" if source == "digits" else f"{source} in {paths.raw}"
    return [f"read {what}", f"write {paths.dataset} ({_standing(recipe, paths)})"]


def _standing(recipe: Recipe, paths: Paths) -> str:
    """Say what prepared data there are already."""
    from stages.shared.runs import differences

    summary = paths.prepared / "summary.json"
    if not (paths.dataset.is_file() and summary.is_file()):
        return "no data yet"
    former, now = (
        {"settings": settings} for settings in (read_json(summary)["settings"], deciding_values(recipe.dataset))
    )
    if changed := differences(former, now):
        return f"in place of one of other settings: {', '.join(changed)}"
    return "in place of one of the same settings; the same images give the same file"
