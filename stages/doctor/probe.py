"""How long a full run would take: a few real steps of each model that is to be trained, scaled to the whole.

Steps are the fit loop's own, at learning rate 0, on the first training images or on noise of their size. On a CPU
teachers are given at most TEACHER_BATCH images at once and students STUDENT_BATCH, their micro-batch; the rest of a
batch costs the same again, but for the update, which is timed apart. Nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config.recipes import FitRecipe, StudentRecipe
from pipeline.data.streaming import place_images
from pipeline.labels.source import TeacherAnswer
from pipeline.labels.teacher import Teacher, label_view
from pipeline.losses import objective
from pipeline.models.folding import fold
from pipeline.models.students import build_student, use_inner_block
from pipeline.models.teachers import build_teacher
from pipeline.system.runtime import keep_freed_memory, resolve_precision
from pipeline.training.batches import EvaluationData, TrainingData
from pipeline.training.checkpoints import RunState
from pipeline.training.evaluation import CPU_BATCH, GPU_BATCH, evaluate
from pipeline.training.execution import Execution
from pipeline.training.fit import Fit, Session
from pipeline.training.step import Objective
from pipeline.views.views import Views
from stages.doctor.work import Job, Sizes
from stages.shared.context import Context
from stages.shared.runs import student_arguments

TEACHER_BATCH = 64
STUDENT_BATCH = 128
CPU_STEPS, GPU_STEPS = 3, 20
# Until a step is captured in a CUDA graph, see pipeline.training.step.
GRAPH_WARM_UP = 4
SECONDS = 3.0
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Speed:
    """What was measured of a model.

    Attributes:
        steps: Training steps timed; 0 where only labelling was.
        batch: Images of each.
        step_seconds: Of one of them, its views included; the median.
        update_seconds: The part of it that does not grow with the batch.
        evaluation_rate: Images scored a second.
        label_rate: Images labelled a second; None for a student.
        memory: Bytes of GPU memory at the peak; None on a CPU.
        share: What the steps got of this process's threads on a CPU, in (0, 1]; other work gets the rest.
    """

    steps: int = 0
    batch: int = 0
    step_seconds: float = 0.0
    update_seconds: float = 0.0
    evaluation_rate: float = math.inf
    label_rate: float | None = None
    memory: int | None = None
    share: float = 1.0

    def fit_seconds(self, recipe: FitRecipe, epochs: float, sizes: Sizes) -> float:
        """Scale to a run's epochs, its evaluations and its final test."""
        updates = math.ceil(sizes.train / recipe.batch_size) * self.update_seconds
        images = sizes.train * (self.step_seconds - self.update_seconds) / self.batch
        return epochs * (images + updates + sizes.evaluation / self.evaluation_rate) + sizes.test / self.evaluation_rate


class _Enough(Exception):
    """As many steps have been done as were asked for, or there was time for."""


class _Clock:
    """Watches a run: ends it after some steps, or when its time is over."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most, self._deadline, self._times, self._worked = 0, math.inf, [0.0], 0.0

    @property
    def steps(self) -> list[float]:
        """Seconds of each step."""
        return [later - earlier for earlier, later in itertools.pairwise(self._times)]

    @property
    def share(self) -> float:
        """What the steps got of the threads' time."""
        return min(1.0, (time.process_time() - self._worked) / (sum(self.steps) * torch.get_num_threads()))

    def begin(self, most: int, seconds: float) -> None:
        """Allow so many steps, of which the first may take longer than `seconds`."""
        self._worked = time.process_time()
        _wait(self._device)
        self._most, self._times = most, [time.perf_counter()]
        self._deadline = self._times[0] + seconds

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Do nothing."""

    def stepped(self) -> None:
        """Count a step."""
        _wait(self._device)
        self._times.append(time.perf_counter())
        if len(self._times) > self._most or self._times[-1] > self._deadline:
            raise _Enough

    def epoch_ended(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def warned(self, message: str) -> None:
        """Do nothing."""


def probe(context: Context, job: Job, sizes: Sizes, *, prepared: bool) -> Speed:
    """Time a few steps of a job's model, and its evaluation; a teacher labels some images too.

    Raises:
        torch.OutOfMemoryError: The model does not fit the device with its batch.
    """
    device = context.device
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    views_recipe = "default"
    if isinstance(job.recipe, StudentRecipe):
        views_recipe = job.recipe.views
    elif job.kind == "label":
        views_recipe = job.name
    most = STUDENT_BATCH if job.kind == "student" else TEACHER_BATCH
    batch = job.recipe.batch_size if job.recipe is not None else context.recipe.label.batch_size
    batch = min(batch, sizes.train, most if device.type == "cpu" else batch)
    steps = CPU_STEPS if device.type == "cpu" else GPU_STEPS
    views = _views(context, sizes, views_recipe, min(steps * batch, sizes.train), prepared=prepared)
    model, how, loss = _model(job, sizes, device)
    speed = Speed()
    if job.recipe is not None:
        assert how is not None and loss is not None
        data = TrainingData(views, MEAN, STD, None, _answers(views) if job.kind == "student" else None)
        speed = _time_fit(model, data, loss, job.recipe, how, sizes, batch, steps)
    if job.kind != "student":
        speed = dataclasses.replace(speed, label_rate=_label_rate(context, model, views, sizes))
    if device.type == "cuda":
        speed = dataclasses.replace(speed, memory=torch.cuda.max_memory_allocated(device))
    return speed


def _views(context: Context, sizes: Sizes, name: str, count: int, *, prepared: bool) -> Views:
    """Return views of the first training images, or of noise."""
    if prepared:
        train = context.dataset().train.take(np.arange(count))
        images, labels = train.images, train.labels
    else:
        generator = np.random.default_rng(0)
        shape = (count, sizes.image_size, sizes.image_size, 3)
        images = generator.integers(0, 256, shape, dtype=np.uint8)
        labels = generator.integers(0, sizes.num_classes, count)
    placed = place_images(images, context.device, images.nbytes)
    return Views(placed, torch.from_numpy(labels), context.recipe.views[name], key="doctor")


def _model(job: Job, sizes: Sizes, device: torch.device) -> tuple[nn.Module, Execution | None, Objective | None]:
    """Build a job's model on the device, as its stage does, from random weights."""
    assert job.model is not None
    recipe = job.recipe
    if isinstance(recipe, StudentRecipe):
        arguments = student_arguments(recipe, num_classes=sizes.num_classes, image_size=sizes.image_size)
        student = build_student(job.model, **arguments).to(device)
        block = use_inner_block(student, recipe.inner_block, device)
        return student, Execution.of(recipe, device, inner_block=block), objective(recipe)
    model = build_teacher(job.model, num_classes=sizes.num_classes).to(device).to(memory_format=torch.channels_last)
    if recipe is None:
        return model, None, None
    return model, Execution.of(recipe, device), objective(recipe)


def _answers(views: Views) -> Callable[[int, torch.Tensor, torch.Tensor], TeacherAnswer]:
    """Return teacher labels, the images' own."""
    return lambda view, indices, images: TeacherAnswer(views.labels.index_select(0, indices))


def _time_fit(
    model: nn.Module,
    data: TrainingData,
    loss: Objective,
    recipe: FitRecipe,
    how: Execution,
    sizes: Sizes,
    batch: int,
    steps: int,
) -> Speed:
    """Time training steps, the update alone, and an evaluation."""
    device, views = data.views.device, data.views
    images = views.images
    assert isinstance(images, torch.Tensor)
    scored = min(len(images), CPU_BATCH if device.type == "cpu" else GPU_BATCH)
    evaluation = EvaluationData(images[:scored], views.labels[:scored], MEAN, STD, sizes.num_classes)
    clock = _Clock(device)
    fit = Fit(
        model=model,
        data=data,
        evaluation=evaluation,
        objective=loss,
        recipe=dataclasses.replace(recipe, lr=0.0, batch_size=batch),
        execution=how,
        session=Session(RunState(Path("unused"), ""), clock),
        ema=recipe.ema if isinstance(recipe, StudentRecipe) else 0.0,
    )
    fit.saved_at = math.inf
    for epoch, most in enumerate((GRAPH_WARM_UP if how.step == "graph" else 1, steps)):
        fit.progress.epoch, fit.progress.step = epoch, 0
        rendering = _seconds(device, functools.partial(views.prepare, epoch)) / views.num_samples
        clock.begin(most, SECONDS)
        with contextlib.suppress(_Enough):
            fit.train_epoch()
    share = clock.share if device.type == "cpu" else 1.0
    update = _seconds(device, fit.optimizer.step)
    scoring = _seconds(device, lambda: evaluate(model, evaluation, precision=how.precision))
    # The first steps find memory and kernels that the later ones have.
    step = statistics.median(clock.steps)
    return Speed(len(clock.steps), batch, step + batch * rendering, min(update, step), scored / scoring, share=share)


def _label_rate(context: Context, model: nn.Module, views: Views, sizes: Sizes) -> float:
    """Return how many images a second a teacher labels, folded, views included."""
    settings, device = context.recipe.label, context.device
    folded = fold(model, sizes.image_size).to(memory_format=torch.channels_last)
    batch = min(settings.batch_size, views.num_samples)
    teacher = Teacher(folded, MEAN, STD, resolve_precision(settings.precision, device), batch)
    label_view(teacher, views, 0)
    return views.num_samples / _seconds(device, lambda: label_view(teacher, views, 1))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
