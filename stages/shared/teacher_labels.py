"""What a student learns from its teacher, and where that comes from: the cache, the teacher itself, or nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.recipes import Recipe, StudentRecipe
from pipeline.data.datasets import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.labels.cache import RELABEL, LabelCache
from pipeline.labels.replay import check_canaries
from pipeline.labels.source import TeacherLabels, cached_labels, online_labels
from pipeline.models.students import STUDENTS
from pipeline.system.canonical import require_equal
from pipeline.training.checkpoints import read_meta
from pipeline.views.views import Views
from stages.shared.context import Context
from stages.shared.labelling import identity_of, label_clean, load_teacher, read_teacher
from stages.shared.options import kept_name
from stages.shared.paths import Paths

USUAL_TOPK = 5


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a run differs from the recipe in what it learns from the teacher; by default in nothing.

    The temperature is no part of it, but the student's recipe's field `soft`.

    Attributes:
        labels: `cached`; `none` trains both heads on the ground truth, `online` asks the teacher at every step.
        teacher: The checkpoint that `online` asks.
        soft_given: Whether the command gave the temperature, in place of the recipe's own.
        confidence: Whether the teacher's probability of its label weighs each sample's distillation term.
        num_views: Views that the epochs cycle through, always the first ones; None takes the recipe's number.
    """

    labels: str = "cached"
    teacher: Path | None = None
    soft_given: bool = False
    confidence: bool = False
    num_views: int | None = None

    def check(self, name: str, recipe: StudentRecipe) -> None:
        """Refuse what cannot be, before any data is looked for.

        Raises:
            UsageError: Options that do not go together, or not with this student.
        """
        if (self.labels == "online") != (self.teacher is not None):
            raise UsageError(f"--labels {self.labels}: --teacher CHECKPOINT belongs to --labels online, and only to it")
        given = (soft_name(recipe, name, given=True),) if self.soft_given and recipe.soft else ()
        for option in (*given, *(("--confidence",) if self.confidence else ())):
            if self.labels == "none":
                raise UsageError(f"{option}: --labels none has no teacher; leave one of them out")
            require_distillation_head(option, name, recipe)

    def differences(self, recipe: Recipe, name: str, own: StudentRecipe) -> dict[str, str]:
        """Name what a student's run under `own` differs in from its recipe, for the run's directory."""
        found = {}
        if self.labels != "cached":
            found["labels"] = self.labels
        if self.soft_given and own.soft != recipe.students[name].soft:
            found["soft"] = str(own.soft).removesuffix(".0")
        if self.confidence:
            found["confidence"] = "on"
        if self.num_views not in (None, recipe.views[own.views].count):
            found["num_views"] = str(self.num_views)
        return found

    def check_cache(self, cache: LabelCache, path: Path, recipe: Recipe, name: str, own: StudentRecipe) -> None:
        """Refuse a cache that holds less than this run needs.

        Raises:
            DataError: Too few views, or no probabilities.
        """
        view_recipe = own.views
        command = "pipeline label" + ("" if view_recipe == "default" else f" --view-recipe {view_recipe}")
        count = recipe.views[view_recipe].count
        if self.num_views is not None and cache.num_views < self.num_views:
            raise DataError(
                f"{path}: {cache.num_views} views, --views asks for {self.num_views}; "
                f"run `{command} --views :{self.num_views}`"
            )
        if self.num_views is None and cache.num_views < count:
            raise DataError(
                f"{path}: {cache.num_views} views, the recipe asks for {count} "
                f"(recipes.{recipe.name}.views.{view_recipe}.count); run `{command}`, or train on fewer with --views"
            )
        if cache.topk == 0 and (own.soft or self.confidence):
            option = soft_name(own, name, given=self.soft_given) if own.soft else "--confidence"
            keep = "" if recipe.label.topk else f" --keep {kept_name(min(USUAL_TOPK, cache.num_classes))}"
            raise DataError(
                f"{path}: keeps {kept_name(cache.topk)}, {option} needs the teacher's probabilities; "
                f"run `{command}{keep} --fresh`"
            )


def soft_name(own: StudentRecipe, name: str, *, given: bool) -> str:
    """Return what a student's temperature is called where it came from: the command, or params.yaml."""
    return f"--soft {own.soft:g}" if given else f"students.{name}.soft: {own.soft:g}"


def require_distillation_head(option: str, name: str, recipe: StudentRecipe) -> None:
    """Refuse an option or field for a student that has no head for the teacher's answers.

    Raises:
        UsageError: It has none.
    """
    if not STUDENTS[recipe.model].has_distillation_head:
        able = [each for each, student in STUDENTS.items() if student.has_distillation_head]
        way_out = "choose from" if option.startswith("--") else "set it to 0 there, or choose from"
        raise UsageError(
            f"{option}: student {name} ({recipe.model}) has no distillation head; {way_out} {', '.join(able)}"
        )


class TeacherSource:
    """Where a student's teacher labels come from.

    Of a teacher that is to be asked online only the checkpoint is read at first: `ask` loads it.

    Attributes:
        is_distilled: Whether the student learns from them.
        cache: The label cache, where there is one.
        clean: The teacher's labels of the clean splits by name; empty without a teacher.
        teacher: Its name, SHA-256 and top-1, or None.
        digest: Its SHA-256, or None.

    Raises:
        DataError: The cache or the teacher is missing, damaged, belongs to something else or holds too little.
    """

    def __init__(
        self, context: Context, dataset: Dataset, name: str, recipe: StudentRecipe, distillation: Distillation
    ) -> None:
        self.is_distilled = STUDENTS[recipe.model].has_distillation_head and distillation.labels != "none"
        self.cache: LabelCache | None = None
        self.clean: Mapping[str, np.ndarray[Any, Any]] = {}
        self.teacher: Mapping[str, Any] | None = None
        self.digest: str | None = None
        self._is_soft = recipe.soft > 0
        self._distillation = distillation
        self._online: TeacherLabels | None = None
        if distillation.labels == "online":
            assert distillation.teacher is not None
            self.digest = read_teacher(context, dataset, distillation.teacher).sha256
        elif self.is_distilled or context.paths.labels(recipe.views).exists():
            self._open(context, dataset, name, recipe)

    def teacher_labels(self, device: torch.device) -> TeacherLabels | None:
        """Return what gives each batch its teacher labels."""
        if not self.is_distilled:
            return None
        confidence = self._distillation.confidence
        return self._online or (
            cached_labels(self.cache, device, soft=self._is_soft, confidence=confidence) if self.cache else None
        )

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

    def _open(self, context: Context, dataset: Dataset, student: str, recipe: StudentRecipe) -> None:
        """Open the cache, checking that it belongs to the data, the views and the teacher at hand."""
        paths, name = context.paths, recipe.views
        path = paths.labels(name)
        if not path.exists():
            raise DataError(
                f"{path}: no cached labels; run `pipeline teacher-select --recipe {context.recipe.name}`, or "
                f"`pipeline label --view-recipe {name}` where a teacher is selected"
            )
        self.cache = open_labels(paths, context.recipe, dataset, name)
        self._distillation.check_cache(self.cache, path, context.recipe, student, recipe)
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

    def ask(self, context: Context, dataset: Dataset) -> None:
        """Load the teacher that is asked at every step, if there is one.

        Raises:
            DataError: As of the class.
        """
        distillation = self._distillation
        if distillation.teacher is None:
            return
        teacher, checkpoint = load_teacher(context, dataset, distillation.teacher)
        self._online = online_labels(teacher, soft=self._is_soft, confidence=distillation.confidence)
        self.clean = label_clean(context, dataset, teacher)
        split, part = dataset.evaluation
        top1 = 100.0 * float(np.mean(self.clean[split] == part.labels))
        self.teacher = {"name": checkpoint.meta["model"], "sha256": checkpoint.sha256, "top1": top1}


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
