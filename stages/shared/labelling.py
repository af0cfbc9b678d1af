"""A teacher that labels a recipe's data, and the identity of its labels; stages.shared.labellers on who labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.config.recipes import ViewRecipe
from pipeline.data.datasets import Dataset
from pipeline.data.streaming import place_images
from pipeline.inference.loading import Description, from_checkpoint, load_checkpoint_of
from pipeline.labels.cache import make_identity
from pipeline.labels.teacher import Teacher, compile_teacher
from pipeline.system.runtime import images_at_once, resident_limit, resolve_precision
from pipeline.training.checkpoints import Checkpoint
from stages.shared.context import Context
from stages.shared.params import own_code
from stages.shared.trained import require_same_data


def read_teacher(context: Context, dataset: Dataset, path: Path) -> Checkpoint:
    """Read a teacher's checkpoint and check that it belongs to a data set.

    Raises:
        UsageError: The path does not exist.
        DataError: It holds no valid teacher, or one that was trained on other data.
    """
    checkpoint = load_checkpoint_of(path, "teacher")
    way_out = f"train a teacher on these data: pipeline teacher-select --recipe {context.recipe.name}"
    require_same_data(checkpoint.meta, checkpoint.path, context.paths, way_out, dataset=dataset)
    Description.read(checkpoint.meta, checkpoint.path.with_suffix(".json"))
    return checkpoint


def make_ready(context: Context, dataset: Dataset, checkpoint: Checkpoint) -> Teacher:
    """Build a checkpoint's teacher: on the device, folded if it can be, compiled where the recipe asks for it.

    Raises:
        UsageError: torch.compile was asked for and fails.
        DataError: The checkpoint's JSON describes no model, or the weights are not that model's.
    """
    from pipeline.models.folding import fold  # imports torchvision, which takes seconds

    module = from_checkpoint(checkpoint, context.device, own_code=own_code(context.params)).module
    return teacher_of(context, dataset, fold(module, dataset.image_size)[0], checkpoint.meta)


def teacher_of(context: Context, dataset: Dataset, module: nn.Module, meta: Mapping[str, Any]) -> Teacher:
    """Return a model on the device, folded if it can be, as a teacher that labels as the recipe says.

    Args:
        context: The command's setting.
        dataset: What it labels.
        module: The model.
        meta: What describes it, as a checkpoint's JSON: its own mean and std.

    Raises:
        UsageError: torch.compile was asked for and fails.
    """
    settings, device = context.recipe.label, context.device
    precision = resolve_precision(settings.precision, device)
    batch_size = images_at_once(device, dataset.image_size, module, asked=settings.batch_size)
    module = module.to(memory_format=torch.channels_last)
    teacher = Teacher(module, meta["mean"], meta["std"], precision, batch_size)
    return compile_teacher(teacher, dataset.image_size) if settings.compile else teacher


def label_clean(context: Context, dataset: Dataset, teacher: Teacher) -> dict[str, NDArray[np.int64]]:
    """Return the teacher's labels of the unaugmented evaluation images, `(n,)` int64 by split."""
    return {
        split: teacher.label(place_images(part.images, context.device, resident_limit(context.device)))
        for split, part in dataset.splits.items()
        if split != "train"
    }


def accuracy_of(clean: Mapping[str, NDArray[Any]], dataset: Dataset) -> dict[str, float]:
    """Return how many of the labels of unaugmented images are right, in percent, by split."""
    return {split: 100.0 * float(np.mean(row == dataset.splits[split].labels)) for split, row in clean.items()}


def identity_of(dataset: Dataset, view_recipe: ViewRecipe) -> dict[str, Any]:
    """Return the identity of the labels of a data set's training views."""
    return make_identity(
        dataset_sha256=dataset.sha256,
        split="train",
        view_recipe=view_recipe,
        class_names=dataset.class_names,
        num_samples=len(dataset.train),
        rendition=dataset.rendition,
    )
