"""A teacher that labels a recipe's data, and the identity and provenance of its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config.recipes import ViewRecipe
from pipeline.data.datasets import Dataset
from pipeline.data.streaming import place_images
from pipeline.inference.loading import from_checkpoint, load_checkpoint_of
from pipeline.labels.cache import make_identity, make_provenance
from pipeline.labels.teacher import Teacher, compile_teacher
from pipeline.system.runtime import images_at_once, resident_limit, resolve_precision, versions
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
    require_same_data(checkpoint.meta, checkpoint.path, context.paths, way_out, sha256=dataset.sha256)
    return checkpoint


def make_ready(context: Context, dataset: Dataset, checkpoint: Checkpoint) -> Teacher:
    """Build a checkpoint's teacher: on the device, folded, compiled where the recipe asks for it.

    Raises:
        UsageError: torch.compile was asked for and fails.
        DataError: The checkpoint's JSON describes no model, or the weights are not that model's.
    """
    from pipeline.models.folding import fold  # imports torchvision, which takes seconds

    settings, device = context.recipe.label, context.device
    module = from_checkpoint(checkpoint, device, own_code=own_code(context.params)).module
    folded = fold(module, dataset.image_size)[0].to(memory_format=torch.channels_last)
    precision = resolve_precision(settings.precision, device)
    batch_size = images_at_once(device, dataset.image_size, module, asked=settings.batch_size)
    teacher = Teacher(folded, checkpoint.meta["mean"], checkpoint.meta["std"], precision, batch_size)
    return compile_teacher(teacher, dataset.image_size) if settings.compile else teacher


def label_clean(context: Context, dataset: Dataset, teacher: Teacher) -> dict[str, NDArray[np.int64]]:
    """Return the teacher's labels of the unaugmented evaluation images, `(n,)` int64 by split."""
    return {
        split: teacher.label(place_images(part.images, context.device, resident_limit(context.device)))
        for split, part in dataset.splits.items()
        if split != "train"
    }


def identity_of(dataset: Dataset, view_recipe: ViewRecipe) -> dict[str, Any]:
    """Return the identity of the labels of a data set's training views."""
    return make_identity(
        dataset_sha256=dataset.sha256,
        split="train",
        view_recipe=view_recipe,
        class_names=dataset.class_names,
        num_samples=len(dataset.train),
    )


def provenance_of(context: Context, dataset: Dataset, checkpoint: Checkpoint, topk: int) -> dict[str, Any]:
    """Return the provenance of the labels that a teacher makes here, keeping `topk` classes of each sample."""
    settings, device = context.recipe.label, context.device
    return make_provenance(
        teacher=str(checkpoint.meta["model"]),
        checkpoint_sha256=checkpoint.sha256,
        mean=checkpoint.meta["mean"],
        std=checkpoint.meta["std"],
        precision=resolve_precision(settings.precision, device),
        device=device.type,
        versions=versions(),
        topk=topk,
        compiled=settings.compile,
    )
