"""What views draw is uniform, as likely as it should be, and independent of everything else that is drawn.

The seeds are fixed, so that a test always passes or always fails. A fair generator passes each with probability
1 - 1e-4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from pipeline.config.recipes import ViewRecipe
from pipeline.views import draws, mixing, operations
from pipeline.views.policies import CIFAR10_POLICY, POLICIES
from pipeline.views.views import Views

NUM_SAMPLES = 20_000
ALPHA = 1e-4
Cells = NDArray[np.int64]


def uniforms(operation: str, num_draws: int, *, seed: int = 0, key: str = "", view: int = 0) -> NDArray[np.float64]:
    return draws.uniforms(seed, key, view, operation, NUM_SAMPLES, num_draws)


def in_cells(uniform: NDArray[np.float64], num_cells: int = 8) -> Cells:
    return draws.integers(uniform, num_cells)


# What each operation makes of its draws, as a category of every sample.
DRAWN: dict[str, Callable[..., Cells]] = {
    "crop, down": lambda **of: in_cells(uniforms("crop", 2, **of)[:, 0], 9),
    "crop, right": lambda **of: in_cells(uniforms("crop", 2, **of)[:, 1], 9),
    "flip": lambda **of: (uniforms("flip", 1, **of)[:, 0] < 0.5).astype(np.int64),
    "sub-policy": lambda **of: in_cells(uniforms("autoaugment", 5, **of)[:, 0], 25),
    "first applied": lambda **of: in_cells(uniforms("autoaugment", 5, **of)[:, 1], 10),
    "second applied": lambda **of: in_cells(uniforms("autoaugment", 5, **of)[:, 2], 10),
    "first sign": lambda **of: in_cells(uniforms("autoaugment", 5, **of)[:, 3], 2),
    "second sign": lambda **of: in_cells(uniforms("autoaugment", 5, **of)[:, 4], 2),
    "RandAugment, second": lambda **of: in_cells(uniforms("randaugment", 4, **of)[:, 1], 14),
    "TrivialAugment": lambda **of: in_cells(uniforms("trivialaugment", 3, **of)[:, 0], 14),
    "TrivialAugment, magnitude": lambda **of: in_cells(uniforms("trivialaugment", 3, **of)[:, 1], 31),
    "partner": lambda **of: in_cells(uniforms("partner", 1, **of)[:, 0], 16),
    "lambda": lambda **of: in_cells(uniforms("lambda", 1, **of)[:, 0]),
    "box, x": lambda **of: in_cells(uniforms("box", 2, **of)[:, 0]),
    "box, y": lambda **of: in_cells(uniforms("box", 2, **of)[:, 1]),
    "rotation": lambda **of: in_cells(uniforms("rotation", 1, **of)[:, 0]),
    "scale": lambda **of: in_cells(uniforms("scale", 1, **of)[:, 0]),
}


def independence(first: Cells, second: Cells) -> float:
    """p-value of Pearson's chi-square test on the table of two categories of the same samples."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    return float(stats.chi2_contingency(table, correction=False).pvalue)


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("of", [{}, {"seed": 7}, {"view": 599}, {"key": "teacher"}], ids=str)
def test_every_outcome_is_equally_likely(name: str, of: dict[str, int]) -> None:
    assert stats.chisquare(np.bincount(DRAWN[name](**of))).pvalue > ALPHA


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(DRAWN, 2)))
def test_two_draws_of_a_sample_are_independent(first: str, second: str) -> None:
    assert independence(DRAWN[first](), DRAWN[second]()) > ALPHA


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("other", [{"view": 1}, {"view": 2}, {"seed": 1}, {"key": "teacher"}], ids=str)
def test_a_draw_is_independent_of_that_of_another_view_seed_and_key(name: str, other: dict[str, int]) -> None:
    assert independence(DRAWN[name](), DRAWN[name](**other)) > ALPHA


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("distance", [1, 2, 1024])
def test_a_sample_is_independent_of_its_neighbours(name: str, distance: int) -> None:
    cells = DRAWN[name]()
    assert independence(cells[:-distance], cells[distance:]) > ALPHA


def test_operations_are_applied_as_often_as_the_policy_says() -> None:
    """Seen in the pixels: two levels, of which each of these operations changes at least one."""
    for row, (first, second) in enumerate(CIFAR10_POLICY):
        names = {first[0], second[0]}
        if not names <= {"Invert", "Contrast", "Brightness", "Solarize", "AutoContrast", "Posterize", "Color"}:
            continue
        if 0 in (first[2], second[2]):  # a magnitude of 0 changes nothing
            continue
        uniform = np.concatenate([np.full((NUM_SAMPLES, 1), (row + 0.5) / 25), uniforms("autoaugment", 5)[:, 1:]], 1)
        images = torch.tensor([[60, 90], [100, 201], [30, 61]], dtype=torch.uint8)[:, None].expand(-1, 8, -1)
        batch = images.repeat(NUM_SAMPLES, 1, 1, 1)
        choice = POLICIES["cifar10"].choose(uniform, *batch.shape[-2:])
        num_untouched = int((operations.apply(batch, choice) == batch).flatten(1).all(1).sum())
        expected = (1 - first[1]) * (1 - second[1])
        assert stats.binomtest(num_untouched, NUM_SAMPLES, expected).pvalue > ALPHA, (first, second)


def cifar_views(num_samples: int, **changes: object) -> Views:
    images = torch.zeros((num_samples, 3, 32, 32), dtype=torch.uint8)
    recipe = ViewRecipe(**{"count": 1, "mixing": "cutmix", **changes})  # type: ignore[arg-type]
    return Views(images, torch.arange(num_samples), recipe)


def test_a_mixup_lambda_is_beta_one_half() -> None:
    lam = cifar_views(NUM_SAMPLES, mixing="mixup").batch(0, np.arange(NUM_SAMPLES)).lam.double().numpy()
    assert stats.kstest(lam, stats.beta(0.5, 0.5).cdf).pvalue > ALPHA


def test_a_cutmix_box_has_the_side_of_a_beta_one_half_lambda_before_it_is_clipped() -> None:
    uniform = uniforms("lambda", 1)[:, 0]
    center = np.full((NUM_SAMPLES, 2), 0.5)  # in the middle of a large frame nothing is clipped
    side = 2_000_000  # pixels: so large that rounding down to whole, even sides does not show
    left, top, right, bottom = mixing.cutmix_boxes(uniform, center, side, side).T
    assert np.array_equal(right - left, bottom - top)
    lam = 1 - ((right - left) / side) ** 2
    assert stats.kstest(lam, stats.beta(0.5, 0.5).cdf).pvalue > ALPHA


def test_a_partner_is_any_sample_with_equal_chance() -> None:
    views = cifar_views(NUM_SAMPLES)
    batch = views.batch(3, np.arange(NUM_SAMPLES))
    partners = batch.partner_labels.numpy()
    # The number of samples that nobody drew is that of throwing N balls into N boxes: N / e, deviation 0.31 sqrt(N).
    num_unused = NUM_SAMPLES - len(np.unique(partners))
    assert abs(num_unused - NUM_SAMPLES / np.e) < 4 * 0.31 * np.sqrt(NUM_SAMPLES)
    assert stats.chisquare(np.bincount(partners * 100 // NUM_SAMPLES)).pvalue > ALPHA
    assert independence(np.arange(NUM_SAMPLES) * 20 // NUM_SAMPLES, partners * 20 // NUM_SAMPLES) > ALPHA
    assert stats.binomtest(int((partners == np.arange(NUM_SAMPLES)).sum()), NUM_SAMPLES, 1 / NUM_SAMPLES).pvalue > ALPHA
