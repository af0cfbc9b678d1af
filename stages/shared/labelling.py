"""What a labelling run has to do: which views, how many classes it keeps of each answer, what it goes on from."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config.recipes import MAX_VIEWS, Recipe, ViewRecipe
from pipeline.data.datasets import Dataset
from pipeline.data.streaming import place_images
from pipeline.errors import DataError, UsageError
from pipeline.inference.loading import from_checkpoint, load_checkpoint_of
from pipeline.labels.cache import LabelCache, make_identity, make_provenance
from pipeline.labels.teacher import Teacher, compile_teacher
from pipeline.models.folding import fold
from pipeline.system.runtime import current_ranks, resident_limit, resolve_precision, versions
from pipeline.system.storage import is_locked
from pipeline.training.checkpoints import Checkpoint
from stages.shared.context import Context

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 10.0

ViewSlice = tuple[int, int | None]
"""First view and the one behind the last; None is the recipe's number of views."""


def wanted_views(recipe: Recipe, view_recipe: str, part: ViewSlice | None) -> range:
    """Return the views to label: those of a slice, or all that the recipe asks for.

    Raises:
        UsageError: The slice is empty, or goes beyond what a recipe may ask for.
    """
    count = recipe.views[view_recipe].count
    if part is None:
        return range(count)
    start, stop = part[0], count if part[1] is None else part[1]
    if not start < stop <= MAX_VIEWS:
        end = f"{count}, recipes.{recipe.name}.views.{view_recipe}.count" if part[1] is None else f"{stop}"
        raise UsageError(
            f"--views: the slice from {start} to {end} holds no view, or one beyond {MAX_VIEWS}; write A:B with A < B"
        )
    return range(start, stop)


def asked_topk(recipe: Recipe, keep: int | None, num_classes: int) -> int:
    """Return how many classes to keep of each sample, 0 for the argmax alone; `keep` goes before the recipe's.

    Raises:
        UsageError: There are fewer classes.
    """
    topk = recipe.label.topk if keep is None else keep
    if topk > num_classes:
        raise UsageError(
            f"{_key(recipe, keep)}: topk={topk}, but the data set has {num_classes} classes; keep at most that many"
        )
    return topk


def reusable_cache(
    context: Context, path: Path, identity: Mapping[str, Any], checkpoint_sha256: str
) -> LabelCache | None:
    """Open the sealed file that a run goes on from: one of this data, view recipe and teacher; others get replaced."""
    if not path.exists():
        return None
    try:
        return LabelCache.open(
            path, expected_identity=identity, expected_provenance={"checkpoint_sha256": checkpoint_sha256}
        )
    except DataError as error:
        context.say(f"labelling every view again: {error}")
        return None


def topk_beside(context: Context, path: Path, cache: LabelCache, asked: int, keep: int | None) -> int:
    """Return the K with which a sealed file goes on: its own, since what it keeps is never dropped.

    Args:
        context: The command's setting.
        path: The file.
        cache: Its content.
        asked: What the command asks for.
        keep: As given on the command line.

    Raises:
        DataError: It holds less than is asked for.
    """
    if cache.topk > asked:
        context.say(f"{path}: keeps {kept_name(cache.topk)} and goes on with it; {kept_name(asked)} was asked for")
    if cache.topk < asked:
        option = "" if keep is None else f" --keep {kept_name(keep)}"
        raise DataError(
            f"{path}: keeps {kept_name(cache.topk)}, {_key(context.recipe, keep)} asks for {kept_name(asked)}; "
            f"`pipeline label{option} --fresh` labels every view again"
        )
    return cache.topk


def kept_name(topk: int) -> str:
    """Return what is kept of each answer, as --keep names it."""
    return f"topk={topk}" if topk else "argmax"


def slices(views: Sequence[int]) -> str:
    """Write ascending views as --views takes them: `0:4, 7:8`."""
    groups = itertools.groupby(enumerate(views), key=lambda pair: pair[1] - pair[0])
    runs = [[view for _, view in group] for _, group in groups]
    return ", ".join(f"{run[0]}:{run[-1] + 1}" for run in runs)


def _key(recipe: Recipe, keep: int | None) -> str:
    return f"recipes.{recipe.name}.label.topk" if keep is None else "--keep"


def lock_of(work: Path, rank: int) -> Path:
    """Return a rank's lock file, beside the directory of the parts."""
    return work.with_name(f"{work.name}-{rank}.lock")


def ranks_at_work(work: Path) -> set[int]:
    """Return the other ranks that hold their lock, of whatever group.

    A rank may outlive its group: without torchrun nobody ends it when rank 0 dies.
    """
    own = current_ranks().rank
    name = re.compile(re.escape(work.name) + r"-(\d+)\.lock")
    found = {int(match[1]): file for file in work.parent.iterdir() if (match := name.fullmatch(file.name))}
    return {rank for rank, file in found.items() if rank != own and is_locked(file)}


def label_for_others(
    say: Callable[[str], None],
    work: Path,
    views: Iterable[int],
    *,
    is_finished: Callable[[int], bool],
    label: Callable[[int], None],
) -> None:
    """Return when every view is labelled and no other rank is at work, labelling what nobody else does.

    So rank 0 never waits for a rank that died, failed, or finished without being of use (one that found other
    libraries than rank 0 did writes parts that rank 0 does not take), and never deletes the file that another is
    about to rename. One that starts late finds some of its work done.

    Args:
        say: Prints a line.
        work: The directory of the parts.
        views: The views wanted.
        is_finished: Whether a view is labelled.
        label: Labels a view.
    """
    left, said, taken = list(views), time.monotonic(), 0
    while True:
        # Looked at before the parts: a rank that ends in between has written its views.
        busy = ranks_at_work(work)
        left = [view for view in left if not is_finished(view)]
        abandoned = [view for view in left if view % current_ranks().world_size not in busy]
        if abandoned:
            label(abandoned[0])
            taken += 1
        elif not busy:
            break
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            say(f"{len(left)} views to go; ranks at work besides this one: {sorted(busy) or 'none'}")
            said = time.monotonic()
    if taken:
        say(f"labelled {taken} views of ranks that were not at work")


def load_teacher(context: Context, dataset: Dataset, path: Path) -> tuple[Teacher, Checkpoint]:
    """Load a teacher for a data set, folded for labelling.

    Raises:
        UsageError: The path does not exist; or torch.compile was asked for and fails.
        DataError: No valid teacher lies there, or one of other classes, image size or normalisation.
    """
    device = context.device
    checkpoint = load_checkpoint_of(path, "teacher")
    module = from_checkpoint(checkpoint, device).module
    check_teacher(context, dataset, checkpoint)
    settings = context.recipe.label
    precision = resolve_precision(settings.precision, device)
    folded = fold(module, dataset.image_size).to(memory_format=torch.channels_last)
    ready = Teacher(folded, dataset.mean, dataset.std, precision, settings.batch_size)
    return compile_teacher(ready, dataset.image_size) if settings.compile else ready, checkpoint


def check_teacher(context: Context, dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Refuse a teacher of other data.

    Raises:
        DataError: Its classes, image size or normalisation are others.
    """
    for key, expected in (
        ("class_names", list(dataset.class_names)),
        ("image_size", dataset.image_size),
        ("mean", list(dataset.mean)),
        ("std", list(dataset.std)),
    ):
        if checkpoint.meta.get(key) != expected:
            raise DataError(
                f"{checkpoint.path}: its {key} is not that of {context.paths.dataset}; train a teacher on this data"
            )


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
    """Return the provenance of the labels that a teacher, loaded by `load_teacher`, makes here."""
    settings, device = context.recipe.label, context.device
    return make_provenance(
        teacher=str(checkpoint.meta["model"]),
        checkpoint_sha256=checkpoint.sha256,
        mean=dataset.mean,
        std=dataset.std,
        precision=resolve_precision(settings.precision, device),
        device=device.type,
        versions=versions(),
        topk=topk,
        compiled=settings.compile,
    )
