"""`pipeline teacher-select`: all of stage one that is not up to date."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click

from pipeline.config.recipes import MAX_VIEWS, OPTIMIZERS
from pipeline.errors import DataError, NumericalError, UsageError
from pipeline.report.tables import Table
from stages.jobs import LabelJob, SelectJob, TeacherJob, labels_of, stage_one, survey, sweep_settings
from stages.prepare import prepare_unless_done
from stages.reports.conditions import NOT_RUN
from stages.reports.runs import FinishedRun
from stages.reports.tables import candidates_table, optimizers_table, with_conditions
from stages.selection import select
from stages.shared import options
from stages.shared.context import Context
from stages.shared.prepared import check_available
from stages.shared.runs import State
from stages.teacher import plan_teacher, teacher_recipe, train_teacher


def teacher_select(
    context: Context,
    *,
    teachers: Sequence[str] | None = None,
    optimizers: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> list[Table]:
    """Prepare, train every candidate, select, label.

    Under torchrun all ranks train each candidate together; rank 0 prepares and selects, while the others wait.

    Args:
        context: The command's setting.
        teachers: Names of the candidates; None takes `teachers` of params.yaml.
        optimizers: Train the winner with each of these too (Figure 5).
        settings: Fields of the candidates' recipes to replace; their runs go to data/runs.
        fresh: Whether to train and label everything again.

    Returns:
        Table 2, and Figure 5's table where optimisers are given.

    Raises:
        UsageError: A name does not exist, or options do not go together.
        DataError: There are no data, no candidate has learned anything, or `settings` would replace the labels of a
            teacher without them.
    """
    names = check_names(context, teachers, optimizers, settings)
    jobs = stage_one(context, names, settings)
    if fresh and context.ranks.world_size > 1:
        files = f"{context.paths.labels('default').parent} and {context.paths.kept}/label@*.json"
        raise UsageError(
            f"--fresh: not under torchrun, whose ranks would delete each other's labels; delete {files} first, "
            "and train with `teacher NAME --fresh`"
        )
    with context.joined() as group:
        group.on_main(lambda: prepare_from_raw(context))
        runs = {name: plan_teacher(context, name, settings=settings) for name in names}
        outs = {name: run.out for name, run in runs.items()}
        if settings and not fresh:
            _keep_labels(context, outs.values())
        later = [run.epochs_to_train(fresh=fresh) for run in list(runs.values())[1:]]
        trainings = [job for job in jobs if isinstance(job, TeacherJob)]
        for job in context.in_turn("teacher", trainings, later):
            job.run(context, fresh=fresh)
        comparison = group.on_main(lambda: select(context, names, outs))
        tables = [candidates_table(context, comparison, outs)]
        context.say(f"selected {comparison['winner']} by {comparison['by']}")
        if optimizers:
            tables.append(sweep(context, comparison["winner"], optimizers, fresh=fresh))
    for labels in (job for job in jobs if isinstance(job, LabelJob)):
        labels.run(context, fresh=fresh)
    return tables


def prepare_from_raw(context: Context, *, download: bool = False) -> None:
    """Prepare the data if none are there; a recipe's own path needs no download."""
    if not context.paths.is_prepared:
        prepare_unless_done(context, download=download and not context.recipe.dataset.path)


def _keep_labels(context: Context, outs: Iterable[Path]) -> None:
    """Refuse to replace labels that were made by a teacher without the settings asked for.

    Raises:
        DataError: There are such labels.
    """
    from pipeline.training.checkpoints import read_meta

    makers = [meta["sha256"] for meta in map(read_meta, outs) if meta is not None]
    for name in context.params.labelled(context.recipe):
        cache = labels_of(context, name)
        if cache is not None and cache.provenance["checkpoint_sha256"] not in makers:
            raise DataError(
                f"{context.paths.labels(name)}: made by a {cache.provenance['teacher']} without this --set, and would "
                "be replaced; move the file away, or give --fresh"
            )


def check_names(
    context: Context,
    teachers: Sequence[str] | None,
    optimizers: Sequence[str],
    settings: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Check names and settings before any data is looked for, and return the candidates' names.

    Raises:
        UsageError: A teacher, optimiser or field does not exist, or both settings and optimisers are given.
    """
    if settings and optimizers:
        raise UsageError("--set and --optimizers: both change how teachers are trained; give one of them")
    for optimizer in optimizers:
        if optimizer not in OPTIMIZERS:
            raise UsageError(f"--optimizers {optimizer}: choose from {', '.join(OPTIMIZERS)}")
    names = tuple(teachers or context.params.candidates(context.recipe))
    for name in names:
        teacher_recipe(context.recipe, name, settings)
    return names


def plan(
    context: Context,
    teachers: Sequence[str] | None = None,
    optimizers: Sequence[str] = (),
    *,
    settings: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> list[str]:
    """Say what `teacher_select` would do, and why, and write nothing."""
    names, lines = check_names(context, teachers, optimizers, settings), []
    jobs = stage_one(context, names, settings)
    if not context.paths.is_prepared:
        lines.append(f"prepare: {check_available(context) or 'no prepared data'}")
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
@options.settings_option
@options.watch_option
@click.option("--views", "num_views", type=click.IntRange(1, MAX_VIEWS), help="Label the first views only.")
@click.option("--fresh", is_flag=True, help="Train and label everything again.")
@options.time_limit_option
@options.dry_run_option
def command(
    recipe: str | None,
    device: str | None,
    teachers: tuple[str, ...] | None,
    optimizers: tuple[str, ...] | None,
    settings: tuple[str, ...],
    num_views: int | None,
    fresh: bool,
    dry_run: bool,
) -> None:
    """Do all of stage one: prepare, train what is missing, select, label."""
    context, chosen = options.open_context(recipe, device), options.parse_settings(settings)
    if num_views is not None:
        views = {name: replace(one, count=num_views) for name, one in context.recipe.views.items()}
        context.recipe = replace(context.recipe, views=views)
    if dry_run:
        for line in plan(context, teachers, optimizers or (), settings=chosen, fresh=fresh):
            context.say(line)
        return
    tables = teacher_select(context, teachers=teachers, optimizers=optimizers or (), settings=chosen, fresh=fresh)
    for table in tables:
        context.show(table)
    context.end()
