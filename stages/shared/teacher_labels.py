"""Where a student's teacher labels come from: the label cache, the teacher itself, or nowhere.

`TeacherSource.find` is enough to plan a run, and loads no model; `TeacherSource.open` gives what training needs.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.recipes import Recipe, StudentRecipe
from pipeline.data.datasets import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.labels.cache import LabelCache
from pipeline.models.own import code_sha256
from pipeline.system.canonical import fingerprint, require_equal
from pipeline.system.text import counted
from pipeline.training.checkpoints import read_meta
from stages.shared.context import Context
from stages.shared.options import kept_name
from stages.shared.paths import Paths, label_command, labels_name, relabel
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
        teacher_labels: The name of the label file that `cached` reads, as `label --as` gave it; None reads the selected
            teacher's.
        teacher: The checkpoint that `online` asks.
        confidence: Whether the teacher's probability of its label weighs each sample's distillation term.
        num_views: Views that the epochs cycle through, always the first ones; None takes the recipe's number.
        settings: Fields of the student's recipe to replace, the temperature `soft` among them.
    """

    labels: str = "cached"
    teacher_labels: str | None = None
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
        if self.teacher_labels is not None:
            check_label_name("--teacher-labels", self.teacher_labels)
            if self.labels != "cached":
                raise UsageError(f"--teacher-labels {self.teacher_labels}: --labels {self.labels} reads no label file")
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
        if self.teacher_labels is not None:
            differs["teacher_labels"] = self.teacher_labels
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
        view_recipe, given = student.views, "given" in cache.provenance
        command = functools.partial(label_command, labels_name(view_recipe, self.teacher_labels), given=given)
        count = recipe.views[view_recipe].count
        if self.num_views is not None and cache.num_views < self.num_views:
            raise DataError(
                f"{path}: {counted(cache.num_views, 'view')}, --views asks for {self.num_views}; "
                f"run {command(f' --views :{self.num_views}')}"
            )
        if self.num_views is None and cache.num_views < count:
            raise DataError(
                f"{path}: {counted(cache.num_views, 'view')}, the recipe asks for {count} "
                f"(recipes.{recipe.name}.views.{view_recipe}.count); run {command()}, or train on fewer with --views"
            )
        if cache.topk == 0 and (student.soft or self.confidence):
            option = soft_name(student, name, given=self.soft_given) if student.soft else "--confidence"
            keep = "" if recipe.label.topk else f" --keep {kept_name(min(USUAL_TOPK, cache.num_classes))}"
            raise DataError(
                f"{path}: keeps {kept_name(cache.topk)}, {option} needs the teacher's probabilities; "
                f"run {command(f'{keep} --fresh')}"
            )


def check_label_name(option: str, name: str) -> None:
    """Check a name for a label file beside the selected teacher's.

    Raises:
        UsageError: It is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}", name):
        raise UsageError(f"{option} {name!r}: no name; write letters, digits, and within them . _ + -, at most 80")


def soft_name(student: StudentRecipe, name: str, *, given: bool) -> str:
    """Return a student's temperature as the user wrote it: an option of the command, or a key of params.yaml."""
    return f"--soft {student.soft:g}" if given else f"students.{name}.soft: {student.soft:g}"


def require_distillation_head(
    option: str, name: str, recipe: StudentRecipe, arguments: Mapping[str, Any] | None = None
) -> None:
    """Check that a student has a head for the teacher's labels, which an option or field needs.

    Args:
        option: What needs it.
        name: The student.
        recipe: Its recipe.
        arguments: What it is built with; without them a model that must be tried first is not checked.

    Raises:
        UsageError: It has none.
    """
    from pipeline.models.students import STUDENTS, has_distillation_head, is_foreign

    if arguments is None and is_foreign(recipe.model):
        return
    if not has_distillation_head(recipe.model, arguments or {}):
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
        is_distilled: Whether the student learns from the teacher's labels.
        digest: SHA-256 of the teacher's checkpoint; None without a teacher.
        cache: The label cache, if there is one; a student that does not learn from it is still measured against it.
        asked: Of a teacher that is asked online, what decides its answers.
    """

    recipe: StudentRecipe
    distillation: Distillation
    is_distilled: bool
    digest: str | None = None
    cache: LabelCache | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)

    def labels_sha256(self, num_views: int) -> str | None:
        """Return a digest of the labels that the student learns from, 64 hexadecimal digits; None where from none.

        That is LabelCache.digest, or of what decides the answers of a teacher that is asked online.

        Args:
            num_views: Views that its epochs cycle through.
        """
        if not self.is_distilled:
            return None
        if self.cache is None:
            return fingerprint(self.asked)
        return self.cache.digest(num_views, topk=self.recipe.soft > 0 or self.distillation.confidence)

    @classmethod
    def find(
        cls,
        context: Context,
        name: str,
        recipe: StudentRecipe,
        distillation: Distillation,
        arguments: Mapping[str, Any],
    ) -> TeacherSource:
        """Find a student's cache or teacher, and check that it fits the data, the views and the run.

        Args:
            context: The command's setting.
            name: The student.
            recipe: Its recipe.
            distillation: What the command changes.
            arguments: What the student is built with.

        Raises:
            UsageError: The student has no head for what is asked for, or cannot be built.
            DataError: It is missing, damaged, belongs to something else or holds too little.
        """
        from pipeline.models.students import has_distillation_head
        from stages.shared.labellers import as_member, what_decides
        from stages.shared.labelling import read_teacher

        dataset, path = context.dataset(), context.paths.labels(recipe.views, distillation.teacher_labels)
        is_distilled = has_distillation_head(recipe.model, arguments) and distillation.labels != "none"
        if recipe.soft or distillation.confidence:
            option = soft_name(recipe, name, given=distillation.soft_given) if recipe.soft else "--confidence"
            require_distillation_head(option, name, recipe, arguments)
        source = cls(recipe=recipe, distillation=distillation, is_distilled=is_distilled)
        if distillation.teacher is not None:
            checkpoint = read_teacher(context, dataset, distillation.teacher)
            member = as_member(checkpoint.meta, checkpoint.sha256, code_sha256(str(checkpoint.meta["model"])))
            asked = {**what_decides(member), "precision": context.recipe.label.precision}
            return replace(source, digest=checkpoint.sha256, asked=asked)
        if not path.exists():
            if not source.is_distilled:
                return source
            if distillation.teacher_labels is not None:
                command = label_command(labels_name(recipe.views, distillation.teacher_labels))
                raise DataError(
                    f"{path}: no labels of this name, there are {named_labels(path) or 'none'}; run {command}, or "
                    "with --from FILE"
                )
            both, alone = "`pipeline teacher-select`", label_command(recipe.views)
            if recipe.views in context.params.labelled(context.recipe):
                raise DataError(f"{path}: no cached labels; run {both}, or {alone} where a teacher is selected")
            raise DataError(f"{path}: no cached labels; run {alone}, after {both} where no teacher is selected yet")
        cache = open_labels(context.paths, context.recipe, dataset, recipe.views, distillation.teacher_labels)
        if source.is_distilled:
            distillation.check_cache(cache, path, context.recipe, name, recipe)
        return replace(source, cache=cache, digest=str(cache.provenance["checkpoint_sha256"]))

    def open(self, context: Context, views: Views) -> Teaching:
        """Load the teacher, or put the cached labels on the device, for training.

        Args:
            context: The command's setting.
            views: The student's training views, which must be those that were labelled.

        Raises:
            UsageError: torch.compile was asked for and fails.
            DataError: The teacher does not fit the data, or a view's pixels are not those that were labelled.
        """
        from pipeline.labels.replay import check_canaries, other_pixels
        from pipeline.labels.source import OnlineLabels, TeacherLabels, cached_labels
        from stages.shared.fitting import Teaching
        from stages.shared.labelling import accuracy_of, label_clean, make_ready, read_teacher

        dataset, kind = context.dataset(), {"soft": self.recipe.soft > 0, "confidence": self.distillation.confidence}
        if self.distillation.teacher is not None:
            checkpoint = read_teacher(context, dataset, self.distillation.teacher)
            teacher = make_ready(context, dataset, checkpoint)
            labels: TeacherLabels | None = OnlineLabels(teacher, **kind) if self.is_distilled else None
            clean, name = label_clean(context, dataset, teacher), str(checkpoint.meta["model"])
        elif self.cache is not None:
            view, given = check_canaries(self.cache, views), "given" in self.cache.provenance
            if view is not None:
                name = labels_name(self.recipe.views, self.distillation.teacher_labels)
                raise DataError(
                    f"{other_pixels(self.cache, view)}; {relabel(name, given=given)}, or see how many labels change by "
                    "`pipeline labels verify`"
                )
            labels = cached_labels(self.cache, context.device, **kind) if self.is_distilled else None
            clean, name = dict(self.cache.clean), str(self.cache.provenance["teacher"])
        else:
            return Teaching()

        accuracy = accuracy_of(clean, dataset)  # labels that are given may lack those of clean images
        scores = {"top1": accuracy.get(dataset.evaluation[0]), "test_top1": accuracy.get("test")}
        named = {"labels": self.distillation.teacher_labels} if self.distillation.teacher_labels else {}
        return Teaching(labels, clean, {"name": name, "sha256": self.digest, **scores, **named})


def named_labels(path: Path) -> str:
    """Name the label files beside one, of the same view recipe."""
    view_recipe = path.stem.partition("@")[0]
    return ", ".join(sorted(file.stem.partition("@")[2] for file in path.parent.glob(f"{view_recipe}@*.h5")))


def open_labels(
    paths: Paths, recipe: Recipe, dataset: Dataset, view_recipe: str, teacher: str | None = None
) -> LabelCache:
    """Open a recipe's label cache.

    Args:
        paths: The recipe's.
        recipe: The recipe.
        dataset: Its data.
        view_recipe: Whose views are labelled.
        teacher: The name of the file; None is the selected teacher's.

    Raises:
        DataError: It is not valid, or belongs to other data, views or evaluation images; or, where it has no name of
            its own, to another teacher than the selected one.
    """
    from stages.shared.labellers import as_member, what_decides
    from stages.shared.labelling import identity_of

    identity, path = identity_of(dataset, recipe.views[view_recipe]), paths.labels(view_recipe, teacher)
    cache = LabelCache.open(path, way_out=relabel(path.stem))
    way_out = relabel(path.stem, given="given" in cache.provenance)
    require_equal(f"{path}", cache.identity, identity, way_out)
    if teacher is None and (winner := read_meta(paths.winner)) is not None:
        actual, code = what_decides(cache.provenance), None
        with contextlib.suppress(UsageError):  # students need no teacher, and the file of one may not be here
            code = code_sha256(str(winner["model"]))
        expected = what_decides(as_member(winner, winner["sha256"], code or actual["code_sha256"]))
        require_equal(f"{path}", actual, expected, way_out)
    labelled = {split: len(labels) for split, labels in cache.clean.items()}
    to_label = {split: len(part) for split, part in dataset.splits.items() if split != "train"}
    if "given" in cache.provenance:  # of what its maker knew
        to_label = {split: size for split, size in to_label.items() if split in labelled}
    require_equal(f"{path}", {"clean": labelled}, {"clean": to_label}, way_out)
    return cache
