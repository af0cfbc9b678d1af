"""A teacher over views: labels, replay and canaries."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import NumericalError
from pipeline.labelling import Teacher, label_view
from pipeline.labels import LabelCache, make_identity, make_provenance
from pipeline.recipes import ViewRecipe
from pipeline.replay import Replay, check_canaries, make_canaries, replay
from pipeline.views import Views

RECIPE = ViewRecipe(count=3, crop=1, flip=True, autoaugment="cifar10", mixing="cutmix")
NUM_SAMPLES, NUM_CLASSES, SIZE = 40, 4, 8


def make_views(recipe: ViewRecipe = RECIPE) -> Views:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_SAMPLES, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return Views(images, torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator), recipe)


def make_teacher(batch_size: int = 16) -> Teacher:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, NUM_CLASSES)).eval()
    return Teacher(model, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "fp32", batch_size)


def make_cache(teacher: Teacher, views: Views) -> LabelCache:
    identity = make_identity(
        dataset_sha256="0" * 64, split="train", view_recipe=RECIPE, class_names="abcd", num_samples=NUM_SAMPLES
    )
    provenance = make_provenance(
        teacher="t", checkpoint_sha256="0" * 64, mean=teacher.mean, std=teacher.std, precision="fp32", device="cpu",
        versions={},
    )  # fmt: skip
    rows = np.stack([label_view(teacher, views, view).labels for view in range(3)]).astype(np.uint8)
    canaries = tuple(make_canaries(views, 3))
    return LabelCache(labels=rows, clean={}, canaries=canaries, identity=identity, provenance=provenance)


@pytest.mark.parametrize("batch_size", [1, 7, 40, 100])
def test_labels_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    views = make_views()
    assert np.array_equal(
        label_view(make_teacher(), views, 1).labels, label_view(make_teacher(batch_size), views, 1).labels
    )


def test_a_label_is_the_argmax_on_the_mixed_view_itself() -> None:
    teacher, views = make_teacher(), make_views()
    batch = views.batch(2, torch.arange(NUM_SAMPLES))
    images = (batch.images.float() / 255 - 0.5) / 0.2
    expected = teacher.model(images).argmax(1)
    assert np.array_equal(label_view(teacher, views, 2).labels, expected.numpy())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_label(poison: float) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), NUM_CLASSES)
            logits[-1, 2] = poison
            return logits

    teacher = dataclasses.replace(make_teacher(), model=Broken())
    with pytest.raises(NumericalError, match="logit of the teacher is not finite"):
        label_view(teacher, make_views(), 0)


def test_a_replay_names_view_sample_labels_and_margin() -> None:
    teacher, views = make_teacher(), make_views()
    cache = make_cache(teacher, views)
    everything = [(view, sample) for view in range(3) for sample in range(NUM_SAMPLES)]
    assert replay(cache, teacher, views, everything) == Replay([], None)
    labels = np.array(cache.labels)
    labels[1, 5] = (labels[1, 5] + 1) % NUM_CLASSES
    [difference] = replay(dataclasses.replace(cache, labels=labels), teacher, views, everything).differences
    assert (difference.view, difference.sample, difference.cached) == (1, 5, labels[1, 5])
    assert difference.replayed == cache.labels[1, 5]
    images = (views.batch(1, torch.tensor([5])).images.float() / 255 - 0.5) / 0.2
    logits = teacher.model(images)[0]
    expected = (logits[difference.replayed] - logits[difference.cached]).item()
    assert difference.margin == pytest.approx(expected, abs=1e-5)


def test_canaries_notice_views_that_are_no_longer_the_same() -> None:
    cache = make_cache(make_teacher(), make_views())
    assert {canary.view for canary in cache.canaries} == {0, 1, 2}
    assert check_canaries(cache, make_views()) is None
    assert check_canaries(cache, make_views(dataclasses.replace(RECIPE, seed=1))) == 0
