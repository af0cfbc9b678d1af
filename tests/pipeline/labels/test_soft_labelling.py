"""A teacher's top-k over views, and students' batches made of it, cached or asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.labels.answers import ViewLabels
from pipeline.labels.cache import LabelCache, make_identity, make_provenance
from pipeline.labels.replay import make_canaries, replay
from pipeline.labels.source import cached_labels, online_labels
from pipeline.labels.teacher import Teacher, label_view, top_classes
from pipeline.losses import marginal_smoothing, soft_divergence
from pipeline.training.batches import TrainingData
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


def batches(teacher_labels: Any) -> list[Any]:
    data = TrainingData(make_views(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 3, teacher_labels)
    order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(0))
    return [batch for epoch in range(4) for batch in data.batches(epoch, order.split(16))]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("confidence", [False, True])
def test_all_classes_cached_are_what_the_teacher_says_when_asked(soft: bool, confidence: bool) -> None:
    options = {"soft": soft, "confidence": confidence}
    cached = batches(cached_labels(make_cache(NUM_CLASSES), CPU, **options))
    online = batches(online_labels(make_teacher(), **options))
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


def test_labels_of_more_than_255_classes_are_read_as_they_are() -> None:
    cache = make_cache(2)
    assert cache.classes is not None
    wide = dataclasses.replace(
        cache,
        labels=cache.labels.astype("<u2"),
        classes=cache.classes.astype("<u2"),
        identity={**cache.identity, "class_names": [*"abcd", *(["x"] * 40_000)]},
    )
    answer = cached_labels(wide, CPU, soft=True)(1, torch.arange(NUM_SAMPLES), torch.empty(0))
    assert answer.labels.shape == (NUM_SAMPLES, 40_004)
    assert np.array_equal(answer.labels.argmax(1).numpy(), cache.labels[1])
    assert wide.classes is not None
    last = wide.classes.copy()
    last[last == 3] = 40_003
    largest = dataclasses.replace(wide, labels=np.ascontiguousarray(last[..., 0]), classes=last)
    hard = cached_labels(largest, CPU)(1, torch.arange(NUM_SAMPLES), torch.empty(0))
    soft = cached_labels(largest, CPU, soft=True)(1, torch.arange(NUM_SAMPLES), torch.empty(0))
    assert np.array_equal(hard.labels.numpy(), last[1, :, 0]) and hard.labels.max() == 40_003, "beyond int16"
    assert np.array_equal(soft.labels.argmax(1).numpy(), last[1, :, 0])
