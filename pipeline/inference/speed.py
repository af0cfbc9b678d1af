"""How fast trained models answer, by batch size.

Timed is `Classifier.answer`: from uint8 pixels in RAM to probabilities in RAM, with the copy to the device and back,
normalisation and both heads, but without reading and resizing image files.
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
"""`(rounds * repeats,)` float64, seconds of each timed call."""

WARM_UPS = 3  # the first call chooses and compiles kernels, memory grows until the second
SECONDS_OF_A_TURN = 0.1
MAX_REPEATS = 20
MIN_FOR_P95 = 20


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model answers to batches of one size.

    Attributes:
        name: Of the model.
        batch_size: Images in a batch.
        num_timed: Timed batches.
        median_ms: Median time of a batch, milliseconds.
        quartiles_ms: First and third quartile of that time.
        p95_ms: 95th percentile of that time; None where fewer than MIN_FOR_P95 batches were timed.
        images_per_second: Batch size over the median.
        peak_bytes: Peak memory of a GPU above what was held before the batch; None elsewhere.
    """

    name: str
    batch_size: int
    num_timed: int
    median_ms: float
    quartiles_ms: tuple[float, ...]
    p95_ms: float | None
    images_per_second: float
    peak_bytes: int | None


def measure_speed(models: Mapping[str, Classifier], batch_sizes: Sequence[int], *, rounds: int = 10) -> list[Speed]:
    """Time models in turns.

    In a round each model has a turn at each batch size: one batch, or as many as take about SECONDS_OF_A_TURN. Each
    batch is timed. Single images are timed often enough for a 95th percentile.

    Args:
        models: Name to model, on the CPU and at most one other device.
        batch_sizes: At least 1 each.
        rounds: Turns of each model at each batch size.

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
    return [
        Speed(
            name=name,
            batch_size=size,
            num_timed=len(seconds),
            median_ms=1000 * float(np.median(seconds)),
            quartiles_ms=tuple(quartiles(1000 * seconds)),
            p95_ms=1000 * float(np.quantile(seconds, 0.95)) if len(seconds) >= MIN_FOR_P95 else None,
            images_per_second=size / float(np.median(seconds)),
            peak_bytes=peaks[name, size],
        )
        for (name, size), seconds in timed.items()
    ]


def shared_device(models: Iterable[Classifier]) -> torch.device:
    """Return the device other than the CPU that a model is on; the CPU if all are there."""
    devices = [model.device for model in models]
    return next((device for device in devices if device.type != "cpu"), devices[0])


def _warm_up(run: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Call WARM_UPS times; return the seconds and the peak memory, bytes, of the last call."""
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


def interleave(
    contenders: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    repeats: Mapping[Name, int] | None = None,
) -> dict[Name, Seconds]:
    """Time functions in turns, after one untimed call of each.

    Args:
        contenders: Name to function.
        rounds: Timed turns of each, at least 1.
        device: Waited for before the clock is started and before it is stopped.
        repeats: Name to calls in one turn, each of them timed; None for one.

    Returns:
        Seconds by name.
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
    """Wait until a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
