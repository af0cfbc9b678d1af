"""A student in training through the real fit loop, and a sealed label cache for it."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np

from benchmarks.measure import ROOT
from benchmarks.synthetic import MEAN, NUM_CLASSES, SIZE, STD
from pipeline.config.params import load_params
from pipeline.config.recipes import Recipe
from pipeline.data.streaming import in_batches
from pipeline.labels.cache import LabelCache, make_identity, make_provenance
from pipeline.labels.parts import LabelParts, seal
from pipeline.labels.source import TeacherLabels
from pipeline.losses import objective
from pipeline.models.students import build_student, use_inner_block, use_outer_block
from pipeline.system.runtime import resolve_precision
from pipeline.training.batches import EvaluationData, TrainingData
from pipeline.training.checkpoints import RunState
from pipeline.training.execution import Execution
from pipeline.training.fit import Fit, Session
from pipeline.views.views import Views
from stages.shared.runs import student_arguments


@functools.cache
def recipe() -> Recipe:
    """Return the recipe cifar100, the paper's protocol."""
    return load_params(ROOT / "params.yaml").recipes["cifar100"]


def make_fit(
    name: str,
    views: Views,
    teacher_labels: TeacherLabels | None,
    *,
    num_views: int,
    batch_size: int,
    depth: int | None = None,
) -> Fit:
    """Prepare a student's training run on the device of the views, by the recipe cifar100.

    Args:
        name: A student of the recipe.
        views: Of the images to train on.
        teacher_labels: Where a batch's teacher labels come from; None trains without distillation.
        num_views: Views that the epochs cycle through.
        batch_size: Samples a step.
        depth: Blocks L; None takes the recipe's.
    """
    student_recipe = recipe().students[name]
    student_recipe = dataclasses.replace(
        student_recipe, batch_size=batch_size, depth=student_recipe.depth if depth is None else depth
    )
    device = views.images.device
    model = build_student(
        student_recipe.model, **student_arguments(student_recipe, num_classes=NUM_CLASSES, image_size=SIZE)
    ).to(device)
    precision = resolve_precision(student_recipe.precision, device)
    inner_block = use_inner_block(model, student_recipe.inner_block, device, precision=precision)
    outer_block = use_outer_block(model, student_recipe.outer_block, device, precision=precision)
    return Fit(
        model=model,
        data=TrainingData(views, MEAN, STD, num_views, teacher_labels),
        evaluation=EvaluationData(next(in_batches(views.images, 1)), views.labels[:1], MEAN, STD, NUM_CLASSES),
        objective=objective(student_recipe),
        recipe=student_recipe,
        ema=student_recipe.ema,
        execution=Execution.of(student_recipe, device, inner_block=inner_block, outer_block=outer_block),
        session=Session(RunState(Path("unused"), "")),
    )


def train_epoch(fit: Fit) -> None:
    """Train through all samples once, on the next view, without evaluating or saving."""
    fit.saved_at = math.inf
    fit.train_epoch()
    fit.progress.epoch, fit.progress.step = fit.progress.epoch + 1, 0


def seal_random_labels(path: Path, *, num_views: int, num_samples: int) -> LabelCache:
    """Write a label cache of random labels as `pipeline label` does, and open it.

    Args:
        path: The sealed file; the parts lie beside it while it is made.
        num_views: V.
        num_samples: N.
    """
    names = [f"class {number}" for number in range(NUM_CLASSES)]
    view_recipe = recipe().views["default"]
    identity = make_identity(
        dataset_sha256="0" * 64, split="train", view_recipe=view_recipe, class_names=names, num_samples=num_samples
    )
    provenance = make_provenance(
        teacher="random", checkpoint_sha256="0" * 64, mean=MEAN, std=STD, precision="fp32", device="cpu", versions={}
    )
    parts = LabelParts(path.with_suffix(".parts"), identity=identity, provenance=provenance)
    generator = np.random.default_rng(0)
    for view in range(num_views):
        parts.write(view, generator.integers(NUM_CLASSES, size=num_samples))
    seal(path, parts=parts, count=num_views, clean={})
    return LabelCache.open(path, expected_identity=identity)
