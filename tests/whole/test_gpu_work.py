"""What a GPU is asked for: launches, copies and waits are counted on a pretended one, and may not grow again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config.recipes import FitRecipe, ViewRecipe
from pipeline.data.streaming import HostImages
from pipeline.labels.source import OnlineLabels, TeacherAnswer
from pipeline.labels.teacher import Teacher, label_view
from pipeline.losses import training_loss
from pipeline.models.students import STUDENTS, build_student
from pipeline.models.students.attention import outer_blocks
from pipeline.models.students.fused import cuda, outer_cuda
from pipeline.models.students.tnt import NestedBlock
from pipeline.training.batches import Batch, EvaluationData, TrainingData
from pipeline.training.evaluation import Predictions, evaluate
from pipeline.training.execution import Execution
from pipeline.training.fit import Fit
from pipeline.training.optimization import build_optimizer
from pipeline.training.step import train_step
from pipeline.views.views import Views
from tests.pipeline.training.test_fit import MEAN, NUM_CLASSES, STD, VIEW_RECIPE, images_and_labels
from tests.pipeline.views.test_views import EVERYTHING, make_views
from tests.support.pretended_gpu import CPU, GPU, KINDS, Counted, OnGpu, as_compiled, pretended_gpu

PAPER = ViewRecipe(count=3, crop=4, flip=True, autoaugment="cifar10", mixing="cutmix")
NUM_IMAGES, BATCH = 200, 50
PARTS = torch.arange(NUM_IMAGES).split(BATCH)


class Work(NamedTuple):
    """What something asks for, in the order of KINDS."""

    launches: int
    pinned: int = 0
    pageable: int = 0
    fetched: int = 0
    waits: int = 0

    def per(self, number: int) -> Work:
        """Divide by a number of batches or steps, rounding up."""
        return Work(*(-(-amount // number) for amount in self))


MOST = {
    "a view: paper": Work(540, pinned=3),
    "a batch of a prepared view: paper": Work(20, pinned=1),
    "a view: everything": Work(730, pinned=3),
    "a batch of a prepared view: everything": Work(20, pinned=1),
    "a streamed batch: everything": Work(720, pinned=4),
    "a step: vit, bf16": Work(170),
    "a step: deit, bf16": Work(200),
    "a step: tnt, bf16": Work(200),
    "a step: titn, bf16": Work(230),
    "a step: titn, bf16, outer block compiled": Work(200),
    "a step: titn, fp32": Work(170),
    "an epoch of four steps, without them": Work(170, pinned=9, fetched=1),
    "the end of an epoch": Work(120, fetched=2, waits=3),
    "a moving average": Work(1),
    "an evaluation": Work(120, fetched=1, waits=1),
    "a streamed evaluation": Work(110, pinned=1, fetched=1, waits=1),
    "labels of a prepared view of four batches": Work(170, pinned=1, fetched=1),
    "a batch's labels by a teacher that is asked": Work(14),
    "the check of a teacher that is asked": Work(1, waits=1),
}
"""The most that each may ask for. Views have two chunks of images. Steps are of students of two blocks with clipping,
AdamW and a fused inner block, which counts as one launch forward and one backward."""


@pytest.fixture(scope="module")
def asked() -> Mapping[str, tuple[Work, str]]:
    """What each asks for, and who asks; the results are compared with those of the CPU on the way."""
    with pytest.MonkeyPatch.context() as patch, pretended_gpu() as counted:
        patch.setattr("pipeline.views.views.GPU_CHUNK", NUM_IMAGES // 2)
        patch.setattr("pipeline.views.views.MAX_TOGETHER", NUM_IMAGES - 1)
        patch.setattr(outer_cuda, "_compiled", lambda function: functools.partial(as_compiled, function))
        found: dict[str, tuple[Work, str]] = {}
        for part in (views, streamed, steps, around, scores, labels):
            for name, number in part(counted):
                who = "".join(f"\n{kind}: {counted.callers(kind)}" for kind in KINDS[1:])
                found[name] = Work(*counted.take().values()).per(number), who
        return found


Counting = Iterator[tuple[str, int]]
"""Yields a name, and the number that what has been counted since the last is divided by."""


def views(counted: Counted) -> Counting:
    for name, recipe in (("paper", PAPER), ("everything", EVERYTHING)):
        on_cpu = make_views(recipe, num_samples=NUM_IMAGES)
        on_gpu = Views(on_cpu.images.to(GPU), on_cpu.labels, recipe)
        on_gpu.prepare(0)  # makes the maps that are kept
        counted.take()
        on_gpu.prepare(1)
        yield f"a view: {name}", 1
        batches = list(on_gpu.batches(1, PARTS))
        yield f"a batch of a prepared view: {name}", len(PARTS)
        for batch, expected in zip(batches, on_cpu.batches(1, PARTS), strict=True):
            assert all(same(getattr(batch, key), value) for key, value in vars(expected).items())
        counted.take()


def streamed(counted: Counted) -> Counting:
    on_cpu = make_views(EVERYTHING, num_samples=NUM_IMAGES)
    pixels = np.ascontiguousarray(on_cpu.images.permute(0, 2, 3, 1).numpy())
    on_gpu, parts = Views(HostImages(pixels, GPU), on_cpu.labels, EVERYTHING), PARTS[:2]
    on_gpu.batch(1, parts[0])  # draws the view
    counted.take()
    batches = list(on_gpu.batches(1, parts))
    yield "a streamed batch: everything", len(parts)
    for batch, expected in zip(batches, on_cpu.batches(1, parts), strict=True):
        assert all(same(getattr(batch, key), value) for key, value in vars(expected).items())
    counted.take()


def make_fit(student: str, *, precision: str = "fp32", drop_path: float = 0.0) -> Fit:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "width": 48, "depth": 2}
    model = build_student(student, num_classes=NUM_CLASSES, drop_path=drop_path, **sizes).to(GPU)
    for block in model.modules():
        if isinstance(block, NestedBlock):
            block.fused = cuda.inner_block
    images, labels = (values.to(GPU) for values in images_and_labels(NUM_IMAGES, seed=0))
    teacher = (labels + 1) % NUM_CLASSES
    fit = Fit(
        model=model,
        data=TrainingData(
            Views(images, labels, VIEW_RECIPE), MEAN, STD, VIEW_RECIPE.count,
            lambda view, indices, _: TeacherAnswer(teacher.index_select(0, indices)),
        ),
        evaluation=EvaluationData(images, labels, MEAN, STD, NUM_CLASSES, teacher),
        objective=training_loss,
        recipe=FitRecipe(epochs=9, batch_size=BATCH, lr=0.001, clip=1.0, optimizer="adamw"),
        ema=0.9,
        execution=Execution(precision=precision),
    )  # fmt: skip
    # As where steps are captured, which a pretended GPU cannot do.
    fit.optimizer = build_optimizer(model, fit.recipe, captured=True)
    return fit


def step_of(fit: Fit) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    return lambda batch: train_step(
        fit.model, batch, fit.objective, fit.optimizer, clip=1.0, precision=fit.execution.precision
    )


def steps(counted: Counted) -> Counting:
    for student, precision in [("titn", "fp32"), *((name, "bf16") for name in STUDENTS)]:
        fit = make_fit(student, precision=precision)
        first, second, *_ = fit.data.batches(0, PARTS)
        fit.model.train()
        step = step_of(fit)
        step(first)  # makes the optimiser's moments
        counted.take()
        _, finite = step(second)
        yield f"a step: {student}, {precision}", 1
        assert bool(finite)
    for block in outer_blocks(fit.model):
        block.passes = outer_cuda.PASSES
    step(first)
    counted.take()
    step(second)
    yield f"a step: {student}, {precision}, outer block compiled", 1


def around(counted: Counted) -> Counting:
    """What an epoch of training asks for beside its steps, and what follows each epoch."""
    fit = make_fit("titn", drop_path=0.1)
    fit.train_epoch()
    fit.end_epoch()
    results = torch.ones((), device=GPU), torch.ones((), dtype=torch.bool, device=GPU)
    fit.step = lambda _: results
    counted.take()
    fit.train_epoch()
    yield "an epoch of four steps, without them", 1
    fit.end_epoch()
    yield "the end of an epoch", 1
    fit.average.update(1)
    yield "a moving average", 1


def scores(counted: Counted) -> Counting:
    fit = make_fit("titn")
    pixels = np.ascontiguousarray(fit.evaluation.images.held.permute(0, 2, 3, 1).numpy())
    kept = Predictions.of(fit.evaluation)
    counted.take()
    expected = evaluate(fit.model, fit.evaluation, predictions=kept)
    yield "an evaluation", 1
    streamed = dataclasses.replace(fit.evaluation, images=HostImages(pixels, GPU))
    assert evaluate(fit.model, streamed) == expected
    yield "a streamed evaluation", 1


def labels(counted: Counted) -> Counting:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, NUM_CLASSES)).eval()
    on_cpu = make_views(PAPER, num_samples=NUM_IMAGES)
    expected = label_view(Teacher(module, MEAN, STD, "fp32", BATCH), on_cpu, 1, topk=2)
    teacher = Teacher(module.to(GPU), MEAN, STD, "fp32", BATCH)
    on_gpu = Views(on_cpu.images.to(GPU), on_cpu.labels, PAPER)
    on_gpu.prepare(1)
    counted.take()
    made = label_view(teacher, on_gpu, 1, topk=2)
    yield "labels of a prepared view of four batches", 1
    assert made.to_bytes() == expected.to_bytes()
    source = OnlineLabels(teacher, soft=True, confidence=True)
    for batch in on_gpu.batches(1, PARTS):
        source(1, batch.indices, batch.images)
    counted.take()
    source(1, batch.indices, batch.images)
    yield "a batch's labels by a teacher that is asked", 1
    source.check()
    yield "the check of a teacher that is asked", 1


def same(tensor: Tensor, expected: Tensor) -> bool:
    """Whether a tensor on the pretended GPU has the bits of another on the CPU."""
    assert isinstance(tensor, OnGpu)
    return torch.equal(tensor.held, expected)


@pytest.mark.parametrize("name", MOST)
def test_no_more_is_asked_of_a_gpu(name: str, asked: Mapping[str, tuple[Work, str]]) -> None:
    work, who = asked[name]
    assert all(number <= most for number, most in zip(work, MOST[name], strict=True)), f"{work}{who}"


def test_all_that_is_counted_has_a_bound(asked: Mapping[str, tuple[Work, str]]) -> None:
    assert set(asked) == set(MOST)


def test_a_wait_in_a_step_is_noticed() -> None:
    with pretended_gpu() as counted:
        fit = make_fit("vit")
        step = step_of(fit)
        [batch, *_] = fit.data.batches(0, PARTS)
        counted.take()
        step(batch)
        assert Work(*counted.take().values()).waits == 0
        fit.objective = lambda outputs, targets: training_loss(outputs, targets) * targets.lam.sum().item() / BATCH
        step(batch)
        assert Work(*counted.take().values()).waits == 1
        for wait in (bool, float, Tensor.nonzero, lambda value: batch.lam[batch.lam > 0.5]):
            wait(batch.lam.sum())
            assert Work(*counted.take().values()).waits == 1
        batch.lam.tolist()
        assert Work(*counted.take().values()).fetched == 1


def test_a_pageable_copy_in_a_batch_is_noticed() -> None:
    with pretended_gpu() as counted:
        images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8).to(GPU)
        array = torch.arange(4)
        counted.take()
        for copy in (
            lambda: array.to(GPU, non_blocking=True),  # PyTorch waits all the same
            lambda: array.pin_memory().to(GPU),
            lambda: torch.tensor([1.0, 2.0], device=GPU),
            lambda: torch.where(images > 1, images, 0),
            lambda: images[torch.tensor([1, 2])],
        ):
            copy()
            assert Work(*counted.take().values()).pageable == 1
        array.pin_memory().to(GPU, non_blocking=True)
        torch.full((), 3, device=GPU)
        images[1:2] = 3
        assert Work(*counted.take().values())[1:] == (1, 0, 0, 0)
        assert images.cpu().device == CPU
        assert Work(*counted.take().values()).fetched == 1
