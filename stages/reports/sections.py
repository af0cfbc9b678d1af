"""What a report shows, in its order, and what is said of what has not been run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pipeline.errors import DataError
from pipeline.report import paper
from pipeline.report.page import Item, Missing, Section
from pipeline.report.tables import Figure, Table
from stages.reports.attention import attention
from stages.reports.classes import by_class
from stages.reports.compared import LEFT_OUT, compared
from stages.reports.comparisons import Comparisons
from stages.reports.figures import STUDENTS as STUDENTS_FIGURES
from stages.reports.figures import figures
from stages.reports.others import optimizer_runs, optimizers_table, others_table
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.reports.scores import NOT_RUN
from stages.reports.settings import distilled_students, settings_table
from stages.reports.tables import all_teachers, drops_table, students_tables
from stages.reports.variants import variants_tables
from stages.reports.views import teacher_on_views
from stages.shared.context import Context

COMPARED = "Runs that differ in one thing, at an equal budget, with all seeds that there are."


def main_sections(
    context: Context, runs: FinishedRuns, comparisons: Comparisons, *, with_figures: bool = True
) -> list[Section]:
    """Return the parts of the report whose tables the terminal shows too.

    Args:
        context: The command's setting.
        runs: What has been run.
        comparisons: Those among the runs; without any there is no such part.
        with_figures: Whether to draw.
    """
    drawn = {figure.name: figure for figure in figures(context, runs)} if with_figures else None
    others, answers = others_table(runs), compared(comparisons, with_figures=with_figures)
    drops = drops_table(runs, distilled_students(runs.recipe))
    students = [
        *students_tables(runs),
        _curves(runs, drawn),
        *variants_tables(runs),
        drops,
        *([others] if others else []),
    ]
    return [
        Section("What was run", [overview_table(runs), settings_table(runs.recipe)]),
        Section("Teachers", _teachers(runs, drawn)),
        Section("Students", students),
        *([Section("Comparisons", answers, COMPARED)] if answers else []),
    ]


def detail_sections(context: Context, runs: FinishedRuns, *, with_figures: bool) -> list[Section]:
    """Return what lies behind the tables: by class, by view, and where students look."""
    name = runs.recipe.name
    student = f"pipeline distill --recipe {name} --student titn"
    confusion, views, maps = "Confusion and agreement by class", "The teacher on augmented views", "Attention maps"
    if not with_figures:
        parts: list[Sequence[Item]] = [[Missing(title, LEFT_OUT)] for title in (confusion, views, maps)]
    else:
        parts = [
            by_class(runs) or [Missing(confusion, NOT_RUN, student)],
            _unless_stale(context, views, teacher_on_views, runs)
            or [Missing(views, NOT_RUN, f"pipeline label --recipe {name}")],
            _unless_stale(context, maps, attention, runs) or [Missing(maps, NOT_RUN, student)],
        ]
    return [
        Section("By class", parts[0]),
        Section("What the student learns from", parts[1]),
        Section("Attention", parts[2]),
    ]


def _unless_stale(
    context: Context, title: str, draw: Callable[[Context, FinishedRuns], Sequence[Item]], runs: FinishedRuns
) -> Sequence[Item]:
    """Return what reads data, labels or weights; where they don't belong to the recipe as it now is, say so instead.

    Tables and curves of finished runs are right all the same.
    """
    try:
        return draw(context, runs)
    except DataError as error:
        context.say(f"left out: {title}: {error}")
        return [Missing(title, f"left out: {error}")]


def overview_table(runs: FinishedRuns) -> Table:
    """Return a row for each of the paper's tables and figures: how much of it this report shows, or which one would."""
    recipe, source = runs.recipe, runs.recipe.dataset.source
    num_teachers = f"{sum(bool(runs.seeds(name)) for name in recipe.teachers)} of {len(recipe.teachers)} teachers"
    num_students = f"{sum(bool(runs.seeds(name)) for name in recipe.students)} of {len(recipe.students)} students"
    sweep = [name for name, run in optimizer_runs(runs).items() if isinstance(run, FinishedRun)]
    rows = [
        ["Table 1", "settings and parameters of the students", "all, without a run"],
        ["Table 2, Figure 4", "teachers", num_teachers],
        ["Figure 5", "the selected teacher by optimiser", ", ".join(sweep) if len(sweep) > 1 else NOT_RUN],
    ]
    if source not in paper.TABLES:
        rows.append(["in the form of Table 3", f"students on {recipe.name}", num_students])
    for other, table in paper.TABLES.items():
        where = num_students if other == source else f"pipeline report --recipe {other}"
        rows.append(
            [f"{table}, {STUDENTS_FIGURES[other]}", f"students on {recipe.name if other == source else other}", where]
        )
    rows.append(["Table 6", "accuracy lost from teacher to student", num_students])
    note = "A report is on one recipe; the paper's tables of other data sets are in the reports of theirs."
    return Table("The paper's tables and figures", ("in the paper", "what", "here"), rows, note)


def lead(runs: FinishedRuns, *, tracked_only: bool) -> str:
    """Return the report's first paragraph: in a few sentences, what has been reached.

    Args:
        runs: What has been run.
        tracked_only: Whether data/runs has been left out.
    """
    recipe = runs.recipe
    parts = [f"Data: {recipe.dataset.source}."]
    winner = runs.teachers.get(runs.winner or "")
    if winner is not None:
        parts.append(f"Selected teacher: {winner.name}, {winner.metrics['test']['top1']:.2f} % of the test images.")
    trained = list(runs.students.values())
    if trained:
        best = max(trained, key=lambda run: run.metrics["test"]["top1"])
        parts.append(f"Best student: {best.name}, {best.metrics['test']['top1']:.2f} % at its best epoch, seed 0.")
    if not runs.teachers and not trained:
        parts.append(
            f"Nothing has been run yet: pipeline teacher-select --recipe {recipe.name}, then pipeline distill."
        )
    parts.append("The paper is arXiv:2502.16762; a difference is ours less the paper's.")
    if tracked_only:
        parts.append(
            "Runs in data/runs are left out, since DVC does not track them; without --tracked-only they are shown."
        )
    return " ".join(parts)


def _teachers(runs: FinishedRuns, drawn: Mapping[str, Figure] | None) -> list[Item]:
    recipe, outcomes = runs.recipe, optimizer_runs(runs)
    command = f"pipeline teacher-select --recipe {recipe.name}"
    sweep = f"{command} --optimizers {','.join(paper.OPTIMIZERS)}"
    items: list[Item] = [
        all_teachers(runs),
        _figure(drawn, "figure-4", "Figure 4. Teachers by epoch", command),
        _figure(drawn, "figure-5", "Figure 5. The selected teacher by optimiser", sweep),
    ]
    if runs.winner and sum(isinstance(outcome, FinishedRun) for outcome in outcomes.values()) > 1:
        items.append(optimizers_table(recipe, runs.winner, outcomes, {}))
    return items


def _curves(runs: FinishedRuns, drawn: Mapping[str, Figure] | None) -> Item:
    number = STUDENTS_FIGURES.get(runs.recipe.dataset.source)
    name = number.lower().replace(" ", "-") if number else "students"
    title = f"{number}. Students by epoch" if number else "Students by epoch"
    return _figure(drawn, name, title, f"pipeline distill --recipe {runs.recipe.name} --student titn")


def _figure(drawn: Mapping[str, Figure] | None, name: str, title: str, command: str) -> Item:
    """Return a figure, or what is said in its place; `drawn` is None where figures are left out."""
    if drawn is None:
        return Missing(title, LEFT_OUT)
    return drawn.get(name) or Missing(title, NOT_RUN, command)
