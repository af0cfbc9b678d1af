"""Random draws that depend on their name alone.

A counter-based generator (Philox) is keyed by the name of the draws, so that any of them can be made again,
by any process, without replaying what was drawn before.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray


def uniforms(seed: int, key: str, view: int, operation: str, num_samples: int, num_draws: int) -> NDArray[np.float64]:
    """Draw `num_draws` uniform numbers for each of `num_samples` samples.

    Sample i's draws do not depend on `num_samples`, and no two names share a stream.

    Args:
        seed: Seed of the view recipe.
        key: Whose views: "" for the labelled ones, "teacher" for a teacher's training.
        view: View index.
        operation: Name of the operation that uses the draws.
        num_samples: N.
        num_draws: Draws per sample.

    Returns:
        `(N, num_draws)` float64 in [0, 1), multiples of 2^-53.

    Source: Philox4x64-10 of Salmon et al., SC 2011. Only the bit generator's raw stream is used, which NumPy
        guarantees never to change; the methods of `numpy.random.Generator` carry no such guarantee.
    """
    name = json.dumps([seed, key, view, operation]).encode()
    philox_key = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8").astype(np.uint64)
    raw = np.random.Philox(key=philox_key).random_raw(num_samples * num_draws)
    return np.ldexp((raw >> np.uint64(11)).astype(np.float64), -53).reshape(num_samples, num_draws)


def integers(uniform: NDArray[np.float64], num_values: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn uniform numbers, float64 in [0, 1), into equally likely int64 in [0, num_values), of the same shape.

    `num_values` may be an array of that shape.
    """
    return np.floor(uniform * num_values).astype(np.int64)


def between(uniform: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Stretch uniform numbers, float64 in [0, 1), over [low, high), float64 of the same shape."""
    return low + (high - low) * uniform
