from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.config.recipes import ViewRecipe
from pipeline.views import draws, mixing
from pipeline.views.views import Views

unit = st.floats(0, 1, exclude_max=True)


def two_batches(num_images: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, num_images, 3, height, width), dtype=torch.uint8, generator=generator)
    return images[0], images[1]


def cutmix(images: torch.Tensor, partners: torch.Tensor, boxes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    lam = mixing.cutmix_lambda(boxes, *images.shape[-2:])
    return mixing.cutmix(images, partners, torch.from_numpy(boxes)), torch.from_numpy(lam)


def mixup(images: torch.Tensor, partners: torch.Tensor, uniform: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    shares = mixing.mixup_shares(uniform)
    lam = mixing.mixup_lambda(shares)
    return mixing.mixup(images, partners, torch.from_numpy(shares)), torch.from_numpy(lam)


def test_cutmix_fills_the_box_with_the_partner() -> None:
    images = torch.full((1, 3, 3, 4), 1, dtype=torch.uint8)
    mixed, lam = cutmix(images, images + 8, np.array([[1, 0, 3, 2]]))
    assert mixed[0].tolist() == [[[1, 9, 9, 1], [1, 9, 9, 1], [1, 1, 1, 1]]] * 3
    assert lam.tolist() == [np.float32(8 / 12)]


def test_a_box_is_centred_even_sided_and_clipped() -> None:
    # The side is cos(pi u / 2) of the frame's: all of it at 0, just above a half at 0.66.
    lambda_uniform = np.array([0.0, 0.0, 0.66, 0.66, 0.66, 0.999])
    center_uniform = np.array([[0.0, 0.0], [0.99, 0.5], [0.5, 0.5], [0.0, 0.99], [0.3, 0.1], [0.5, 0.5]])
    boxes = mixing.cutmix_boxes(lambda_uniform, center_uniform, height=8, width=16)
    assert boxes.tolist() == [
        [0, 0, 8, 4],  # sides (16, 8): halves (8, 4), around (0, 0)
        [7, 0, 16, 8],  # around (15, 4)
        [4, 2, 12, 6],  # sides (8, 4): halves (4, 2), around (8, 4)
        [0, 5, 4, 8],  # around (0, 7)
        [0, 0, 8, 2],  # around (4, 0)
        [8, 4, 8, 4],  # a side below 2 leaves nothing
    ]


@given(st.lists(st.tuples(unit, unit, unit), min_size=1, max_size=20), st.integers(1, 40), st.integers(1, 40))
def test_lambda_is_the_share_of_pixels_left_of_the_first_image(
    uniform: list[tuple[float, float, float]], height: int, width: int
) -> None:
    values = np.array(uniform)
    boxes = mixing.cutmix_boxes(values[:, 0], values[:, 1:], height, width)
    first = torch.zeros((len(values), 3, height, width), dtype=torch.uint8)
    mixed, lam = cutmix(first, first + 1, boxes)
    assert lam.dtype == torch.float32
    num_left = (mixed == 0).sum(dim=(1, 2, 3)).double() / 3
    assert torch.equal(lam, (num_left / (height * width)).float())
    assert (boxes[:, :2] <= boxes[:, 2:]).all() and (boxes >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()


def test_unclipped_lambda_follows_beta_one_half_one_half() -> None:
    images = torch.zeros((40_000, 3, 1, 1), dtype=torch.uint8)
    _, lam = mixup(images, images, draws.uniforms(0, "", 0, "lambda", 40_000, 1)[:, 0])
    observed = np.sort(lam.double().numpy())
    arcsine_cdf = 2 / np.pi * np.arcsin(np.sqrt(observed))
    ranks = np.arange(1, len(observed) + 1) / len(observed)
    assert np.abs(ranks - arcsine_cdf).max() < 1.95 / np.sqrt(len(observed))  # Kolmogorov-Smirnov, p = 0.001


def test_box_sides_follow_the_same_lambda() -> None:
    uniform = draws.uniforms(0, "", 0, "lambda", 20_000, 1)[:, 0]
    boxes = mixing.cutmix_boxes(uniform, np.full((20_000, 2), 0.5), height=1000, width=2000)
    _, lam = mixup(*two_batches(20_000, 1, 1), uniform)
    for side, length in ((boxes[:, 2] - boxes[:, 0], 2000), (boxes[:, 3] - boxes[:, 1], 1000)):
        assert np.abs(side / length - np.sqrt(1 - lam.double().numpy())).max() < 2 / length + 0.004


def test_mixup_is_the_weighted_mean_rounded_half_up() -> None:
    first, second = two_batches(200, 5, 7)
    uniform = np.random.default_rng(0).random(200)
    uniform[:2] = 0.0, 1 - 2.0**-53
    mixed, lam = mixup(first, second, uniform)
    share = lam.double()[:, None, None, None]
    expected = torch.floor(share * first + (1 - share) * second + 0.5)
    assert torch.equal(mixed.double(), expected)
    assert torch.equal(lam * 65536, (lam * 65536).round())
    assert lam.dtype == torch.float32
    assert np.abs(lam.numpy() - np.sin(np.pi / 2 * uniform) ** 2).max() <= 2.0**-17 + 1e-9


@pytest.mark.parametrize("name", mixing.MIXINGS)
def test_large_images_are_mixed_one_by_one_with_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two_batches(40, 64, 64)
    uniform = {key: np.random.default_rng(0).random((40, 2)) for key in ("lambda", "box", "switch")}
    amounts, _ = mixing.draw(uniform, ViewRecipe(count=1, mixing=name), 64, 64)
    large = mixing.MIXINGS[name].mix(first, second, torch.from_numpy(amounts))
    monkeypatch.setattr("pipeline.views.parcel.LARGE_PIXELS", 2**30)
    assert torch.equal(large, mixing.MIXINGS[name].mix(first, second, torch.from_numpy(amounts)))


def test_mixup_by_hand() -> None:
    images = torch.tensor([0, 255, 255, 10], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 1, 1)
    partners = torch.tensor([255, 255, 0, 11], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 1, 1)
    mixed, lam = mixup(images, partners, np.array([0.5, 0.5, 1 / 3, 0.5]))
    assert lam.tolist() == [0.5, 0.5, 0.25, 0.5]
    assert mixed[:, 0, 0, 0].tolist() == [128, 255, 64, 11]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 30.0])
def test_lambda_is_the_quantile_of_the_beta_distribution(alpha: float) -> None:
    uniform = np.concatenate([draws.uniforms(0, "", 0, "lambda", 3000, 1)[:, 0], [0.0, 0.5, 1 - 2.0**-53]])
    quantile = mixing.beta_quantile(uniform, alpha)
    expected = stats.beta(alpha, alpha).ppf(uniform)
    np.testing.assert_allclose(quantile[:-1], expected[:-1], rtol=0, atol=0.5 / 65536 + 1e-9)
    assert quantile[-2] == pytest.approx(0.5, abs=1e-9)
    # Next to 1 a double says little of what is left.
    assert expected[-1] == pytest.approx(quantile[-1], abs=0.005) and quantile[-1] <= 1


def test_lambda_of_alpha_one_is_the_draw_itself_and_of_one_half_as_it_was() -> None:
    uniform = draws.uniforms(0, "", 0, "lambda", 500, 1)[:, 0]
    assert mixing.mixup_shares(uniform, 1.0).tolist() == np.rint(uniform * 65536).tolist()
    assert mixing.mixup_shares(uniform).tolist() == np.rint(np.sin(np.pi / 2 * uniform) ** 2 * 65536).tolist()
    boxes = mixing.cutmix_boxes(uniform, np.full((500, 2), 0.5), 100, 100, alpha=1.0)
    half = (100 * np.sqrt(1 - uniform)).astype(int) // 2
    assert (boxes[:, 2] - boxes[:, 0]).tolist() == (2 * half).tolist()


def test_either_mixing_is_the_one_or_the_other() -> None:
    first, second = two_batches(40, 6, 7)
    uniform = np.random.default_rng(0).random((40, 3))
    boxes, shares = mixing.cutmix_boxes(uniform[:, 0], uniform[:, 1:], 6, 7), mixing.mixup_shares(uniform[:, 0])
    boxes[::2], shares[1::2] = 0, mixing.MIXUP_STEPS
    mixed = mixing.mix_either(first, second, torch.from_numpy(mixing.MIXINGS["both"].amounts(boxes, shares)))
    assert torch.equal(mixed[1::2], mixing.cutmix(first, second, torch.from_numpy(boxes))[1::2])
    assert torch.equal(mixed[::2], mixing.mixup(first, second, torch.from_numpy(shares))[::2])


def drawn(number: int = 20_000, **operations: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How each sample is mixed, the argument of `mix`, and lambda."""
    recipe = ViewRecipe(count=1, **operations)
    uniform = {name: draws.uniforms(0, "", 1, name, number, count) for name, count in mixing.num_draws(recipe).items()}
    return mixing.kinds(uniform, recipe), *mixing.draw(uniform, recipe, 64, 64)


def test_both_mix_evenly_and_with_their_probability_and_alphas() -> None:
    kinds, amounts, lam = drawn(mixing="both", mixing_probability=0.75, cutmix_alpha=1.0, mixup_alpha=0.8)
    assert stats.chisquare(np.bincount(kinds), np.array([0.25, 0.375, 0.375]) * len(kinds)).pvalue > 1e-4
    none, cutmix, mixup = (kinds == kind for kind in range(3))
    assert (lam[none] == 1).all() and (amounts[none] == [0, 0, 0, 0, 65536]).all()
    assert (amounts[cutmix, 4] == 65536).all() and (amounts[mixup, :4] == 0).all()
    assert stats.kstest(lam[mixup], stats.beta(0.8, 0.8).cdf).pvalue > 1e-4
    assert np.array_equal(lam[cutmix], mixing.cutmix_lambda(amounts[cutmix, :4], 64, 64))


@pytest.mark.parametrize("name", ["cutmix", "mixup"])
def test_a_sample_that_is_not_mixed_is_all_its_own_and_the_others_are_as_without(name: str) -> None:
    kinds, amounts, lam = drawn(mixing=name, mixing_probability=0.3)
    _, always, lam_always = drawn(mixing=name)
    assert stats.binomtest(int((kinds > 0).sum()), len(kinds), 0.3).pvalue > 1e-4
    assert (lam[kinds == 0] == 1).all()
    assert np.array_equal(amounts[kinds > 0], always[kinds > 0]) and np.array_equal(
        lam[kinds > 0], lam_always[kinds > 0]
    )


def test_views_that_mix_by_chance_leave_the_others_alone_and_name_them() -> None:
    images, _ = two_batches(50, 6, 6)
    plain = Views(images, torch.arange(50), ViewRecipe(count=1, flip=True))
    views = Views(images, torch.arange(50), replace(plain.recipe, mixing="both", mixing_probability=0.5))
    told, batch = views.drawn(0), views.batch(0, np.arange(50))
    alone = told["mixing"] == 0
    assert 10 < alone.sum() < 40 and (told["partner"][alone] == np.flatnonzero(alone)).all()
    assert torch.equal(batch.images[alone], plain.batch(0, np.arange(50)).images[alone])
    assert torch.equal(batch.partner_labels, torch.from_numpy(told["partner"])) and (batch.lam[alone] == 1).all()
