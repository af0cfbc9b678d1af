"""`pipeline teacher-select`: all of stage one that is not up to date."""

from __future__ import annotations

from collections.abc import Sequence

import click

from pipeline.config.recipes import OPTIMIZERS
from pipeline.data.sources import check_source
from pipeline.errors import NumericalError, UsageError
from pipeline.report.tables import Table
from pipeline.system.runtime import current_ranks
from stages.jobs import LabelJob, SelectJob, TeacherJob, stage_one, survey, sweep_settings
from stages.prepare import prepare
from stages.reports.conditions import NOT_RUN
from stages.reports.runs import FinishedRun
from stages.reports.tables import candidates_table, optimizers_table, with_conditions
from stages.selection import select
from stages.shared import options
from stages.shared.context import Context
from stages.shared.runs import State
from stages.teacher import plan_teacher, teacher_recipe, train_teacher


def teacher_select(
    context: Context,
    *,
    teachers: Sequence[str] | None = None,
    optimizers: Sequence[str] = (),
    fresh: bool = False,
) -> list[Table]:
    """Prepare, train every candidate, select, label.

    Under torchrun all ranks train each candidate together; rank 0 prepares and selects, while the others wait.

    Args:
        context: The command's setting.
        teachers: Names of the candidates; None takes `teachers` of params.yaml.
        optimizers: Train the winner with each of these too (Figure 5).
        fresh: Whether to train and label everything again.

    Returns:
        Table 2, and Figure 5's table where optimisers are given.
    """
    names = check_names(context, teachers, optimizers)
    jobs = stage_one(context, names)
    if fresh and current_ranks().world_size > 1:
        raise UsageError(
            "--fresh: not under torchrun, whose ranks would delete each other's labels; delete "
            f"{context.paths.labels('default').parent} first, and train with `teacher NAME --fresh`"
        )
    with context.joined() as group:
        group.on_main(lambda: prepare_from_raw(context))
        later = [plan_teacher(context, name).epochs_to_train(fresh=fresh) for name in names[1:]]
        trainings = [job for job in jobs if isinstance(job, TeacherJob)]
        for job in context.in_turn("teacher", trainings, later):
            job.run(context, fresh=fresh)
        comparison = group.on_main(lambda: select(context, names))
        tables = [candidates_table(context, comparison)]
        context.say(f"selected {comparison['winner']} by {comparison['by']}")
        if optimizers:
            tables.append(sweep(context, comparison["winner"], optimizers, fresh=fresh))
    for labels in (job for job in jobs if isinstance(job, LabelJob)):
        labels.run(context, fresh=fresh)
    return tables


def prepare_from_raw(context: Context, *, download: bool = False) -> None:
    """Prepare the data from data/raw unless they are prepared; `download` fetches what is missing there."""
    if context.paths.is_prepared:
        return
    prepare(context.recipe, out=context.paths.prepared, raw=context.paths.raw, download=download)
    context.changed("prepare")
    context.say(f"{context.paths.dataset}: prepared")


def check_names(context: Context, teachers: Sequence[str] | None, optimizers: Sequence[str]) -> tuple[str, ...]:
    """Check names before any data is looked for, and return the candidates'.

    Raises:
        UsageError: A teacher or optimiser does not exist.
    """
    for optimizer in optimizers:
        if optimizer not in OPTIMIZERS:
            raise UsageError(f"--optimizers {optimizer}: choose from {', '.join(OPTIMIZERS)}")
    names = tuple(teachers or context.params.candidates(context.recipe))
    for name in names:
        teacher_recipe(context.recipe, name)
    for views in context.params.view_recipes:
        if views not in context.recipe.views:
            known = ", ".join(context.recipe.views)
            raise UsageError(f"view_recipes: {views} is not in recipe {context.recipe.name}; choose from {known}")
    return names


def plan(
    context: Context, teachers: Sequence[str] | None = None, optimizers: Sequence[str] = (), *, fresh: bool = False
) -> list[str]:
    """Say what `teacher_select` would do, and why, and write nothing."""
    jobs, lines = stage_one(context, check_names(context, teachers, optimizers)), []
    if not context.paths.is_prepared:
        check_source(context.recipe, context.paths.raw)
        lines.append("prepare: no prepared data")
    for job, state in survey(jobs, {context.recipe.name: context}, fresh=fresh):
        lines.append(f"{job.title}: {state.text if isinstance(state, State) else f'refused: {state}'}")
        if isinstance(job, SelectJob):
            lines += [f"optimiser {optimizer}: the winner" for optimizer in optimizers]
    return lines


def sweep(context: Context, winner: str, optimizers: Sequence[str], *, fresh: bool) -> Table:
    """Train the winner with each optimiser (Figure 5) and return the comparison."""
    teacher = teacher_recipe(context.recipe, winner)
    outcomes: dict[str, FinishedRun | str] = {}
    rates = {}
    for optimizer in optimizers:
        settings = sweep_settings(teacher, optimizer)
        rates[optimizer] = float(settings.get("lr", teacher.lr))
        try:
            out = train_teacher(context, winner, settings=settings, fresh=fresh and bool(settings))
        except NumericalError as error:
            context.say(f"{winner} with {optimizer}: {error}")
            outcomes[optimizer] = "diverged"
            continue
        outcomes[optimizer] = FinishedRun.read(out) or NOT_RUN
    trained = [outcome for outcome in outcomes.values() if isinstance(outcome, FinishedRun)]
    return with_conditions(optimizers_table(context.recipe, winner, outcomes, rates), trained)


@click.command("teacher-select")
@options.recipe_option
@options.device_option
@options.teachers_option
@click.option(
    "--optimizers", type=options.split_names, metavar="A,B,...", help="Train the winner with each of these (Figure 5)."
)
@click.option("--fresh", is_flag=True, help="Train and label everything again.")
@options.time_limit_option
@options.dry_run_option
def command(
    recipe: str | None,
    device: str | None,
    teachers: tuple[str, ...] | None,
    optimizers: tuple[str, ...] | None,
    fresh: bool,
    dry_run: bool,
) -> None:
    """Do all of stage one: prepare, train what is missing, select, label."""
    context = options.open_context(recipe, device)
    if dry_run:
        for line in plan(context, teachers, optimizers or (), fresh=fresh):
            context.say(line)
        return
    for table in teacher_select(context, teachers=teachers, optimizers=optimizers or (), fresh=fresh):
        context.show(table)
    context.end()
