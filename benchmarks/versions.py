"""Training steps of this checkout beside those of another one: `python -m benchmarks.versions --beside DIR`."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.measure import ROOT, add_students, begin, compare, option_parser, positive

GOALS = {"titn": 1.25, "tnt": 1.25, "deit": 1.2, "vit": 1.2}
"""Student to how many times faster its step should be than at commit fa353451."""
# Runs in any checkout since then: it prints the seconds of a step for each line that it reads. Threads wait in all of
# them as this process has been told to, since the variable that says so is inherited.
WORKER = """
import sys, time
import torch
from benchmarks import training
from benchmarks.synthetic import images_and_labels
from pipeline.system import runtime
try:
    from pipeline.views.views import Views
except ImportError:
    from pipeline.views import Views
name, batch_size, threads, depth = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
runtime.keep_freed_memory()
images, labels = images_and_labels(batch_size)
views = Views(images, labels, training.recipe().views["default"])
fit = training.make_fit(name, views, None, num_views=10**6, batch_size=batch_size, depth=depth or None)
for _ in range(2):
    training.train_epoch(fit)
print("ready", flush=True)
for line in sys.stdin:
    started = time.perf_counter()
    training.train_epoch(fit)
    print(time.perf_counter() - started, flush=True)
"""


class Steps:
    """A process that does a training step, its view included, when it is asked to.

    Args:
        checkout: Whose code it runs.
        student: Which student of the recipe cifar100.
        batch_size: Samples of a step.
        threads: CPU threads.
        depth: Blocks; 0 takes the recipe's.
    """

    def __init__(self, checkout: Path, student: str, batch_size: int, threads: int, depth: int) -> None:
        arguments = [student, *map(str, (batch_size, threads, depth))]
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *arguments],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def step(self) -> float:
        """Return the seconds of a step."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return float(self._read())

    def end(self) -> None:
        """End it."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with {self._process.wait()}; its error stands above")
        return line


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, threads=2)
    parser.add_argument("--beside", type=_checkout, required=True, metavar="DIR", help="the other checkout")
    add_students(parser)
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--starts", type=positive, default=4, help="how often both are started anew; default: 4")
    options = parser.parse_args(arguments)
    if options.device.type != "cpu":
        parser.error(f"--device {options.device}: only steps on a CPU are compared")
    report = begin("Training steps", options)
    command = ["git", "-C", str(options.beside), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    for name in options.students:
        sizes = name, options.batch_size, options.threads, options.depth or 0
        seconds = np.concatenate([
            turns((ROOT, options.beside), sizes, options.rounds, is_reversed=start % 2 == 1)
            for start in range(options.starts)
        ])  # fmt: skip
        report.rows.append(
            compare(
                f"{name}, training step at batch {options.batch_size}",
                1e3 * seconds[:, 0],
                1e3 * seconds[:, 1],
                f"commit {commit or 'unknown'}",
                unit="ms",
                higher_is_better=False,
                goal=None if options.depth else GOALS.get(name),
            )
        )
    report.finish(Console(), options.json)


def turns(
    checkouts: tuple[Path, Path], sizes: tuple[str, int, int, int], rounds: int, *, is_reversed: bool
) -> NDArray[np.float64]:
    """Start both checkouts and let them take turns.

    On some machines the process that starts first is slower throughout: on an Intel Xeon with AMX, with equal code, by
    10 to 15 %. So a comparison starts both several times, and each of them is first in half of them.

    Args:
        checkouts: Ours and the other.
        sizes: What `Steps` takes after the checkout.
        rounds: Steps of each.
        is_reversed: Whether the other one starts, and takes each turn, first.

    Returns:
        `(rounds, 2)` float64, seconds of ours and of the other.
    """
    order = (1, 0) if is_reversed else (0, 1)
    with contextlib.ExitStack() as stack:
        processes: dict[int, Steps] = {}
        for which in order:
            processes[which] = Steps(checkouts[which], *sizes)
            stack.callback(processes[which].end)
        taken = [{which: processes[which].step() for which in order} for _ in range(rounds)]
    return np.array([[row[0], row[1]] for row in taken])


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "benchmarks/training.py").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no checkout of this project")
    return path


if __name__ == "__main__":
    main()
