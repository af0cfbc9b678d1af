"""`pipeline evaluate CHECKPOINT`: score a trained model on a recipe's data, or on a folder of images."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.folders import MAX_CLASSES_NAMED, ImageFile, find_labelled_images, read_images
from pipeline.data.images import BadFile, refusal
from pipeline.errors import DataError, UsageError, printable
from pipeline.inference.prediction import Predictor
from pipeline.report.tables import Table, number
from pipeline.training.metrics import Meter, class_scores, worst_first
from stages.shared.context import Context
from stages.shared.fitting import evaluation_data
from stages.trained import Trained, load_trained


def evaluate_checkpoint(
    context: Context, path: Path, *, split: str = "test", precision: str | None = None, per_class: bool = False
) -> dict[str, Any]:
    """Score a checkpoint on a split of the recipe's prepared data.

    Args:
        context: The command's setting.
        path: As of stages.trained.load_trained.
        split: `train`, `val` or `test`.
        precision: `auto`, `fp32` or `bf16`; None takes that of the training.
        per_class: Whether to add the scores of each class.

    Returns:
        Model, split, number of images, `autocast` (`fp32` or `bf16`), the fields of pipeline.training.metrics.Scores;
        with `per_class` also `classes`, the fields of pipeline.training.metrics.ClassScores for each, the worst first.

    Raises:
        UsageError: The path does not exist, or there is no such split.
        DataError: It holds no valid checkpoint, or one of other classes or image size.
    """
    trained = load_trained(path, context.device_name, precision)
    predictor = trained.predictor
    dataset = context.dataset()
    if split not in dataset.splits:
        raise UsageError(f"--split {split}: recipe {context.recipe.name} has {', '.join(dataset.splits)}")
    for key, own, expected in (
        ("class_names", predictor.class_names, dataset.class_names),
        ("image_size", predictor.image_size, dataset.image_size),
    ):
        if own != expected:
            raise DataError(f"{trained.file}: its {key} is not that of recipe {context.recipe.name}; name its own")
    data = evaluation_data(dataset, dataset.splits[split], predictor.device)
    meter = Meter(dataset.num_classes, predictor.device)
    for part, images in data.batches(predictor.batch_size, slice(0, len(data.labels))):
        meter.add(predictor.logits(images), data.labels[part])
    where = {"checkpoint": str(trained.file), "recipe": context.recipe.name, "split": split}
    return {"model": trained.meta["model"], **where, **_scores(trained, meter, per_class)}


def evaluate_folder(
    path: Path,
    folder: Path,
    *,
    device: str | None = None,
    precision: str | None = None,
    skip_bad: bool = False,
    per_class: bool = False,
) -> dict[str, Any]:
    """Score a checkpoint on a folder of images; nothing else is needed.

    Args:
        path: As of stages.trained.load_trained.
        folder: As of pipeline.data.folders.find_labelled_images.
        device: As of stages.trained.load_trained.
        precision: `auto`, `fp32` or `bf16`; None takes that of the training.
        skip_bad: Leave bad files out; otherwise one is enough to refuse the folder.
        per_class: Whether to add the scores of each class.

    Returns:
        As of `evaluate_checkpoint`, with `data` (the folder), `absent_classes` and `skipped` in place of recipe and
        split.

    Raises:
        UsageError: A path does not exist.
        DataError: There is no valid checkpoint, a folder has the name of no class, or there are bad files.
    """
    trained = load_trained(path, device, precision)
    predictor = trained.predictor
    files, bad = find_labelled_images(folder, predictor.class_names)
    meter = Meter(len(predictor.class_names), predictor.device)
    # Pillow warns of damaged metadata, which does no harm.
    quiet = warnings.catch_warnings(action="ignore", category=UserWarning)
    with quiet, contextlib.closing(read_images(files, predictor.image_size, predictor.batch_size)) as batches:
        for batch in batches:
            bad += (BadFile(printable(file.path.relative_to(folder)), file.problem) for file in batch if file.problem)
            _add(meter, predictor, [file for file in batch if file.pixels is not None])
    if bad and not skip_bad:
        raise refusal(folder, bad)
    supports = meter.confusion.sum(dim=1).tolist()
    if not any(supports):
        raise DataError(f"{printable(folder)}: none of its {len(files)} images can be read")
    absent = [name for name, support in zip(predictor.class_names, supports, strict=True) if not support]
    where = {"checkpoint": str(trained.file), "data": printable(folder), "absent_classes": absent}
    skipped = [dataclasses.asdict(file) for file in bad]
    return {"model": trained.meta["model"], **where, "skipped": skipped, **_scores(trained, meter, per_class)}


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
    where = result["data"] if "data" in result else f"{result['recipe']}, {result['split']}"
    note = f"{result['num_images']} images, {result['device']}, {result['autocast']}"
    if result.get("skipped"):
        note += f"; {len(result['skipped'])} bad files left out"
    if absent := result.get("absent_classes"):
        some = ", ".join(map(printable, absent[:MAX_CLASSES_NAMED])) + (
            ", ..." if len(absent) > MAX_CLASSES_NAMED else ""
        )
        note += f"; no images of {len(absent)} classes ({some}), which count 0 in the means where they are predicted"
    return Table(f"{result['checkpoint']} on {where}", columns, [[*row, *heads]], note)


def classes_table(result: dict[str, Any]) -> Table:
    """Return the table of an evaluation's classes, the worst first."""
    rows = []
    for each in result["classes"]:
        scores = [number(each[key], 3) for key in ("recall", "precision", "f1")]
        confused = (
            "-" if each["confused_with"] is None else f"{printable(each['confused_with'])} ({each['num_confused']})"
        )
        rows.append([printable(each["name"]), str(each["support"]), *scores, confused])
    columns = ["class", "images", "recall", "precision", "F1", "most often taken for"]
    return Table("Classes, the worst first", columns, rows, "Recall is the accuracy on the images of the class alone.")


def _add(meter: Meter, predictor: Predictor, files: list[ImageFile]) -> None:
    """Count a batch of images that have been read."""
    if not files:
        return
    images = predictor.place(np.stack([file.pixels for file in files if file.pixels is not None]))
    labels = torch.tensor([file.label for file in files], device=predictor.device)
    meter.add(predictor.logits(images), labels)


def _scores(trained: Trained, meter: Meter, per_class: bool) -> dict[str, Any]:
    """Return what an evaluation found, as plain JSON values."""
    classes = worst_first(class_scores(meter.confusion, trained.predictor.class_names))
    return {
        "num_images": int(meter.confusion.sum()),
        "autocast": trained.precision,
        "device": trained.predictor.device.type,
        **dataclasses.asdict(meter.scores()),
        **({"classes": [dataclasses.asdict(each) for each in classes]} if per_class else {}),
    }
