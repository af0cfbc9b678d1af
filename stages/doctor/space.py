"""Disk and memory that a full run of the recipe needs, artefact by artefact."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.recipes import FitRecipe, StudentRecipe
from pipeline.data.sources import KNOWN_SIZES
from pipeline.inference.loading import build_model
from pipeline.labels.identity import label_dtype
from pipeline.models.teachers import weights_file
from pipeline.system.runtime import RESIDENT_VARIABLE, resident_limit
from stages.doctor.checks import DVC, Task, dvc_setting, has_source
from stages.doctor.software import OK, PROBLEM, WARNING, Finding, size_text
from stages.shared.context import Context
from stages.shared.paths import DATA
from stages.shared.runs import student_arguments

# Tensors as large as the model that an optimiser keeps.
MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2, "rmsprop": 2}
# Two states are kept, and a third is written beside the one that it replaces.
STATES = 3
PROBABILITY_BYTES = 2
# Archives, and what is unpacked of them.
DOWNLOADS = {"mnist": 67_000_000, "cifar10": 357_000_000, "cifar100": 355_000_000}
# Where less than this share of what is free would be left, it is worth a warning.
MARGIN = 0.1


@dataclass(frozen=True)
class Artefact:
    """Something that a full run writes.

    Attributes:
        name: What it is.
        path: Where it lies.
        size: Bytes, estimated.
        needed: Bytes of it that are not there yet.
        stage: The DVC stage that it is an output of, if any.
    """

    name: str
    path: Path
    size: int
    needed: int
    stage: str | None = None


@dataclass(frozen=True)
class Sizes:
    """How large a data set is.

    Attributes:
        train: Training images.
        evaluation: Images that every epoch is scored on.
        test: Test images.
        total: Of all splits.
        num_classes: K.
        image_size: Side, pixels.
    """

    train: int
    evaluation: int
    test: int
    total: int
    num_classes: int
    image_size: int

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return 3 * self.image_size**2


def sizes(context: Context, *, prepared: bool) -> Sizes | None:
    """Return the size of the prepared data, or of the source where that is known."""
    recipe = context.recipe
    if prepared:
        dataset = context.dataset()
        counts = {name: len(split) for name, split in dataset.splits.items()}
        evaluation, total = len(dataset.evaluation[1]), sum(counts.values())
        return Sizes(counts["train"], evaluation, counts["test"], total, dataset.num_classes, dataset.image_size)
    if recipe.dataset.source not in KNOWN_SIZES:
        return None
    train, test, num_classes = KNOWN_SIZES[recipe.dataset.source]
    total = train + test
    test = test or round(train * recipe.dataset.test_fraction)
    train = total - test
    val = round(train * recipe.dataset.val_fraction)
    return Sizes(train - val, val or test, test, total, num_classes, recipe.dataset.image_size)


def artefacts(context: Context, jobs: list[Task], sizes: Sizes) -> list[Artefact]:
    """Estimate everything that a full run writes; reports and curves, some megabytes, are not counted."""
    paths, recipe = context.paths, context.recipe
    models = {job.stage: model_bytes(context, job, sizes) for job in jobs if job.recipe is not None}
    teachers = [job for job in jobs if job.kind == "teacher"]
    found = _downloads(context, {job.name: models[job.stage] for job in teachers if job.why})
    found.append(_artefact("prepared data", paths.dataset, sizes.total * (sizes.image_bytes + 2), "prepare"))
    for job in teachers:
        found.append(
            _artefact(f"teacher {job.name}", paths.teacher(job.name) / "best.safetensors", models[job.stage], job.stage)
        )
    largest = max(models[job.stage] for job in teachers)
    found.append(_artefact("the selected teacher, at most", paths.winner / "best.safetensors", largest, "select"))
    for job in jobs:
        if job.kind == "label":
            size = recipe.views[job.name].count * view_bytes(context, sizes)
            labels = _artefact(f"labels {job.name}", paths.labels(job.name), size, job.stage)
            parts = Artefact(
                f"labels {job.name} under way", paths.work("labels", job.name), size, size if job.why else 0
            )
            found += [labels, parts]
        elif job.kind == "student":
            file, size = paths.student(job.name) / "last.safetensors", 2 * models[job.stage]
            found.append(_artefact(f"student {job.name}, best and last", file, size, job.stage))
    states = [STATES * _state_bytes(job.recipe, models[job.stage]) for job in jobs if job.recipe and job.why]
    if states:
        found.append(Artefact("saved states of one run, at most", paths.work(), max(states), max(states)))
    return [*found, *_dvc_copies(jobs, found)]


def _downloads(context: Context, teachers: Mapping[str, int]) -> list[Artefact]:
    """Return what is downloaded for the data, and for teachers to be trained, given with their sizes."""
    recipe, raw, found = context.recipe, context.paths.raw, []
    if recipe.dataset.source in DOWNLOADS:
        size = DOWNLOADS[recipe.dataset.source]
        is_there = context.paths.dataset.exists() or has_source(recipe, raw)
        found.append(Artefact(f"{recipe.dataset.source} as downloaded", raw, size, 0 if is_there else size))
    wanted = {name: size for name, size in teachers.items() if recipe.teachers[name].weights == "imagenet"}
    if wanted:
        missing = sum(size for name, size in wanted.items() if not weights_file(name).is_file())
        found.append(
            Artefact("ImageNet weights", weights_file(next(iter(wanted))).parent, sum(wanted.values()), missing)
        )
    return found


def _dvc_copies(jobs: list[Task], found: list[Artefact]) -> list[Artefact]:
    """Return DVC's copies of what it tracks, unless its cache lies elsewhere."""
    if DVC.is_dir() and dvc_setting("cache", "dir") is None:
        current = {job.stage: job.why is None for job in jobs}
        tracked = [each for each in found if each.stage is not None]
        size = sum(each.size for each in tracked)
        new = sum(each.size for each in tracked if not current.get(each.stage or "", not each.needed))
        return [Artefact("DVC's copies, where it cannot link", DVC / "cache", size, new)]
    return []


def _artefact(name: str, path: Path, size: int, stage: str) -> Artefact:
    return Artefact(name, path, size, 0 if path.exists() else size, stage)


def model_bytes(context: Context, job: Task, sizes: Sizes) -> int:
    """Return the bytes of a model's weights and buffers."""
    assert job.model is not None
    arguments: dict[str, object] = {"num_classes": sizes.num_classes}
    if job.kind == "student":
        own = context.recipe.students[job.name]
        arguments = student_arguments(own, num_classes=sizes.num_classes, image_size=sizes.image_size)
    with torch.device("meta"):
        model = build_model(job.kind, job.model, arguments)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def view_bytes(context: Context, sizes: Sizes) -> int:
    """Return the bytes of one view's labels, and of the classes and probabilities kept with them."""
    label = label_dtype(sizes.num_classes).itemsize
    kept = context.recipe.label.topk * (label + PROBABILITY_BYTES)
    return sizes.train * (label + kept)


def _state_bytes(recipe: FitRecipe, model: int) -> int:
    """Weights, the best epoch's or gradients, the optimiser's moments, and the average of the weights."""
    average = isinstance(recipe, StudentRecipe) and recipe.ema > 0
    return (2 + MOMENTS[recipe.optimizer] + average) * model


def disk(found: Iterable[Artefact]) -> Finding:
    """Compare what is not there yet with what is free."""
    needed = sum(each.needed for each in found)
    folder = DATA if DATA.is_dir() else Path()
    free = shutil.disk_usage(folder).free
    text = f"disk: the recipe needs at most {size_text(needed)} more, {size_text(free)} are free"
    if not os.access(folder, os.W_OK):
        return Finding("space", PROBLEM, f"{folder.absolute()} cannot be written to", "mend its rights")
    if needed > free:
        return Finding("space", PROBLEM, text, "free some, or have `data` and .dvc/cache on a larger disk")
    if needed > (1 - MARGIN) * free:
        return Finding("space", WARNING, text, "free some before a long run")
    return Finding("space", OK, text)


def memory(context: Context, jobs: list[Task], sizes: Sizes) -> list[Finding]:
    """Say whether the training images stay in memory, and compare the largest model with what there is."""
    device = context.device
    size, limit = sizes.train * sizes.image_bytes, resident_limit(device)
    where = "GPU memory" if device.type == "cuda" else "RAM"
    text = f"training images: {size_text(size)}, "
    if size <= limit:
        text += f"kept in {where} (up to {size_text(limit)} are)"
    else:
        text += f"more than the {size_text(limit)} kept in {where}: they stream ({RESIDENT_VARIABLE} sets the limit)"
    found = [Finding("space", OK, text)]
    models = [(model_bytes(context, job, sizes), job) for job in jobs if job.why and job.recipe is not None]
    if not models:
        return found
    needs = [(_state_bytes(job.recipe, size), job) for size, job in models if job.recipe is not None]
    need, job = max(needs, key=lambda pair: pair[0])
    need += 2 * size if size <= limit else 0
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_ram()
    if free is None:
        return found
    text = f"{where}: {job.name}'s weights, gradients and moments, with the images, take {size_text(need)} of "
    text += f"{size_text(free)} available, its activations not counted"
    enough = need <= (1 - MARGIN) * free
    found.append(Finding("space", OK if enough else WARNING, text, "" if enough else "stop what else runs here"))
    return found


def available_ram() -> int | None:
    """Return the bytes of RAM that are free or can be freed; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
