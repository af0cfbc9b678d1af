from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.views import draws


def test_the_stream_of_a_name_never_changes() -> None:
    values = draws.uniforms(7, "teacher", 3, "crop", 2, 2)
    assert [value.hex() for value in values.ravel().tolist()] == [
        "0x1.6e63025186df8p-1",
        "0x1.09718acb5cfb8p-3",
        "0x1.1b5bc55b89840p-4",
        "0x1.9365607a2280fp-1",
    ]


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 4))
def test_a_sample_draws_the_same_whatever_the_number_of_samples(one: int, other: int, num_draws: int) -> None:
    few, many = sorted((one, other))
    np.testing.assert_array_equal(
        draws.uniforms(0, "", 0, "flip", many, num_draws)[:few],
        draws.uniforms(0, "", 0, "flip", few, num_draws),
    )


def test_every_name_has_a_stream_of_its_own() -> None:
    names = itertools.product((0, 1, 11), ("", "1", "teacher"), (0, 1, 11), ("crop", "1crop", 'crop", "'))
    first = [draws.uniforms(*name, 1, 1)[0, 0] for name in names]
    assert len(set(first)) == 81


def test_draws_are_multiples_of_2_to_the_minus_53_in_the_unit_interval() -> None:
    values = draws.uniforms(1, "", 2, "crop", 1000, 3)
    assert values.shape == (1000, 3) and values.dtype == np.float64
    assert (values >= 0).all() and (values < 1).all()
    assert (values * 2.0**53 == np.floor(values * 2.0**53)).all()
    assert (values * 2.0**52 != np.floor(values * 2.0**52)).any()


def test_draws_are_uniform_and_columns_are_independent() -> None:
    values = draws.uniforms(5, "", 0, "crop", 100_000, 2)
    counts, _, _ = np.histogram2d(values[:, 0], values[:, 1], bins=20, range=[[0, 1], [0, 1]])
    chi_square = ((counts - 250.0) ** 2 / 250.0).sum()
    assert 280 < chi_square < 540  # 399 degrees of freedom: mean 399, standard deviation 28


def test_global_generators_neither_move_the_draws_nor_are_moved() -> None:
    expected = draws.uniforms(0, "", 0, "crop", 10, 2)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator is what is tested
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    np.testing.assert_array_equal(draws.uniforms(0, "", 0, "crop", 10, 2), expected)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert before == after


@given(st.integers(1, 2**31))
def test_integers_stay_below_their_bound(num_values: int) -> None:
    ends = np.array([0.0, 1 - 2.0**-53])
    assert draws.integers(ends, num_values).tolist() == [0, num_values - 1]


@pytest.mark.parametrize("num_values", [2, 9, 25, 32])
def test_integers_are_equally_likely(num_values: int) -> None:
    values = draws.integers(draws.uniforms(3, "", 0, "partner", 50_000, 1), num_values)
    counts = np.bincount(values[:, 0], minlength=num_values)
    expected = 50_000 / num_values
    assert len(counts) == num_values
    assert ((counts - expected) ** 2 / expected).sum() < num_values + 6 * np.sqrt(2 * num_values)


def test_between_stretches_over_its_bounds() -> None:
    assert draws.between(np.array([0.0, 0.5, 0.75]), -2.0, 2.0).tolist() == [-2.0, 0.0, 1.0]
