"""What models are in recipes and in checkpoints, and the list of all of them."""

from __future__ import annotations

from typing import Any

from pipeline.report.tables import Table
from stages.shared.runs import costs


def list_models(num_classes: int, image_size: int = 32) -> list[dict[str, Any]]:
    """Return name, kind and costs of every student and teacher."""
    from pipeline.models.students import STUDENTS
    from pipeline.models.teachers import TEACHERS

    geometry = {"num_classes": num_classes, "image_size": image_size}
    students = {name: (name, geometry) for name in STUDENTS}
    if "titn" in students:
        students["titn-large-patch"] = ("titn", {**geometry, "patch_size": 16, "pixel_size": 4})
    entries = [(name, "student", model, arguments) for name, (model, arguments) in students.items()]
    entries += [(name, "teacher", name, {"num_classes": num_classes}) for name in TEACHERS]
    return [
        {
            "name": name,
            "kind": kind,
            **costs({"kind": kind, "model": model, "arguments": arguments}, image_size),
        }
        for name, kind, model, arguments in entries
    ]


def models_table(models: list[dict[str, Any]], num_classes: int) -> Table:
    """Return the table of `list_models`."""
    return Table(
        title=f"Models, {num_classes} classes, 32x32 images",
        columns=("model", "kind", "parameters", "paper GMACs, batch 1024", "FLOPs of one image"),
        rows=[
            (
                model["name"],
                model["kind"],
                f"{model['parameters']:,}",
                f"{model['paper_gmacs_1024']:.2f}",
                f"{model['flops_per_image']:,}",
            )
            for model in models
        ],
        note="Paper GMACs: 10^9 multiply-accumulates by the paper's convention (Table 3 calls them GFLOPs); "
        "FLOPs by PyTorch's counter, attention included.",
    )
