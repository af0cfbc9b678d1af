"""`pipeline evaluate CHECKPOINT`: score a trained model on a recipe's data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, UsageError
from pipeline.evaluation import evaluate
from pipeline.reporting import Table, number
from pipeline.runtime import resolve_precision
from stages.context import Context
from stages.fitting import evaluation_data
from stages.models import load_model


def evaluate_checkpoint(
    context: Context, path: Path, *, split: str = "test", precision: str | None = None
) -> dict[str, Any]:
    """Score a checkpoint.

    Args:
        context: The command's setting.
        path: A directory that a stage wrote, or a .safetensors file in it.
        split: `train`, `val` or `test`.
        precision: `auto`, `fp32` or `bf16`; None takes that of the training.

    Returns:
        Model, split, number of images, `autocast` (`fp32` or `bf16`) and the fields of pipeline.metrics.Scores.

    Raises:
        UsageError: The path does not exist, or there is no such split.
        DataError: It holds no valid checkpoint, or one of other classes or image size.
    """
    device = context.device
    model, checkpoint = load_model(path, device)
    dataset = context.dataset()
    if split not in dataset.splits:
        raise UsageError(f"--split {split}: recipe {context.recipe.name} has {', '.join(dataset.splits)}")
    meta = checkpoint.meta
    for key, expected in (("class_names", list(dataset.class_names)), ("image_size", dataset.image_size)):
        if meta.get(key) != expected:
            raise DataError(f"{checkpoint.path}: its {key} is not that of recipe {context.recipe.name}; name its own")
    data = evaluation_data(dataset, dataset.splits[split], device)
    mean, std = ((float(r), float(g), float(b)) for r, g, b in (meta["mean"], meta["std"]))
    data = dataclasses.replace(data, mean=mean, std=std)
    precision = resolve_precision(precision or meta["training"]["precision"], device)
    scores = evaluate(model, data, precision=precision)
    return {
        "model": meta["model"],
        "checkpoint": str(checkpoint.path),
        "recipe": context.recipe.name,
        "split": split,
        "num_images": len(data.labels),
        "autocast": precision,
        "device": device.type,
        **dataclasses.asdict(scores),
    }


def scores_table(result: dict[str, Any]) -> Table:
    """Return the table of an evaluation."""
    heads = [number(result["class_top1"]), number(result["distillation_top1"])]
    row = [result["model"], number(result["top1"]), number(result["top5"])]
    row += [number(result[key], 3) for key in ("precision", "recall", "f1")]
    columns = [
        "model",
        "top-1 %",
        "top-5 %",
        "precision",
        "recall",
        "F1",
        "class head %",
        "distillation head %",
    ]
    title = f"{result['checkpoint']} on {result['recipe']}, {result['split']}"
    note = f"{result['num_images']} images, {result['device']}, {result['autocast']}"
    return Table(title, columns, [[*row, *heads]], note)
