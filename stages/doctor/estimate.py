"""What each stage of a full run would take, from what the probe measured."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stages.doctor.findings import FAULTS, OK, PROBLEM, WARNING, Finding, size_text, time_text
from stages.doctor.probe import Speed, probe
from stages.doctor.work import Job, Sizes
from stages.shared.context import Context

# Load by core from which other work is taken to slow the probe down.
BUSY = 0.75


@dataclass(frozen=True)
class Estimate:
    """One stage.

    Attributes:
        stage: As DVC calls it.
        why: Why there is something to do; None where it is up to date.
        seconds: Until it is done; None where nothing could be measured.
        least: The same for labelling, should the fastest candidate win; None where the teacher is known.
        speed: What was measured of its model.
        measured: The same for people.
    """

    stage: str
    why: str | None
    seconds: float | None = None
    least: float | None = None
    speed: Speed | None = None
    measured: str = "-"

    @property
    def seconds_alone(self) -> float:
        """The same, had the device nothing else to do."""
        return (self.seconds or 0.0) * (1.0 if self.speed is None else self.speed.share)

    @property
    def time(self) -> str:
        """Seconds as people say it."""
        if self.why is None:
            return "-"
        if self.seconds is None:
            return "not known"
        return (
            time_text(self.seconds) if self.least is None else f"{time_text(self.least)} to {time_text(self.seconds)}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        found = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("speed", "measured")}
        speed = {} if self.speed is None else dataclasses.asdict(self.speed)
        return {**found, "measured": {key: value for key, value in speed.items() if value not in (0, float("inf"))}}


def estimate(
    context: Context, jobs: list[Job], sizes: Sizes, *, prepared: bool, note: Callable[[list[Finding]], None]
) -> list[Estimate]:
    """Probe the models that are not up to date, one after another, and scale what they take."""
    if any(job.why for job in jobs) and is_busy(context):
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        note([Finding("time", WARNING, f"the machine is busy ({load}), which makes the times below longer")])
    found: list[Estimate] = []
    label_rates: list[float] = []
    for job in jobs:
        if job.why is None or (job.kind == "label" and job.model is None):
            rates = label_rates if job.why else []
            found.append(_labelling(job, sizes, rates) if rates else Estimate(job.stage, job.why))
            continue
        speed = _probe(context, job, sizes, prepared=prepared, note=note)
        if speed is None:
            found.append(Estimate(job.stage, job.why))
            continue
        if speed.label_rate is not None:
            label_rates.append(speed.label_rate)
        if job.kind == "label":
            found.append(_labelling(job, sizes, label_rates[-1:], speed))
            continue
        assert job.recipe is not None
        seconds = speed.fit_seconds(job.recipe, job.amount, sizes)
        found.append(Estimate(job.stage, job.why, seconds, speed=speed, measured=_steps(speed)))
    return found


def is_busy(context: Context) -> bool:
    """Tell whether other work is likely to slow the probe down."""
    return context.device.type == "cpu" and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)


def _labelling(job: Job, sizes: Sizes, rates: list[float], speed: Speed | None = None) -> Estimate:
    """Scale the rate of the teacher, or those of all that may win."""
    images = job.amount * sizes.train
    slow, fast = min(rates), max(rates)
    least = images / fast if len(rates) > 1 else None
    measured = f"{slow:,.0f} images/s" if least is None else f"{slow:,.0f} to {fast:,.0f} images/s"
    return Estimate(job.stage, job.why, images / slow, least, speed, measured)


def _probe(
    context: Context, job: Job, sizes: Sizes, *, prepared: bool, note: Callable[[list[Finding]], None]
) -> Speed | None:
    """Measure a model and say what was measured; None where that fails, which is said too."""
    device = context.device
    try:
        speed = probe(context, job, sizes, prepared=prepared)
    except torch.OutOfMemoryError:
        batch = "recipes.label.batch_size" if job.recipe is None else f"batch_size {job.recipe.batch_size}"
        remedy = "lower it, or set micro_batch" if job.kind == "student" else "lower it"
        note([Finding("time", PROBLEM, f"{job.name}: {batch} does not fit {device}'s memory", remedy)])
        return None
    except FAULTS as error:
        note([Finding("time", WARNING, f"{job.name}: could not be timed: {error}")])
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    parts = [_steps(speed)] if speed.steps else []
    if speed.label_rate is not None:
        parts.append(f"labels {speed.label_rate:,.0f} images/s")
    if speed.memory is not None:
        parts.append(f"peak {size_text(speed.memory)} of GPU memory")
    note([Finding("time", OK, f"{job.name}: {', '.join(parts)}")])
    return speed


def _steps(speed: Speed) -> str:
    steps = f"{speed.steps} steps" if speed.steps > 1 else "1 step"
    return f"{steps} of {speed.batch} images, {time_text(speed.step_seconds)} each"
