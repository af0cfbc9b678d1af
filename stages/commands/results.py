"""Commands that show what has been reached."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stages.options import (
    device_option,
    json_option,
    open_console,
    open_context,
    precision_option,
    recipe_option,
    require_exists,
)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@recipe_option
@device_option
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "val", "test"]))
@precision_option
@json_option
def evaluate(
    checkpoint: Path, recipe: str | None, device: str | None, split: str, precision: str | None, as_json: bool
) -> None:
    """Score a checkpoint on a recipe's data."""
    from stages.evaluate import evaluate_checkpoint, scores_table

    require_exists(checkpoint)
    context = open_context(recipe, device)
    result = evaluate_checkpoint(context, checkpoint, split=split, precision=precision)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        context.show(scores_table(result))


@click.command()
@recipe_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory of the report; data/<recipe>/reports if left out."
)
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


@click.command()
@click.option("--classes", default=100, show_default=True, type=click.IntRange(2, 65535))
@json_option
def models(classes: int, as_json: bool) -> None:
    """List students and teachers with their parameters and costs."""
    from stages.models import list_models, models_table

    found = list_models(classes)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        console = open_console()
        console.print(models_table(found, classes).to_rich(console.width))
