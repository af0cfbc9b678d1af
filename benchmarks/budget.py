"""Where a training step on a CPU spends its time, with fused and with plain blocks: `python -m benchmarks.budget`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import add_students, alone, begin, compare, option_parser, positive
from benchmarks.steps import synthetic_batch
from benchmarks.student_contenders import TRAINING, Contender, turn
from pipeline.system.runtime import keep_freed_memory

PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::linear", "mkldnn"),
    "inner blocks": ("inner_block",),
    "attention": ("aten::bmm", "softmax", "_Attend"),
    "GELU": ("gelu", "_Gelu"),
    "sums, biases, LayerNorm": ("aten::add", "aten::sum", "layer_norm", "_Add", "_Norm"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::cat", "aten::clone", "pad"),
    "clipping and update": ("_fused_", "linalg_vector_norm", "_foreach", "Optimizer"),
}
"""Part of a step to names of operations: what they begin with, and without `aten::` any piece of them."""
REST, WHOLE = "all else", "whole step"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, threads=2)
    add_students(parser)
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(arguments)
    if options.device.type != "cpu":
        parser.error(f"--device {options.device}: on a GPU a step is one graph; ask its own profiler")
    report = begin("Budget of a training step", options)
    keep_freed_memory()  # as training does
    batch = synthetic_batch(options.batch_size, options.device)
    for name in options.students:
        steps = {
            blocks: turn(
                Contender(name, options.precision, blocks=blocks), batch, TRAINING, student=name, depth=options.depth
            )
            for blocks in ("fused", "plain")
        }
        for step in steps.values():
            step()
        rounds: dict[str, list[dict[str, float]]] = {blocks: [] for blocks in steps}
        for _ in range(options.rounds):
            for blocks, step in steps.items():
                rounds[blocks].append(budget(step))
        for part in [*PARTS, REST, WHOLE]:
            ours, plain = (_figures(rounds[blocks], part) for blocks in ("fused", "plain"))
            what = f"{name} {options.precision} b{options.batch_size}, {part}"
            if plain.any():
                report.rows.append(compare(what, ours, plain, "plain blocks", unit="ms", higher_is_better=False))
            elif ours.any():  # plain blocks spend it in other parts
                report.rows.append(alone(what, ours, "ms"))
    report.finish(Console(), options.json)


def budget(step: Callable[[], object]) -> dict[str, float]:
    """Return the milliseconds that the parts of a step take, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    spent = dict.fromkeys([*PARTS, REST], 0.0)
    for event in profiler.key_averages():
        spent[part_of(event.key)] += event.self_cpu_time_total / 1e3
    return {**spent, WHOLE: sum(spent.values())}


def part_of(operation: str) -> str:
    """Return the part of a step that an operation belongs to."""
    for part, names in PARTS.items():
        if any(operation.startswith(name) if name.startswith("aten::") else name in operation for name in names):
            return part
    return REST


def _figures(rounds: Sequence[dict[str, float]], part: str) -> NDArray[np.float64]:
    return np.array([spent[part] for spent in rounds])


if __name__ == "__main__":
    main()
