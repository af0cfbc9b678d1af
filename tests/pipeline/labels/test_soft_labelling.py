"""A teacher's top-k over views, and students' batches made of it, cached or asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.labels.answers import ViewLabels, indexable
from pipeline.labels.cache import LabelCache, make_identity, make_provenance
from pipeline.labels.identity import label_dtype
from pipeline.labels.replay import make_canaries, replay
from pipeline.labels.source import OnlineLabels, cached_labels
from pipeline.labels.teacher import Teacher, label_view, top_classes
from pipeline.losses import marginal_smoothing, soft_divergence, training_loss
from pipeline.training.batches import TrainingData
from pipeline.views.views import Views
from tests.pipeline.labels.test_teacher import MEAN, NUM_CLASSES, NUM_SAMPLES, RECIPE, STD, make_teacher, make_views

CPU = torch.device("cpu")
EVERYTHING = [(view, sample) for view in range(3) for sample in range(NUM_SAMPLES)]


def make_cache(topk: int) -> LabelCache:
    teacher, views = make_teacher(), make_views()
    identity = make_identity(
        dataset_sha256="0" * 64, split="train", view_recipe=RECIPE, class_names="abcd", num_samples=NUM_SAMPLES
    )
    provenance = make_provenance(
        teacher="t", checkpoint_sha256="0" * 64, mean=MEAN, std=STD, precision="fp32", device="cpu",
        versions={}, topk=topk,
    )  # fmt: skip
    kept = [label_view(teacher, views, view, topk) for view in range(3)]
    stored = [view_answers.stored(num_samples=NUM_SAMPLES, num_classes=NUM_CLASSES, topk=topk) for view_answers in kept]
    labels, classes, probabilities = (
        np.stack(arrays) for arrays in zip(*(encoded.arrays for encoded in stored), strict=True)
    )
    return LabelCache(
        labels=labels, classes=classes, probabilities=probabilities, clean={}, canaries=tuple(make_canaries(views, 3)),
        identity=identity, provenance=provenance,
    )  # fmt: skip


@pytest.mark.parametrize("topk", [1, 3, NUM_CLASSES])
def test_the_top_k_are_the_most_probable_classes_and_their_softmax(topk: int) -> None:
    teacher, views = make_teacher(), make_views()
    kept = label_view(teacher, views, 2, topk)
    images = (views.batch(2, torch.arange(NUM_SAMPLES)).images.float() / 255 - 0.5) / 0.2
    shares, order = teacher.module(images).softmax(1).detach().sort(1, descending=True)
    assert kept.classes is not None and kept.probabilities is not None
    assert np.array_equal(kept.classes, order[:, :topk].numpy())
    assert np.array_equal(kept.probabilities, shares[:, :topk].half().numpy())
    assert np.array_equal(kept.labels, label_view(teacher, views, 2).labels) and kept.labels.dtype == np.int64


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_top_k_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    views = make_views()
    first, second = (label_view(make_teacher(size), views, 1, 2) for size in (16, batch_size))
    assert first.classes is not None and np.array_equal(first.classes, second.classes)
    assert first.probabilities is not None and second.probabilities is not None
    assert np.allclose(first.probabilities, second.probabilities, rtol=2**-10)


def test_the_label_comes_first_even_among_equal_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (2000, 40), generator=generator).float()
    classes, shares = top_classes(logits, 6)
    assert torch.equal(classes[:, 0], logits.argmax(1))
    assert not torch.equal(logits.topk(6, dim=1).indices[:, 0], logits.argmax(1)), "topk alone breaks ties otherwise"
    answers = ViewLabels(classes[:, 0].numpy(), classes.numpy(), shares.half().numpy())
    answers.check(num_samples=2000, num_classes=40, topk=6)
    torch.testing.assert_close(shares, logits.softmax(1).gather(1, classes))


def test_a_class_number_above_int16_survives_the_transfer() -> None:
    class Wide(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(images), 65535)
            logits[:, 65534], logits[:, 40000] = 9.0, 8.0
            return logits

    kept = label_view(Teacher(Wide(), MEAN, STD, "fp32", batch_size=16), make_views(), 0, 2)
    assert kept.classes is not None and (kept.classes == [65534, 40000]).all()
    kept.stored(num_samples=NUM_SAMPLES, num_classes=65535, topk=2)


def test_a_replay_tells_the_largest_difference_of_a_probability() -> None:
    cache = make_cache(3)
    honest = replay(cache, make_teacher(), make_views(), EVERYTHING)
    assert honest.differences == [] and honest.probability_error is not None
    assert 0 < honest.probability_error <= 2**-12, "half a unit of float16 below 1"
    assert cache.probabilities is not None
    changed = np.array(cache.probabilities)
    changed[1, 5, 2] = 0.0
    replayed = replay(dataclasses.replace(cache, probabilities=changed), make_teacher(), make_views(), EVERYTHING)
    assert replayed.probability_error == pytest.approx(float(cache.probabilities[1, 5, 2]), abs=2**-12)
    elsewhere = [pair for pair in EVERYTHING if pair != (1, 5)]
    again = replay(dataclasses.replace(cache, probabilities=changed), make_teacher(), make_views(), elsewhere)
    assert again.probability_error == honest.probability_error


@pytest.mark.parametrize("pairs", [[(1, 5)], [(0, 3), (1, 5), (2, 0)]])
def test_a_single_label_of_a_view_is_replayed(pairs: list[tuple[int, int]]) -> None:
    replayed = replay(make_cache(3), make_teacher(), make_views(), pairs)
    assert replayed.num_samples == len(pairs) and replayed.differences == []
    assert replayed.probability_error is not None and replayed.probability_error <= 2**-12


def batches(teacher_labels: Any) -> list[Any]:
    data = TrainingData(make_views(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 3, teacher_labels)
    order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(0))
    return [batch for epoch in range(4) for batch in data.batches(epoch, order.split(16))]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("confidence", [False, True])
def test_all_classes_cached_are_what_the_teacher_says_when_asked(soft: bool, confidence: bool) -> None:
    options = {"soft": soft, "confidence": confidence}
    cached = batches(cached_labels(make_cache(NUM_CLASSES), CPU, **options))
    online = batches(OnlineLabels(make_teacher(), **options))
    for one, other in zip(cached, online, strict=True):
        assert one.teacher_labels.shape == ((len(one.labels), NUM_CLASSES) if soft else (len(one.labels),))
        torch.testing.assert_close(one.teacher_labels, other.teacher_labels, rtol=2**-10, atol=2**-20)
        assert (one.confidence is not None) == (other.confidence is not None) == confidence
        if confidence:
            torch.testing.assert_close(one.confidence, other.confidence, rtol=2**-10, atol=0)
        if soft:
            logits = torch.randn(len(one.labels), NUM_CLASSES, requires_grad=True)
            both = [soft_divergence(logits, answers.teacher_labels, 2.0).sum() for answers in (one, other)]
            torch.testing.assert_close(*both, rtol=1e-3, atol=1e-5)
            both[1].backward()  # the answer of a teacher asked online can be saved for the backward pass


def test_a_batch_gets_the_answers_of_its_own_view_and_samples() -> None:
    cache = make_cache(2)
    assert cache.classes is not None and cache.probabilities is not None
    indices = torch.tensor([7, 3, 39])
    answer = cached_labels(cache, CPU, soft=True, confidence=True)(2, indices, torch.empty(0))
    kept = torch.from_numpy(np.array(cache.probabilities[2, indices]))
    classes = torch.from_numpy(cache.classes[2, indices].astype(np.int64))
    assert torch.equal(answer.labels, marginal_smoothing(classes, kept, NUM_CLASSES))
    assert answer.confidence is not None and torch.equal(answer.confidence, kept[:, 0].float())
    hard = cached_labels(cache, CPU)(2, indices, torch.empty(0))
    assert torch.equal(hard.labels, classes[:, 0]) and hard.confidence is None


class WithoutUint16(TorchDispatchMode):
    """A stand-in for CUDA, where hardly an operation takes uint16: every one that is given it fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.uint16, f"{func} of uint16"
        return func(*args, **(kwargs or {}))


def widened(cache: LabelCache, num_classes: int) -> LabelCache:
    """Add classes, of which the last takes the place of class 3."""
    assert cache.classes is not None
    classes = cache.classes.astype(label_dtype(num_classes))
    classes[classes == 3] = num_classes - 1
    names = [*"abcd", *map(str, range(num_classes - 4))]
    labels = np.ascontiguousarray(classes[..., 0])
    return dataclasses.replace(
        cache, labels=labels, clean={"test": labels[0]}, classes=classes,
        identity={**cache.identity, "class_names": names},
    )  # fmt: skip


class Wide(torch.nn.Module):
    """The teacher of `widened` labels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.module, self.num_classes = make_teacher().module, num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(images), self.num_classes), -99.0)
        logits[:, [0, 1, 2, -1]] = self.module(images)
        return logits


def check_wide_labels(num_classes: int, device: torch.device) -> None:
    """Check a step's labels of each kind against the cache's numbers."""
    cache = widened(make_cache(2), num_classes)
    assert cache.classes is not None and cache.labels.max() == num_classes - 1
    views = make_views()
    data = TrainingData(Views(views.images.to(device), views.labels, RECIPE), (0.5,) * 3, (0.2,) * 3, 3)
    teacher = Teacher(Wide(num_classes).eval(), MEAN, STD, "fp32", batch_size=16)
    sources = [cached_labels(cache, device), cached_labels(cache, device, soft=True, confidence=True)]
    sources += [OnlineLabels(teacher)] if device.type == "cpu" else []
    order = torch.arange(NUM_SAMPLES).flip(0)
    for source in sources:
        (batch,) = dataclasses.replace(data, teacher_labels=source).batches(1, [order])
        assert batch.teacher_labels is not None
        found = batch.teacher_labels.argmax(1) if batch.teacher_labels.ndim == 2 else batch.teacher_labels
        assert found.dtype == torch.int64 and np.array_equal(found.cpu().numpy(), cache.labels[1, order])
        outputs = [torch.zeros(NUM_SAMPLES, num_classes, device=device, requires_grad=True) for _ in range(2)]
        training_loss((outputs[0], outputs[1]), batch).backward()  # type: ignore[no-untyped-call]
        assert outputs[1].grad is not None and int(outputs[1].grad[0].argmin()) == found[0]


@pytest.mark.parametrize(("num_classes", "dtype"), [(256, "i2"), (32_767, "i2"), (32_768, "i4"), (65_535, "i4")])
def test_class_numbers_are_held_in_the_smallest_type_that_every_device_indexes(num_classes: int, dtype: str) -> None:
    held = indexable(np.array([0, num_classes - 1], "<u2"), num_classes)
    assert held.dtype == np.dtype(dtype) and held.tolist() == [0, num_classes - 1]
    assert indexable(np.array([0, 254], "u1"), 255).dtype == np.uint8


@pytest.mark.parametrize("num_classes", [300, 65_535])
def test_more_than_255_classes_are_never_indexed_as_uint16(num_classes: int) -> None:
    with WithoutUint16():
        if num_classes < 1000:
            cache = widened(make_cache(2), num_classes)
            teacher = Teacher(Wide(num_classes).eval(), MEAN, STD, "fp32", batch_size=16)
            assert replay(cache, teacher, make_views(), EVERYTHING).differences == []
        check_wide_labels(num_classes, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("num_classes", [300, 40_000])
def test_a_gpu_takes_the_labels_of_more_than_255_classes(num_classes: int) -> None:
    check_wide_labels(num_classes, torch.device("cuda"))
