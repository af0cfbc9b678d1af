"""Students beside timm's and lucidrains': training step, forward pass and memory: `python -m benchmarks.students`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch._dynamo.exc import TorchDynamoException

from benchmarks import floor, peak_memory
from benchmarks.measure import Report, Row, add_students, alone, begin, compare, option_parser, positive
from benchmarks.steps import repeated, synthetic_batch
from benchmarks.student_contenders import (
    CAPTURED,
    EAGER,
    FORWARD,
    GRAPHS,
    TRAINING,
    Contender,
    build,
    contenders,
    recipe,
    turn,
)
from pipeline.inference.speed import interleave
from pipeline.models.counting import num_parameters
from pipeline.system.runtime import keep_freed_memory

GOAL, GOAL_BATCH = 1.5, 128
MEMORY = "peak memory of a training step"
# Students with the same peers are measured together.
FAMILIES = (("titn", "tnt"), ("deit",), ("vit",))
OPERATIONS = {"training": TRAINING, "forward": FORWARD}
MEASURED = ("memory", *OPERATIONS)
WARM_UPS = 4  # of what is compiled or captured

Figures = Mapping[Contender, NDArray[np.float64]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, threads=2)
    parser.add_argument(
        "--batch-sizes", type=_sizes, help=f"separated by commas; default: {GOAL_BATCH},1024; {GOAL_BATCH} with --quick"
    )
    parser.add_argument("--steps", type=positive, help="of a timed turn; default: 1 on a CPU, 10 on a GPU")
    add_students(parser)
    parser.add_argument("--no-compile", action="store_true", help="leave compiled models out, as --quick does")
    parser.add_argument(
        "--only",
        help="contenders whose names have one of these, separated by commas, as 'titn c++ bf16,timm', or are one, as "
        "'=titn c++ bf16 compiled'; default: all",
    )
    parser.add_argument(
        "--measure",
        default=",".join(MEASURED),
        help=f"what is measured, separated by commas; default: {','.join(MEASURED)}",
    )
    parser.add_argument(
        "--peak-side", type=positive, default=2048, help="of the matrices that measure a device's peak; default: 2048"
    )
    options = parser.parse_args(arguments)
    for name in options.measure.split(","):
        if name not in MEASURED:
            parser.error(f"--measure {name}: is not measured; choose from {', '.join(MEASURED)}")
    options.batch_sizes = options.batch_sizes or ([GOAL_BATCH] if options.quick else [GOAL_BATCH, 1024])
    options.compiled = not (options.quick or options.no_compile)
    report = begin("Students", options, rounds=(5, 7, 7), steps=(1, 1, 10))
    if options.device.type == "cpu":
        keep_freed_memory()  # as training does
    side = options.peak_side
    peaks = floor.find_peaks(options.device, side=side, copied_bytes=256 * side**2)
    report.extra |= {"peaks": dataclasses.asdict(peaks), "parameters": {}, "left_out": {}}
    if peaks == floor.H200:
        report.extra["inner_kernels_ms"] = inner_kernels(options.students, options)
    for family in FAMILIES:
        students = [name for name in family if name in options.students]
        if students:
            compare_family(students, report, peaks, options)
    for name, why in report.extra["left_out"].items():
        Console().print(f"left out: {name}: {why}", style="yellow", highlight=False)
    report.finish(Console(), options.json)


def compare_family(students: Sequence[str], report: Report, peaks: floor.Peaks, options: argparse.Namespace) -> None:
    """Compare students that have the same peers, at every batch size; the peers have the first one's geometry."""
    device, depth = options.device, options.depth

    def wanted(who: Contender) -> bool:
        return options.only is None or any(
            part[1:] == who.name if part.startswith("=") else part in who.name for part in options.only.split(",")
        )

    families = [
        list(filter(wanted, contenders(name, report, device, depth=depth, compiled=options.compiled)))
        for name in students
    ]
    everyone = {who: students[0] for who in families[0]} | {
        who: name for name, family in zip(students, families, strict=True) for who in family if who.is_ours
    }
    for who, student in everyone.items():
        if who.model not in report.extra["parameters"]:
            model = build(dataclasses.replace(who, run_as=EAGER), device, student=student, depth=depth)
            report.extra["parameters"][who.model] = num_parameters(model)
    smallest: dict[Contender, float] = {}
    for batch_size in sorted(options.batch_sizes):
        needs = {who: smallest.get(who, 0.0) * batch_size / min(options.batch_sizes) for who in everyone}
        running = dict(everyone)
        if "memory" in options.measure.split(","):
            memory = measure_memory(everyone, needs, batch_size, report, options)
            smallest = smallest or {who: float(peak[0]) for who, peak in memory.items()}
            report.rows += rows(students, memory, MEMORY, batch_size, "MiB", 2.0**-20, {}, options)
            report.write(options.json)
            running = {
                who: student
                for who, student in everyone.items()
                if dataclasses.replace(who, run_as=who.run_as if device.type == "cuda" else EAGER) in memory
            }
        for operation in [name for key, name in OPERATIONS.items() if key in options.measure.split(",")]:
            if operation == FORWARD:
                running = {who: student for who, student in running.items() if who.run_as != CAPTURED}
            seconds = measure_seconds(running, operation, batch_size, report, options)
            floors = least_seconds(running, operation, batch_size, peaks, options)
            report.rows += rows(students, seconds, operation, batch_size, "ms", 1e3, floors, options)
            report.write(options.json)


def measure_memory(
    everyone: Mapping[Contender, str],
    needs: Mapping[Contender, float],
    batch_size: int,
    report: Report,
    options: argparse.Namespace,
) -> dict[Contender, NDArray[np.float64]]:
    """Return the peak bytes of a training step, `(1,)`, of everyone for whom there is enough memory.

    Args:
        everyone: Contender to the student whose geometry it has; on a CPU only the eager ones are measured.
        needs: Estimated bytes of each, from its peak at the smallest batch size. A contender that needs more than is
            free is left out.
        batch_size: B.
        report: Receives who is left out, and why.
        options: Of the command line.
    """
    peaks = {}
    for who, student in everyone.items():
        if options.device.type != "cuda" and who.run_as != EAGER:
            continue
        left = peak_memory.available(options.device)
        label = f"{who.name} at batch {batch_size}"
        if needs[who] > left:
            report.extra["left_out"][label] = (
                f"needs about {needs[who] / 2**30:.1f} GiB, {left / 2**30:.1f} GiB are free"
            )
            continue
        try:
            peak = peak_memory.measure(who, options.device, student=student, batch_size=batch_size, depth=options.depth)
        except (MemoryError, TorchDynamoException) as error:
            report.extra["left_out"][label] = _first_line(error)
            continue
        peaks[who] = np.array([float(peak)])
    torch._dynamo.reset()
    return peaks


def measure_seconds(
    everyone: Mapping[Contender, str], operation: str, batch_size: int, report: Report, options: argparse.Namespace
) -> dict[Contender, NDArray[np.float64]]:
    """Return the seconds of one step or pass of everyone, `(rounds,)`, measured in turns."""
    batch = synthetic_batch(batch_size, options.device)
    turns: dict[Contender, Callable[[], object]] = {}
    for who, student in everyone.items():
        try:
            step = turn(who, batch, operation, student=student, depth=options.depth)
            for _ in range(1 if who.run_as == EAGER else WARM_UPS):
                step()
        except (MemoryError, torch.OutOfMemoryError, TorchDynamoException) as error:
            report.extra["left_out"][f"{who.name}, {operation} at batch {batch_size}"] = _first_line(error)
        else:
            turns[who] = repeated(step, options.steps)
    seconds = interleave({who.name: run for who, run in turns.items()}, rounds=options.rounds, device=options.device)
    torch._dynamo.reset()
    return {who: seconds[who.name] / options.steps for who in turns}


def least_seconds(
    everyone: Mapping[Contender, str], operation: str, batch_size: int, peaks: floor.Peaks, options: argparse.Namespace
) -> dict[Contender, float]:
    """Return each contender's floor, seconds: of its student's geometry, in its own precision."""
    floors = {}
    for who, student in everyone.items():
        student_recipe = recipe(student, options.depth)
        counted = floor.operations(
            student_recipe,
            batch_size=batch_size,
            precision=who.precision,
            training=operation == TRAINING,
            device_type=options.device.type,
        )
        floors[who] = floor.floor(counted, peaks, who.precision).fused
    return floors


def inner_kernels(students: Sequence[str], options: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds in which an H200 issues the instructions of a step's fused inner blocks."""
    found = {}
    for name in students:
        for precision in floor.ISSUED:
            for size in options.batch_sizes:
                seconds = floor.issued_seconds(recipe(name, options.depth), batch_size=size, precision=precision)
                if seconds is not None:
                    found[f"{name} {precision} at batch {size}"] = 1e3 * seconds
    return found


def rows(
    students: Sequence[str],
    figures: Figures,
    operation: str,
    batch_size: int,
    unit: str,
    scale: float,
    floors: Mapping[Contender, float],
    options: argparse.Namespace,
) -> list[Row]:
    """Compare each student's best setting with the best of all peers, and list every setting.

    Ours counts only in the settings that a recipe can train with: eager, captured, or `compile: true`.

    Args:
        students: Of one family.
        figures: Lower is better.
        operation: TRAINING, FORWARD or MEMORY.
        batch_size: B.
        unit: Of the rows.
        scale: From figures to that unit.
        floors: In the figures' unit; empty for memory.
        options: Of the command line.
    """
    peers = {who: values for who, values in figures.items() if not who.is_ours}
    best_peer = min(peers, key=lambda who: float(np.median(peers[who])), default=None)
    compared = []

    def add(what: str, ours: Contender, peer: Contender | None, goal: float | None = None) -> None:
        details: dict[str, Any] = {"ours_name": ours.name}
        for prefix, who in (("", ours), ("peer_", peer)):
            if who is not None and who in floors:
                details[f"{prefix}floor"] = scale * floors[who]
                details[f"{prefix}floor_ratio"] = float(np.median(figures[who])) / floors[who]
        if peer is None:
            compared.append(alone(what, scale * figures[ours], unit, **details))
            return
        pair = (scale * figures[ours], scale * figures[peer])
        compared.append(compare(what, *pair, peer.name, unit=unit, higher_is_better=False, goal=goal, **details))

    at = f"{operation} at batch {batch_size}"
    for student in students:
        settings = [who for who in figures if who.model == student]
        trained_so = [who for who in settings if who.run_as != GRAPHS]
        if not trained_so:
            continue  # left out, and told so
        best = min(trained_so, key=lambda who: float(np.median(figures[who])))
        if (student, operation, batch_size) == ("titn", TRAINING, GOAL_BATCH) and best_peer is not None:
            full_size = options.depth in (None, recipe(student).depth)
            add(f"titn {TRAINING} b{GOAL_BATCH}", best, best_peer, GOAL if full_size else None)
        else:
            add(f"{student}, {at}", best, best_peer)
        for who in settings:
            add(f"{who.name}, {at}", who, best_peer)
        if student == students[0]:
            for who in peers:
                add(f"{who.name}, {at}", best, who)
    return compared


def _sizes(text: str) -> list[int]:
    """Read batch sizes from the command line."""
    return [positive(part) for part in text.split(",")]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    main()
