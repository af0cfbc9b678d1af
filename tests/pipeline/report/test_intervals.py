"""Intervals of means and of differences against SciPy's and hand arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.report.intervals import Estimate, estimate, matched_difference, paired_difference, t_quantile


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_students_quantiles_are_scipys(confidence: float) -> None:
    for degrees in (*range(1, 32), 100, 1001):
        assert t_quantile(confidence, degrees) == pytest.approx(stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-8)


def test_an_interval_is_scipys() -> None:
    values = [71.2, 73.0, 70.4, 72.9]
    mean = estimate(values)
    assert (mean.count, mean.mean) == (4, pytest.approx(71.875))
    assert mean.sd == pytest.approx(np.std(values, ddof=1))
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert mean.interval == pytest.approx(expected)


def test_a_single_measurement_has_no_interval() -> None:
    assert estimate([3.0]) == Estimate(1, 3.0, None, None)
    assert estimate([3.0]).excludes_zero is None


def test_differences_are_of_the_seeds_that_both_have() -> None:
    """Runs that scatter by 10 points differ by 1 in every pair, and pairing shows it."""
    values = {0: 61.0, 1: 71.2, 2: 80.8, 3: 99.0}
    references = {2: 80.0, 1: 70.0, 0: 60.0, 4: 1.0}
    mean = paired_difference(values, references)
    assert mean is not None and mean.count == 3 and mean.mean == pytest.approx(1.0)
    expected = stats.ttest_rel([61.0, 71.2, 80.8], [60.0, 70.0, 80.0]).confidence_interval(0.95)
    assert mean.interval == pytest.approx((expected.low, expected.high)) and mean.excludes_zero
    assert paired_difference({0: 1.0}, {1: 2.0}) is None


@pytest.mark.parametrize(("values", "excludes"), [([1.0, -1.0], False), ([0.0, 0.0], False), ([-1.0, -1.1], True)])
def test_an_interval_may_have_zero_in_it(values: list[float], excludes: bool) -> None:
    assert estimate(values).excludes_zero is excludes


def matched(first: int, second: int, both: int, neither: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [first, second, both + neither])


def test_a_matched_difference_is_that_of_hand_arithmetic() -> None:
    """Agresti and Min: (20 - 10) / 102 -+ 1.95996 sqrt(31 - 10^2 / 102) / 102."""
    assert matched_difference(matched(20, 10, 60, 10)) == pytest.approx((-0.0072419, 0.2033203), abs=1e-6)
    low, high = matched_difference(np.zeros(10))
    assert low == -high == pytest.approx(-1.959964 * np.sqrt(1 / 12) / np.sqrt(12)), "no image tells them apart"


@pytest.mark.parametrize("probabilities", [(0.1, 0.1, 0.8), (0.02, 0.05, 0.93), (0.3, 0.1, 0.6)])
@pytest.mark.parametrize("count", [30, 360])
def test_a_matched_differences_interval_holds_the_truth_as_often_as_it_says(
    probabilities: tuple[float, float, float], count: int
) -> None:
    draws = np.random.default_rng(0).choice([1.0, -1.0, 0.0], p=probabilities, size=(4000, count))
    truth = probabilities[0] - probabilities[1]
    held = [low <= truth <= high for low, high in map(matched_difference, draws)]
    assert np.mean(held) > 0.935, "more than 95 % where hardly any image tells them apart"
    assert count == 30 or np.mean(held) < 0.965
