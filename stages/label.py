"""`pipeline label`: label every view of the training set once."""

from __future__ import annotations

import contextlib
import dataclasses
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
from pipeline.labels.cache import RELABEL, LabelCache
from pipeline.labels.parts import LabelParts, seal
from pipeline.report.progress import SECONDS_BETWEEN_LINES, CountWatcher
from pipeline.system.canonical import fingerprint, require_equal
from pipeline.system.stopping import stopped
from pipeline.system.storage import NO_LOCKS_VARIABLE, is_locked, lock, remove_leftovers, uses_locks
from pipeline.system.text import counted
from pipeline.training.checkpoints import read_meta
from stages.shared import kept, options
from stages.shared.context import Context
from stages.shared.paths import label_command, labels_name, relabel
from stages.shared.runs import RESTARTED
from stages.shared.teacher_labels import check_label_name
from stages.shared.trained import SHORT

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.system.runtime import Ranks
    from stages.shared.labellers import Labeller

SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True, kw_only=True)
class LabelRequest:
    """What `label` is asked for; by default every view of the default view recipe that is not labelled yet.

    Attributes:
        view_recipe: Whose views to label.
        teachers: Who labels, see stages.shared.labelling.find_member; several are an ensemble, none is the selected
            teacher. The labels of any other go to a file of their own.
        given: A file of labels that something else has computed, instead.
        label_name: What the file of labels is called that are not the selected teacher's; None names it after the
            teachers.
        fresh: Whether to leave existing labels aside.
        keep: Classes to keep of each sample with their probabilities, K, 0 for the argmax alone; None takes the
            recipe's. A sealed file that keeps more goes on keeping it.
        views: The first view to label and the one behind the last, where None is the recipe's number of views. Such a
            slice is sealed once no view before it is missing, together with the finished views that follow; until then
            its views stay parts. None labels all.
    """

    view_recipe: str = "default"
    teachers: tuple[str, ...] = ()
    given: Path | None = None
    label_name: str | None = None
    fresh: bool = False
    keep: int | None = None
    views: tuple[int, int | None] | None = None

    def check(self, context: Context) -> range:
        """Refuse what `label` cannot do, before any data is looked for, and return the views asked for.

        Raises:
            UsageError: There is no such view recipe or slice; or options do not go together.
            DataError: There is no teacher.
        """
        name, recipe, paths = self.view_recipe, context.recipe, context.paths
        if name not in recipe.views:
            raise UsageError(f"--view-recipe {name}: not in {recipe.name}; choose from {', '.join(recipe.views)}")
        if self.given is not None:
            beside = {"--teacher": self.teachers, "--keep": self.keep is not None, "--views": self.views}
            if refused := [option for option, is_given in beside.items() if is_given]:
                raise UsageError(f"{refused[0]}: --from takes the labels of {self.given} as they are; leave it out")
        if self.label_name is not None:
            check_label_name("--as", self.label_name)
        if self.teachers:
            from stages.shared.labellers import require_teacher

            for what in self.teachers:
                require_teacher(context, what)
        if self.given is None and not self.teachers and not paths.winner.exists():
            raise DataError(
                f"{paths.winner}: no teacher is selected; run `pipeline teacher-select --recipe {recipe.name}`"
            )
        start, end = self.views or (0, None)
        count = recipe.views[name].count
        stop = count if end is None else end
        if not start < stop <= MAX_VIEWS:
            until = f"{count}, recipes.{recipe.name}.views.{name}.count" if end is None else f"{stop}"
            raise UsageError(
                f"--views: the slice from {start} to {until} holds no view, or one beyond {MAX_VIEWS}; "
                "write A:B with A < B"
            )
        if self.fresh and (context.ranks.world_size > 1 or self.views is not None):
            why = "under torchrun, whose ranks would" if self.views is None else "with --views, whose slices would"
            other = self.label_name or ("NAME" if self.teachers or self.given else None)
            files = f"{paths.labels(name, other)} and {paths.kept}/label@{labels_name(name, other)}.json"
            raise UsageError(f"--fresh: not {why} delete each other's work; delete {files} first")
        return range(start, stop)


@click.command("label")
@options.recipe_option
@options.device_option
@click.option("--view-recipe", default="default", show_default=True, help="A view recipe of the recipe.")
@click.option(
    "--teacher", "teachers", multiple=True, type=options.TEACHER, metavar="WHAT",
    help="A teacher of the recipe, a checkpoint, a model as timm/NAME or FILE.py:FUNCTION, or MODEL=FILE for a state "
    "dict; default: the selected teacher. Several make an ensemble.",
)  # fmt: skip
@click.option(
    "--from", "given", type=options.EXISTING, metavar="FILE",
    help="Take the labels that something else has computed from this .npy or .npz file.",
)  # fmt: skip
@click.option(
    "--as", "label_name", metavar="NAME",
    help="The name of labels that are not the selected teacher's; default: that of their teacher, or given.",
)  # fmt: skip
@click.option("--fresh", is_flag=True, help="Label every view again.")
@click.option(
    "--keep", type=options.parse_keep, metavar="argmax|topk=K",
    help="Keep the K most probable classes too; default: the recipe's.",
)  # fmt: skip
@click.option(
    "--views", type=options.parse_views, metavar="A:B",
    help="Label only the views A to B - 1; :B starts at 0, A: ends at the last.",
)  # fmt: skip
@options.time_limit_option
@options.dry_run_option
def command(recipe: str | None, device: str | None, dry_run: bool, **asked: Any) -> None:
    """Label every view of the training set with a teacher."""
    context, request = options.open_context(recipe, device), LabelRequest(**asked)
    if dry_run:
        context.say(plan_labels(context, request).text)
        return
    label(context, request)
    context.end()


@dataclass(frozen=True)
class LabelPlan:
    """What labelling a view recipe takes.

    Attributes:
        path: The sealed file, which may not exist yet.
        asked: The views asked for.
        missing: Those of them still to be labelled, ascending.
        parts: The views labelled so far.
        cache: The sealed file that the run extends; None without one that it can.
        target: Who labels what.
        fresh: Whether to delete the parts first.
        goes_on: Whether a run with --fresh was interrupted, which goes on although the sealed file stands.
        result: The sealed file as it is kept; what is put back holds more views than the one that is there.
    """

    path: Path
    asked: range
    missing: list[int]
    parts: LabelParts
    cache: LabelCache | None
    target: LabelTarget
    fresh: bool
    goes_on: bool
    result: kept.Result

    @property
    def is_up_to_date(self) -> bool:
        """Whether the sealed file has every view asked for."""
        return self.cache is not None and self.cache.num_views >= self.asked.stop

    @property
    def text(self) -> str:
        """The plan in one line."""
        if self.cache is not None and self.is_up_to_date:
            return f"{self.path}: up to date, {counted(self.cache.num_views, 'view')}"
        if not (self.fresh or self.goes_on) and (second := kept.find(self.result)) is not None:
            return f"{self.path}: put back what was finished on {second.when}"
        if not self.missing:
            return f"{self.path}: every view is labelled; seals them"
        is_first = len(self.missing) == len(self.asked)
        why = "no labels yet" if is_first else "the others are labelled"
        if self.fresh or self.goes_on:
            why = "--fresh" if self.fresh else RESTARTED
        what = f"the views {slices(self.missing)} of {len(self.target.dataset.train)} images"
        return f"{self.path}: label {what}, {options.kept_name(self.parts.topk)}, {self.target.how} ({why})"


@dataclass(frozen=True)
class LabelTarget:
    """Who labels what, and what the file is called.

    Attributes:
        dataset: The data set whose training images are labelled.
        labeller: Who labels.
        how: How, in a few words.
        views: The views asked for.
        path: The sealed file.
        name: Its name without suffix, which parts and locks share.
        is_selected: Whether the labels are the selected teacher's, which students take unless they are told others.
    """

    dataset: Dataset
    labeller: Labeller
    how: str
    views: range
    path: Path
    name: str
    is_selected: bool

    @classmethod
    def find(cls, context: Context, request: LabelRequest) -> LabelTarget:
        """Look for the data and the teacher of a request."""
        from stages.shared.labellers import GivenLabeller, read_labeller

        views, paths = request.check(context), context.paths
        dataset = context.dataset()
        labeller = read_labeller(context, dataset, request.teachers, request.given)
        if isinstance(labeller, GivenLabeller):
            views, count = range(labeller.given.num_views), context.recipe.views[request.view_recipe].count
            if len(views) != count:
                where = f"recipes.{context.recipe.name}.views.{request.view_recipe}.count"
                context.say(f"{request.given}: {counted(len(views), 'view')}, the recipe asks for {count} ({where})")
        selected = read_meta(paths.winner)
        is_selected = request.label_name is None and selected is not None and labeller.is_of(selected)
        teacher = None if is_selected else request.label_name or labeller.title
        if teacher is not None:
            check_label_name("--as" if request.label_name else "the name of the teacher", teacher)
        path, name = paths.labels(request.view_recipe, teacher), labels_name(request.view_recipe, teacher)
        return cls(dataset, labeller, labeller.how(context), views, path, name, is_selected)


def plan_labels(context: Context, request: LabelRequest, target: LabelTarget | None = None) -> LabelPlan:
    """Return what `label` would do, and write nothing; the errors are the same, but that pixels are not looked at."""
    from stages.shared.labelling import identity_of

    target = target or LabelTarget.find(context, request)
    dataset, labeller, path, views, fresh = target.dataset, target.labeller, target.path, target.views, request.fresh
    identity, inode = identity_of(dataset, context.recipe.views[request.view_recipe]), _inode(path)

    def parts_beside(cache: LabelCache | None) -> LabelParts:
        topk = _topk(context, target, cache, request.keep) if labeller.topk is None else labeller.topk
        work = context.paths.work("labels", target.name)
        return LabelParts(work, identity=identity, provenance=labeller.provenance(context, topk))

    parts = parts_beside(None)
    goes_on = not fresh and parts.are_fresh
    cache = None if fresh or goes_on else _reusable_cache(context, target, identity)
    if cache is not None:
        parts = parts_beside(cache)
    missing = list(views) if fresh else parts.missing(views.stop, views.start)
    # Rank 0 deletes parts only after it has sealed them, so a view that vanished meanwhile is in the new file.
    if not fresh and _inode(path) != inode:
        cache = _reusable_cache(context, target, identity)
    if cache is not None:
        missing = [view for view in missing if view >= cache.num_views]
        if cache.num_views < views.stop:
            parts.adopt(cache, relabel(target.name, given="given" in cache.provenance))
    by = labeller.sha256 if labeller.is_usual else labeller.deciding
    result = kept.Result(
        context.recipe.name, f"label@{target.name}", fingerprint({**identity, "teacher": by}), path, (path,),
        {"topk": parts.topk, "views": 1 if cache is None else cache.num_views + 1},
        project=context.project,
    )  # fmt: skip
    return LabelPlan(path, views, missing, parts, cache, target, fresh, goes_on, result)


def label(context: Context, request: LabelRequest) -> Path:
    """Label the views of a view recipe that are not labelled yet, and seal them into one file.

    Under torchrun, or wherever RANK and WORLD_SIZE are set, rank r of W labels the views v with v mod W = r. Rank 0
    then labels what ranks that are not at work have left, waits for those that are, and seals: it ends whatever
    becomes of the others. Any number of ranks can go on with a run that was killed; the file is the same.

    Returns:
        The sealed file; it is not there yet where a slice left views before it to other runs.

    Raises:
        UsageError: See `LabelRequest.check`; or there are fewer classes than are to be kept.
        DataError: There is no teacher; the sealed file keeps less than is asked for; views are to be added to labels
            that another precision, device or version made; or a file of that name is another teacher's.
    """
    ranks = context.ranks
    if ranks.world_size > 1 and not uses_locks():
        raise UsageError(
            f"{NO_LOCKS_VARIABLE}=1: ranks know by their locks who is at work; start without torchrun, or label slices "
            "with --views"
        )
    target = LabelTarget.find(context, request)  # before a lock is written
    with lock(context.paths.work("labels", f"{target.name}-{ranks.rank}.lock")):
        plan = plan_labels(context, request, target)
        if not (request.fresh or plan.goes_on or plan.is_up_to_date) and kept.put_back(context, plan.result):
            plan = plan_labels(context, request, target)
        if plan.is_up_to_date:
            kept.say_if_older(context, dataclasses.replace(plan.result, amounts={}))
            _clean_up(plan, ranks)
            context.say(f"{plan.text}; --fresh labels them again")
            return plan.path
        if request.fresh:
            plan.parts.begin_anew() if plan.path.exists() else plan.parts.delete()
        if plan.missing and (code := context.stop.before_step()):
            raise stopped(code, f"before the labels of {target.name}")
        labelling = _Labelling(context, request, plan)
        labelling.label_share()
        if ranks.is_main:
            labelling.label_for_others()
            labelling.seal()
    return plan.path


def _reusable_cache(context: Context, target: LabelTarget, identity: Mapping[str, Any]) -> LabelCache | None:
    """Open the sealed file if it is of this data, view recipe and teacher; else say that it will be replaced.

    Raises:
        DataError: It has a name of its own, and another teacher's labels of the same views.
    """
    from stages.shared.labellers import what_decides

    path, expected = target.path, target.labeller.deciding
    if not path.exists():
        return None
    try:
        cache = LabelCache.open(path, expected_identity=identity)
        actual = what_decides(cache.provenance)
        require_equal(f"{path}", {key: actual[key] for key in expected}, expected, RELABEL)
        return cache
    except DataError as error:
        if not target.is_selected:
            _refuse_anothers(path, identity)
        context.say(f"labelling every view again: {error}")
        return None


def _refuse_anothers(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to replace whole labels of the same views by another teacher, whose name is a new one's too."""
    with contextlib.suppress(DataError):
        provenance = LabelCache.open(path, expected_identity=identity).provenance
        by = f"{provenance['teacher']} (SHA-256 {provenance['checkpoint_sha256'][:SHORT]}...)"
        raise UsageError(f"{path}: labels by {by} have this name; choose another with --as, or replace them by --fresh")


def _topk(context: Context, target: LabelTarget, cache: LabelCache | None, keep: int | None) -> int:
    """Return how many classes to keep of each sample, K; 0 for the argmax alone.

    A sealed file that the run extends never loses what it keeps. Without `keep` the recipe decides.

    Raises:
        UsageError: There are fewer classes.
        DataError: The sealed file keeps fewer.
    """
    recipe, num_classes = context.recipe, target.dataset.num_classes
    asked, key = (recipe.label.topk, f"recipes.{recipe.name}.label.topk") if keep is None else (keep, "--keep")
    if asked > num_classes:
        raise UsageError(f"{key}: topk={asked}, but the data set has {num_classes} classes; keep at most that many")
    if cache is None or cache.topk == asked:
        return asked
    kept, name = f"{target.path}: keeps {options.kept_name(cache.topk)}", options.kept_name(asked)
    if cache.topk < asked:
        option = "" if keep is None else f" --keep {name}"
        command = label_command(target.name, f"{option} --fresh")
        raise DataError(f"{kept}, {key} asks for {name}; {command} labels every view again")
    context.say(f"{kept} and goes on with it; {name} was asked for")
    return cache.topk


def slices(views: Sequence[int]) -> str:
    """Write ascending views as --views takes them: `0:4, 7:8`."""
    groups = itertools.groupby(enumerate(views), key=lambda pair: pair[1] - pair[0])
    runs = [[view for _, view in group] for _, group in groups]
    return ", ".join(f"{run[0]}:{run[-1] + 1}" for run in runs)


def _inode(path: Path) -> int | None:
    """Return what tells a file from its replacement; None if it does not exist."""
    return path.stat().st_ino if path.exists() else None


def _clean_up(plan: LabelPlan, ranks: Ranks) -> None:
    """Delete the parts and temporary files of a run that was killed after it had sealed the file."""
    assert plan.cache is not None
    if ranks.is_main and not _ranks_at_work(plan.parts.directory, ranks.rank):
        remove_leftovers(plan.path)
        plan.parts.delete(below=plan.cache.num_views)


def _ranks_at_work(work: Path, this: int) -> set[int]:
    """Return the other ranks that hold their lock, beside the directory of the parts.

    Some may be left of an earlier group: without torchrun nobody ends them when rank 0 dies.
    """
    name = re.compile(re.escape(work.name) + r"-(\d+)\.lock")
    locks = {int(match[1]): file for file in work.parent.iterdir() if (match := name.fullmatch(file.name))}
    return {rank for rank, file in locks.items() if rank != this and is_locked(file)}


class _Labelling:
    """A plan carried out by one rank, which holds its lock."""

    def __init__(self, context: Context, request: LabelRequest, plan: LabelPlan) -> None:
        from stages.shared.fitting import make_views

        self._context, self._request, self._plan = context, request, plan
        self._parts, self._ranks = plan.parts, context.ranks
        self._views = make_views(context, plan.target.dataset, request.view_recipe)
        self._mind_pixels()
        self._source = plan.target.labeller.open(context, self._views)

    def _mind_pixels(self) -> None:
        """Refuse to add views to a file of other pixels, and count parts of such as missing.

        The sealed file's digests of pixels are made at the end, for all of its views.

        Raises:
            DataError: Today's views are not those that were labelled.
        """
        from pipeline.labels.replay import check_canaries, make_canaries, other_pixels

        plan, [first] = self._plan, make_canaries(self._views, 1)
        if plan.cache is not None and (view := check_canaries(plan.cache, self._views)) is not None:
            way_out = relabel(plan.target.name, given="given" in plan.cache.provenance)
            raise DataError(f"{plan.path}: {other_pixels(plan.cache, view)}; {way_out}")
        self._parts.pixels = bytes.fromhex(first.sha256)
        unsealed = range(max(plan.asked.start, self._parts.num_sealed), plan.asked.stop)
        self._plan = dataclasses.replace(plan, missing=sorted({*plan.missing, *self._parts.invalid(unsealed)}))

    def label_share(self) -> None:
        """Label this rank's share of the missing views and show the progress."""
        context, ranks, parts = self._context, self._ranks, self._parts
        mine = [view for view in self._plan.missing if view % ranks.world_size == ranks.rank]
        if num_invalid := len(parts.invalid(mine)):
            found = f"{counted(num_invalid, 'finished view')} {'is' if num_invalid == 1 else 'are'} damaged"
            what = "or of another teacher, precision, device, version or --keep, or of other pixels; labelling again"
            context.say(f"{parts.directory}: {found}, {what}")
        console = context.console if ranks.is_main else None
        images = "images", self._views.num_samples
        with CountWatcher(
            console, context.say, "labelling views", "labelled", "views", len(mine), rate=images, ends=True
        ) as shown:
            for view in mine:
                self._label(view)
                shown.advance()

    def label_for_others(self) -> None:
        """Label the views of ranks that are not at work, until every view is labelled and no other rank is at work.

        So rank 0 never waits for a rank that died, failed, or wrote parts that rank 0 cannot use, made with other
        libraries, and never deletes a file that another rank is about to rename.
        """
        say, ranks, parts = self._context.say, self._ranks, self._parts
        left, said, num_taken = list(self._plan.asked), time.monotonic(), 0
        while True:
            # Before the parts are read: a rank that ends in between has written its views.
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
                say(f"{counted(len(left), 'view')} to go; ranks at work besides this one: {sorted(busy) or 'none'}")
                said = time.monotonic()
        if num_taken:
            say(f"labelled {counted(num_taken, 'view')} of ranks that were not at work")

    def seal(self) -> None:
        """Seal the finished views into one file, unless a slice left views before them to other runs."""
        from pipeline.labels.replay import make_canaries
        from stages.shared.labelling import accuracy_of

        context, plan, parts, target = self._context, self._plan, self._parts, self._plan.target
        count = plan.asked.stop
        if self._request.views is not None:
            while parts.read(count) is not None:  # other slices may have got ahead
                count += 1
            if gaps := parts.missing(count):
                missing = f"the views {slices(gaps)} are missing; label them with --views"
                context.say(f"{plan.path}: not sealed yet, {missing}")
                return
        clean = self._source.clean()
        canaries = make_canaries(self._views, count)
        is_usual = target.is_selected and target.labeller.is_usual
        accuracy = None if is_usual else accuracy_of(clean, target.dataset)
        with context.stop.deferred():
            seal(plan.path, parts=parts, count=count, clean=clean, canaries=canaries, accuracy=accuracy)
            kept.keep(context, dataclasses.replace(plan.result, amounts={"topk": parts.topk, "views": count}))
        what = f"{counted(count, 'view')} of {counted(len(target.dataset.train), 'image')}"
        context.say(f"{plan.path}: {what}, {options.kept_name(parts.topk)}, sealed")
        if accuracy:
            scores = ", ".join(f"{value:.2f} % of {split}" for split, value in sorted(accuracy.items()))
            context.say(f"{plan.path}: right on {scores}, unaugmented")
        context.changed(plan.result.stage)

    def _label(self, view: int) -> None:
        """Label a view completely or not at all.

        Raises:
            Interrupted: A signal came, or the time limit has been reached; this view is saved.
        """
        with self._context.stop.deferred():
            self._parts.write(view, self._source.view(view, self._parts.topk))
            code = self._context.stop.after_step()
        if code:
            raise stopped(code, f"after view {view}")
