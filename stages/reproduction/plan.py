"""Which jobs a table, a figure, an ablation or everything takes, in the order of their worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.config.params import Params
from pipeline.config.recipes import Recipe
from pipeline.errors import UsageError
from pipeline.models.students import STUDENTS
from pipeline.report import paper
from pipeline.report.paper import FIGURES
from pipeline.report.paper import TEACHER as PAPERS_TEACHER
from stages.reproduction.jobs import Job, LabelJob, SelectJob, StudentJob, TeacherJob

MAIN = "cifar100"
PAPERS = tuple(paper.TABLES)
"""The recipes of the paper, named after their data, in the order of worth."""
OURS = "titn"
NUM_VIEWS = (1, 2, 5)
TABLES = {
    2: MAIN, 6: "cifar10", **{int(name.split()[-1]): recipe for recipe, name in paper.TABLES.items()},
}  # fmt: skip
FIGURES_RECIPES = {4: MAIN, 5: MAIN, **{int(name.split()[-1]): recipe for recipe, name in FIGURES.items()}}
"""Table or figure, then the recipe it is about."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be reproduced; by default everything.

    Attributes:
        table: Of the paper.
        figure: Of the paper.
        ablation: `labels` or `views`.
        recipe: In place of the paper's.
        student: The only one.
        seeds: Of the students.
    """

    table: int | None = None
    figure: int | None = None
    ablation: str | None = None
    recipe: str | None = None
    student: str | None = None
    seeds: Sequence[int] = (0,)

    def check(self) -> None:
        """Refuse what the paper has not.

        Raises:
            UsageError: No such table or figure, or two choices.
        """
        given = {"--table": self.table, "--figure": self.figure, "--ablation": self.ablation}
        chosen = [f"{option} {value}" for option, value in given.items() if value is not None]
        if len(chosen) > 1:
            raise UsageError(f"{' and '.join(chosen)}: give one of them")
        if self.table is not None and self.table not in (1, *TABLES):
            raise UsageError(f"--table {self.table}: the paper has Tables 1 to {max(TABLES)}")
        if self.figure is not None and self.figure not in FIGURES_RECIPES:
            known = ", ".join(map(str, sorted(FIGURES_RECIPES)))
            raise UsageError(f"--figure {self.figure}: those of results are {known}; the paper's others show models")


def plan(params: Params, choice: Choice) -> list[Job]:
    """List the jobs that a choice takes, each once.

    Raises:
        UsageError: A name that does not exist, or a choice without such a student.
    """
    choice.check()
    if choice.table == 1:
        return []
    if choice.ablation is not None:
        jobs = _ablation(params, params.select(choice.recipe or MAIN), choice)
    elif choice.table is not None or choice.figure is not None:
        jobs = _shown(params, choice)
    else:
        jobs = _everything(params, choice)
    found = list(dict.fromkeys(jobs))
    if choice.student is not None and not any(isinstance(job, StudentJob) for job in found):
        raise UsageError(f"--student {choice.student}: what was chosen has no such student; leave one of them out")
    return found


def _everything(params: Params, choice: Choice) -> Iterator[Job]:
    """Yield all of a recipe's jobs, or the whole paper's."""
    recipes = [params.select(name) for name in ((choice.recipe,) if choice.recipe else PAPERS)]
    students = {recipe.name: _students(recipe) for recipe in recipes}
    if choice.student is not None:
        if not any(choice.student in recipe.students for recipe in recipes):
            raise _unknown(choice.student, recipes)
        students = {name: [choice.student] if choice.student in each else [] for name, each in students.items()}
    for recipe in recipes:
        if students[recipe.name] or choice.student is None:
            teachers = _teachers(params, recipe) if choice.student is None else ()
            yield from Chain(params, recipe).jobs(teachers, students[recipe.name], choice.seeds)
    if choice.student is None and recipes[0].name == MAIN:
        yield from Chain(params, recipes[0]).optimizers()


def _shown(params: Params, choice: Choice) -> Iterator[Job]:
    """Yield the jobs of a table or figure."""
    known, number = (TABLES, choice.table) if choice.figure is None else (FIGURES_RECIPES, choice.figure)
    assert number is not None
    recipe = params.select(choice.recipe or known[number])
    chain = Chain(params, recipe)
    if choice.figure == 5:
        yield from chain.optimizers()
    elif (choice.table, choice.figure) in ((2, None), (None, 4)):
        yield from chain.jobs(_teachers(params, recipe, every=True), (), choice.seeds)
    else:
        students = _students(recipe)
        if choice.table == 6:
            students = [name for name in students if name == OURS] or students
        if choice.figure is not None and recipe.name in paper.STUDENTS:
            students = [name for name in students if name in STUDENTS]  # one curve for each architecture
        if choice.student is not None:
            if choice.student not in recipe.students:
                raise _unknown(choice.student, [recipe])
            students = [name for name in students if name == choice.student]
        yield from chain.jobs((), students, choice.seeds)


def _ablation(params: Params, recipe: Recipe, choice: Choice) -> Iterator[Job]:
    """Yield the jobs of an ablation, seed by seed: what was cut off compares as much as there is."""
    name = choice.student or (OURS if OURS in recipe.students else next(iter(recipe.students)))
    if name not in recipe.students:
        raise _unknown(name, [recipe])
    own = recipe.students[name]
    if own.model in STUDENTS and not STUDENTS[own.model].has_distillation_head:
        able = [each for each, one in recipe.students.items() if STUDENTS[one.model].has_distillation_head]
        tried = ", ".join(able)
        raise UsageError(f"--student {name}: has no distillation head, so that labels make no difference; try {tried}")
    chain = Chain(params, recipe)
    yield from chain.teaching()
    labels = chain.labels(own.views)
    yield labels
    counts = [count for count in NUM_VIEWS if count < recipe.views[own.views].count]
    for seed in choice.seeds:
        job = StudentJob(recipe=recipe.name, after=(labels,), name=name, seed=seed)
        if choice.ablation == "labels":
            yield from (dataclasses.replace(job, labels=each) for each in ("cached", "none", "online"))
        else:
            yield from (dataclasses.replace(job, num_views=count) for count in (*counts, None))


class Chain:
    """What a recipe's jobs follow from: teachers, a selection, labels.

    Where the data are the paper's, its teacher comes first and labels before any other is trained; else all candidates
    are compared first.

    Args:
        params: All of params.yaml.
        recipe: The recipe.
    """

    def __init__(self, params: Params, recipe: Recipe) -> None:
        self.recipe = recipe
        is_papers = recipe.dataset.source in paper.TEACHERS and PAPERS_TEACHER in recipe.teachers
        self.first = (PAPERS_TEACHER,) if is_papers else params.candidates(recipe)

    def jobs(self, teachers: Sequence[str], students: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
        """Yield everything up to the students, seed by seed, and then the other teachers."""
        yield from self.teaching()
        for seed in seeds:
            for name in students:
                labels = self.labels(self.recipe.students[name].views)
                yield labels
                yield StudentJob(recipe=self.recipe.name, after=(labels,), name=name, seed=seed)
        others = [name for name in teachers if name not in self.first]
        yield from (self.teacher(name) for name in others)
        if others:
            yield SelectJob(recipe=self.recipe.name, names=tuple(teachers))

    def teaching(self) -> Iterator[Job]:
        """Yield the teachers that have to be there before anything is labelled, and their selection."""
        yield from (self.teacher(name) for name in self.first)
        yield self.selection()

    def optimizers(self) -> Iterator[Job]:
        """Yield Figure 5's teachers and what they take."""
        yield from self.teaching()
        name = self.first[0] if len(self.first) == 1 else None
        own = None if name is None else self.recipe.teachers[name].optimizer
        for optimizer in paper.OPTIMIZERS:
            if optimizer != own:
                after = (self.selection(),)
                yield TeacherJob(recipe=self.recipe.name, after=after, name=name, optimizer=optimizer)

    def teacher(self, name: str) -> TeacherJob:
        """Return a candidate's job."""
        return TeacherJob(recipe=self.recipe.name, name=name)

    def selection(self) -> SelectJob:
        """Return the selection that labels follow from; it makes do with those candidates that can be trained."""
        after = tuple(self.teacher(name) for name in self.first) if len(self.first) == 1 else ()
        return SelectJob(recipe=self.recipe.name, after=after, names=self.first)

    def labels(self, views: str) -> LabelJob:
        """Return a view recipe's labels."""
        return LabelJob(recipe=self.recipe.name, after=(self.selection(),), views=views)


def _teachers(params: Params, recipe: Recipe, *, every: bool = False) -> tuple[str, ...]:
    """Return the teachers of a recipe: those that the paper reports, or every candidate."""
    reported = paper.TEACHERS.get(recipe.name)
    if reported is None or every:
        return params.candidates(recipe)
    return tuple(name for name in reported if name in recipe.teachers)


def _students(recipe: Recipe) -> list[str]:
    """Return the students of a recipe, of the paper's those that it reports; ours first, other view recipes last."""
    reported: Iterable[str] = paper.STUDENTS.get(recipe.name, recipe.students)
    names = [name for name in reported if name in recipe.students]
    return sorted(names, key=lambda name: (recipe.students[name].views != "default", name != OURS))


def _unknown(name: str, recipes: Sequence[Recipe]) -> UsageError:
    students = dict.fromkeys(student for recipe in recipes for student in recipe.students)
    where = ", ".join(recipe.name for recipe in recipes)
    return UsageError(f"--student {name}: not in recipe {where}; choose from {', '.join(students)}")
