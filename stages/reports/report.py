"""`pipeline report`: one page, Markdown, tables and figures of whatever of a recipe has been run."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import page, paper
from pipeline.errors import DataError, UsageError
from pipeline.page import Item, Missing, Section, file_names
from pipeline.reporting import Figure, Table
from pipeline.storage import read_json, write_atomic, write_json
from stages.context import Context
from stages.reports.others import optimizer_runs, optimizers_table, others_table
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.reports.settings import distilled_students, settings_table
from stages.reports.tables import all_teachers, drops_table, students_tables

OWN_FILE = re.compile(r"(tables|figures)/[a-z0-9-]+\.(csv|png)")
STUDENTS_FIGURES = {"cifar100": "Figure 6", "cifar10": "Figure 7", "mnist": "Figure 8"}
SWEEP = "pipeline teacher-select --optimizers sgd,adam,rmsprop --recipe {}"


@dataclass(frozen=True)
class Report:
    """What has been written.

    Attributes:
        directory: Where.
        files: Its files, relative to it.
        tables: The paper's tables, and other runs, for the terminal.
    """

    directory: Path
    files: Sequence[str]
    tables: Sequence[Table]


def report(
    context: Context, out: Path | None = None, *, with_figures: bool = True, tracked_only: bool = False
) -> Report:
    """Write report.html, report.md, report.json, tables/*.csv and figures/*.png from what has been run.

    Args:
        context: The command's setting.
        out: Directory of all; None takes data/<recipe>/reports.
        with_figures: Whether to draw; without, matplotlib is not needed.
        tracked_only: Whether to leave out data/runs, which DVC does not track.

    Raises:
        UsageError: matplotlib is missing, or a student's settings do not go together.
        DataError: A file of a run is damaged.
    """
    if with_figures and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "report: figures need matplotlib: pip install 'titn-pipeline[report]', or leave them out by --no-figures"
        )
    runs = FinishedRuns.read(context.recipe, context.paths)
    runs = replace(runs, others={}) if tracked_only else runs
    sections = make_sections(context, runs, with_figures=with_figures, tracked_only=tracked_only)
    directory = context.paths.report.parent if out is None else out
    files = _write(directory, _title(runs), _lead(runs, tracked_only=tracked_only), sections, runs)
    if out is None:
        context.changed("report")
    tables = [item for section in sections[:3] for item in section.items if isinstance(item, Table)]
    return Report(directory, files, tables)


def make_sections(
    context: Context, runs: FinishedRuns, *, with_figures: bool = True, tracked_only: bool = False
) -> list[Section]:
    """Return the parts of the report, in order."""
    drawn: dict[str, Figure] = {}
    others = others_table(runs)
    left_out = "" if with_figures else "left out by --no-figures"
    distilled = distilled_students(runs.recipe)
    return [
        Section("What was run", [overview_table(runs), settings_table(runs.recipe)]),
        Section("Teachers", _teachers(runs, drawn, left_out)),
        Section(
            "Students",
            [
                *students_tables(runs),
                *_curves(runs, drawn, left_out),
                drops_table(runs, distilled),
                *([others] if others else []),
            ],
        ),
    ]


def overview_table(runs: FinishedRuns) -> Table:
    """Return a row for each of the paper's tables and figures: how much of it this report shows, or which one would."""
    recipe, source = runs.recipe, runs.recipe.dataset.source
    num_teachers = f"{sum(bool(runs.seeds(name)) for name in recipe.teachers)} of {len(recipe.teachers)} teachers"
    num_students = f"{sum(bool(runs.seeds(name)) for name in recipe.students)} of {len(recipe.students)} students"
    sweep = [name for name, run in optimizer_runs(runs).items() if isinstance(run, FinishedRun)]
    own = [["Table 1", "settings and parameters of the students", "all, without a run"]]
    own += [["Table 2, Figure 4", "teachers", num_teachers]]
    own += [["Figure 5", "the selected teacher by optimiser", ", ".join(sweep) or "not run"]]
    shown = source if source in paper.TABLES else None
    if shown is None:
        own += [["Table 3 and Figure 6 in form", f"students on {recipe.name}", num_students]]
    for other, table in paper.TABLES.items():
        where = num_students if other == shown else f"pipeline report --recipe {other}"
        name = f"{table}, {STUDENTS_FIGURES[other]}"
        own.append([name, f"students on {recipe.name if other == shown else other}", where])
    own += [["Table 6", "accuracy lost from teacher to student", num_students]]
    note = "A report is on one recipe; the paper's tables of other data sets are in the reports of theirs."
    return Table("The paper's tables and figures", ("in the paper", "what", "here"), own, note)


def _title(runs: FinishedRuns) -> str:
    return f"Report on {runs.recipe.name}"


def _lead(runs: FinishedRuns, *, tracked_only: bool) -> str:
    """Say in a few sentences what has been reached."""
    recipe = runs.recipe
    parts = [f"Data: {recipe.dataset.source}."]
    winner = runs.teachers.get(runs.winner or "")
    if winner is not None:
        parts.append(f"Selected teacher: {winner.name}, {winner.metrics['test']['top1']:.2f} % of the test images.")
    trained = list(runs.students.values())
    if trained:
        best = max(trained, key=lambda run: run.metrics["test"]["top1"])
        parts.append(f"Best student: {best.name}, {best.metrics['test']['top1']:.2f} % at its best epoch.")
    if not runs.teachers and not trained:
        parts.append(
            f"Nothing has been run yet: pipeline teacher-select --recipe {recipe.name}, then pipeline distill."
        )
    if tracked_only:
        parts.append("Runs of data/runs are left out, since DVC does not track them; `pipeline report` shows them.")
    parts.append("Ours beside the paper's, arXiv:2502.16762; a difference is ours less the paper's.")
    return " ".join(parts)


def _teachers(runs: FinishedRuns, drawn: Mapping[str, Figure], left_out: str) -> list[Item]:
    recipe = runs.recipe
    items: list[Item] = [all_teachers(runs)]
    title = "Figure 4. Test accuracy of the teachers over the epochs"
    items.append(
        drawn.get("figure-4")
        or Missing(title, left_out or "not run", _unless(left_out, "pipeline teacher-select --recipe " + recipe.name))
    )
    outcomes = optimizer_runs(runs)
    swept = sum(isinstance(outcome, FinishedRun) for outcome in outcomes.values()) > 1
    title, command = "Figure 5. The selected teacher by optimiser", SWEEP.format(recipe.name)
    if swept and runs.winner:
        items.append(drawn.get("figure-5") or Missing(title, left_out or "not run", _unless(left_out, command)))
        items.append(optimizers_table(recipe, runs.winner, outcomes, {}))
    else:
        items.append(Missing(title, "not run", command))
    return items


def _curves(runs: FinishedRuns, drawn: Mapping[str, Figure], left_out: str) -> list[Item]:
    recipe = runs.recipe
    number = STUDENTS_FIGURES.get(recipe.dataset.source, "Figure 6")
    title = f"{number}. Test accuracy of the students over the epochs"
    figure = drawn.get(number.lower().replace(" ", "-"))
    command = f"pipeline distill --student titn --recipe {recipe.name}"
    return [figure or Missing(title, left_out or "not run", _unless(left_out, command))]


def _unless(left_out: str, command: str) -> str:
    return "" if left_out else command


def _write(directory: Path, title: str, lead: str, sections: Sequence[Section], runs: FinishedRuns) -> list[str]:
    """Write all files, report.json last, delete what a former report wrote and this one does not, and name them."""
    items = [item for section in sections for item in section.items]
    files: dict[str, bytes] = {}
    for name, item in zip(file_names(items), items, strict=True):
        if isinstance(item, Table):
            files[f"tables/{name}.csv"] = item.to_csv()
        elif isinstance(item, Figure):
            files[f"figures/{name}.png"] = item.png
            if item.data is not None:
                files[f"figures/{name}.csv"] = item.data.to_csv()
    files["report.md"] = page.to_markdown(title, lead, sections, pictures="figures")
    files["report.html"] = page.to_html(title, lead, sections)
    former = _former_files(directory / "report.json")
    for name, content in files.items():
        write_atomic(directory / name, content)
    write_json(directory / "report.json", {**_figures(runs), "files": sorted(files)})
    for name in former - set(files):
        (directory / name).unlink(missing_ok=True)
    return [*files, "report.json"]


def _former_files(path: Path) -> set[str]:
    """Return the tables and figures that a former report in the same directory lists as its own."""
    try:
        former = read_json(path) if path.is_file() else {}
    except DataError:
        return set()  # it is about to be replaced
    files = former.get("files", []) if isinstance(former, dict) else []
    return {name for name in files if isinstance(name, str) and OWN_FILE.fullmatch(name)}


def _figures(runs: FinishedRuns) -> dict[str, Any]:
    """Return report.json: every run's metrics, and under `run` where and when it took place."""

    def all_of(found: Mapping[str, FinishedRun]) -> dict[str, Any]:
        return {name: {**run.metrics, "run": dict(run.environment)} for name, run in found.items()}

    return {
        "recipe": runs.recipe.name,
        "selected": runs.winner,
        "models": all_of({**runs.teachers, **runs.students}),
        "other_runs": all_of(runs.others),
    }
