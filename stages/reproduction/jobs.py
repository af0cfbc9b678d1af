"""The jobs of which `pipeline reproduce` makes up its plan, each a call of the stage that does it.

A job tells whether it is done by the rules of its stage. Labels and students stay with the teacher that they were made
with: a selection is replaced only while no labels follow from it; and where labels lie here whose teacher, too large to
come along, was trained elsewhere, that teacher counts as trained and selected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError
from pipeline.system.storage import read_json
from pipeline.training.checkpoints import RunState, read_meta
from stages.distill import distill, plan_student
from stages.label import label, plan_labels
from stages.reproduction.standing_labels import any_labels, labels_of, selected
from stages.selection import compare, select
from stages.shared.context import Context
from stages.shared.runs import NOT_TRAINED, Run
from stages.shared.teacher_labels import Distillation
from stages.teacher import plan_teacher, teacher_recipe, train_teacher
from stages.teacher_select import sweep_settings


class State(NamedTuple):
    """How far a job is.

    Attributes:
        text: In a few words.
        is_done: Whether nothing is left to do.
    """

    text: str
    is_done: bool = False


DONE = State("done", is_done=True)
ELSEWHERE = State("done elsewhere; its labels are here", is_done=True)


@dataclass(frozen=True)
class Job(ABC):
    """A part of the plan.

    Attributes:
        recipe: The recipe it belongs to.
        after: Jobs of whose outcome it makes use: it is left out where one of them fails.
    """

    recipe: str
    after: tuple[Job, ...] = ()

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is, in a few words."""

    @abstractmethod
    def state(self, context: Context) -> State:
        """Tell how far it is; the data are there, and what it comes after is done.

        Raises:
            DataError: It cannot be done.
        """

    @abstractmethod
    def run(self, context: Context) -> None:
        """Do it, or go on with it, on every rank."""

    def output(self, context: Context) -> Path | None:
        """Return the directory of the finished run that it left; None where it leaves none."""
        return None


@dataclass(frozen=True)
class TeacherJob(Job):
    """Train a teacher.

    Attributes:
        name: Of the teacher; None is the selected one.
        optimizer: In place of the recipe's (Figure 5); None is the recipe's.
    """

    name: str | None = None
    optimizer: str | None = None

    @property
    def title(self) -> str:
        """The teacher, and its optimiser."""
        name = self.name or "the selected one"
        return f"teacher {name}" + (f" with {self.optimizer}" if self.optimizer else "")

    def state(self, context: Context) -> State:
        """As of its run."""
        name = self._teacher(context)
        if not self._settings(context) and read_meta(context.paths.teacher(name)) is None:
            cache = any_labels(context)
            if cache is not None and cache.provenance["teacher"] == name:
                return ELSEWHERE
        return _state_of(self._plan(context))

    def run(self, context: Context) -> None:
        """Train it."""
        train_teacher(context, self._teacher(context), settings=self._settings(context))

    def output(self, context: Context) -> Path | None:
        """Its run's; None where it was trained elsewhere."""
        out = self._plan(context).out
        return out if read_meta(out) is not None else None

    def _plan(self, context: Context) -> Run:
        return plan_teacher(context, self._teacher(context), settings=self._settings(context))

    def _teacher(self, context: Context) -> str:
        return self.name or selected(context)

    def _settings(self, context: Context) -> dict[str, str]:
        if self.optimizer is None:
            return {}
        return sweep_settings(teacher_recipe(context.recipe, self._teacher(context)), self.optimizer)


@dataclass(frozen=True)
class SelectJob(Job):
    """Select the best of those candidates that are trained.

    Attributes:
        names: The candidates.
    """

    names: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The candidates."""
        return "selection " + (f"of {self.names[0]}" if len(self.names) == 1 else f"from {len(self.names)} teachers")

    def state(self, context: Context) -> State:
        """Done where the best is selected already, or where labels hold on to another."""
        paths, cache = context.paths, any_labels(context)
        maker = None if cache is None else str(cache.provenance["teacher"])
        own = None if maker is None else read_meta(paths.teacher(maker))
        if cache is not None and own is None:
            return ELSEWHERE
        names = self._trained(context)
        if not names:
            return State("runs, once one of them is trained")
        comparison = compare(context, names)
        best = comparison["winner"]
        is_kept = cache is not None and own is not None and own["sha256"] == cache.provenance["checkpoint_sha256"]
        if is_kept and best != maker:
            text = f"done: {best} has the highest {comparison['by']}; labels and students stay with {maker}'s"
            return State(text, is_done=True)
        chosen, trained = read_meta(paths.winner), read_meta(paths.teacher(best))
        if chosen is None or trained is None or chosen["sha256"] != trained["sha256"]:
            return State("runs")
        former = read_json(paths.selection) if paths.selection.is_file() else {}
        compared = former.get("candidates", [])
        stands = former.get("winner") == best and all(each in compared for each in comparison["candidates"])
        return DONE if stands else State("runs")

    def run(self, context: Context) -> None:
        """Select."""
        with context.joined() as group:
            found: dict[str, Any] = group.on_main(lambda: self._select(context))
        context.say(f"selected {found['winner']} by {found['by']}")

    def _select(self, context: Context) -> dict[str, Any]:
        names = self._trained(context)
        if not names:
            raise DataError(f"none of {', '.join(self.names)} is trained")
        return select(context, names)

    def _trained(self, context: Context) -> tuple[str, ...]:
        return tuple(name for name in self.names if plan_teacher(context, name).why_stale() is None)


@dataclass(frozen=True)
class LabelJob(Job):
    """Label a view recipe's views with the selected teacher.

    Attributes:
        views: The view recipe.
    """

    views: str = "default"

    @property
    def title(self) -> str:
        """The view recipe."""
        return f"labels of the views {self.views}"

    def state(self, context: Context) -> State:
        """Done where every view is labelled and sealed."""
        count, cache = context.recipe.views[self.views].count, labels_of(context, self.views)
        if cache is not None and cache.num_views >= count and cache.topk >= context.recipe.label.topk:
            return DONE
        missing = len(plan_labels(context, self.views).missing)
        return State(f"runs: {missing} of {count} views" if missing else "runs: seals them")

    def run(self, context: Context) -> None:
        """Label; each rank its own views."""
        label(context, self.views)


@dataclass(frozen=True)
class StudentJob(Job):
    """Train a student.

    Attributes:
        name: Of the student.
        seed: Of initialisation and order.
        labels: `cached`, `none` or `online`, as for `distill`.
        num_views: Views that it trains on; None is the recipe's number.
    """

    name: str = ""
    seed: int = 0
    labels: str = "cached"
    num_views: int | None = None

    @property
    def title(self) -> str:
        """The student, and what is special about it."""
        parts = [f"student {self.name}"]
        parts += [f"labels {self.labels}"] if self.labels != "cached" else []
        parts += [f"{self.num_views} view{'s' if self.num_views > 1 else ''}"] if self.num_views is not None else []
        return ", ".join([*parts, f"seed {self.seed}"])

    def state(self, context: Context) -> State:
        """As of its run."""
        return _state_of(self._plan(context))

    def run(self, context: Context) -> None:
        """Train it."""
        asked = self._asked(context)
        distill(context, self.name, labels=self.labels, teacher=asked, num_views=self.num_views, seed=self.seed)

    def output(self, context: Context) -> Path | None:
        """Its run's."""
        return self._plan(context).out

    def _plan(self, context: Context) -> Run:
        how = Distillation(labels=self.labels, teacher=self._asked(context), num_views=self.num_views)
        return plan_student(context, self.name, how, seed=self.seed)[0]

    def _asked(self, context: Context) -> Path | None:
        """Return the teacher that is asked online, if one is."""
        if self.labels != "online":
            return None
        if read_meta(context.paths.winner) is None:
            raise DataError(f"{context.paths.winner}: no teacher is here, which labels online need")
        return context.paths.winner


def _state_of(run: Run) -> State:
    """Tell how far a model's training is."""
    why = run.why_stale()
    if why is None:
        return DONE
    saved = RunState(run.work, run.fingerprint).peek()
    if saved is not None:
        return State(f"interrupted in epoch {saved['epoch'] + 1} of {run.recipe.epochs}, step {saved['step']}")
    epochs = f"{run.recipe.epochs} epoch{'s' if run.recipe.epochs > 1 else ''}"
    return State(f"runs: {epochs}" if why == NOT_TRAINED else f"runs: {epochs} ({why})")
