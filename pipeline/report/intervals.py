"""Intervals: of the mean of a few repeated runs, and of the difference of two models on the same images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
BISECTIONS = 60


@dataclass(frozen=True)
class Estimate:
    """The mean of repeated measurements.

    Attributes:
        count: How many, at least one.
        mean: In the measurements' unit.
        sd: Sample standard deviation (divisor n - 1); None of a single measurement.
        interval: Low and high end of the mean's 95 % interval; None of a single measurement.
    """

    count: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None

    @property
    def excludes_zero(self) -> bool | None:
        """Whether 0 lies outside the interval; None without one."""
        return None if self.interval is None else not self.interval[0] <= 0.0 <= self.interval[1]


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, deviation and 95 % interval of measurements taken as independent and normal.

    Args:
        values: At least one.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(1, mean, None, None)
    deviation = statistics.stdev(values)
    reach = t_quantile(CONFIDENCE, len(values) - 1) * deviation / math.sqrt(len(values))
    return Estimate(len(values), mean, deviation, (mean - reach, mean + reach))


def paired_difference(values: Mapping[int, float], references: Mapping[int, float]) -> Estimate | None:
    """Return the mean of value - reference over the keys that both have; None where they share none.

    Args:
        values: Measurements by seed.
        references: Likewise, of what they are compared with.
    """
    shared = sorted(set(values) & set(references))
    return estimate([values[key] - references[key] for key in shared]) if shared else None


def matched_difference(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference of two models over images that both were asked about.

    It covers the choice of the images, not the models' seeds. Half an image is added to each of the four outcomes, so
    that the interval holds what it says also where hardly any image tells the models apart.

    Args:
        differences: `(N,)`, N at least one, in [-1, 1]: 1 where only the first model is right, -1 where only the second
            is, 0 where both or neither are; over several seeds of each, their mean.

    Returns:
        Low and high end, in the differences' unit.

    Source: A. Agresti and Y. Min, Simple improved confidence intervals for comparing matched proportions, Statistics in
    Medicine 24 (2005), 729-740.
    """
    count = len(differences) + 2
    mean = float(differences.sum()) / count
    squares = (float(np.square(differences).sum()) + 1) / count
    reach = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt((squares - mean**2) / count)
    return mean - reach, mean + reach


def t_quantile(confidence: float, degrees: int) -> float:
    """Return the t that |T| of Student's distribution stays below with a probability.

    Args:
        confidence: The probability, in (0, 1).
        degrees: Of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _probability(theta: float, degrees: int) -> float:
    """Return P(|T| <= sqrt(degrees) tan theta).

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    is_odd = degrees % 2
    term = math.cos(theta) if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(2 + is_odd, degrees - 1, 2):
        term *= math.cos(theta) ** 2 * (power - 1) / power
        total += term
    inner = math.sin(theta) * total
    return 2 / math.pi * (theta + inner) if is_odd else inner
