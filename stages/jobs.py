"""Jobs: the trainings, selections and labellings of a command, each a call of the command that does it.

`reproduce` and `teacher-select` do them; `--dry-run` and `doctor` show their states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.recipes import TeacherRecipe
from pipeline.errors import DataError, StorageError, UsageError
from pipeline.labels.cache import LabelCache
from pipeline.system.canonical import is_whole
from pipeline.system.storage import read_json
from pipeline.system.text import counted
from pipeline.training.checkpoints import read_meta
from pipeline.training.manifest import check_all
from stages.distill import distill, plan_student
from stages.label import LabelRequest, label, plan_labels
from stages.selection import compare, select
from stages.shared.context import Context
from stages.shared.runs import Run, State
from stages.shared.teacher_labels import Distillation, open_labels
from stages.teacher import plan_teacher, teacher_recipe, train_teacher

ENSEMBLE = "ensemble"
"""The name of the label file of a LabelJob's ensemble."""
ELSEWHERE = State("done elsewhere; its labels are here", is_done=True)
# Rates for Figure 5 where an optimiser is not the recipe's; the paper gives one rate, SGD's.
# Differs: Adam and RMSprop learn nothing at 0.1, so each gets a customary rate.
SWEEP_RATES = {"sgd": "0.1", "adam": "0.001", "adamw": "0.001", "rmsprop": "0.0001"}
# AdamW takes some hundred times as much weight decay as optimisers that add it to the gradient: theirs is the paper's.
SWEEP_DECAYS = {"sgd": "0.0001", "adam": "0.0001", "adamw": "0.05", "rmsprop": "0.0001"}


@dataclass(frozen=True)
class Job(ABC):
    """A piece of work that a command does.

    Attributes:
        recipe: Its recipe.
        after: Jobs whose results it needs; it is left out if one of them fails.
    """

    recipe: str
    after: tuple[Job, ...] = ()

    @property
    @abstractmethod
    def title(self) -> str:
        """Its name for people."""

    @abstractmethod
    def amount(self, context: Context) -> str:
        """Say how much work it is from the beginning."""

    @abstractmethod
    def state(self, context: Context, *, fresh: bool = False) -> State:
        """Say what it would do, given that the jobs it comes after are done.

        Args:
            context: Its recipe's context.
            fresh: Whether it would start over.

        Raises:
            DataError: It cannot be done.
        """

    @abstractmethod
    def run(self, context: Context, *, fresh: bool = False) -> None:
        """Do it, or go on with it, on every rank."""

    def epochs_to_train(self, context: Context) -> int:
        """Return how many epochs it trains, counted from the beginning; 0 where it is done or trains nothing."""
        return 0

    def output(self, context: Context) -> Path | None:
        """Return the directory of the finished run that it leaves; None where it leaves none."""
        return None


@dataclass(frozen=True)
class TrainingJob(Job):
    """Train a model."""

    @abstractmethod
    def plan(self, context: Context) -> Run:
        """Return the run; the errors are those of the command that trains it."""

    @abstractmethod
    def epochs(self, context: Context) -> int:
        """Return the recipe's epochs."""

    def amount(self, context: Context) -> str:
        """Its epochs."""
        return f"train {counted(self.epochs(context), 'epoch')}"

    def state(self, context: Context, *, fresh: bool = False) -> State:
        """See `Run.state`."""
        return self.plan(context).state(fresh=fresh)

    def epochs_to_train(self, context: Context) -> int:
        """Return the recipe's epochs unless it is known to be done."""
        try:
            return 0 if self.state(context).is_done else self.epochs(context)
        except (DataError, StorageError, UsageError):  # told when the job is done
            return self.epochs(context)

    def output(self, context: Context) -> Path | None:
        """Return the run's; None where the model was trained elsewhere."""
        out = self.plan(context).out
        return out if read_meta(out) is not None else None


@dataclass(frozen=True)
class TeacherJob(TrainingJob):
    """Train a teacher.

    Attributes:
        name: The teacher; None is the selected one.
        optimizer: The optimiser, for Figure 5; None is the recipe's.
        keeps: See `SelectJob`; a teacher whose labels are here without it counts as trained.
        settings: Fields of the recipe to replace, as key and text.
    """

    name: str | None = None
    optimizer: str | None = None
    keeps: bool = False
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """The teacher, and its optimiser."""
        name = self.name or "the selected one"
        return f"teacher {name}" + (f" with {self.optimizer}" if self.optimizer else "")

    def epochs(self, context: Context) -> int:
        """Return the recipe's epochs; of a teacher to be selected, the most of any."""
        recipe, names = context.recipe, [self.name] if self.name else context.recipe.teachers
        return max(teacher_recipe(recipe, name, dict(self.settings)).epochs for name in names)

    def state(self, context: Context, *, fresh: bool = False) -> State:
        """See `Run.state`."""
        if not context.paths.is_prepared:
            return State(f"{self.amount(context)} (no data yet)")
        name = self._teacher(context)
        if self.keeps and not self._settings(context) and read_meta(context.paths.teacher(name)) is None:
            cache = any_labels(context)
            if cache is not None and _maker(context, cache) == name:
                return ELSEWHERE
        return super().state(context, fresh=fresh)

    def run(self, context: Context, *, fresh: bool = False) -> None:
        """Train it."""
        train_teacher(context, self._teacher(context), settings=self._settings(context), fresh=fresh)

    def plan(self, context: Context) -> Run:
        """See `plan_teacher`."""
        return plan_teacher(context, self._teacher(context), settings=self._settings(context))

    def _teacher(self, context: Context) -> str:
        return self.name or selected(context)

    def _settings(self, context: Context) -> dict[str, str]:
        if self.optimizer is None:
            return dict(self.settings)
        return sweep_settings(teacher_recipe(context.recipe, self._teacher(context)), self.optimizer)


@dataclass(frozen=True)
class SelectJob(Job):
    """Select the best of those candidates that are trained.

    Attributes:
        names: The candidates.
        keeps: Whether labels and students that are here stay with the teacher that made the labels: no other teacher
            replaces it, and where its checkpoint, too large to be copied along, is not here, it counts as selected.
        settings: What the candidates' runs replace in their recipes, as key and text.
    """

    names: tuple[str, ...] = ()
    keeps: bool = False
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """The candidates."""
        return "selection " + (f"of {self.names[0]}" if len(self.names) == 1 else f"from {len(self.names)} teachers")

    def amount(self, context: Context) -> str:
        """The score that decides."""
        return f"select by {context.recipe.select.by}"

    def state(self, context: Context, *, fresh: bool = False) -> State:
        """Return that it is done if the best candidate is selected, or the selected one stays."""
        if not context.paths.is_prepared:
            return State(f"{self.amount(context)} (no data yet)")
        paths, cache = context.paths, any_labels(context) if self.keeps else None
        maker = None if cache is None else _maker(context, cache)
        makers = None if maker is None else read_meta(paths.teacher(maker))
        if cache is not None and makers is None:
            return ELSEWHERE
        names = self._trained(context)
        if not names:
            return State(f"{self.amount(context)}, once a candidate is trained")
        outs = self._outs(context)
        comparison = compare(context, names, outs)
        best = comparison["winner"]
        is_kept = cache is not None and makers is not None and makers["sha256"] == cache.provenance["checkpoint_sha256"]
        if is_kept and best != maker:
            text = f"done: {best} has the highest {comparison['by']}; labels and students stay with {maker}'s"
            return State(text, is_done=True)
        trained = read_meta(outs[best])
        try:
            chosen = read_meta(paths.winner)
            check_all(paths.winner)
            former = read_json(paths.selection) if paths.selection.is_file() else {}
        except DataError:  # selecting again makes them whole
            return State(self.amount(context))
        if chosen is None or trained is None or chosen["sha256"] != trained["sha256"]:
            return State(self.amount(context))
        compared = former.get("candidates", []) if is_whole(former) else []
        is_same = former.get("winner") == best and all(row in compared for row in comparison["candidates"])
        return State(f"{best} is selected", is_done=True) if is_same else State(self.amount(context))

    def run(self, context: Context, *, fresh: bool = False) -> None:
        """Select."""

        def select_trained() -> dict[str, Any]:
            if names := self._trained(context):
                return select(context, names, self._outs(context))
            raise DataError(f"none of {', '.join(self.names)} is trained")

        with context.joined() as group:
            comparison: dict[str, Any] = group.on_main(select_trained)
        context.say(f"selected {comparison['winner']} by {comparison['by']}")

    def _trained(self, context: Context) -> tuple[str, ...]:
        return tuple(name for name in self.names if self._run(context, name).why_stale() is None)

    def _outs(self, context: Context) -> dict[str, Path]:
        return {name: self._run(context, name).out for name in self.names}

    def _run(self, context: Context, name: str) -> Run:
        return plan_teacher(context, name, settings=dict(self.settings))


@dataclass(frozen=True)
class LabelJob(Job):
    """Label a view recipe's views with the selected teacher, or with an ensemble.

    Attributes:
        views: The view recipe.
        ensemble: The teachers of an ensemble, whose labels go to a file named ENSEMBLE; none is the selected teacher.
    """

    views: str = "default"
    ensemble: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The view recipe, and who labels it if that is an ensemble."""
        return f"labels of the views {self.views}" + (f" by {' and '.join(self.ensemble)}" if self.ensemble else "")

    def amount(self, context: Context) -> str:
        """Its views."""
        return f"label {counted(context.recipe.views[self.views].count, 'view')}"

    def state(self, context: Context, *, fresh: bool = False) -> State:
        """Return that it is done if every view is labelled and sealed."""
        if self.ensemble:
            plan = plan_labels(context, self._request(fresh=fresh))
            return State(plan.text, is_done=plan.is_up_to_date and not fresh)
        count, cache = context.recipe.views[self.views].count, None if fresh else labels_of(context, self.views)
        if cache is not None and cache.num_views >= count and cache.topk >= context.recipe.label.topk:
            what = f"up to date, {counted(cache.num_views, 'view')}"
            return State(f"{context.paths.labels(self.views)}: {what}", is_done=True)
        return State(plan_labels(context, self._request(fresh=fresh)).text)

    def run(self, context: Context, *, fresh: bool = False) -> None:
        """Label; each rank its own views."""
        label(context, self._request(fresh=fresh))

    def _request(self, *, fresh: bool) -> LabelRequest:
        name = ENSEMBLE if self.ensemble else None
        return LabelRequest(view_recipe=self.views, teachers=self.ensemble, label_name=name, fresh=fresh)


@dataclass(frozen=True)
class StudentJob(TrainingJob):
    """Train a student.

    Attributes:
        name: The student.
        seed: Of initialisation and order.
        labels: `cached`, `none` or `online`, as for `distill`.
        num_views: Views that it trains on; None is the recipe's number.
        teacher_labels: The name of the label file, as for `distill`; None is the selected teacher's.
        settings: Fields of the recipe to replace, as key and text.
    """

    name: str = ""
    seed: int = 0
    labels: str = "cached"
    num_views: int | None = None
    teacher_labels: str | None = None
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """The student, and what differs from the recipe."""
        parts = [f"student {self.name}"]
        parts += [f"labels {self.labels}"] if self.labels != "cached" else []
        parts += [counted(self.num_views, "view")] if self.num_views is not None else []
        parts += [f"labels of {self.teacher_labels}"] if self.teacher_labels is not None else []
        parts += [f"{key} {value}" for key, value in self.settings]
        return ", ".join([*parts, f"seed {self.seed}"])

    def epochs(self, context: Context) -> int:
        """Return the recipe's epochs."""
        return context.recipe.students[self.name].epochs

    def run(self, context: Context, *, fresh: bool = False) -> None:
        """Train it."""
        distill(context, self.name, self._distillation(context), seed=self.seed, fresh=fresh)

    def plan(self, context: Context) -> Run:
        """See `plan_student`."""
        return plan_student(context, self.name, self._distillation(context), seed=self.seed)[0]

    def _distillation(self, context: Context) -> Distillation:
        teacher = context.paths.winner if self.labels == "online" else None
        if teacher is not None and read_meta(teacher) is None:
            raise DataError(f"{teacher}: no teacher is here, which labels online need")
        return Distillation(
            labels=self.labels,
            teacher=teacher,
            num_views=self.num_views,
            teacher_labels=self.teacher_labels,
            settings=dict(self.settings),
        )


def stage_one(context: Context, names: Sequence[str], settings: Mapping[str, str] | None = None) -> list[Job]:
    """Return the jobs of `teacher-select`: train every candidate, select, label.

    Args:
        context: The recipe's context.
        names: The candidates.
        settings: Fields of their recipes to replace.
    """
    recipe, pairs = context.recipe.name, tuple((settings or {}).items())
    teachers = tuple(TeacherJob(recipe=recipe, name=name, settings=pairs) for name in names)
    selection = SelectJob(recipe=recipe, after=teachers, names=tuple(names), settings=pairs)
    views = context.params.labelled(context.recipe)
    labels = [LabelJob(recipe=recipe, after=(selection,), views=name) for name in views]
    return [*teachers, selection, *labels]


def whole_run(context: Context) -> list[Job]:
    """Return the jobs of `dvc repro` on a recipe, as far as it has the views and students that params.yaml lists."""
    recipe, jobs = context.recipe, stage_one(context, context.params.candidates(context.recipe))
    selection = next(job for job in jobs if isinstance(job, SelectJob))
    for name in context.params.students:
        if name in recipe.students:
            labels = LabelJob(recipe=recipe.name, after=(selection,), views=recipe.students[name].views)
            jobs.append(StudentJob(recipe=recipe.name, after=(labels,), name=name))
    return jobs


def survey(
    jobs: Iterable[Job], contexts: Mapping[str, Context], *, fresh: bool = False
) -> Iterator[tuple[Job, State | DataError]]:
    """Yield each job with its state, or with the error for which it cannot be done; nothing is written.

    Args:
        jobs: In their order.
        contexts: By the jobs' recipes.
        fresh: Whether they would start over.
    """
    done: set[Job] = set()
    for job in jobs:
        context = contexts[job.recipe]
        if missing := next((former for former in job.after if former not in done), None):
            yield job, State(f"{job.amount(context)}, after the {missing.title}")
            continue
        try:
            state = job.state(context, fresh=fresh)
        except DataError as error:
            yield job, error
            continue
        if state.is_done:
            done.add(job)
        yield job, state


def sweep_settings(teacher: TeacherRecipe, optimizer: str) -> dict[str, str]:
    """Return what Figure 5 replaces in a teacher's recipe for an optimiser; nothing for the recipe's own."""
    if optimizer == teacher.optimizer:
        return {}
    settings = {"optimizer": optimizer, "lr": SWEEP_RATES[optimizer]}
    if "adamw" in (optimizer, teacher.optimizer):
        settings["weight_decay"] = SWEEP_DECAYS[optimizer]
    return settings


def labels_of(context: Context, view_recipe: str) -> LabelCache | None:
    """Open a view recipe's labels; None where there are none of these data and views by the selected teacher."""
    if not context.paths.labels(view_recipe).exists():
        return None
    try:
        return open_labels(context.paths, context.recipe, context.dataset(), view_recipe)
    except DataError:
        return None


def any_labels(context: Context) -> LabelCache | None:
    """Open the labels of the first view recipe that has any, see `labels_of`."""
    caches = (labels_of(context, name) for name in context.recipe.views)
    return next((cache for cache in caches if cache is not None), None)


def selected(context: Context) -> str:
    """Return the name of the selected teacher, or of the one that made the labels here.

    Raises:
        DataError: There is none.
    """
    chosen = read_meta(context.paths.winner)
    if chosen is not None:
        return str(chosen.get("metrics", {}).get("name", chosen["model"]))  # older versions knew the eight alone
    cache = any_labels(context)
    if cache is None:
        raise DataError(f"{context.paths.winner}: no teacher is selected")
    return _maker(context, cache)


def _maker(context: Context, cache: LabelCache) -> str:
    """Return the name of the teacher that made labels, by its model; the model where the recipe has none of it."""
    model = str(cache.provenance["teacher"])
    return next((name for name, teacher in context.recipe.teachers.items() if (teacher.model or name) == model), model)
