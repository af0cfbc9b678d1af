"""Commands that look into a label file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline.errors import PipelineError
from stages.shared.options import (
    PATH,
    FiniteFloat,
    device_option,
    json_option,
    open_context,
    recipe_option,
    require_exists,
)


@click.group()
def labels() -> None:
    """Look into a label file, or replay its teacher."""


@labels.command()
@click.argument("file", type=PATH)
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Show what a label file holds and where it comes from."""
    from stages.labels import inspect as run

    require_exists(file)
    found = run(file)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        click.echo(f"{key}: {json.dumps(value) if isinstance(value, dict) else value}")


@labels.command()
@click.argument("file", type=PATH)
@recipe_option
@device_option
@click.option("--sample", default=1000, show_default=True, type=click.IntRange(1), help="Labels to replay.")
@click.option("--teacher", type=PATH, help="The checkpoint; the selected teacher if left out.")
@click.option("--margin", type=FiniteFloat(0.0), help="Largest logit margin of a difference that may pass.")
def verify(
    file: Path,
    recipe: str | None,
    device: str | None,
    sample: int,
    teacher: Path | None,
    margin: float | None,
) -> None:
    """Replay the teacher on some labels; exit 1 if it would give others."""
    from stages.labels import verify as run

    require_exists(file)
    context = open_context(recipe, device)
    if teacher is not None:
        require_exists(teacher)
    replay, allowed = run(context, file, teacher=teacher, num_samples=sample, margin=margin)
    failed = [difference for difference in replay.differences if difference.margin > allowed]
    for difference in replay.differences:
        context.say(
            f"view {difference.view}, sample {difference.sample}: cached {difference.cached}, now "
            f"{difference.replayed}, logit margin {difference.margin:.4g}"
            + ("" if difference.margin > allowed else " (near tie, allowed)")
        )
    context.say(
        f"{file}: {replay.num_samples} labels replayed, {len(replay.differences)} differ, "
        f"{len(failed)} by more than {allowed:g}"
    )
    if replay.probability_error is not None:
        context.say(f"{file}: probabilities differ by at most {replay.probability_error:.2g}")
    if failed:
        raise PipelineError(f"{file}: {len(failed)} labels are not the teacher's; run `pipeline label --fresh`")
