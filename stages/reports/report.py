"""`pipeline report`: one page, Markdown, tables and figures of whatever of a recipe has been run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, UsageError
from pipeline.report import page
from pipeline.report.figures import require_matplotlib
from pipeline.report.page import Section, file_names
from pipeline.report.tables import Figure, Table
from pipeline.system.storage import read_json, write_atomic, write_json
from stages.reports.comparisons import Comparisons
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.reports.sections import detail_sections, lead, main_sections
from stages.shared.context import Context

OWN_FILE = re.compile(r"tables/[a-z0-9-]+\.csv|figures/[a-z0-9-]+\.png")


@dataclass(frozen=True)
class Report:
    """What has been written.

    Attributes:
        directory: Where.
        files: Its files, relative to it.
        tables: The paper's tables, other runs and comparisons, for the terminal.
    """

    directory: Path
    files: Sequence[str]
    tables: Sequence[Table]


def report(
    context: Context, out: Path | None = None, *, with_figures: bool = True, tracked_only: bool = False
) -> Report:
    """Write report.html, report.md, report.json, tables/ and figures/ from what has been run.

    tables/ holds a CSV file for each table and for the figures behind each picture of figures/.

    Args:
        context: The command's setting.
        out: Directory of all; None takes data/<recipe>/reports.
        with_figures: Whether to draw; without, matplotlib is not needed.
        tracked_only: Whether to leave out data/runs, which DVC does not track.

    Raises:
        UsageError: matplotlib is missing, or a student's settings do not go together.
        DataError: A file of a run is damaged.
    """
    if with_figures:
        try:
            require_matplotlib()
        except UsageError as error:
            raise UsageError(f"{error}; or leave them out: pipeline report --no-figures") from None
    runs = FinishedRuns.read(context.recipe, context.paths)
    runs = replace(runs, others={}) if tracked_only else runs
    comparisons = Comparisons.find(runs)
    main = main_sections(context, runs, comparisons, with_figures=with_figures)
    sections = [*main, *detail_sections(context, runs, with_figures=with_figures)]
    directory = context.paths.reports if out is None else out
    text = lead(runs, tracked_only=tracked_only)
    figures = {**_figures(runs), "comparisons": comparisons.as_json()}
    files = _write(directory, f"Report on {runs.recipe.name}", text, sections, figures)
    if out is None:
        context.changed("report")
    tables = [item for section in main for item in section.items if isinstance(item, Table)]
    return Report(directory, files, tables)


def _write(
    directory: Path, title: str, text: str, sections: Sequence[Section], figures: Mapping[str, Any]
) -> list[str]:
    """Write all files, report.json last, delete what a former report wrote and this one does not, and name them."""
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
    former = _former_files(directory / "report.json")
    for name, content in files.items():
        write_atomic(directory / name, content)
    write_json(directory / "report.json", {**figures, "files": sorted(files)})
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
