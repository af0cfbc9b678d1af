"""Building models from recipes and from checkpoints, and the list of all of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoints import Checkpoint, load_checkpoint, load_weights
from pipeline.counting import flops_per_image, num_parameters, paper_gmacs_1024
from pipeline.datasets import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.recipes import PRECISIONS, StudentRecipe
from pipeline.reporting import Table

GEOMETRY = ("patch_size", "pixel_size", "width", "depth", "num_heads", "pixel_width", "pixel_heads")
CLASSES = (int, 2, 65535)
IMAGE_SIZES = (int, 4, 1024)


def student_arguments(recipe: StudentRecipe, *, num_classes: int, image_size: int) -> dict[str, Any]:
    """Return what pipeline.students.build_student needs, as plain JSON values."""
    geometry = {key: value for key, value in dataclasses.asdict(recipe).items() if key in GEOMETRY}
    return {"num_classes": num_classes, "image_size": image_size, **geometry}


def describe(dataset: Dataset, recipe_name: str, *, kind: str, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a checkpoint's JSON from which the model can be built and used again."""
    return {
        "kind": kind,
        "model": model,
        "arguments": arguments,
        "recipe": recipe_name,
        "class_names": list(dataset.class_names),
        "image_size": dataset.image_size,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "dataset_sha256": dataset.sha256,
    }


def build(meta: dict[str, Any]) -> nn.Module:
    """Build the untrained model that a checkpoint's JSON describes.

    Raises:
        DataError: The JSON describes no model.
    """
    try:
        kind, model, arguments = meta["kind"], meta["model"], dict(meta["arguments"])
    except (KeyError, TypeError, ValueError):
        raise DataError("the checkpoint's JSON describes no model; name a checkpoint that a stage wrote") from None
    if kind == "student":
        from pipeline.students import build_student

        return build_student(model, **arguments)
    from pipeline.teachers import build_teacher

    return build_teacher(model, **arguments)


def check_description(meta: Mapping[str, Any]) -> None:
    """Refuse a checkpoint's JSON that `describe` cannot have made, before anything is built from it.

    Raises:
        DataError: A field is missing or out of range; the message names it.
    """
    from pipeline.students import STUDENTS
    from pipeline.teachers import TEACHERS

    models = {"student": tuple(STUDENTS), "teacher": tuple(TEACHERS)}
    arguments, names, training = (meta.get(key) for key in ("arguments", "class_names", "training"))
    kind, precision = meta.get("kind"), training.get("precision") if isinstance(training, dict) else None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    limits = _limits(kind)
    checks = {
        "kind": isinstance(kind, str) and kind in models,
        "model": meta.get("model") in models.get(str(kind), ()),
        "arguments": isinstance(arguments, dict) and arguments.keys() <= limits.keys() and "num_classes" in arguments,
        "class_names": is_list,
        "image_size": _is_within(meta.get("image_size"), *IMAGE_SIZES),
        "mean": _is_channels(meta.get("mean"), 0.0),
        "std": _is_channels(meta.get("std"), sys.float_info.min),
        "training.precision": precision in PRECISIONS,
    }
    if isinstance(arguments, dict):
        known = sorted(limits.keys() & arguments.keys())
        checks |= {f"arguments.{key}": _is_within(arguments[key], *limits[key]) for key in known}
        checks["arguments.num_classes"] = is_list and arguments.get("num_classes") == len(names or ())
        checks["arguments.image_size"] = arguments.get("image_size", meta.get("image_size")) == meta.get("image_size")
    wrong = [key for key, is_right in checks.items() if not is_right]
    if wrong:
        raise DataError(f"its JSON describes no model: {', '.join(wrong)}; name a checkpoint that a stage wrote")


def _limits(kind: Any) -> dict[str, tuple[type, float, float]]:
    """Return type, least and largest value of each argument that a model of a kind is built from."""
    if kind == "teacher":
        return {"num_classes": CLASSES, "bn_momentum": (float, 0.0, 1.0)}
    ranges = {field.name: field.metadata.get("range", ()) for field in dataclasses.fields(StudentRecipe)}
    return {"num_classes": CLASSES, "image_size": IMAGE_SIZES, **{name: (int, *ranges[name]) for name in GEOMETRY}}


def _is_within(value: Any, kind: type, low: float, high: float) -> bool:
    return type(value) is kind and isinstance(value, int | float) and low <= value <= high


def _is_channels(value: Any, low: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_within(each, float, low, 1.0) for each in value)


def load_model(path: Path, device: torch.device, *, kind: str | None = None) -> tuple[nn.Module, Checkpoint]:
    """Load a trained model in evaluation mode.

    Args:
        path: A directory that a stage wrote, or a .safetensors file in it.
        device: Where to put it.
        kind: `teacher` or `student`, where only one will do.

    Raises:
        UsageError: The path does not exist.
        DataError: It holds no valid checkpoint, or one of the other kind.
    """
    from pipeline.students import Student, use_inner_block

    checkpoint = load_checkpoint(path)
    try:
        check_description(checkpoint.meta)
    except DataError as error:
        raise DataError(f"{checkpoint.path}: {error}") from error
    if kind is not None and checkpoint.meta.get("kind") != kind:
        raise DataError(f"{checkpoint.path}: a {checkpoint.meta.get('kind')}'s checkpoint; a {kind}'s is needed here")
    with torch.device("meta"):
        try:
            model = build(dict(checkpoint.meta))
        except UsageError as error:  # a geometry that does not divide
            raise DataError(f"{checkpoint.path}: its JSON describes no model: {error}") from error
    load_weights(model, checkpoint)
    if isinstance(model, Student):
        use_inner_block(model, "auto", device)
    return model.to(device).eval(), checkpoint


def costs(meta: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Return parameters, the paper's GMACs of a batch of 1024, and PyTorch's FLOPs of one image."""
    with torch.device("meta"):
        model = build(meta)
    return {
        "parameters": num_parameters(model),
        "paper_gmacs_1024": round(paper_gmacs_1024(model, image_size), 3),
        "flops_per_image": flops_per_image(model, image_size),
    }


def list_models(num_classes: int, image_size: int = 32) -> list[dict[str, Any]]:
    """Return name, kind and costs of every student and teacher."""
    from pipeline.students import STUDENTS
    from pipeline.teachers import TEACHERS

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
