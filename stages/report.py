"""`pipeline report`: a page, Markdown, tables and figures of a recipe's runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.errors import DataError, UsageError
from pipeline.report import page, paper
from pipeline.report.figures import require_matplotlib
from pipeline.report.page import Item, Missing, Section, file_names
from pipeline.report.tables import Figure, Table
from pipeline.system.storage import lock, read_json, remove_leftovers, to_json, write_together
from pipeline.system.text import counted
from pipeline.training.manifest import MANIFEST
from stages.reports import compare, tables, verdict
from stages.reports.conditions import LEFT_OUT, NOT_RUN
from stages.reports.figures import figures
from stages.reports.pairs import Pair, pair_items, students_in_pairs
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.shared.context import Context
from stages.shared.options import PATH, open_context, recipe_option

COMPARED = "Runs that differ in one setting and the seed alone, over all seeds that have been run."
NO_IMAGES = "the student's predictions, or the prepared data that it was trained on, are not here"
OWN_FILE = re.compile(r"tables/[a-z0-9-]+\.csv|figures/[a-z0-9-]+\.png")


@click.command("report")
@recipe_option
@click.option("--out", type=PATH, help="Directory of the report; data/<recipe>/reports if left out.")
@click.option("--no-figures", is_flag=True, help="Draw nothing; matplotlib is not needed then.")
@click.option("--tracked-only", is_flag=True, help="Leave out data/runs, which DVC does not track.")
def command(recipe: str | None, out: Path | None, no_figures: bool, tracked_only: bool) -> None:
    """Write a page, tables and figures of what has been run."""
    context = open_context(recipe)
    directory = context.paths.reports if out is None else out
    written = report(context, directory, with_figures=not no_figures, tracked_only=tracked_only)
    if out is None:
        context.changed("report")
    for table in written:
        context.show(table)
    context.say(f"wrote {directory / 'report.html'}, report.md, report.json, tables/ and figures/")
    context.end()


def report(context: Context, directory: Path, *, with_figures: bool = True, tracked_only: bool = False) -> list[Table]:
    """Write report.html, report.md, report.json, tables/ and figures/ from what has been run.

    tables/ holds a CSV file for each table, and for each picture of figures/ the numbers behind it.

    Args:
        context: The command's setting.
        directory: The output directory.
        with_figures: Whether to draw figures, which needs matplotlib.
        tracked_only: Whether to leave out data/runs, which DVC does not track.

    Returns:
        The paper's tables, other runs and comparisons, for the terminal.

    Raises:
        UsageError: matplotlib is missing, or a student's settings do not go together.
        DataError: A file of a run is damaged.
    """
    if with_figures:
        try:
            require_matplotlib()
        except UsageError as error:
            raise UsageError(f"{error}; or leave them out: `pipeline report --no-figures`") from None
    runs = FinishedRuns.read(context.recipe, context.paths, tracked_only=tracked_only)
    for trained, why in runs.left_out.items():
        context.say(f"left out: {trained}: {why}")
    if unsealed := [run for run in runs.all if not run.is_sealed]:
        which = f"{counted(len(unsealed), 'run')}, {unsealed[0].directory}{' and others' if unsealed[1:] else ''}"
        context.say(f"without {MANIFEST}, as older versions wrote none, so that damage is not told: {which}")
    comparisons = compare.find_comparisons(runs)
    teachers, optimizers, students = figures(runs, with_figures=with_figures)
    opening, closing = opening_section(context, runs, students, with_figures=with_figures), closing_section(runs)
    pairs = students_in_pairs(runs)
    main = main_sections(runs, (teachers, optimizers), pairs, comparisons, with_figures=with_figures)
    written = [item for section in (opening, *main) for item in section.items if isinstance(item, Table)]
    sections = [opening, *main, *detail_sections(context, runs, with_figures=with_figures), closing]
    compared = {**compare.as_json(comparisons), "students": [pair.as_json() for pair in pairs]}
    content = {**_as_json(runs), "comparisons": compared}
    text = verdict.lead(runs, comparisons, tracked_only=tracked_only)
    # A folder that --out names may lie where no lock can be kept.
    with lock(context.paths.work("report.lock")) if directory == context.paths.reports else contextlib.nullcontext():
        _write(directory, f"Report on {runs.recipe.name}", text, sections, content)
    return written


def opening_section(context: Context, runs: FinishedRuns, curve: Figure | Missing, *, with_figures: bool) -> Section:
    """Return what the report opens with: the verdict, the students' curve, the worst mistakes."""
    title = "Worst mistakes"
    speeds: dict[str, float] = {}
    why_not = f"images/s are {LEFT_OUT}; pipeline bench measures them."
    mistakes: Sequence[Item] = [Missing(title, LEFT_OUT)]
    if with_figures:
        try:
            speeds, why_not = verdict.speeds_here(context, runs)
        except (DataError, UsageError) as error:
            why_not = f"images/s are left out: {error}."
        mistakes = _unless_stale(context, title, verdict.worst_mistakes, runs) or [Missing(title, NO_IMAGES)]
    return Section("Verdict", [verdict.verdict_table(runs, speeds, why_not), curve, *mistakes])


def main_sections(
    runs: FinishedRuns,
    curves: tuple[Figure | Missing, Figure | Missing],
    pairs: Sequence[Pair],
    comparisons: Sequence[compare.Comparison],
    *,
    with_figures: bool,
) -> list[Section]:
    """Return the sections whose tables the terminal shows too; the curves are of teachers and of optimisers."""
    teachers, optimizers = curves
    outcomes = tables.optimizer_runs(runs)
    others = compare.others_table(runs)
    shown_students: list[Item] = [*tables.students_tables(runs), *pair_items(runs, pairs, with_figures=with_figures)]
    shown_students += compare.variants_tables(runs)
    shown_students += [tables.drops_table(runs), *([others] if others else [])]
    shown_teachers: list[Item] = [tables.all_teachers(runs), teachers]
    if isinstance(optimizers, Figure) or runs.recipe.dataset.source in paper.TABLES:
        shown_teachers.append(optimizers)
    if runs.winner and sum(isinstance(outcome, FinishedRun) for outcome in outcomes.values()) > 1:
        shown_teachers.append(tables.optimizers_table(runs.recipe, runs.winner, outcomes, {}))
    answers = compare.comparison_items(comparisons, with_figures=with_figures)
    return [
        Section("Students", shown_students),
        *([Section("Comparisons", answers, COMPARED)] if answers else []),
        Section("Teachers", shown_teachers),
    ]


def closing_section(runs: FinishedRuns) -> Section:
    """Return what the report closes with: settings, every run as it was trained, and the paper's tables."""
    finished = runs.all
    shown: list[Item] = [tables.settings_table(runs.recipe, runs.num_classes)]
    shown += [tables.runs_table(finished)] if finished else []
    shown += [overview_table(runs)] if runs.recipe.dataset.source in paper.TABLES else []
    return Section("Settings", shown)


def detail_sections(context: Context, runs: FinishedRuns, *, with_figures: bool) -> list[Section]:
    """Return the report's sections on classes, augmented views and attention."""
    from stages.reports.attention import attention
    from stages.reports.classes import by_class
    from stages.reports.views import teacher_on_views

    distill = f"pipeline distill --recipe {runs.recipe.name} --student {next(iter(runs.recipe.students))}"
    label = f"pipeline label --recipe {runs.recipe.name}"

    def section(name: str, title: str, draw: Callable[[], Sequence[Item]], how: str) -> Section:
        items = (draw() or [Missing(title, NOT_RUN, how)]) if with_figures else [Missing(title, LEFT_OUT)]
        return Section(name, items)

    learned, views, maps = "What the student learns from", "The teacher on augmented views", "Attention maps"
    return [
        section("By class", "Confusion and agreement by class", lambda: by_class(runs), distill),
        section(learned, views, lambda: _unless_stale(context, views, teacher_on_views, runs), label),
        section("Attention", maps, lambda: _unless_stale(context, maps, attention, runs), distill),
    ]


def _unless_stale(
    context: Context, title: str, draw: Callable[[Context, FinishedRuns], Sequence[Item]], runs: FinishedRuns
) -> Sequence[Item]:
    """Draw from data, labels or weights; where these are damaged or no longer the recipe's, say so instead."""
    try:
        return draw(context, runs)
    except DataError as error:
        context.say(f"left out: {title}: {error}")
        return [Missing(title, f"left out: {error}")]


def overview_table(runs: FinishedRuns) -> Table:
    """Return a table of the paper's tables and figures: how much of each is in this report, or where to get it."""
    recipe, source = runs.recipe, runs.recipe.dataset.source
    num_teachers = (
        f"{sum(bool(runs.seeds('teacher', name)) for name in recipe.teachers)} of {len(recipe.teachers)} teachers"
    )
    num_students = (
        f"{sum(bool(runs.seeds('student', name)) for name in recipe.students)} of {len(recipe.students)} students"
    )
    sweep = [name for name, run in tables.optimizer_runs(runs).items() if isinstance(run, FinishedRun)]
    rows = [
        ["Table 1", "settings and parameters of the students", "all, without a run"],
        ["Table 2, Figure 4", "teachers", num_teachers],
        ["Figure 5", "the selected teacher by optimiser", ", ".join(sweep) if len(sweep) > 1 else NOT_RUN],
    ]
    for other, table in paper.TABLES.items():
        name, where = (recipe.name, num_students) if other == source else (other, f"pipeline report --recipe {other}")
        rows.append([f"{table}, {paper.FIGURES[other]}", f"students on {name}", where])
    rows.append(["Table 6", "accuracy lost from teacher to student", num_students])
    note = (
        "The paper is arXiv:2502.16762; a difference is our figure minus the paper's. A report covers one recipe; the "
    )
    note += "paper's tables of other data sets are in the reports of their recipes."
    return Table("The paper's tables and figures", ("in the paper", "what", "here"), rows, note)


def _write(directory: Path, title: str, text: str, sections: Sequence[Section], content: Mapping[str, Any]) -> None:
    """Write all files together, report.json last, and delete those that only a former report wrote."""
    items = [item for section in sections for item in section.items]
    files: dict[str, bytes] = {}
    for name, item in zip(file_names(items), items, strict=True):
        if isinstance(item, Table):
            files[f"tables/{name}.csv"] = item.to_csv()
        elif isinstance(item, Figure):
            files[f"figures/{name}.png"] = item.png
            if item.data is not None:
                files[f"tables/{name}.csv"] = item.data.to_csv()
    files["report.md"] = page.to_markdown(title, text, sections, pictures="figures")
    files["report.html"] = page.to_html(title, text, sections)
    (directory / "figures").mkdir(parents=True, exist_ok=True)  # DVC expects it, also where nothing was drawn
    former = _former_files(directory / "report.json") - set(files)
    for place in (directory, directory / "tables", directory / "figures"):
        remove_leftovers(place)
    contents = {**files, "report.json": to_json({**content, "files": sorted(files)})}
    write_together({directory / name: data for name, data in contents.items()})
    for name in former:
        (directory / name).unlink(missing_ok=True)


def _former_files(path: Path) -> set[str]:
    """Return the tables and figures that a former report in the same directory lists."""
    try:
        former = read_json(path) if path.is_file() else {}
    except DataError:
        return set()  # it is about to be replaced
    files = former.get("files", []) if isinstance(former, dict) else []
    return {name for name in files if isinstance(name, str) and OWN_FILE.fullmatch(name)}


def _as_json(runs: FinishedRuns) -> dict[str, Any]:
    """Return every run's metrics, and under `run` where and when it took place.

    A student with a teacher's name is found under `NAME (student)`.
    """

    def metrics(finished: Mapping[str, FinishedRun]) -> dict[str, Any]:
        return {name: {**run.metrics, "run": dict(run.environment)} for name, run in finished.items()}

    students = {f"{name} (student)" if name in runs.teachers else name: run for name, run in runs.students.items()}
    return {
        "recipe": runs.recipe.name,
        "selected": runs.winner,
        "models": metrics({**runs.teachers, **students}),
        "other_runs": metrics(runs.others),
        "left_out": dict(runs.left_out),
    }
