"""`pipeline reproduce`: run whatever a table, a figure or everything still lacks, and record what is finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.data.sources import check_source
from pipeline.errors import DataError, NumericalError, PipelineError, UsageError
from stages.record import Records
from stages.reproduction.jobs import Job, State
from stages.reproduction.plan import Choice, plan
from stages.shared import options
from stages.shared.context import Context
from stages.teacher_select import prepare_from_raw

NEEDS_DATA = State("needs data")
PASSED_OVER = (DataError.exit_code, NumericalError.exit_code)
"""By its exit code, what ends a job and not the others. Codes, because a rank is told another's error by its code."""


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
    """Jobs under way.

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
        for job in self._jobs:
            context = self._contexts[job.recipe]
            state = self._state(job, context) if context.paths.is_prepared else _without_data(job, self._lacking)
            if state.is_done:
                self._done.add(job)
            self._say(f"{job.recipe} {job.title}: {state.text}")
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
        failed = next((each for each in job.after if each not in self._done), None)
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

    def _state(self, job: Job, context: Context) -> State:
        waits = next((each for each in job.after if each not in self._done), None)
        if waits is not None:
            return State(f"runs after {waits.title}")
        try:
            return job.state(context)
        except DataError as error:
            return State(f"cannot run: {error}")

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


def _without_data(job: Job, lacking: dict[str, str]) -> State:
    return NEEDS_DATA if job.recipe in lacking else State("runs")


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
