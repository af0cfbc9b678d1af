"""Paired partners: the samples of each view form random pairs, of which one reading of each image makes both views."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from pipeline.config.recipes import ViewRecipe
from pipeline.labels.teacher import Teacher, label_view
from pipeline.system.runtime import Ranks
from pipeline.training.batches import epoch_order
from pipeline.training.distributed import Group
from pipeline.views import mixing
from pipeline.views.views import Views
from tests.pipeline.training import test_fit
from tests.support.encoded import photographs, views_of

RECIPE = ViewRecipe(
    seed=2, count=2, resized_crop={"scale": [0.2, 1.0], "ratio": [0.75, 1.333]}, flip=True,
    autoaugment="randaugment", magnitude=7, magnitudes="timm", probability=0.5, erasing=0.3, mixing="both",
    mixing_probability=0.8, cutmix_alpha=1.0, mixup_alpha=0.8, partner="paired",
)  # fmt: skip
N = 30


def small(number: int, **operations: object) -> Views:
    recipe = replace(ViewRecipe(count=1, mixing="mixup", partner="paired"), **operations)  # type: ignore[arg-type]
    return Views(torch.zeros((number, 3, 1, 1), dtype=torch.uint8), torch.arange(number), recipe)


@settings(max_examples=20)
@given(number=st.integers(1, 60), view=st.integers(0, 9))
def test_the_partner_of_the_partner_is_the_sample_itself(number: int, view: int) -> None:
    paired = small(number).pairs(view)
    assert paired is not None and paired[paired].tolist() == list(range(number))
    assert (paired == np.arange(number)).sum() == number % 2


def test_every_pairing_is_equally_likely_and_views_differ() -> None:
    counts: dict[tuple[int, ...], int] = {}
    views = small(6)
    for view in range(3000):
        pairing = tuple(np.asarray(views.pairs(view)).tolist())
        counts[pairing] = counts.get(pairing, 0) + 1
    assert len(counts) == 15 and stats.chisquare(list(counts.values())).pvalue > 1e-4  # 5 x 3 x 1


def test_a_uniform_recipe_has_no_pairs_and_keeps_its_order() -> None:
    assert small(9, partner="uniform").pairs(0) is None and small(9, mixing="none").pairs(0) is None
    assert torch.equal(epoch_order(3, 1, 9, None), epoch_order(3, 1, 9))


@pytest.mark.parametrize("number", [64, 65])
def test_an_epochs_order_shuffles_pairs(number: int) -> None:
    paired = small(number).pairs(0)
    order, other = (epoch_order(seed, 0, number, paired).numpy() for seed in (0, 1))
    assert paired is not None and sorted(order.tolist()) == list(range(number))
    firsts, seconds = order[: number // 2 * 2].reshape(-1, 2).T
    assert (paired[firsts] == seconds).all() and not np.array_equal(order, other)
    if number % 2:
        assert paired[order[-1]] == order[-1], "it would part all pairs behind it"
    # As sorted by their keys, not by their numbers.
    assert abs(stats.spearmanr(firsts, np.arange(len(firsts))).statistic) < 0.6


def test_a_batch_of_whole_pairs_reads_each_image_once() -> None:
    images = photographs(N)
    views = views_of(images, RECIPE)
    order = epoch_order(0, 0, N, views.pairs(1))
    list(views.batches(1, list(order.split(10))))
    assert (images.reads == 1).all()
    images.reads[:] = 0
    list(views.batches(1, list(order.split(7))))
    assert images.reads.sum() <= N + 4 * 2, "an end of a batch parts one pair"


def test_uniform_partners_of_a_batch_are_read_once_too() -> None:
    images = photographs(N)
    views = views_of(images, replace(RECIPE, partner="uniform", mixing_probability=1.0))
    views.batch(0, np.arange(N))
    assert (images.reads == 1).all()


@settings(max_examples=15)
@given(data=st.data())
def test_a_view_of_pairs_ignores_batch_order_and_repetition(data: st.DataObject) -> None:
    views = views_of(photographs(11), RECIPE)
    indices = np.array(data.draw(st.lists(st.integers(0, 10), min_size=1, max_size=25)))
    every, some = views.batch(1, np.arange(11)), views.batch(1, torch.from_numpy(indices))
    for of_some, of_every in zip(vars(some).values(), vars(every).values(), strict=True):
        assert torch.equal(of_some, of_every[indices])


def test_resident_images_and_a_prepared_view_give_the_same() -> None:
    recipe = replace(RECIPE, resized_crop={})
    host = views_of(photographs(N), recipe)
    resident = Views(host.images.place(host.images.read(np.arange(N))), host.labels, recipe)  # type: ignore[union-attr]
    parts = list(torch.arange(N).split(8))
    for one, other in zip(host.batches(1, parts), resident.batches(1, parts), strict=True):
        for first, second in zip(vars(one).values(), vars(other).values(), strict=True):
            assert torch.equal(first, second)


def teacher(batch_size: int) -> Teacher:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 9)).eval()
    return Teacher(model, (0.5,) * 3, (0.2,) * 3, "fp32", batch_size)


def test_labelling_walks_pairs_and_each_label_is_its_samples_own() -> None:
    images = photographs(N)
    views = views_of(images, RECIPE)
    kept = label_view(teacher(10), views, 1, topk=2)
    assert (images.reads == 1).all()
    expected = teacher(10)(views.batch(1, np.arange(N)).images)
    assert np.array_equal(kept.labels, expected.argmax(1).numpy()) and len(np.unique(kept.labels)) > 1
    assert kept.classes is not None and np.array_equal(kept.classes[:, 0], kept.labels)
    assert np.array_equal(label_view(teacher(7), views, 1).labels, kept.labels)


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of test_fit train on pairs."""
    monkeypatch.setattr(test_fit, "VIEW_RECIPE", replace(RECIPE, resized_crop={}))


def test_a_stopped_run_ends_like_an_unbroken_one(paired: None, tmp_path: Path) -> None:
    test_fit.test_a_stopped_run_ends_like_an_unbroken_one(tmp_path, "sgd", 6)


def test_ranks_share_the_batches_of_one_process(paired: None, tmp_path: Path) -> None:
    fit = test_fit.make_fit(tmp_path)
    order = epoch_order(0, 0, fit.data.views.num_samples, fit.data.pairs(0))
    alone = [batch.images for batch in fit.data.batches(0, [share.indices for share in fit._shares(order)])]
    parts = []
    for rank in range(3):
        fit.group = Group(Ranks(rank, 3, rank))
        shares = fit._shares(order)
        made = fit.data.batches(0, [share.indices for share in shares])
        parts.append([batch.images[: share.count] for batch, share in zip(made, shares, strict=True)])
    for whole, *shared in zip(alone, *parts, strict=True):
        assert torch.equal(whole, torch.cat(shared))


def test_pairs_are_those_that_the_draws_make_neighbours() -> None:
    uniform = {"partner": np.array([[0.5], [0.1], [0.9], [0.3], [0.7]])}  # in order: 1, 3, 0, 4, 2
    paired = mixing.partners(uniform, ViewRecipe(count=1, mixing="mixup", partner="paired"))
    assert paired.tolist() == [4, 3, 2, 1, 0]
    assert mixing.by_pairs(np.array([0.9, 0.2, 0.1, 0.6, 0.05]), paired).tolist() == [1, 3, 0, 4, 2]
