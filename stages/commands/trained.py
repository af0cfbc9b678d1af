"""Commands that use trained models, wherever their data may be."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from pipeline.config.recipes import PRECISIONS
from pipeline.errors import PipelineError, printable
from stages.shared.options import PATH, device_option, json_option, open_console, parse_batch_sizes, precision_option


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--topk", default=5, show_default=True, type=click.IntRange(1), help="Classes to name, at most all.")
@device_option
@precision_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each image.")
def predict(
    checkpoint: Path, images: tuple[str, ...], topk: int, device: str | None, precision: str | None, as_json: bool
) -> None:
    """Name the classes of images, by a student or a teacher.

    CHECKPOINT is a directory that a stage or export wrote, or a file in it; nothing else is needed. An IMAGE is a file;
    a folder, of which all PNG, JPEG, WebP, PPM and BMP files are taken at any depth, in the order of their names'
    bytes; or -, one image's bytes on standard input. For a list of files use xargs.

    Of two heads the prediction is the mean of their probabilities; what each says alone stands beside it. What can't
    be read is named on standard error, the rest is answered, and the exit code is 1.
    """
    from collections import Counter

    from pipeline.data.images import BadFile
    from stages.predict import predict as run
    from stages.trained import load_trained

    predictor = load_trained(checkpoint, device, precision).predictor
    # A heading as wide as its columns.
    width = max(len("distillation head") - 9, *(len(printable(name)) for name in predictor.class_names))
    left_out: Counter[str] = Counter()
    standard_input = sys.stdin.buffer if "-" in images else None
    num_good = num_bad = 0
    for found in run(predictor, images, topk=topk, left_out=left_out, standard_input=standard_input):
        if isinstance(found, BadFile):
            num_bad += 1
            click.echo(f"{found.path}: {found.reason}", err=True)
            continue
        if not as_json and not num_good and (heading := found.heading(width)) is not None:
            click.echo(heading)
        num_good += 1
        click.echo(json.dumps(found.as_json()) if as_json else found.as_text(width))
    if left_out:
        counts = ", ".join(f"{count} {printable(suffix) or 'without any'}" for suffix, count in left_out.most_common())
        click.echo(f"left out, not having an image's suffix: {counts}", err=True)
    if num_bad:
        raise PipelineError(f"{num_bad} of {num_bad + num_good} could not be read; they are named above")


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...", type=PATH)
@click.option("--batch-sizes", default="1,8,64,256", show_default=True, help="Images a batch.")
@device_option
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; PyTorch's choice where left out.")
@click.option("--rounds", type=click.IntRange(1, 10000), default=10, show_default=True, help="Turns of each.")
@json_option
def bench(
    checkpoints: tuple[Path, ...],
    batch_sizes: str,
    device: str | None,
    precision: str,
    threads: int | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Show what models cost and how fast they answer here.

    Several checkpoints take turns, so that what else the machine does hits all of them. Timed are batches of pixels;
    reading image files is left out.
    """
    from pipeline.inference.speed import measure_speed
    from stages.bench import conditions, costs_table, cpu_threads, load, speed_table

    sizes, console = parse_batch_sizes(batch_sizes), open_console()
    with cpu_threads(threads):
        predictors, costs = load(checkpoints, device, precision)
        devices = [each.device for each in predictors.values()]
        on = next((each for each in devices if each.type != "cpu"), devices[0])
        where = conditions(on, rounds)
        if not as_json:
            console.print(costs_table(costs).to_rich(console.width))
        speeds = measure_speed(predictors, sizes, rounds=rounds)
        if as_json:
            found = {"environment": where, "models": costs, "speeds": [dataclasses.asdict(each) for each in speeds]}
            click.echo(json.dumps(found, indent=2))
        else:
            console.print(speed_table(speeds, where, on).to_rich(console.width))
