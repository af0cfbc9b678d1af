"""Commands that show what has been reached."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline.errors import UsageError
from stages.shared.options import (
    PATH,
    device_option,
    json_option,
    open_console,
    open_context,
    precision_option,
    recipe_option,
    require_exists,
)


@click.command()
@click.argument("checkpoint", type=PATH)
@recipe_option
@device_option
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Of the recipe's data; test where left out.")
@click.option("--data", type=PATH, help="Score on this folder's <class>/* or test/<class>/*.")
@click.option("--skip-bad", is_flag=True, help="Leave corrupt, empty and oversized files of --data out.")
@click.option("--per-class", is_flag=True, help="Show each class too, the worst first.")
@precision_option
@json_option
def evaluate(
    checkpoint: Path,
    recipe: str | None,
    device: str | None,
    split: str | None,
    data: Path | None,
    skip_bad: bool,
    per_class: bool,
    precision: str | None,
    as_json: bool,
) -> None:
    """Score a checkpoint on a recipe's data, or on any folder's.

    With --data neither recipe nor prepared data are needed. Its folders are matched with the checkpoint's classes by
    name; classes may be absent, others are refused.
    """
    from stages.evaluate import classes_table, evaluate_checkpoint, evaluate_folder, scores_table

    require_exists(checkpoint)
    if data is None:
        if skip_bad:
            raise UsageError("--skip-bad: the recipe's data have been prepared; use it with --data")
        context = open_context(recipe, device)
        result = evaluate_checkpoint(
            context, checkpoint, split=split or "test", precision=precision, per_class=per_class
        )
    else:
        if recipe is not None or split is not None:
            given = "--recipe" if recipe is not None else "--split"
            raise UsageError(f"--data and {given}: both say what to score on; give one of them")
        result = evaluate_folder(
            checkpoint, data, device=device, precision=precision, skip_bad=skip_bad, per_class=per_class
        )
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    console = open_console()
    for table in (scores_table, classes_table) if per_class else (scores_table,):
        console.print(table(result).to_rich(console.width))


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
