"""Where a student's teacher labels come from: the label cache, the teacher itself, or nowhere.

`TeacherSource.find` is enough to plan a run, and loads no model; `TeacherSource.open` gives what training needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.recipes import Recipe, StudentRecipe
from pipeline.data.datasets import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.labels.cache import RELABEL, LabelCache
from pipeline.system.canonical import require_equal
from pipeline.system.text import counted
from pipeline.training.checkpoints import read_meta
from stages.shared.context import Context
from stages.shared.options import kept_name
from stages.shared.paths import Paths
from stages.shared.places import settings_as_written

if TYPE_CHECKING:
    from pipeline.views.views import Views
    from stages.shared.fitting import Teaching

USUAL_TOPK = 5


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a command changes in how a student is trained; by default nothing. Whatever differs goes to data/runs.

    Attributes:
        labels: `cached`; or a control: `none` trains both heads on the ground truth, `online` asks the teacher at every
            step.
        teacher: The checkpoint that `online` asks.
        confidence: Whether the teacher's probability of its label weighs each sample's distillation term.
        num_views: Views that the epochs cycle through, always the first ones; None takes the recipe's number.
        settings: Fields of the student's recipe to replace, the temperature `soft` among them.
    """

    labels: str = "cached"
    teacher: Path | None = None
    confidence: bool = False
    num_views: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def soft_given(self) -> bool:
        """Whether the command sets the temperature."""
        return "soft" in self.settings

    def check(self, name: str, recipe: StudentRecipe) -> None:
        """Check the options, before any data is looked for.

        Raises:
            UsageError: They do not go together, or not with this student.
        """
        if (self.labels == "online") != (self.teacher is not None):
            raise UsageError(f"--labels {self.labels}: --teacher CHECKPOINT belongs to --labels online, and only to it")
        given = (soft_name(recipe, name, given=True),) if self.soft_given and recipe.soft else ()
        for option in (*given, *(("--confidence",) if self.confidence else ())):
            if self.labels == "none":
                raise UsageError(f"{option}: --labels none has no teacher; leave one of them out")
            require_distillation_head(option, name, recipe)

    def differences(self, recipe: Recipe, name: str, student: StudentRecipe) -> dict[str, str]:
        """Return what differs between a student's run and params.yaml, as key and value."""
        differs = {}
        if self.labels != "cached":
            differs["labels"] = self.labels
        if student.soft != recipe.students[name].soft:
            differs |= settings_as_written(student, {"soft"} & self.settings.keys())
        if self.confidence:
            differs["confidence"] = "on"
        if self.num_views not in (None, recipe.views[student.views].count):
            differs["num_views"] = str(self.num_views)
        return differs | settings_as_written(student, self.settings.keys() - {"soft"})

    def check_cache(self, cache: LabelCache, path: Path, recipe: Recipe, name: str, student: StudentRecipe) -> None:
        """Check that a cache holds what this run needs.

        Raises:
            DataError: Too few views, or no probabilities.
        """
        view_recipe = student.views
        command = f"pipeline label --recipe {recipe.name}"
        command += "" if view_recipe == "default" else f" --view-recipe {view_recipe}"
        count = recipe.views[view_recipe].count
        if self.num_views is not None and cache.num_views < self.num_views:
            raise DataError(
                f"{path}: {counted(cache.num_views, 'view')}, --views asks for {self.num_views}; "
                f"run `{command} --views :{self.num_views}`"
            )
        if self.num_views is None and cache.num_views < count:
            raise DataError(
                f"{path}: {counted(cache.num_views, 'view')}, the recipe asks for {count} "
                f"(recipes.{recipe.name}.views.{view_recipe}.count); run `{command}`, or train on fewer with --views"
            )
        if cache.topk == 0 and (student.soft or self.confidence):
            option = soft_name(student, name, given=self.soft_given) if student.soft else "--confidence"
            keep = "" if recipe.label.topk else f" --keep {kept_name(min(USUAL_TOPK, cache.num_classes))}"
            raise DataError(
                f"{path}: keeps {kept_name(cache.topk)}, {option} needs the teacher's probabilities; "
                f"run `{command}{keep} --fresh`"
            )


def soft_name(student: StudentRecipe, name: str, *, given: bool) -> str:
    """Return a student's temperature as the user wrote it: an option of the command, or a key of params.yaml."""
    return f"--soft {student.soft:g}" if given else f"students.{name}.soft: {student.soft:g}"


def require_distillation_head(option: str, name: str, recipe: StudentRecipe) -> None:
    """Check that a student has a head for the teacher's labels, which an option or field needs.

    Raises:
        UsageError: It has none.
    """
    from pipeline.models.students import STUDENTS

    if not STUDENTS[recipe.model].has_distillation_head:
        able = [model for model, student in STUDENTS.items() if student.has_distillation_head]
        way_out = "set it to 0 there, or choose from" if option.startswith("students.") else "choose from"
        raise UsageError(
            f"{option}: student {name} ({recipe.model}) has no distillation head; {way_out} {', '.join(able)}"
        )


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """Where a student's teacher labels come from.

    Attributes:
        recipe: The student's recipe.
        distillation: What the command changes.
        digest: SHA-256 of the teacher's checkpoint; None without a teacher.
        cache: The label cache, if there is one; a student that does not learn from it is still measured against it.
    """

    recipe: StudentRecipe
    distillation: Distillation
    digest: str | None = None
    cache: LabelCache | None = None

    @classmethod
    def find(cls, context: Context, name: str, recipe: StudentRecipe, distillation: Distillation) -> TeacherSource:
        """Find a student's cache or teacher, and check that it fits the data, the views and the run.

        Raises:
            DataError: It is missing, damaged, belongs to something else or holds too little.
        """
        from stages.shared.labelling import read_teacher

        dataset, path = context.dataset(), context.paths.labels(recipe.views)
        if distillation.teacher is not None:
            digest = read_teacher(context, dataset, distillation.teacher).sha256
            return cls(recipe=recipe, distillation=distillation, digest=digest)
        source = cls(recipe=recipe, distillation=distillation)
        if not path.exists():
            if not source.is_distilled:
                return source
            raise DataError(
                f"{path}: no cached labels; run `pipeline teacher-select --recipe {context.recipe.name}`, or "
                f"`pipeline label --view-recipe {recipe.views}` where a teacher is selected"
            )
        cache = open_labels(context.paths, context.recipe, dataset, recipe.views)
        distillation.check_cache(cache, path, context.recipe, name, recipe)
        return replace(source, cache=cache, digest=str(cache.provenance["checkpoint_sha256"]))

    @property
    def is_distilled(self) -> bool:
        """Whether the student learns from the teacher's labels."""
        from pipeline.models.students import STUDENTS

        return STUDENTS[self.recipe.model].has_distillation_head and self.distillation.labels != "none"

    def open(self, context: Context, views: Views) -> Teaching:
        """Load the teacher, or put the cached labels on the device, for training.

        Args:
            context: The command's setting.
            views: The student's training views, which must be those that were labelled.

        Raises:
            UsageError: torch.compile was asked for and fails.
            DataError: The teacher does not fit the data, or a view's pixels are not those that were labelled.
        """
        from pipeline.labels.replay import check_canaries
        from pipeline.labels.source import cached_labels, online_labels
        from stages.shared.fitting import Teaching
        from stages.shared.labelling import label_clean, make_ready, read_teacher

        dataset, kind = context.dataset(), {"soft": self.recipe.soft > 0, "confidence": self.distillation.confidence}
        if self.distillation.teacher is not None:
            checkpoint = read_teacher(context, dataset, self.distillation.teacher)
            teacher = make_ready(context, dataset, checkpoint)
            labels = online_labels(teacher, **kind) if self.is_distilled else None
            clean, name = label_clean(context, dataset, teacher), str(checkpoint.meta["model"])
        elif self.cache is not None:
            view = check_canaries(self.cache, views)
            if view is not None:
                raise DataError(
                    f"view {view}: its pixels are not those that were labelled (another version of this project or of "
                    "its libraries made them); run `pipeline label --fresh`"
                )
            labels = cached_labels(self.cache, context.device, **kind) if self.is_distilled else None
            clean, name = dict(self.cache.clean), str(self.cache.provenance["teacher"])
        else:
            return Teaching()

        def top1(split: str) -> float:
            return 100.0 * float(np.mean(clean[split] == dataset.splits[split].labels))

        scores = {"top1": top1(dataset.evaluation[0]), "test_top1": top1("test")}
        return Teaching(labels, clean, {"name": name, "sha256": self.digest, **scores})


def open_labels(paths: Paths, recipe: Recipe, dataset: Dataset, view_recipe: str) -> LabelCache:
    """Open a recipe's label cache.

    Raises:
        DataError: It is not valid, or belongs to other data, views, evaluation images or another teacher than the
            selected one.
    """
    from stages.shared.labelling import identity_of

    identity, path = identity_of(dataset, recipe.views[view_recipe]), paths.labels(view_recipe)
    winner = read_meta(paths.winner)
    provenance = None if winner is None else {"checkpoint_sha256": winner["sha256"]}
    cache = LabelCache.open(path, expected_identity=identity, expected_provenance=provenance)
    labelled = {split: len(labels) for split, labels in cache.clean.items()}
    expected = {split: len(part) for split, part in dataset.splits.items() if split != "train"}
    require_equal(f"{path}", {"clean": labelled}, {"clean": expected}, RELABEL)
    return cache
