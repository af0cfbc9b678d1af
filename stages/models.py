"""What models are in recipes and in checkpoints, and the list of all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoints import Checkpoint, load_checkpoint
from pipeline.counting import flops_per_image, num_parameters, paper_gmacs_1024
from pipeline.datasets import Dataset
from pipeline.descriptions import GEOMETRY
from pipeline.errors import DataError
from pipeline.loading import build_model, restore
from pipeline.recipes import StudentRecipe
from pipeline.reporting import Table


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


def load_checkpoint_of(path: Path, kind: str | None) -> Checkpoint:
    """Load a checkpoint; arguments and errors as of `load_model`."""
    checkpoint = load_checkpoint(path)
    if kind is not None and checkpoint.meta.get("kind") != kind:
        raise DataError(f"{checkpoint.path}: a {checkpoint.meta.get('kind')}'s checkpoint; a {kind}'s is needed here")
    return checkpoint


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
    checkpoint = load_checkpoint_of(path, kind)
    return restore(checkpoint, device), checkpoint


def costs(meta: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Return parameters, the paper's GMACs of a batch of 1024, and PyTorch's FLOPs of one image."""
    with torch.device("meta"):
        model = build_model(meta["kind"], meta["model"], meta["arguments"])
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
