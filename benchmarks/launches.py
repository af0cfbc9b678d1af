"""What a training step starts on the device, counted by PyTorch's profiler: `python -m benchmarks.launches`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks import training
from benchmarks.measure import Report, Row, add_students, alone, begin, figure, option_parser, positive, text_table
from benchmarks.steps import at_rest, synthetic_batch
from benchmarks.synthetic import images_and_labels
from pipeline.inference.speed import wait_for
from pipeline.training.step import WARM_UP_STEPS
from pipeline.views.views import Views

NUM_STEPS = 3
LISTED = 30


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the count."""
    parser = option_parser(__doc__)
    parser.add_argument("--batch-size", type=positive, help="default: 1024, 128 on a CPU, 16 with --quick")
    add_students(parser, ("titn",))
    options = parser.parse_args(arguments)
    report = begin("Launches", options, batch_size=(16, 128, 1024))
    report.extra["kernels"] = {}
    for name in options.students:
        report.rows.append(count(name, report, options))
    report.finish(Console(), options.json)


def count(name: str, report: Report, options: argparse.Namespace) -> Row:
    """Count what a step starts as training runs it: kernels on a GPU, ATen's operators on a CPU.

    The report gets those that take most of the time.
    """
    device = options.device
    images, labels = (values.to(device) for values in images_and_labels(2))
    views = Views(images, labels, training.recipe().views["default"])
    fit = training.make_fit(name, views, None, num_views=1, batch_size=options.batch_size, depth=options.depth)
    at_rest(fit.optimizer)
    batch = synthetic_batch(options.batch_size, device)
    fit.parallel.train()
    on_gpu = device.type == "cuda"
    for _ in range(WARM_UP_STEPS + 2 if on_gpu else 1):
        fit.step(batch)
    wait_for(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(NUM_STEPS):
            fit.step(batch)
        wait_for(device)
    started: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    for event in profiler.events():
        if event.is_user_annotation:
            continue
        if (event.device_type == DeviceType.CUDA) if on_gpu else event.name.startswith("aten::"):
            started[event.name] += 1
            microseconds[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
    moves = {kind: sum(n for key, n in started.items() if key.startswith(kind)) for kind in ("Memcpy", "Memset")}
    kernels = sum(started.values()) - sum(moves.values())
    listed: list[dict[str, Any]] = [
        {"name": key[:200], "a_step": started[key] / NUM_STEPS, "us_a_step": value / NUM_STEPS}
        for key, value in microseconds.most_common(LISTED)
    ]
    report.extra["kernels"][name] = listed
    cells = [(kernel["name"][:90], "", figure(kernel["a_step"]), figure(kernel["us_a_step"])) for kernel in listed]
    report.tables.append(text_table(f"{name}: what takes most", ("kernel", "", "a step", "us a step"), cells, ""))
    return alone(
        f"{name}, {'kernels' if on_gpu else 'operators'} of a training step at batch {options.batch_size}",
        [kernels / NUM_STEPS],
        "launches",
        copies=moves["Memcpy"] / NUM_STEPS,
        fills=moves["Memset"] / NUM_STEPS,
        us_on_the_device=sum(microseconds.values()) / NUM_STEPS,
        **fit.execution.as_json(),
    )


if __name__ == "__main__":
    main()
