"""`pipeline reproduce`: do the jobs that the paper's tables and figures still lack, and record finished runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.config.params import Params
from pipeline.config.recipes import Recipe
from pipeline.errors import DataError, NumericalError, PipelineError, UsageError
from pipeline.report import paper
from pipeline.system.text import counted
from stages.jobs import ENSEMBLE, Job, LabelJob, SelectJob, StudentJob, TeacherJob, survey
from stages.record import Records
from stages.shared import options
from stages.shared.context import Context
from stages.shared.hints import with_recipe
from stages.shared.prepared import check_available
from stages.shared.runs import State
from stages.teacher_select import prepare_from_raw

MAIN = "cifar100"
PAPERS = tuple(paper.TABLES)
"""The paper's recipes, named after their data, the most telling first."""
OURS = "titn"
ABLATIONS = ("labels", "views", "drop_path", "ensemble")
NUM_VIEWS = (1, 2, 5)
DROP_PATHS = ("0", "0.1", "0.2")
TABLES = {
    2: MAIN, 6: "cifar10", **{int(name.split()[-1]): recipe for recipe, name in paper.TABLES.items()},
}  # fmt: skip
FIGURES_RECIPES = {4: MAIN, 5: MAIN, **{int(name.split()[-1]): recipe for recipe, name in paper.FIGURES.items()}}
"""The recipe of each table and figure."""
PASSED_OVER = (DataError.exit_code, NumericalError.exit_code)
"""Errors that end one job and not the others, by exit code: a rank learns of another's error by its code alone."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What is to be reproduced; by default everything.

    Attributes:
        table: The paper's table.
        figure: The paper's figure.
        ablation: One of ABLATIONS.
        recipe: In place of the paper's.
        student: The only student to train.
        seeds: The students' seeds.
    """

    table: int | None = None
    figure: int | None = None
    ablation: str | None = None
    recipe: str | None = None
    student: str | None = None
    seeds: Sequence[int] = (0,)

    def check(self) -> None:
        """Refuse a table or figure that the paper does not have, and two at once.

        Raises:
            UsageError: It is one of these.
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


def reproduce(context: Context, scope: Scope, *, out: Path, download: bool = False, dry_run: bool = False) -> None:
    """Do the jobs of a scope that are not done yet, and record what they leave.

    Under torchrun all ranks train each model together, and rank 0 records.

    Args:
        context: The command's setting; its recipe does not matter.
        scope: What is to be reproduced.
        out: The file of records.
        download: Whether to download missing data.
        dry_run: Whether only to say what would be done.

    Raises:
        UsageError: There is no such table, figure, recipe or student.
        DataError: Data are missing, or a job could not be done; the others are done.
        NumericalError: A job diverged; the others are done.
        Interrupted: The time limit has been reached, or a signal came; the same call goes on.
    """
    jobs = plan(context.params, scope)
    if scope.table == 1:
        context.say("Table 1 lists the students' settings, which no run decides; `pipeline report` shows it")
        return
    records = Records(out)
    records.read()
    work = Reproduction(context, jobs, records, download=download)
    if dry_run:
        work.show()
    else:
        work.carry_out()


class Reproduction:
    """The jobs of a scope, in their order, under way; with the arguments of `reproduce`."""

    def __init__(self, context: Context, jobs: Sequence[Job], records: Records, *, download: bool) -> None:
        self._jobs, self._records, self._download = jobs, records, download
        recipes = {job.recipe: context.params.recipes[job.recipe] for job in jobs}
        self._contexts = {
            name: dataclasses.replace(context, recipe=recipe, _changed=[]) for name, recipe in recipes.items()
        }
        self._context, self._say = context, context.say
        self._lacking: dict[str, str] = {}
        self._done: set[Job] = set()
        self._errors: list[tuple[int, str]] = []

    def show(self) -> None:
        """Say how far each job is, and write nothing."""
        for name, context in self._contexts.items():
            if not context.paths.is_prepared:
                self._say(f"{name} data: {self._state_of_data(context)}")
        for job, state in survey(self._jobs, self._contexts):
            text = state.text if isinstance(state, State) else with_recipe(f"cannot run: {state}", job.recipe)
            self._say(f"{job.recipe} {job.title}: {'needs data' if job.recipe in self._lacking else text}")
            if isinstance(state, State) and state.is_done:
                self._done.add(job)
        self._say(f"{len(self._done)} of {len(self._jobs)} jobs are done")

    def carry_out(self) -> None:
        """Do every job that can be done, and record it.

        Raises:
            PipelineError: See `reproduce`.
        """
        num_recorded = 0
        later = [job.epochs_to_train(self._contexts[job.recipe]) for job in self._jobs[1:]]
        for job in self._context.in_turn("job", self._jobs, later):
            context = self._contexts[job.recipe]
            context.position = self._context.position
            if self._has_data(context):
                num_recorded += self._do(job, context)
        records = counted(num_recorded, "new record")
        self._say(f"{len(self._done)} of {len(self._jobs)} jobs are done; {records} in {self._records.path}")
        for context in self._contexts.values():
            context.end()
        self._tell_failures()

    def _do(self, job: Job, context: Context) -> int:
        """Do a job unless it is done, record it, and return the number of new records."""
        failed = next((former for former in job.after if former not in self._done), None)
        if failed is not None:
            self._say(f"{job.recipe} {job.title}: left out, it takes {failed.title}")
            return 0
        try:
            with context.joined() as group:
                text, is_done = group.on_main(lambda: tuple(job.state(context)))
            self._say(f"{job.recipe} {job.title}: {text}")
            if not is_done:
                job.run(context)
            self._done.add(job)
            with context.joined() as group:
                return group.on_main(lambda: self._record(job.output(context)))
        except PipelineError as error:
            error.args = (with_recipe(str(error), job.recipe),)
            if error.exit_code not in PASSED_OVER:
                raise
            self._say(f"{job.recipe} {job.title}: {error}")
            self._errors.append((error.exit_code, f"{job.recipe} {job.title}: {error}"))
            return 0

    def _record(self, out: Path | None) -> int:
        return int(out is not None and self._records.add(out) is not None)

    def _has_data(self, context: Context) -> bool:
        """Prepare a recipe's data unless they are there; where that fails, say why, once, and return False."""
        name = context.recipe.name
        if name in self._lacking:
            return False
        try:
            with context.joined() as group:
                group.on_main(lambda: self._prepare(context))
            context.dataset()
        except PipelineError as error:
            if error.exit_code not in (UsageError.exit_code, DataError.exit_code):
                raise
            self._lacking[name] = with_recipe(str(error), name)
            self._say(f"{name}: left out, {self._lacking[name]}")
            return False
        return True

    def _prepare(self, context: Context) -> None:
        if not context.paths.is_prepared:
            if not self._download:
                check_available(context)
            prepare_from_raw(context, download=self._download)

    def _state_of_data(self, context: Context) -> str:
        """Say whether a recipe's data can be prepared."""
        if self._download:
            return "prepares, downloading what is missing"
        try:
            return check_available(context) or "prepares"
        except (DataError, UsageError) as error:
            self._lacking[context.recipe.name] = str(error)
            return f"needs data: {error}"

    def _tell_failures(self) -> None:
        """End with one line of all that could not be done."""
        failures = [text for _, text in self._errors]
        failures += [f"recipe {name} left out: {why}" for name, why in self._lacking.items()]
        if failures:
            diverged = any(code == NumericalError.exit_code for code, _ in self._errors)
            raise (NumericalError if diverged else DataError)("; ".join(failures))


def plan(params: Params, scope: Scope) -> list[Job]:
    """List the jobs that a scope takes, each once.

    Raises:
        UsageError: A name that does not exist, or a scope without such a student.
    """
    scope.check()
    if scope.table == 1:
        return []
    if scope.ablation is not None:
        jobs = _ablation(params, params.select(scope.recipe or MAIN), scope)
    elif scope.table is not None or scope.figure is not None:
        jobs = _shown(params, scope)
    else:
        jobs = _everything(params, scope)
    distinct = list(dict.fromkeys(jobs))
    if scope.student is not None and not any(isinstance(job, StudentJob) for job in distinct):
        raise UsageError(f"--student {scope.student}: what was chosen has no such student; leave one of them out")
    return distinct


def _everything(params: Params, scope: Scope) -> Iterator[Job]:
    """Yield all of a recipe's jobs, or the whole paper's."""
    recipes = [params.select(name) for name in ((scope.recipe,) if scope.recipe else PAPERS)]
    students = {recipe.name: _students(recipe) for recipe in recipes}
    if scope.student is not None:
        if not any(scope.student in recipe.students for recipe in recipes):
            raise _unknown(scope.student, recipes)
        students = {name: [scope.student] if scope.student in listed else [] for name, listed in students.items()}
    for recipe in recipes:
        if students[recipe.name] or scope.student is None:
            teachers = _teachers(params, recipe) if scope.student is None else ()
            yield from Chain(params, recipe).jobs(teachers, students[recipe.name], scope.seeds)
    if scope.student is None and recipes[0].name == MAIN:
        yield from Chain(params, recipes[0]).optimizers()


def _shown(params: Params, scope: Scope) -> Iterator[Job]:
    """Yield the jobs of a table or figure."""
    from pipeline.models.students import STUDENTS

    known, number = (TABLES, scope.table) if scope.figure is None else (FIGURES_RECIPES, scope.figure)
    assert number is not None
    recipe = params.select(scope.recipe or known[number])
    chain = Chain(params, recipe)
    if scope.figure == 5:
        yield from chain.optimizers()
    elif (scope.table, scope.figure) in ((2, None), (None, 4)):
        yield from chain.jobs(_teachers(params, recipe, every=True), (), scope.seeds)
    else:
        students = _students(recipe)
        if scope.table == 6:
            students = [name for name in students if name == OURS] or students
        if scope.figure is not None and recipe.name in paper.STUDENTS:
            students = [name for name in students if name in STUDENTS]  # one curve for each architecture
        if scope.student is not None:
            if scope.student not in recipe.students:
                raise _unknown(scope.student, [recipe])
            students = [name for name in students if name == scope.student]
        yield from chain.jobs((), students, scope.seeds)


def _ablation(params: Params, recipe: Recipe, scope: Scope) -> Iterator[Job]:
    """Yield the jobs of an ablation, seed by seed: what was cut off compares as much as there is."""
    from pipeline.models.students import STUDENTS

    name = scope.student or (OURS if OURS in recipe.students else next(iter(recipe.students)))
    if name not in recipe.students:
        raise _unknown(name, [recipe])
    student = recipe.students[name]
    if scope.ablation == "drop_path":
        if student.model not in STUDENTS:
            raise UsageError(f"--student {name}: {student.model} has no drop_path of ours; try {OURS}")
    elif student.model in STUDENTS and not STUDENTS[student.model].has_distillation_head:
        models = {key: STUDENTS.get(other.model) for key, other in recipe.students.items()}
        able = ", ".join(key for key, model in models.items() if model is None or model.has_distillation_head)
        raise UsageError(f"--student {name}: has no distillation head, so that labels make no difference; try {able}")
    chain = Chain(params, recipe)
    if scope.ablation == "ensemble" and len(chain.all) < 2:
        raise UsageError(f"--ablation ensemble: recipe {recipe.name} has one teacher, {chain.all[0]}; add another")
    yield from chain.teaching()
    labels = chain.labels(student.views)
    yield labels
    ensemble = chain.ensemble(student.views) if scope.ablation == "ensemble" else None
    if ensemble is not None:
        yield from (*ensemble.after, ensemble)
    for seed in scope.seeds:
        job = StudentJob(recipe=recipe.name, after=(labels,), name=name, seed=seed)
        if scope.ablation == "labels":
            yield from (dataclasses.replace(job, labels=source) for source in ("cached", "none", "online"))
        elif scope.ablation == "views":
            counts = [count for count in NUM_VIEWS if count < recipe.views[student.views].count]
            yield from (dataclasses.replace(job, num_views=count) for count in (*counts, None))
        elif scope.ablation == "drop_path":
            rates = [rate for rate in DROP_PATHS if float(rate) != student.drop_path]
            yield from (job, *(dataclasses.replace(job, settings=(("drop_path", rate),)) for rate in rates))
        elif ensemble is not None:
            yield from (job, dataclasses.replace(job, after=(ensemble,), teacher_labels=ENSEMBLE))


class Chain:
    """What a recipe's students need: teachers, a selection, labels.

    In the paper's recipes its teacher comes first and labels before any other is trained; in others, also those on its
    data, all candidates are compared first.

    Args:
        params: All of params.yaml.
        recipe: The recipe.
    """

    def __init__(self, params: Params, recipe: Recipe) -> None:
        self.recipe = recipe
        is_papers = recipe.name in paper.TEACHERS and paper.TEACHER in recipe.teachers
        self.all = params.candidates(recipe)
        self.first = (paper.TEACHER,) if is_papers else self.all

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
            yield SelectJob(recipe=self.recipe.name, names=tuple(teachers), keeps=True)

    def teaching(self) -> Iterator[Job]:
        """Yield the teachers that have to be there before anything is labelled, and their selection."""
        yield from (self.teacher(name) for name in self.first)
        yield self.selection()

    def optimizers(self) -> Iterator[Job]:
        """Yield Figure 5's teachers and what they take."""
        yield from self.teaching()
        name = self.first[0] if len(self.first) == 1 else None
        usual = None if name is None else self.recipe.teachers[name].optimizer
        for optimizer in paper.OPTIMIZERS:
            if optimizer != usual:
                after = (self.selection(),)
                yield TeacherJob(recipe=self.recipe.name, after=after, name=name, optimizer=optimizer)

    def teacher(self, name: str) -> TeacherJob:
        """Return a candidate's job."""
        return TeacherJob(recipe=self.recipe.name, name=name, keeps=True)

    def selection(self) -> SelectJob:
        """Return the selection that labels follow from; it makes do with those candidates that can be trained."""
        after = tuple(self.teacher(name) for name in self.first) if len(self.first) == 1 else ()
        return SelectJob(recipe=self.recipe.name, after=after, names=self.first, keeps=True)

    def labels(self, views: str) -> LabelJob:
        """Return a view recipe's labels."""
        return LabelJob(recipe=self.recipe.name, after=(self.selection(),), views=views)

    def ensemble(self, views: str) -> LabelJob:
        """Return a view recipe's labels by all teachers together."""
        teachers = tuple(self.teacher(name) for name in self.all)
        return LabelJob(recipe=self.recipe.name, after=teachers, views=views, ensemble=self.all)


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


@click.command("reproduce")
@click.option("--table", type=int, help="Of the paper, 1 to 6.")
@click.option("--figure", type=int, help="Of the paper, 4 to 8.")
@click.option(
    "--ablation",
    type=click.Choice(ABLATIONS),
    help="Labels cached, none, online; 1, 2, 5 and all views; drop_path 0, 0.1, 0.2; labels of the best teacher or of "
    "all together. The paper has none of these.",
)
@click.option("--recipe", help="Run this recipe, not the paper's: all, or --table, --figure, --ablation of it.")
@click.option("--student", help="Train only this student and the teacher it needs; default for --ablation: titn.")
@click.option(
    "--seeds", type=options.parse_seeds, metavar="A,B,...", default="0", show_default=True,
    help="Of the students, one after another.",
)  # fmt: skip
@options.device_option
@click.option("--download", is_flag=True, help="Download what is missing to data/raw.")
@options.watch_option
@options.records_option
@options.time_limit_option
@options.dry_run_option
def command(recipe: str | None, device: str | None, download: bool, out: Path, dry_run: bool, **choice: Any) -> None:
    """Run whatever the paper's tables and figures still lack.

    Without a choice all of them, the most telling first. What is done costs nothing; what was stopped goes on. Each
    finished run leaves a line in results/runs.jsonl, and its curve in results/curves.
    """
    context = options.open_context(recipe, device)
    reproduce(context, Scope(recipe=recipe, **choice), out=out, download=download, dry_run=dry_run)
