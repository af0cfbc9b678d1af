"""`pipeline reproduce`: run whatever a table, a figure or everything still lacks, and record what is finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from pipeline.config.params import Params
from pipeline.config.recipes import Recipe
from pipeline.data.sources import check_source
from pipeline.errors import DataError, NumericalError, PipelineError, UsageError
from pipeline.models.students import STUDENTS
from pipeline.report import paper
from pipeline.report.paper import FIGURES
from pipeline.report.paper import TEACHER as PAPERS_TEACHER
from stages.jobs import Job, LabelJob, SelectJob, StudentJob, TeacherJob, survey
from stages.record import Records
from stages.shared import options
from stages.shared.context import Context
from stages.shared.runs import State
from stages.teacher_select import prepare_from_raw

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
PASSED_OVER = (DataError.exit_code, NumericalError.exit_code)
"""By its exit code, what ends a job and not the others. Codes, because a rank is told another's error by its code."""


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


def reproduce(context: Context, choice: Choice, *, out: Path, download: bool = False, dry_run: bool = False) -> None:
    """Go through the jobs that a choice takes, doing what is not done.

    Under torchrun all ranks train each model together, and rank 0 records.

    Args:
        context: The command's setting; its recipe does not matter.
        choice: What is to be reproduced.
        out: The file of records.
        download: Whether to download data that are not there.
        dry_run: Whether only to say what would be done.

    Raises:
        UsageError: There is no such table, figure, recipe or student.
        DataError: Data are missing, or a job could not be done; all others are done.
        NumericalError: A job diverged; all others are done.
        Interrupted: The time limit has been reached, or a signal came; the same call goes on.
    """
    jobs = plan(context.params, choice)
    if choice.table == 1:
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
    """The jobs of a choice, under way.

    Args:
        context: The command's setting.
        jobs: In their order.
        records: Where finished runs are recorded.
        download: Whether to download data that are not there.
    """

    def __init__(self, context: Context, jobs: Sequence[Job], records: Records, *, download: bool) -> None:
        self._jobs, self._records, self._download = jobs, records, download
        recipes = dict.fromkeys(job.recipe for job in jobs)
        recipe_of = context.params.recipes
        self._contexts = {
            name: Context(context.params, recipe_of[name], context.console, context.stop, context.device_name)
            for name in recipes
        }
        self._say = context.say
        self._lacking: dict[str, str] = {}
        self._done: set[Job] = set()
        self._errors: list[tuple[int, str]] = []

    def show(self) -> None:
        """Say how far each job is, and write nothing."""
        for name, context in self._contexts.items():
            if not context.paths.is_prepared:
                self._say(f"{name} data: {self._standing_of_data(context)}")
        for job, state in survey(self._jobs, self._contexts):
            text = state.text if isinstance(state, State) else f"cannot run: {state}"
            self._say(f"{job.recipe} {job.title}: {'needs data' if job.recipe in self._lacking else text}")
            if isinstance(state, State) and state.is_done:
                self._done.add(job)
        self._say(f"{len(self._done)} of {len(self._jobs)} jobs are done")

    def carry_out(self) -> None:
        """Do every job that can be done, and record it.

        Raises:
            PipelineError: As of `reproduce`, once all is done that can be.
        """
        num_recorded = 0
        for job in self._jobs:
            context = self._contexts[job.recipe]
            if self._has_data(context):
                num_recorded += self._do(job, context)
        self._say(
            f"{len(self._done)} of {len(self._jobs)} jobs are done; {num_recorded} new records in {self._records.path}"
        )
        for context in self._contexts.values():
            context.end()
        self._tell_failures()

    def _do(self, job: Job, context: Context) -> int:
        """Do a job unless it is done, and record it; return the number of new records."""
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
            return self._record(job, context)
        except PipelineError as error:
            if error.exit_code not in PASSED_OVER:
                raise
            self._say(f"{job.recipe} {job.title}: {error}")
            self._errors.append((error.exit_code, f"{job.recipe} {job.title}: {error}"))
            return 0

    def _record(self, job: Job, context: Context) -> int:
        """Record what a job has left, if that is a run; return the number of new records."""
        with context.joined() as group:

            def add() -> int:
                out = job.output(context)
                return int(out is not None and self._records.add(out) is not None)

            return group.on_main(add)

    def _has_data(self, context: Context) -> bool:
        """Prepare a recipe's data where they are not; tell whether they are there, and why not, once."""
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
            self._lacking[name] = str(error)
            self._say(f"{name}: left out, {error}")
            return False
        return True

    def _prepare(self, context: Context) -> None:
        if not context.paths.is_prepared:
            if not self._download:
                check_source(context.recipe, context.paths.raw)
            prepare_from_raw(context, download=self._download)

    def _standing_of_data(self, context: Context) -> str:
        """Say whether a recipe's data can be prepared."""
        if self._download:
            return "prepares, downloading what is missing"
        try:
            check_source(context.recipe, context.paths.raw)
        except (DataError, UsageError) as error:
            self._lacking[context.recipe.name] = str(error)
            return f"needs data: {error}"
        return "prepares"

    def _tell_failures(self) -> None:
        """End with one line of all that could not be done.

        Raises:
            NumericalError: A job diverged.
            DataError: Data are missing, or a job could not be done.
        """
        said = [text for _, text in self._errors]
        said += [f"recipe {name} left out: {why}" for name, why in self._lacking.items()]
        if any(code == NumericalError.exit_code for code, _ in self._errors):
            raise NumericalError("; ".join(said))
        if said:
            raise DataError("; ".join(said))


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
            yield SelectJob(recipe=self.recipe.name, names=tuple(teachers), keeps=True)

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
        return TeacherJob(recipe=self.recipe.name, name=name, keeps=True)

    def selection(self) -> SelectJob:
        """Return the selection that labels follow from; it makes do with those candidates that can be trained."""
        after = tuple(self.teacher(name) for name in self.first) if len(self.first) == 1 else ()
        return SelectJob(recipe=self.recipe.name, after=after, names=self.first, keeps=True)

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


@click.command("reproduce")
@click.option("--table", type=int, help="Of the paper, 1 to 6.")
@click.option("--figure", type=int, help="Of the paper, 4 to 8.")
@click.option(
    "--ablation",
    type=click.Choice(["labels", "views"]),
    help="Labels cached, none, online; or 1, 2, 5 and all views. The paper has neither.",
)
@click.option("--recipe", help="A recipe in place of the paper's; all of it without --table, --figure, --ablation.")
@click.option("--student", help="Train only this student and the teacher it needs; default for --ablation: titn.")
@click.option("--seeds", metavar="A,B,...", help="Of the students, one after another; default: 0.")
@options.device_option
@click.option("--download", is_flag=True, help="Download what is missing to data/raw.")
@options.records_option
@options.time_limit_option
@options.dry_run_option
def command(
    table: int | None,
    figure: int | None,
    ablation: str | None,
    recipe: str | None,
    student: str | None,
    seeds: str | None,
    device: str | None,
    download: bool,
    out: Path,
    dry_run: bool,
) -> None:
    """Run whatever the paper's tables and figures still lack.

    Without a choice all of them, the most telling first. What is done costs nothing; what was stopped goes on. Each
    finished run leaves a line in results/runs.jsonl, and its curve in results/curves.
    """
    several = options.parse_seeds(seeds) or (0,)
    context = options.open_context(recipe, device)
    choice = Choice(table=table, figure=figure, ablation=ablation, recipe=recipe, student=student, seeds=several)
    reproduce(context, choice, out=out, download=download, dry_run=dry_run)
