"""`pipeline label`: label every view of the training set once."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.config.recipes import MAX_VIEWS
from pipeline.errors import DataError, UsageError
from pipeline.labels.cache import LabelCache
from pipeline.labels.parts import LabelParts, seal
from pipeline.report.progress import progress_bar
from pipeline.system.stopping import stopped
from pipeline.system.storage import is_locked, lock, remove_leftovers
from stages.shared import options
from stages.shared.context import Context

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.training.checkpoints import Checkpoint

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 10.0

ViewSlice = tuple[int, int | None]
"""First view and the one behind the last; None is the recipe's number of views."""


@click.command("label")
@options.recipe_option
@options.device_option
@click.option("--view-recipe", default="default", show_default=True, help="A view recipe of the recipe.")
@click.option("--teacher", type=options.PATH, help="A checkpoint; default: the selected teacher.")
@click.option("--fresh", is_flag=True, help="Label every view again.")
@click.option("--keep", metavar="argmax|topk=K", help="Keep the K most probable classes too; default: the recipe's.")
@click.option("--views", metavar="A:B", help="Label only the views A to B - 1; :B starts at 0, A: ends at the last.")
@options.time_limit_option
@options.dry_run_option
def command(
    recipe: str | None,
    device: str | None,
    view_recipe: str,
    teacher: Path | None,
    fresh: bool,
    keep: str | None,
    views: str | None,
    dry_run: bool,
) -> None:
    """Label every view of the training set with a teacher."""
    topk, part = options.parse_keep(keep), options.parse_views(views)
    if teacher is not None:
        options.require_exists(teacher)
    context = options.open_context(recipe, device)
    if dry_run:
        context.say(plan_labels(context, view_recipe, teacher=teacher, fresh=fresh, keep=topk, part=part).text)
        return
    label(context, view_recipe, teacher=teacher, fresh=fresh, keep=topk, part=part)
    context.end()


@dataclass(frozen=True)
class LabelPlan:
    """What labelling a view recipe takes.

    Attributes:
        path: The sealed file, whether it is there or not.
        wanted: The views asked for.
        missing: Those of them still to be labelled, ascending.
        parts: The views labelled so far.
        cache: The sealed file that the run extends; None where there is none of use.
        dataset: Its training images are labelled.
        checkpoint: The teacher's.
        fresh: Whether the parts are to be deleted first.
    """

    path: Path
    wanted: range
    missing: list[int]
    parts: LabelParts
    cache: LabelCache | None
    dataset: Dataset
    checkpoint: Checkpoint
    fresh: bool

    @property
    def is_up_to_date(self) -> bool:
        """Whether the sealed file has every view that is wanted."""
        return self.cache is not None and self.cache.num_views >= self.wanted.stop

    @property
    def text(self) -> str:
        """The plan in one line."""
        if self.cache is not None and self.is_up_to_date:
            return f"{self.path}: up to date, {self.cache.num_views} views"
        if not self.missing:
            return f"{self.path}: every view is labelled; seals them"
        is_first = len(self.missing) == len(self.wanted)
        why = "--fresh" if self.fresh else "no labels yet" if is_first else "the others are labelled"
        what = f"the views {slices(self.missing)} of {len(self.dataset.train)} images"
        how = f"{options.kept_name(self.parts.topk)}, by {self.checkpoint.meta['model']}"
        return f"{self.path}: label {what}, {how} in {self.parts.provenance['precision']} ({why})"


def plan_labels(
    context: Context,
    view_recipe: str = "default",
    *,
    teacher: Path | None = None,
    fresh: bool = False,
    keep: int | None = None,
    part: ViewSlice | None = None,
) -> LabelPlan:
    """Return what `label` would do, and write nothing; arguments and errors are the same."""
    from stages.shared.labelling import identity_of, provenance_of, read_teacher

    wanted = _check_request(context, view_recipe, teacher=teacher, fresh=fresh, part=part)
    recipe, paths = context.recipe, context.paths
    dataset, path = context.dataset(), paths.labels(view_recipe)
    checkpoint = read_teacher(context, dataset, teacher or paths.winner)
    identity, seen = identity_of(dataset, recipe.views[view_recipe]), _inode(path)
    cache = None if fresh else _reusable_cache(context, path, identity, checkpoint.sha256)
    topk = _topk(context, path, cache, dataset.num_classes, keep)
    provenance = provenance_of(context, dataset, checkpoint, topk)
    parts = LabelParts(paths.work("labels", view_recipe), identity=identity, provenance=provenance)
    missing = list(wanted) if fresh else parts.missing(wanted.stop, wanted.start)
    # Rank 0 deletes the parts only once the file is there, so what they no longer hold has been sealed meanwhile.
    if not fresh and _inode(path) != seen:
        cache = _reusable_cache(context, path, identity, checkpoint.sha256)
    if cache is not None:
        missing = [view for view in missing if view >= cache.num_views]
        if cache.num_views < wanted.stop:
            parts.adopt(cache)
    return LabelPlan(path, wanted, missing, parts, cache, dataset, checkpoint, fresh)


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
    becomes of the others. Any number of ranks can go on with a run that was killed; the file is the same.

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
    from pipeline.system.runtime import current_ranks

    _check_request(context, view_recipe, teacher=teacher, fresh=fresh, part=part)  # before a lock is written
    ranks = current_ranks()
    with lock(context.paths.work("labels", f"{view_recipe}-{ranks.rank}.lock")):
        plan = plan_labels(context, view_recipe, teacher=teacher, fresh=fresh, keep=keep, part=part)
        if plan.is_up_to_date:
            _clean_up(plan)
            context.say(f"{plan.text}; --fresh labels them again")
            return plan.path
        if fresh:
            plan.parts.delete()
        if plan.missing and (code := context.stop.before_step()):
            raise stopped(code, f"before the labels of {view_recipe}")
        labelling = _Labelling(context, view_recipe, plan)
        labelling.label_share()
        if ranks.is_main:
            labelling.label_for_others()
            labelling.seal(is_slice=part is not None)
    return plan.path


def _check_request(
    context: Context, view_recipe: str, *, teacher: Path | None, fresh: bool, part: ViewSlice | None
) -> range:
    """Refuse what `label` cannot do, before any data is looked for, and return the views wanted.

    Raises:
        UsageError: See `label`.
        DataError: There is no teacher.
    """
    from pipeline.system.runtime import current_ranks

    recipe, paths = context.recipe, context.paths
    if view_recipe not in recipe.views:
        raise UsageError(f"--view-recipe {view_recipe}: not in {recipe.name}; choose from {', '.join(recipe.views)}")
    if teacher is None and not paths.winner.exists():
        raise DataError(f"{paths.winner}: no teacher is selected; run `pipeline teacher-select --recipe {recipe.name}`")
    start, end = part or (0, None)
    count = recipe.views[view_recipe].count
    stop = count if end is None else end
    if not start < stop <= MAX_VIEWS:
        until = f"{count}, recipes.{recipe.name}.views.{view_recipe}.count" if end is None else f"{stop}"
        raise UsageError(
            f"--views: the slice from {start} to {until} holds no view, or one beyond {MAX_VIEWS}; write A:B with A < B"
        )
    if fresh and (current_ranks().world_size > 1 or part is not None):
        why = "under torchrun, whose ranks would" if part is None else "with --views, whose slices would"
        raise UsageError(f"--fresh: not {why} delete each other's work; delete {paths.labels(view_recipe)} first")
    return range(start, stop)


def _reusable_cache(
    context: Context, path: Path, identity: Mapping[str, Any], checkpoint_sha256: str
) -> LabelCache | None:
    """Open the sealed file if it is of this data, view recipe and teacher; any other will be replaced."""
    if not path.exists():
        return None
    try:
        return LabelCache.open(
            path, expected_identity=identity, expected_provenance={"checkpoint_sha256": checkpoint_sha256}
        )
    except DataError as error:
        context.say(f"labelling every view again: {error}")
        return None


def _topk(context: Context, path: Path, cache: LabelCache | None, num_classes: int, keep: int | None) -> int:
    """Return how many classes to keep of each sample, K; 0 for the argmax alone.

    Args:
        context: The command's setting; its recipe says how many where the command line does not.
        path: The sealed file.
        cache: Its content, if the run extends it: what it keeps is never dropped.
        num_classes: Of the data set.
        keep: As given on the command line.

    Raises:
        UsageError: There are fewer classes.
        DataError: The sealed file keeps fewer.
    """
    recipe = context.recipe
    asked, key = (recipe.label.topk, f"recipes.{recipe.name}.label.topk") if keep is None else (keep, "--keep")
    if asked > num_classes:
        raise UsageError(f"{key}: topk={asked}, but the data set has {num_classes} classes; keep at most that many")
    if cache is None or cache.topk == asked:
        return asked
    kept, wanted = f"{path}: keeps {options.kept_name(cache.topk)}", options.kept_name(asked)
    if cache.topk < asked:
        option = "" if keep is None else f" --keep {wanted}"
        raise DataError(f"{kept}, {key} asks for {wanted}; `pipeline label{option} --fresh` labels every view again")
    context.say(f"{kept} and goes on with it; {wanted} was asked for")
    return cache.topk


def slices(views: Sequence[int]) -> str:
    """Write ascending views as --views takes them: `0:4, 7:8`."""
    groups = itertools.groupby(enumerate(views), key=lambda pair: pair[1] - pair[0])
    runs = [[view for _, view in group] for _, group in groups]
    return ", ".join(f"{run[0]}:{run[-1] + 1}" for run in runs)


def _inode(path: Path) -> int | None:
    """Tell a file from the one that replaces it; None where there is none."""
    return path.stat().st_ino if path.exists() else None


def _clean_up(plan: LabelPlan) -> None:
    """Delete what a run left that was killed between sealing the file and deleting the parts."""
    from pipeline.system.runtime import current_ranks

    assert plan.cache is not None
    ranks = current_ranks()
    if ranks.is_main and not _ranks_at_work(plan.parts.directory, ranks.rank):
        remove_leftovers(plan.path)
        plan.parts.delete(below=plan.cache.num_views)


def _ranks_at_work(work: Path, this: int) -> set[int]:
    """Return the ranks other than this one that hold their lock, beside the directory of the parts.

    Some may be of an earlier group, which they outlive: without torchrun nobody ends them when rank 0 dies.
    """
    name = re.compile(re.escape(work.name) + r"-(\d+)\.lock")
    locks = {int(match[1]): file for file in work.parent.iterdir() if (match := name.fullmatch(file.name))}
    return {rank for rank, file in locks.items() if rank != this and is_locked(file)}


class _Labelling:
    """A plan carried out by one rank, which holds its lock.

    Args:
        context: The command's setting.
        view_recipe: Which view recipe.
        plan: What is missing.
    """

    def __init__(self, context: Context, view_recipe: str, plan: LabelPlan) -> None:
        from pipeline.system.runtime import current_ranks
        from stages.shared.fitting import make_views
        from stages.shared.labelling import make_ready

        self._context, self._view_recipe, self._plan = context, view_recipe, plan
        self._parts, self._ranks = plan.parts, current_ranks()
        self._teacher = make_ready(context, plan.dataset, plan.checkpoint)
        self._views = make_views(context, plan.dataset, view_recipe)

    def label_share(self) -> None:
        """Label this rank's share of the missing views, saying how far it is."""
        context, ranks, parts = self._context, self._ranks, self._parts
        mine = [view for view in self._plan.missing if view % ranks.world_size == ranks.rank]
        if num_invalid := parts.num_invalid(mine):
            what = "are damaged, or of another teacher, precision, device, version or --keep"
            context.say(f"{parts.directory}: {num_invalid} finished views {what}; labelling them again")
        began = said = time.monotonic()
        with progress_bar(context.console) as bar:
            bar.disable = not (context.console.is_terminal and ranks.is_main)
            task = bar.add_task("labelling views", total=len(mine))
            for done, view in enumerate(mine, start=1):
                self._label(view)
                bar.advance(task)
                now = time.monotonic()
                if bar.disable and (done == len(mine) or now - said > SECONDS_BETWEEN_LINES):
                    rate = done * self._views.num_samples / (now - began)
                    left = (len(mine) - done) * (now - began) / done
                    context.say(f"labelled {done}/{len(mine)} views, {rate:.0f} images/s, {left:.0f} s left")
                    said = now

    def label_for_others(self) -> None:
        """Return when every view is labelled and no other rank is at work, labelling what nobody else does.

        So rank 0 never waits for a rank that died, failed, or finished without being of use (one that has other
        libraries than rank 0 writes parts that rank 0 does not take), and never deletes the file that another is
        about to rename. One that starts late finds some of its work done.
        """
        say, ranks, parts = self._context.say, self._ranks, self._parts
        left, said, num_taken = list(self._plan.wanted), time.monotonic(), 0
        while True:
            # Looked at before the parts: a rank that ends in between has written its views.
            busy = _ranks_at_work(parts.directory, ranks.rank)
            left = [view for view in left if parts.read(view) is None]
            abandoned = [view for view in left if view % ranks.world_size not in busy]
            if abandoned:
                self._label(abandoned[0])
                num_taken += 1
            elif not busy:
                break
            else:
                time.sleep(SECONDS_BETWEEN_LOOKS)
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                say(f"{len(left)} views to go; ranks at work besides this one: {sorted(busy) or 'none'}")
                said = time.monotonic()
        if num_taken:
            say(f"labelled {num_taken} views of ranks that were not at work")

    def seal(self, *, is_slice: bool) -> None:
        """Seal the finished views into one file, unless a slice has left some before them to other runs."""
        from pipeline.labels.replay import make_canaries
        from stages.shared.labelling import label_clean

        context, plan, parts = self._context, self._plan, self._parts
        count = plan.wanted.stop
        if is_slice:
            while parts.read(count) is not None:  # other slices may have got ahead
                count += 1
            if gaps := parts.missing(count):
                missing = f"the views {slices(gaps)} are missing; label them with --views"
                context.say(f"{plan.path}: not sealed yet, {missing}")
                return
        clean = label_clean(context, plan.dataset, self._teacher)
        seal(plan.path, parts=parts, count=count, clean=clean, canaries=make_canaries(self._views, count))
        what = f"{count} views of {len(plan.dataset.train)} images, {options.kept_name(parts.topk)}"
        context.say(f"{plan.path}: {what}, sealed")
        context.changed(f"label@{self._view_recipe}")

    def _label(self, view: int) -> None:
        """Label a view whole, or not at all.

        Raises:
            Interrupted: A signal came, or the time limit has been reached; this view is saved.
        """
        from pipeline.labels.teacher import label_view

        with self._context.stop.deferred():
            self._parts.write(view, label_view(self._teacher, self._views, view, self._parts.topk))
            code = self._context.stop.after_step()
        if code:
            raise stopped(code, f"after view {view}")
