"""How fast trained models answer, by batch size.

What is timed is `Classifier.answer`: from uint8 pixels in RAM to probabilities in RAM, with the copy to the device and
back, normalisation and both heads; reading and resizing image files is not in it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.inference.classifier import Classifier

Name = TypeVar("Name", bound=Hashable)
Seconds = NDArray[np.float64]
"""`(rounds,)` float64: how long a contender took in each round."""

WARM_UPS = 3  # kernels are chosen and compiled in the first, memory grows until the second
SECONDS_OF_A_TURN = 0.1
MAX_REPEATS = 20
MIN_FOR_P95 = 20


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model answers to batches of one size.

    Attributes:
        name: The model's.
        batch_size: Images a batch.
        num_timed: Batches that were timed.
        median_ms: Median time of a batch, milliseconds.
        quartiles_ms: First and third quartile of it.
        p95_ms: 95th percentile of it; None where fewer than MIN_FOR_P95 were timed.
        images_per_second: Batch size over the median.
        peak_bytes: Memory of a GPU at its peak above what was held before the batch; None elsewhere.
    """

    name: str
    batch_size: int
    num_timed: int
    median_ms: float
    quartiles_ms: tuple[float, float]
    p95_ms: float | None
    images_per_second: float
    peak_bytes: int | None


def measure_speed(models: Mapping[str, Classifier], batch_sizes: Sequence[int], *, rounds: int = 10) -> list[Speed]:
    """Time models in turns.

    In a round each model has a turn at each batch size: one batch, or as many as take about SECONDS_OF_A_TURN, each of
    them timed. Of single images enough are timed for a 95th percentile.

    Args:
        models: Name to model, on the CPU and at most one other device.
        batch_sizes: At least 1 each.
        rounds: Turns of each.

    Returns:
        The speeds, by batch size and then in the order of the models.

    Raises:
        UsageError: A batch does not fit the device's memory.
    """
    generator = np.random.default_rng(0)
    contenders, repeats, peaks = {}, {}, {}
    for size in batch_sizes:
        for name, model in models.items():
            shape = (size, model.image_size, model.image_size, 3)
            run = functools.partial(model.answer, generator.integers(0, 256, shape, np.uint8))
            contenders[name, size] = run
            try:
                seconds, peaks[name, size] = _warm_up(run, model.device)
            except torch.OutOfMemoryError:
                raise UsageError(
                    f"batch size {size}: {name} runs out of memory on {model.device}; take smaller"
                ) from None
            least = math.ceil(MIN_FOR_P95 / rounds) if size == 1 else 1
            repeats[name, size] = max(least, min(MAX_REPEATS, math.ceil(SECONDS_OF_A_TURN / seconds)))
    device = shared_device(models.values())
    timed = interleave(contenders, rounds=rounds, device=device, repeats=repeats)
    return [_speed(name, size, values, peaks[name, size]) for (name, size), values in timed.items()]


def shared_device(models: Iterable[Classifier]) -> torch.device:
    """Return the one device beside the CPU that any of the models is on; the CPU where there is none."""
    devices = [model.device for model in models]
    return next((device for device in devices if device.type != "cpu"), devices[0])


def _warm_up(run: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Return the seconds and the peak memory of the last of some calls."""
    held = 0
    for _ in range(WARM_UPS):
        wait_for(device)
        if device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        run()
        wait_for(device)
        seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None


def _speed(name: str, batch_size: int, seconds: Seconds, peak: int | None) -> Speed:
    """Sum up the times of a model at a batch size."""
    milliseconds = 1000 * seconds
    median = float(np.median(milliseconds))
    lower, upper = quartiles(milliseconds)
    return Speed(
        name=name,
        batch_size=batch_size,
        num_timed=len(seconds),
        median_ms=median,
        quartiles_ms=(lower, upper),
        p95_ms=float(np.quantile(milliseconds, 0.95)) if len(seconds) >= MIN_FOR_P95 else None,
        images_per_second=1000 * batch_size / median,
        peak_bytes=peak,
    )


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
