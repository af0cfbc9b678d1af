"""Timing in turns, so that whatever else the machine does hits all contenders."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Name = TypeVar("Name", bound=Hashable)
Seconds = NDArray[np.float64]
"""`(rounds,)` float64: how long a contender took in each round."""


def interleave(
    contenders: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    repeats: Mapping[Name, int] | None = None,
) -> dict[Name, Seconds]:
    """Time contenders in turns, after one untimed turn of each.

    Args:
        contenders: Name to what is timed.
        rounds: Timed turns of each, at least 1.
        device: Waited for before the clock is started and before it is stopped.
        repeats: Name to calls in one turn, each of them timed; None for one.

    Returns:
        Seconds by name, `(rounds * repeats,)` each.
    """
    for run in contenders.values():
        run()
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            for _ in range(1 if repeats is None else repeats[name]):
                wait_for(device)
                began = time.perf_counter()
                run()
                wait_for(device)
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def quartiles(values: NDArray[np.float64]) -> list[float]:
    """Return first and third quartile."""
    return [float(value) for value in np.quantile(values, [0.25, 0.75])]


def wait_for(device: torch.device) -> None:
    """Return when a device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
