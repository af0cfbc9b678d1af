"""`pipeline models`: every student and teacher, and what it costs."""

from __future__ import annotations

import json
from typing import Any

import click

from pipeline.report.tables import Table
from stages.shared.options import json_option, open_console
from stages.shared.runs import costs


@click.command("models")
@click.option("--classes", default=100, show_default=True, type=click.IntRange(2, 65535))
@json_option
def command(classes: int, as_json: bool) -> None:
    """List students and teachers with their parameters and costs."""
    models = list_models(classes)
    if as_json:
        click.echo(json.dumps(models, indent=2))
    else:
        console = open_console()
        console.print(models_table(models, classes).to_rich(console.width))


def list_models(num_classes: int, image_size: int = 32) -> list[dict[str, Any]]:
    """Return name, kind and costs of every student and teacher."""
    from pipeline.models import TEACHERS
    from pipeline.models.students import STUDENTS

    geometry = {"num_classes": num_classes, "image_size": image_size}
    students = {name: (name, geometry) for name in STUDENTS}
    if "titn" in students:
        students["titn-large-patch"] = ("titn", {**geometry, "patch_size": 16, "pixel_size": 4})
    models = [(name, "student", model, arguments) for name, (model, arguments) in students.items()]
    models += [(name, "teacher", name, {"num_classes": num_classes}) for name in TEACHERS]
    return [
        {"name": name, "kind": kind, **costs({"kind": kind, "model": model, "arguments": arguments}, image_size)}
        for name, kind, model, arguments in models
    ]


def models_table(models: list[dict[str, Any]], num_classes: int) -> Table:
    """Return the table of `list_models`."""
    cells = ("{name}", "{kind}", "{parameters:,}", "{paper_gmacs_1024:.2f}", "{flops_per_image:,}")
    return Table(
        title=f"Models, {num_classes} classes, 32x32 images",
        columns=("model", "kind", "parameters", "paper GMACs, batch 1024", "FLOPs of one image"),
        rows=[[cell.format(**model) for cell in cells] for model in models],
        note="Paper GMACs: 10^9 multiply-accumulates by the paper's convention (Table 3 calls them GFLOPs); "
        "FLOPs by PyTorch's counter, attention included.",
    )
