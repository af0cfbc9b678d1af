"""Commands of stage two."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click
from click.core import ParameterSource

from pipeline.config.recipes import MAX_VIEWS
from pipeline.errors import UsageError
from stages.shared.options import (
    PATH,
    FiniteFloat,
    device_option,
    dry_run_option,
    open_context,
    parse_seeds,
    parse_settings,
    recipe_option,
    require_exists,
    time_limit_option,
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
@click.option(
    "--soft",
    type=FiniteFloat(0.0, 1000.0),
    metavar="T",
    help="Learn from the teacher's probabilities at temperature T; 0 from its label alone.",
)
@click.option("--confidence", is_flag=True, help="Weigh the samples by the teacher's probability of its label.")
@click.option("--seeds", metavar="A,B,...", help="Train with each of these seeds, and say mean and standard deviation.")
@click.option("--views", "num_views", type=click.IntRange(1, MAX_VIEWS), help="Train on the first views only.")
@time_limit_option
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
    seeds: str | None,
    dry_run: bool,
) -> None:
    """Train a student against the cached labels."""
    if teacher is not None:
        require_exists(teacher)
    several = parse_seeds(seeds)
    if several and click.get_current_context().get_parameter_source("seed") is not ParameterSource.DEFAULT:
        raise UsageError(f"--seed {seed} --seeds {seeds}: give one of them")
    context = open_context(recipe, device)
    from pipeline.report.tables import spread
    from pipeline.system.storage import read_json
    from stages.distill import distill as run

    found = []
    with context.joined() if several else nullcontext():  # torchrun's ranks meet once for all seeds
        for each in several or (seed,):
            out = run(
                context,
                student,
                labels=labels,
                teacher=teacher,
                confidence=confidence,
                num_views=num_views,
                settings=parse_settings(settings, soft=soft),
                seed=each,
                fresh=fresh,
                dry_run=dry_run,
            )
            if dry_run:
                continue
            found.append(read_json(out / "metrics.json"))
            best, last, test = (found[-1][key] for key in ("best", "last", "test"))
            context.say(
                f"{out}: best top-1 {best['top1']:.2f} % in epoch {best['epoch']}, "
                f"last {last['top1']:.2f} %, test {test['top1']:.2f} %"
            )
    if several and not dry_run:
        best, last, test = (spread([one[key]["top1"] for one in found]) for key in ("best", "last", "test"))
        context.say(
            f"{student}, seeds {seeds}, mean ± standard deviation (number): "
            f"top-1 % of the best epochs {best}, of the last {last}, on test {test}"
        )
    context.end()
