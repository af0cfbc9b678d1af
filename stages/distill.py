"""`pipeline distill --student NAME`: train a student against the cached labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.batches import Batch, TeacherLabels, TrainingData
from pipeline.checkpoints import read_meta
from pipeline.datasets import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.label_identity import require_equal
from pipeline.labelling import cached_labels, check_canaries, online_labels
from pipeline.labels import RELABEL, LabelCache
from pipeline.losses import Outputs, hybrid_loss, mixed_cross_entropy, undistilled_loss
from pipeline.params import override
from pipeline.recipes import Recipe, StudentRecipe
from pipeline.students import STUDENTS, build_student
from pipeline.training import Objective
from pipeline.views import Views
from stages.context import Context
from stages.fitting import Run, carry_out, make_views, place, refuse_several_ranks
from stages.label import identity_of, label_clean, load_teacher
from stages.models import describe, student_arguments
from stages.paths import Paths


def student_recipe(recipe: Recipe, name: str, settings: Mapping[str, str]) -> StudentRecipe:
    """Return a student's recipe.

    Raises:
        UsageError: The recipe has no such student, or the student no such architecture.
    """
    if name not in recipe.students:
        raise UsageError(f"--student {name}: not in recipe {recipe.name}; choose from {', '.join(recipe.students)}")
    own = override(recipe.students[name], settings, f"students.{name}")
    if own.model not in STUDENTS:
        raise UsageError(f"students.{name}.model: {own.model!r} is no student; choose from {', '.join(STUDENTS)}")
    if own.views not in recipe.views:
        raise UsageError(f"students.{name}.views: {own.views!r}; choose from {', '.join(recipe.views)}")
    return own


def distill(
    context: Context,
    name: str,
    *,
    labels: str = "cached",
    teacher: Path | None = None,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    fresh: bool = False,
) -> Path:
    """Train a student unless its result is up to date.

    Args:
        context: The command's setting.
        name: A student of the recipe.
        labels: `cached`; or a control that goes to data/runs: `none` trains both heads on the ground truth, `online`
            asks the teacher at every step.
        teacher: The checkpoint that `online` asks.
        settings: Fields of the student's recipe to replace; such a run goes to data/runs.
        seed: Of initialisation and order; one that is not 0 goes to data/runs.
        fresh: Whether to start over.

    Returns:
        The directory of the outputs.

    Raises:
        UsageError: A name or option that does not exist.
        DataError: Prepared data or labels are missing or do not belong together.
    """
    refuse_several_ranks()
    recipe = student_recipe(context.recipe, name, settings or {})
    if (labels == "online") != (teacher is not None):
        raise UsageError(f"--labels {labels}: --teacher CHECKPOINT belongs to --labels online, and only to it")
    device, dataset = context.device, context.dataset()
    view_recipe = context.recipe.views[recipe.views]
    source = _Source(context, dataset, recipe, labels, teacher)
    run = _plan(context, dataset, name, recipe, source, labels=labels, settings=settings or {}, seed=seed)
    if run.is_current() and not fresh:
        context.say(f"{name}: up to date ({run.out}); --fresh trains it again")
        return run.out
    views = make_views(context, dataset, recipe.views)
    source.check(views)
    torch.manual_seed(seed)
    model = build_student(recipe.model, **run.description["arguments"]).to(device)
    carry_out(
        context,
        run,
        model=model,
        dataset=dataset,
        data=TrainingData(views, dataset.mean, dataset.std, view_recipe.count, source.teacher_labels(device)),
        clean=source.clean,
        objective=student_objective(recipe, distilled=source.is_distilled),
        fresh=fresh,
    )
    return run.out


def _plan(
    context: Context,
    dataset: Dataset,
    name: str,
    recipe: StudentRecipe,
    source: _Source,
    *,
    labels: str,
    settings: Mapping[str, str],
    seed: int,
) -> Run:
    """Say what training a student means: its recipe, inputs and outputs."""
    differs = {**({} if labels == "cached" else {"labels": labels}), **settings}
    paths = context.paths
    out, work, stage = place(paths, f"students/{name}", name, differs, seed, paths.student(name), f"student@{name}")
    arguments = student_arguments(recipe, num_classes=dataset.num_classes, image_size=dataset.image_size)
    view_recipe = context.recipe.views[recipe.views]
    return Run(
        name=name,
        out=out,
        work=work,
        stage=stage,
        description=describe(dataset, context.recipe.name, kind="student", model=recipe.model, arguments=arguments),
        recipe=recipe,
        seed=seed,
        inputs={"views": dataclasses.asdict(view_recipe), "labels": labels, "teacher": source.digest},
        teacher=source.teacher,
        is_distilled=source.is_distilled,
        num_views=view_recipe.count,
        keep_last=True,
    )


class _Source:
    """Where a student's teacher labels come from: the cache, a teacher at every step, or nowhere."""

    def __init__(
        self, context: Context, dataset: Dataset, recipe: StudentRecipe, labels: str, teacher: Path | None
    ) -> None:
        self.is_distilled = STUDENTS[recipe.model].has_distillation_head and labels != "none"
        self.cache: LabelCache | None = None
        self.clean: Mapping[str, np.ndarray[Any, Any]] = {}
        self.teacher: Mapping[str, Any] | None = None
        self.digest: str | None = None
        self._online: TeacherLabels | None = None
        if labels == "online":
            self._ask(context, dataset, teacher)
        elif self.is_distilled or context.paths.labels(recipe.views).exists():
            self._open(context, dataset, recipe)

    def teacher_labels(self, device: torch.device) -> TeacherLabels | None:
        """Return what gives each batch its teacher labels."""
        if not self.is_distilled:
            return None
        return self._online or (cached_labels(self.cache, device) if self.cache else None)

    def check(self, views: Views) -> None:
        """Check that the views are still those that were labelled.

        Raises:
            DataError: A canary's pixels differ.
        """
        view = check_canaries(self.cache, views) if self.cache else None
        if view is not None:
            raise DataError(
                f"view {view}: its pixels are not those that were labelled (another version of this project or of "
                "its libraries made them); run `pipeline label --fresh`"
            )

    def _open(self, context: Context, dataset: Dataset, recipe: StudentRecipe) -> None:
        """Open the cache, checking that it belongs to the data, the views and the teacher at hand."""
        paths, name = context.paths, recipe.views
        path = paths.labels(name)
        if not path.exists():
            raise DataError(
                f"{path}: no cached labels; run `pipeline teacher-select --recipe {context.recipe.name}`, or "
                f"`pipeline label --view-recipe {name}` where a teacher is selected"
            )
        self.cache = open_labels(paths, context.recipe, dataset, name)
        count = context.recipe.views[name].count
        if self.cache.num_views < count:
            raise DataError(
                f"{path}: {self.cache.num_views} views, the recipe asks for {count} "
                f"(recipes.{context.recipe.name}.views.{name}.count); run `pipeline label --view-recipe {name}`"
            )
        self.clean = self.cache.clean
        provenance = self.cache.provenance
        self.digest = str(provenance["checkpoint_sha256"])
        split = dataset.evaluation[0]
        truth = dataset.splits[split].labels
        self.teacher = {
            "name": provenance["teacher"],
            "sha256": self.digest,
            "top1": 100.0 * float(np.mean(self.clean[split] == truth)),
        }

    def _ask(self, context: Context, dataset: Dataset, path: Path | None) -> None:
        """Load the teacher that is asked at every step."""
        assert path is not None
        teacher, checkpoint = load_teacher(context, dataset, path)
        self._online = online_labels(teacher)
        self.digest = checkpoint.sha256
        self.clean = label_clean(context, dataset, teacher)
        split, part = dataset.evaluation
        top1 = 100.0 * float(np.mean(self.clean[split] == part.labels))
        self.teacher = {"name": checkpoint.meta["model"], "sha256": self.digest, "top1": top1}


def open_labels(paths: Paths, recipe: Recipe, dataset: Dataset, view_recipe: str) -> LabelCache:
    """Open a recipe's label cache.

    Raises:
        DataError: It is not valid, belongs to other data or views, or to another teacher than the selected one, or
            labels other evaluation images.
    """
    identity, path = identity_of(dataset, recipe.views[view_recipe]), paths.labels(view_recipe)
    winner = read_meta(paths.winner)
    provenance = None if winner is None else {"checkpoint_sha256": winner["sha256"]}
    cache = LabelCache.open(path, expected_identity=identity, expected_provenance=provenance)
    found = {split: len(labels) for split, labels in cache.clean.items()}
    expected = {split: len(part) for split, part in dataset.splits.items() if split != "train"}
    require_equal(f"{path}", {"clean": found}, {"clean": expected}, RELABEL)
    return cache


def student_objective(recipe: StudentRecipe, *, distilled: bool) -> Objective:
    """Return loss (10) for two heads with a teacher, its control without one, or loss (9) for one head."""

    def objective(outputs: Outputs, batch: Batch) -> torch.Tensor:
        mixed = (batch.labels, batch.partner_labels, batch.lam)
        if not isinstance(outputs, tuple):
            return mixed_cross_entropy(outputs, *mixed, label_smoothing=recipe.label_smoothing)
        alpha, smoothing = recipe.alpha, recipe.label_smoothing
        if not distilled:
            return undistilled_loss(outputs, *mixed, alpha=alpha, label_smoothing=smoothing)
        assert batch.teacher_labels is not None
        return hybrid_loss(outputs, *mixed, batch.teacher_labels, alpha=alpha, label_smoothing=smoothing)

    return objective
