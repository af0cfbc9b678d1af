"""The command that shows what has been reached."""

from __future__ import annotations

from pathlib import Path

import click

from stages.shared.options import PATH, open_context, recipe_option


@click.command()
@recipe_option
@click.option("--out", type=PATH, help="Directory of the report; data/<recipe>/reports if left out.")
@click.option("--no-figures", is_flag=True, help="Draw nothing; matplotlib is not needed then.")
@click.option("--tracked-only", is_flag=True, help="Leave out data/runs, which DVC does not track.")
def report(recipe: str | None, out: Path | None, no_figures: bool, tracked_only: bool) -> None:
    """Write a page, tables and figures of what has been run."""
    from stages.reports.report import report as run

    context = open_context(recipe)
    written = run(context, out, with_figures=not no_figures, tracked_only=tracked_only)
    for table in written.tables:
        context.show(table)
    context.say(f"wrote {written.directory / 'report.html'}, report.md, report.json, tables/ and figures/")
    context.end()
