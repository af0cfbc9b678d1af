"""Training, views and labels beside a busy process: `python -m benchmarks.neighbours`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from benchmarks import built_teachers, steps, teachers, training
from benchmarks.measure import begin, compare, option_parser, positive
from benchmarks.synthetic import images_and_labels
from benchmarks.views import whole_epochs
from pipeline.inference.speed import interleave
from pipeline.labels.teacher import label_view
from pipeline.models import TEACHERS
from pipeline.system.neighbours import CHOSEN_BY
from pipeline.system.runtime import keep_freed_memory, resolve_precision
from pipeline.views.views import Views

GOAL = 2.5
SMALL_BATCH = 8  # of short operations, which suffer most
# A process that computes, and one that copies: MEBIBYTES is filled in.
NEIGHBOURS = {
    "a spinning process": "print(flush=True)\nwhile True: pass",
    "a process that copies arrays": """import numpy
source = numpy.ones(MEBIBYTES << 20, numpy.uint8)
target = source.copy()
print(flush=True)
while True: target[:] = source
""",
}


class Neighbour:
    """Another process, which stands still but within `at_work`.

    Args:
        program: Python; it prints a line when it is ready.
    """

    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self._process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Let it work within the block."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def beside(self, run: Callable[[], object]) -> Callable[[], None]:
        """Return `run` beside it."""

        def turn() -> None:
            with self.at_work():
                run()

        return turn

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__)
    parser.add_argument("--batch-size", type=positive, help="of TITN; default: 128, on a GPU 1024, 4 with --quick")
    parser.add_argument("--teacher-batch", type=positive, help="default: 32, on a GPU 1024, 2 with --quick")
    parser.add_argument("--images", type=positive, help="of a view; default: 4096, 64 with --quick")
    parser.add_argument(
        "--labelled", type=positive, help="images to label; default: 128, on a GPU 8192, 4 with --quick"
    )
    parser.add_argument("--teacher", choices=tuple(TEACHERS), default="vgg16_bn", help="default: vgg16_bn")
    parser.add_argument("--depth", type=positive, help="blocks of TITN; default: the recipe's")
    parser.add_argument("--mebibytes", type=positive, help="that are copied; default: 1024, 16 with --quick")
    options = parser.parse_args(arguments)
    report = begin(
        "Alone (ours) and beside a busy process (peer); the goal is the most",
        options,
        rounds=(2, 3, 7),
        batch_size=(4, 128, 1024),
        teacher_batch=(2, 32, 1024),
        images=(64, 4096, 4096),
        labelled=(4, 128, 8192),
        mebibytes=(16, 1024, 1024),
    )
    report.environment["waiting"] = {name: os.environ.get(name) for name in CHOSEN_BY}
    if options.device.type == "cpu":
        keep_freed_memory()  # as training does
    programs = {name: text.replace("MEBIBYTES", str(options.mebibytes)) for name, text in NEIGHBOURS.items()}
    with contextlib.ExitStack() as started:
        neighbours = {}
        for name, program in programs.items():
            neighbours[name] = Neighbour(program)
            started.callback(neighbours[name].end)
        turns = {}
        for what, run in works(options).items():
            turns[what, "alone"] = run
            turns |= {(what, name): neighbour.beside(run) for name, neighbour in neighbours.items()}
        seconds = interleave(turns, rounds=options.rounds, device=options.device)
    for what, beside in turns:
        if beside != "alone":
            milliseconds = 1e3 * seconds[what, "alone"], 1e3 * seconds[what, beside]
            row = compare(what, *milliseconds, f"beside {beside}", unit="ms", higher_is_better=False, goal=GOAL)
            report.rows.append(row)
    report.finish(Console(), options.json)


def works(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name: each call does it once."""
    device, name = options.device, options.teacher

    def views(count: int) -> Views:
        images, labels = (values.to(device) for values in images_and_labels(count))
        return Views(images, labels, training.recipe().views["default"])

    def student(batch_size: int) -> Callable[[], object]:
        fit = training.make_fit(
            "titn", views(batch_size), None, num_views=10**6, batch_size=batch_size, depth=options.depth
        )
        return lambda: training.train_epoch(fit)

    precision, model = resolve_precision("auto", device), built_teachers.build(name)
    teacher = built_teachers.folded(model, device, options.labelled, precision)
    batch, labelled, numbers = (
        steps.synthetic_batch(options.teacher_batch, device),
        views(options.labelled),
        itertools.count(),
    )
    return {
        f"TITN, training step at batch {options.batch_size}": student(options.batch_size),
        f"TITN, training step at batch {SMALL_BATCH}": student(SMALL_BATCH),
        f"{name}, training step at batch {options.teacher_batch}": teachers.our_turn(
            name, model, batch, "training step", precision
        ),
        f"a view of {options.images} images": whole_epochs(views(options.images), options.batch_size),
        f"{name}, labelling {options.labelled} images": lambda: label_view(teacher, labelled, next(numbers)),
    }


if __name__ == "__main__":
    main()
