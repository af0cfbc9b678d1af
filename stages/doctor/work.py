"""What a full run of the recipe still has to do, and on how many images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.recipes import FitRecipe
from pipeline.data.sources import KNOWN_SIZES
from pipeline.training.checkpoints import RunState, read_meta
from stages.distill import plan_student, student_recipe
from stages.doctor.software import FAULTS, OK, PROBLEM, WARNING, Finding
from stages.label import plan_labels
from stages.shared.context import Context
from stages.shared.runs import Run
from stages.teacher import plan_teacher


@dataclass(frozen=True)
class Sizes:
    """How large a data set is.

    Attributes:
        train: Training images.
        evaluation: Images that every epoch is scored on.
        test: Test images.
        total: Of all splits.
        num_classes: K.
        image_size: Side, pixels.
    """

    train: int
    evaluation: int
    test: int
    total: int
    num_classes: int
    image_size: int

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return 3 * self.image_size**2


@dataclass(frozen=True)
class Job:
    """A stage of `dvc repro` that trains or labels.

    Attributes:
        kind: `teacher`, `label` or `student`.
        name: Of the teacher, view recipe or student.
        why: Why there is something to do; None where it is up to date.
        amount: Epochs or views to do.
        recipe: How the model is trained; None for labelling.
        model: The architecture; None where labelling's teacher is not known yet.
    """

    kind: str
    name: str
    why: str | None
    amount: float = 0.0
    recipe: FitRecipe | None = None
    model: str | None = None

    @property
    def stage(self) -> str:
        """As DVC calls it."""
        return f"{self.kind}@{self.name}"


def sizes(context: Context, *, prepared: bool) -> Sizes | None:
    """Return the size of the prepared data, or of the source where that is known."""
    recipe = context.recipe
    if prepared:
        dataset = context.dataset()
        counts = {name: len(split) for name, split in dataset.splits.items()}
        evaluation, total = len(dataset.evaluation[1]), sum(counts.values())
        return Sizes(counts["train"], evaluation, counts["test"], total, dataset.num_classes, dataset.image_size)
    if recipe.dataset.source not in KNOWN_SIZES:
        return None
    train, test, num_classes = KNOWN_SIZES[recipe.dataset.source]
    total = train + test
    test = test or round(train * recipe.dataset.test_fraction)
    train = total - test
    val = round(train * recipe.dataset.val_fraction)
    return Sizes(train - val, val or test, test, total, num_classes, recipe.dataset.image_size)


def work(context: Context, *, prepared: bool) -> tuple[list[Job], list[Finding]]:
    """Return the stages of a full run, in order, and what is wrong with what they start from.

    A student counts as to be done where its labels or teachers are; should the same teacher win again, it is not.
    """
    found: list[Finding] = []
    jobs = [_teacher(context, name, prepared=prepared) for name in context.params.candidates(context.recipe)]
    is_stale = any(job.why for job in jobs)
    labels = [_labels(context, name, found, is_stale=is_stale) for name in _view_recipes(context)]
    is_stale |= any(job.why for job in labels)
    jobs += labels
    jobs += [
        _student(context, name, is_stale=is_stale)
        for name in context.params.students
        if name in context.recipe.students
    ]
    absent = [name for name in context.params.students if name not in context.recipe.students]
    absent += [name for name in context.params.teachers if name not in context.recipe.teachers]
    if absent:
        text = f"params.yaml lists {', '.join(absent)}, not in recipe {context.recipe.name}: `dvc repro` fails on them"
        found.append(
            Finding("data", WARNING, text, "set `teachers` and `students` (dvc exp run -S ...), or use the commands")
        )
    done = sum(job.why is None for job in jobs)
    found.append(Finding("data", OK, f"{done} of {len(jobs)} stages that train or label are up to date"))
    return jobs, found


def _view_recipes(context: Context) -> Iterator[str]:
    return (name for name in context.params.view_recipes if name in context.recipe.views)


def _teacher(context: Context, name: str, *, prepared: bool) -> Job:
    recipe = context.recipe.teachers[name]
    if not prepared:
        return Job("teacher", name, "no data yet", recipe.epochs, recipe, name)
    return _fit("teacher", name, plan_teacher(context, name), name)


def _fit(kind: str, name: str, run: Run, model: str) -> Job:
    why, epochs = run.why_stale(), float(run.recipe.epochs)
    state = RunState(run.work, run.fingerprint).peek() if why else None
    if state is not None:
        why, epochs = f"interrupted in epoch {state['epoch'] + 1}", epochs - state["epoch"]
    return Job(kind, name, why, epochs if why else 0.0, run.recipe, model)


def _labels(context: Context, name: str, found: list[Finding], *, is_stale: bool) -> Job:
    count, winner = context.recipe.views[name].count, read_meta(context.paths.winner)
    if is_stale or winner is None:
        return Job("label", name, "teachers come first" if is_stale else "no teacher is selected", count)
    try:
        plan = plan_labels(context, name)
    except FAULTS as error:
        found.append(Finding("data", PROBLEM, str(error)))
        return Job("label", name, "refused", count, model=str(winner["model"]))
    why = f"{len(plan.missing)} of {count} views are not labelled" if plan.missing else None
    return Job("label", name, why, len(plan.missing), model=str(winner["model"]))


def _student(context: Context, name: str, *, is_stale: bool) -> Job:
    recipe = student_recipe(context.recipe, name, {})
    if is_stale:
        return Job("student", name, "teachers and labels come first", recipe.epochs, recipe, recipe.model)
    try:
        run, _ = plan_student(context, name)
    except FAULTS as error:
        return Job("student", name, str(error), recipe.epochs, recipe, recipe.model)
    return _fit("student", name, run, recipe.model)
