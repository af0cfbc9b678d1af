"""The doctor's estimate of the disk and memory that a full run needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.recipes import FitRecipe, StudentRecipe
from pipeline.data.sources import KNOWN_SIZES
from pipeline.errors import UsageError
from pipeline.inference.loading import build_unfilled
from pipeline.labels.answers import PROBABILITY_DTYPE
from pipeline.labels.identity import label_dtype
from pipeline.models.students import has_distillation_head, is_foreign
from pipeline.models.teachers import is_torchvision, weights_file
from pipeline.system.memory import available_ram
from pipeline.system.runtime import RESIDENT_VARIABLE, resident_limit
from pipeline.system.storage import has_file
from stages.doctor.checks import DVC, Task, dvc_setting, has_source
from stages.doctor.software import OK, PROBLEM, WARNING, Finding, size_text
from stages.shared import kept
from stages.shared.context import Context
from stages.shared.paths import DATA
from stages.shared.runs import student_arguments

# Number of model-sized tensors that an optimiser keeps.
MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2, "rmsprop": 2}
# Two states are kept; a third is written before it replaces the older one.
STATES = 3
# Bytes of the archives and of what is unpacked from them.
DOWNLOADS = {"mnist": 67_000_000, "cifar10": 357_000_000, "cifar100": 355_000_000}
# A warning is given if less than this share of the free space would be left.
MARGIN = 0.1


@dataclass(frozen=True)
class Artefact:
    """Something that a full run writes.

    Attributes:
        name: Of the artefact.
        path: Its file or folder.
        size: Bytes, estimated.
        needed: Bytes that are still to be written.
        stage: The DVC stage whose output it is, if any.
    """

    name: str
    path: Path
    size: int
    needed: int
    stage: str | None = None


@dataclass(frozen=True)
class Sizes:
    """The size of a data set.

    Attributes:
        train: Training images.
        evaluation: Images that each epoch is scored on.
        test: Test images.
        total: Images of all splits.
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
    """Return the size of the prepared data, or of their source; None where it is unknown."""
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


def foreign_students(context: Context, sizes: Sizes) -> list[Finding]:
    """Try the students whose models are not ours on a batch, as training does at its start."""
    findings = []
    for name in context.params.students:
        student = context.recipe.students.get(name)
        if student is None or not is_foreign(student.model):
            continue
        arguments = student_arguments(student, num_classes=sizes.num_classes, image_size=sizes.image_size)
        try:
            heads = "both heads" if has_distillation_head(student.model, arguments) else "a class head alone"
            findings.append(Finding("project", OK, f"students.{name}: {student.model} works and has {heads}"))
        except UsageError as error:
            findings.append(Finding("project", PROBLEM, f"students.{name}: {error}"))
    return findings


def artefacts(context: Context, tasks: list[Task], sizes: Sizes) -> list[Artefact]:
    """Estimate everything that a full run writes; reports and curves, some megabytes, are not counted."""
    paths, recipe = context.paths, context.recipe
    models = {task.stage: model_bytes(context, task, sizes) for task in tasks if task.recipe is not None}
    teachers = [task for task in tasks if task.kind == "teacher"]
    artefacts = _downloads(context, {task.name: models[task.stage] for task in teachers if task.why})

    def add(name: str, path: Path, size: int, stage: str) -> None:
        artefacts.append(Artefact(name, path, size, 0 if path.exists() else size, stage))

    size = sizes.total * (sizes.image_bytes + 2)
    if paths.is_prepared:
        size = sum(file.stat().st_size for file in paths.prepared.iterdir())
    add("prepared data", paths.dataset, size, "prepare")
    for task in teachers:
        add(f"teacher {task.name}", paths.teacher(task.name) / "best.safetensors", models[task.stage], task.stage)
    largest = max(models[task.stage] for task in teachers)
    add("the selected teacher, at most", paths.winner / "best.safetensors", largest, "select")
    for task in tasks:
        if task.kind == "label":
            size = recipe.views[task.name].count * view_bytes(context, sizes)
            add(f"labels {task.name}", paths.labels(task.name), size, task.stage)
            folder, needed = paths.work("labels", task.name), size if task.why else 0
            artefacts.append(Artefact(f"labels {task.name} under way", folder, size, needed))
        elif task.kind == "student":
            file, size = paths.student(task.name) / "last.safetensors", 2 * models[task.stage]
            add(f"student {task.name}, best and last", file, size, task.stage)
    states = [STATES * _state_bytes(task.recipe, models[task.stage]) for task in tasks if task.recipe and task.why]
    if states:
        artefacts.append(Artefact("saved states of one run, at most", paths.work(), max(states), max(states)))
    return [*artefacts, *_dvc_copies(tasks, artefacts)]


def _downloads(context: Context, teachers: Mapping[str, int]) -> list[Artefact]:
    """Return the downloads for the data and for the teachers to be trained, given by name with their bytes."""
    recipe, raw, downloads = context.recipe, context.paths.raw, []
    if recipe.dataset.source in DOWNLOADS:
        size = DOWNLOADS[recipe.dataset.source]
        is_there = context.paths.dataset.exists() or has_source(recipe, raw)
        downloads.append(Artefact(f"{recipe.dataset.source} as downloaded", raw, size, 0 if is_there else size))
    sizes = {recipe.teachers[name]: size for name, size in teachers.items()}
    # timm keeps its weights in another folder, of another library.
    weights = {
        weights_file(teacher.model): size
        for teacher, size in sizes.items()
        if teacher.weights == "imagenet" and is_torchvision(teacher.model)
    }
    if weights:
        missing = sum(size for file, size in weights.items() if not has_file(file))
        downloads.append(Artefact("ImageNet weights", next(iter(weights)).parent, sum(weights.values()), missing))
    return downloads


def _dvc_copies(tasks: list[Task], artefacts: list[Artefact]) -> list[Artefact]:
    """Return DVC's copies of its outputs, unless its cache is elsewhere."""
    if not DVC.is_dir() or dvc_setting("cache", "dir") is not None:
        return []
    current = {task.stage: task.why is None for task in tasks}
    tracked = [artefact for artefact in artefacts if artefact.stage is not None]
    new = sum(part.size for part in tracked if not current.get(part.stage or "", not part.needed))
    return [Artefact("DVC's copies, where it cannot link", DVC / "cache", sum(part.size for part in tracked), new)]


def model_bytes(context: Context, task: Task, sizes: Sizes) -> int:
    """Return the bytes of a model's weights and buffers."""
    assert task.model is not None
    arguments: dict[str, object] = {"num_classes": sizes.num_classes}
    if task.kind == "student":
        student = context.recipe.students[task.name]
        arguments = student_arguments(student, num_classes=sizes.num_classes, image_size=sizes.image_size)
    model = build_unfilled(task.kind, task.model, arguments, own_code=(task.model,))  # a recipe names it
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def view_bytes(context: Context, sizes: Sizes) -> int:
    """Return the bytes of one view's labels, with their top-k classes and probabilities."""
    label = label_dtype(sizes.num_classes).itemsize
    return sizes.train * (label + context.recipe.label.topk * (label + PROBABILITY_DTYPE.itemsize))


def _state_bytes(recipe: FitRecipe, model: int) -> int:
    """Return the bytes of weights, best epoch or gradients, the optimiser's moments and the moving average."""
    average = isinstance(recipe, StudentRecipe) and recipe.ema > 0
    return (2 + MOMENTS[recipe.optimizer] + average) * model


def disk(artefacts: Iterable[Artefact]) -> Finding:
    """Compare what is still to be written with the free space."""
    needed = sum(artefact.needed for artefact in artefacts)
    folder = DATA if DATA.is_dir() else Path()
    free = shutil.disk_usage(folder).free
    text = f"disk: the recipe needs at most {size_text(needed)} more, {size_text(free)} are free"
    if not os.access(folder, os.W_OK):
        return Finding("space", PROBLEM, f"{folder.absolute()} cannot be written to", "mend its rights")
    second_names = kept.space()
    if second_names.own:
        text += f"; second names of results take {size_text(second_names.own)}, which `pipeline clean --kept` frees"
    if needed > free:
        way_out = "free some, or clone the project on a larger disk (`dvc cache dir` moves DVC's copies alone)"
        return Finding("space", PROBLEM, text, way_out)
    if needed > (1 - MARGIN) * free:
        return Finding("space", WARNING, text, "free some before a long run")
    return Finding("space", OK, text)


def memory(context: Context, tasks: list[Task], sizes: Sizes) -> list[Finding]:
    """Report whether the training images stay in memory, and whether the largest model fits."""
    device = context.device
    size, limit = sizes.train * sizes.image_bytes, resident_limit(device)
    where = "GPU memory" if device.type == "cuda" else "RAM"
    is_decoded = any(view.resized_crop for view in context.recipe.views.values())
    stays = size <= limit and not is_decoded
    text = f"training images: {size_text(size)}, "
    if is_decoded:
        text += f"decoded from {context.paths.prepared} for every batch"
    elif stays:
        text += f"kept in {where} (up to {size_text(limit)} are)"
    else:
        text += f"more than the {size_text(limit)} kept in {where}: they stream ({RESIDENT_VARIABLE} sets the limit)"
    findings = [Finding("space", OK, text)]
    needs = {
        task.name: _state_bytes(task.recipe, model_bytes(context, task, sizes))
        for task in tasks
        if task.why and task.recipe is not None
    }
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_ram()
    if not needs or free is None:
        return findings
    largest = max(needs, key=lambda name: needs[name])
    need = needs[largest] + (2 * size if stays else 0)
    text = f"{where}: {largest}'s weights, gradients and moments, with the images, take {size_text(need)} of "
    text += f"{size_text(free)} available, its activations not counted"
    enough = need <= (1 - MARGIN) * free
    findings.append(Finding("space", OK if enough else WARNING, text, "" if enough else "stop other programs"))
    return findings
