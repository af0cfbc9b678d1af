"""Commands of stage two."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline.recipes import MAX_VIEWS
from stages.options import (
    PATH,
    device_option,
    dry_run_option,
    open_context,
    parse_settings,
    recipe_option,
    require_exists,
    training_options,
)


@click.command()
@click.option("--student", required=True, help="A student of the recipe, as titn.")
@recipe_option
@device_option
@training_options
@click.option(
    "--labels",
    type=click.Choice(["cached", "none", "online"]),
    default="cached",
    show_default=True,
    help="none and online are controls; they go to data/runs.",
)
@click.option("--teacher", type=PATH, help="The checkpoint that --labels online asks.")
@click.option("--soft", type=float, metavar="T", help="Learn from the teacher's probabilities at temperature T.")
@click.option("--confidence", is_flag=True, help="Weigh the samples by the teacher's probability of its label.")
@click.option("--views", "num_views", type=click.IntRange(1, MAX_VIEWS), help="Train on the first views only.")
@dry_run_option
def distill(
    student: str,
    recipe: str | None,
    device: str | None,
    fresh: bool,
    seed: int,
    settings: tuple[str, ...],
    labels: str,
    teacher: Path | None,
    soft: float | None,
    confidence: bool,
    num_views: int | None,
    dry_run: bool,
) -> None:
    """Train a student against the cached labels."""
    if teacher is not None:
        require_exists(teacher)
    context = open_context(recipe, device)
    from stages.distill import distill as run

    out = run(
        context,
        student,
        labels=labels,
        teacher=teacher,
        soft=soft,
        confidence=confidence,
        num_views=num_views,
        settings=parse_settings(settings),
        seed=seed,
        fresh=fresh,
        dry_run=dry_run,
    )
    if dry_run:
        return
    metrics = json.loads((out / "metrics.json").read_text())
    best, last = metrics["best"], metrics["last"]
    context.say(
        f"{out}: best top-1 {best['top1']:.2f} % in epoch {best['epoch']}, "
        f"last {last['top1']:.2f} %, test {metrics['test']['top1']:.2f} %"
    )
    context.end()
