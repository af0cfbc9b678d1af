"""`pipeline bench CHECKPOINT...`: what trained models cost and how fast they answer here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.config.recipes import PRECISIONS
from pipeline.errors import UsageError
from pipeline.inference.card import ROUNDED
from pipeline.models.own import is_own
from pipeline.report.tables import Table, number
from pipeline.system.neighbours import load_average
from stages.shared.options import PATH, any_device_option, json_option, load_model, open_console, parse_batch_sizes
from stages.shared.params import own_code_here
from stages.shared.paths import Paths
from stages.shared.trained import Judged, require_same_data

if TYPE_CHECKING:
    from pipeline.inference.classifier import Classifier
    from pipeline.inference.speed import Speed


@click.command("bench")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...", type=PATH)
@click.option(
    "--batch-sizes", type=parse_batch_sizes, metavar="A,B,...", default="1,8,64,256", show_default=True,
    help="Images a batch.",
)  # fmt: skip
@any_device_option
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; PyTorch's choice where left out.")
@click.option("--rounds", type=click.IntRange(1, 10000), default=10, show_default=True, help="Turns of each.")
@json_option
def command(
    checkpoints: tuple[Path, ...],
    batch_sizes: tuple[int, ...],
    device: str | None,
    precision: str,
    threads: int | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Show what models cost and how fast they answer here.

    Several checkpoints take turns, so that what else the machine does hits all of them. Batches of
    pixels are timed, not the reading of image files.
    """
    import torch

    from pipeline.inference.speed import measure_speed, shared_device
    from pipeline.system.runtime import environment

    console = open_console()
    models: dict[str, Classifier] = {}
    own_code = own_code_here()
    with cpu_threads(threads):
        for path in checkpoints:
            if str(path) in models:
                raise UsageError(f"{path}: named twice; name each checkpoint once")
            models[str(path)] = model = load_model(path, device, precision)
            check_data(model)
        costs = [{"checkpoint": name, **costs_of(model, own_code)} for name, model in models.items()]
        on = shared_device(models.values())
        where = {**environment(on), "threads": torch.get_num_threads(), "load_average": load_average()}
        where["rounds"] = rounds
        if not as_json:
            console.print(costs_table(costs).to_rich(console.width))
        speeds = measure_speed(models, batch_sizes, rounds=rounds)
        if as_json:
            result = {"environment": where, "models": costs, "speeds": [dataclasses.asdict(speed) for speed in speeds]}
            click.echo(json.dumps(result, indent=2))
        else:
            console.print(speed_table(speeds, where).to_rich(console.width))


def check_data(classifier: Classifier) -> None:
    """Check that a stage's checkpoint was trained on what is prepared for its recipe here; an export needs no data.

    Raises:
        DataError: Other data have been prepared since, on which the scores shown would not be those of the model.
    """
    recipe = classifier.config.get("recipe")
    if classifier.format == "checkpoint" and isinstance(recipe, str):
        assert classifier.file is not None, "it has been loaded"
        way_out = "train it again, or bench its export"
        require_same_data(classifier.config, classifier.file, Paths(recipe), way_out)


def costs_of(classifier: Classifier, own_code: Collection[str] = ()) -> dict[str, Any]:
    """Count what a model costs.

    Args:
        classifier: The model.
        own_code: Functions of the user's that may be run to build it, see pipeline.inference.loading.load.

    Returns:
        Plain JSON values: model, kind, format, precision, device, inner_block, outer_block, image_size, num_classes,
        parameters, file_bytes, paper_macs and flops_per_image (of one image), top1 (percent; None of a quantised one)
        and top1_split (`test` where its score there is known, else the split that chose the checkpoint; None if
        unknown). Of an export's program whose model is other code than `own_code`, paper_macs and flops_per_image are
        None, and parameters is what the export says.
    """
    from pipeline.inference.loading import build_unfilled
    from pipeline.models.counting import flops_per_image, num_parameters, paper_macs

    config, size = classifier.config, classifier.image_size
    assert classifier.file is not None, "it has been loaded"
    # An export's program has been loaded without the code that its model was built by.
    built = None
    model = config["model"]
    if not is_own(model) or model in own_code:
        built = build_unfilled(config["kind"], model, config["arguments"], own_code=own_code)
    parameters = config.get("parameters") if built is None else num_parameters(built)
    judged = Judged.of(config, classifier.file)
    return {
        "model": config["model"],
        "kind": config["kind"],
        "format": classifier.format,
        "precision": classifier.precision,
        "device": classifier.device.type,
        "inner_block": classifier.inner_block if classifier.format == "checkpoint" else None,
        "outer_block": classifier.outer_block if classifier.format == "checkpoint" else None,
        "image_size": size,
        "num_classes": len(classifier.class_names),
        "parameters": parameters if type(parameters) is int else None,
        "file_bytes": classifier.file.stat().st_size,
        "paper_macs": None if built is None else paper_macs(built, size),
        "flops_per_image": None if built is None else flops_per_image(built, size),
        "top1": judged.scores.get("top1") if classifier.format not in ROUNDED else None,
        "top1_split": judged.split,
    }


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use so many CPU threads for one operation; None leaves its choice."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def costs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of what the models cost."""
    splits = dict.fromkeys(row["top1_split"] for row in rows if row["top1"] is not None)
    cells = [
        {
            "checkpoint": row["checkpoint"],
            "model": row["model"],
            **{
                f"{split or 'unknown split'} top-1 %": number(row["top1"] if row["top1_split"] == split else None)
                for split in splits
            },
            "parameters": "-" if row["parameters"] is None else f"{row['parameters']:,}",
            "file, MB": _millions(row["file_bytes"]),
            "MACs, M": _millions(row["paper_macs"]),
            "FLOPs, M": _millions(row["flops_per_image"]),
            "inner block": (row["inner_block"] or "-").partition(" ")[0],
            "outer block": (row["outer_block"] or "-").partition(" ")[0],
            "precision": row["precision"],
            "on": row["device"],
            "image": str(row["image_size"]),
        }
        for row in rows
    ]
    note = (
        "Top-1 as it was measured when the model was trained. MACs by the paper's convention, FLOPs by PyTorch's "
        "counter, both of one image and the plain formulation."
    )
    return Table("What they cost", list(cells[0]), [list(row.values()) for row in cells], note)


def _millions(count: int | None) -> str:
    return number(None if count is None else count / 1e6, 1)


def speed_table(speeds: Sequence[Speed], where: Mapping[str, Any]) -> Table:
    """Return the table of how fast the models answer."""
    columns = ["checkpoint", "batch", "median, ms", "quartiles, ms", "p95, ms", "images/s"]
    rows = []
    for speed in speeds:
        times = [number(speed.median_ms), " to ".join(map(number, speed.quartiles_ms)), number(speed.p95_ms)]
        memory = [] if speed.peak_bytes is None else [number(speed.peak_bytes / 2**20, 0)]
        rows.append([speed.name, str(speed.batch_size), *times, f"{speed.images_per_second:,.0f}", *memory])
    if where["device_type"] == "cuda":
        columns.append("memory, MiB")
    note = (
        f"From uint8 pixels in RAM to probabilities in RAM, in turns, {where['rounds']} rounds. {where['device']}, "
        f"load {number(where['load_average'])} at the start, torch {where['versions']['torch']}, {where['date']} UTC."
    )
    return Table("How fast they answer", columns, rows, note)
