"""The command that hands a model on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from pipeline.errors import UsageError
from stages.shared.options import PATH, json_option, open_console, open_context, require_exists


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["onnx", "torchscript", "safetensors"]),
    help="Repeatable; at least one.",
)
@click.option("--out", required=True, type=PATH, help="A new directory, or that of a former export.")
@click.option("--int8", is_flag=True, help="Also quantise the ONNX file, and measure what that costs in accuracy.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of the weights in a safetensors file; bf16 halves it, and its accuracy is measured.",
)
@click.option("--recipe", help="Whose test images it is checked on; the checkpoint's own where left out.")
@click.option("--data", type=PATH, help="Check it on the images of this folder instead.")
@click.option("--license", default="unknown", show_default=True, help="License of the weights, as hubs name it.")
@json_option
def export(
    checkpoint: Path,
    formats: tuple[str, ...],
    out: Path,
    int8: bool,
    dtype: str,
    recipe: str | None,
    data: Path | None,
    license: str,
    as_json: bool,
) -> None:
    """Write a trained model as ONNX, TorchScript or safetensors, with a model card.

    CHECKPOINT is a directory that a stage wrote, or a .safetensors file in it. Each file is compared with PyTorch on
    real images; nothing is written before all of them agree. `pipeline.load` takes the directory in Python.
    """
    require_exists(checkpoint)
    if recipe is not None and data is not None:
        raise UsageError("--recipe and --data: give one of them; both name the images to check on")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", license):
        raise UsageError(f"--license {license!r}: write an identifier, as apache-2.0")
    names = _names(formats, dtype, int8=int8)
    from stages.export import check_out, read_inputs
    from stages.export import export as run
    from stages.export_images import from_folder, from_recipe

    check_out(out)
    found, inputs = read_inputs(checkpoint)
    if data is not None:
        console, real = open_console(), from_folder(data, inputs, labelled=int8 or dtype == "bf16")
    else:
        own = found.meta.get("recipe")
        context = open_context(own if recipe is None and isinstance(own, str) else recipe)
        console, real = context.console, from_recipe(context, inputs)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    config = run(found, inputs, real, out, formats=names, int8=int8, license=license, say=say)
    if as_json:
        click.echo(json.dumps(config, indent=2))


def _names(formats: tuple[str, ...], dtype: str, *, int8: bool) -> tuple[str, ...]:
    """Return the formats as pipeline.inference.exporting.FILES names them, refusing what doesn't go together."""
    if not formats:
        raise UsageError("--format: name one or more of onnx, torchscript and safetensors")
    if dtype == "bf16" and (int8 or set(formats) != {"safetensors"}):
        other = "--int8" if int8 else f"--format {next(name for name in formats if name != 'safetensors')}"
        raise UsageError(
            f"--dtype bf16 {other}: only a safetensors file is written in bf16; export the other by itself"
        )
    if int8 and "onnx" not in formats:
        raise UsageError("--int8: only ONNX files are quantised; add --format onnx")
    return tuple(dict.fromkeys("safetensors-bf16" if dtype == "bf16" else name for name in formats))
