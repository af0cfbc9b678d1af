"""A whole epoch as training has it, and what of it is no step: `python -m benchmarks.epoch`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks import training
from benchmarks.measure import Row, add_students, alone, begin, option_parser, positive
from benchmarks.steps import at_rest, repeated
from benchmarks.synthetic import MEAN, NUM_CLASSES, STD, images_and_labels
from benchmarks.views import whole_epochs
from pipeline.inference.speed import interleave
from pipeline.labels.source import cached_labels
from pipeline.system.runtime import keep_freed_memory
from pipeline.training.batches import EvaluationData
from pipeline.training.evaluation import evaluate
from pipeline.training.fit import Fit
from pipeline.training.step import WARM_UP_STEPS
from pipeline.views.views import Views

LOW_RATE = 1e-4  # the labels are random: a usual one might end in numbers that are not finite
EVALUATED = 5  # images of an epoch for one that is evaluated, as in CIFAR


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__)
    parser.add_argument("--images", type=positive, help="of an epoch; default: 50000, 2048 on a CPU, 64 with --quick")
    parser.add_argument("--batch-size", type=positive, help="default: 1024, 128 on a CPU, 16 with --quick")
    add_students(parser, ("titn",))
    options = parser.parse_args(arguments)
    report = begin("An epoch", options, rounds=(1, 3, 5), images=(64, 2048, 50_000), batch_size=(16, 128, 1024))
    if options.device.type == "cpu":
        keep_freed_memory()  # as training does
    for name in options.students:
        report.rows += epoch_rows(name, options)
    report.finish(Console(), options.json)


def epoch_rows(name: str, options: argparse.Namespace) -> list[Row]:
    """Time an epoch, and apart from it its views, its evaluation, and a step on a batch that is there.

    The edges are what an epoch takes beyond its steps: views, copies, checks, evaluation, keeping the best weights.
    """
    fit, ready = (make_fit(name, options) for _ in range(2))
    at_rest(ready.optimizer)
    [batch] = ready.data.batches(0, [torch.arange(options.batch_size) % options.images])
    views = Views(fit.data.views.images, fit.data.views.labels, training.recipe().views["default"])
    num_steps = len(fit.batches)

    def epoch() -> None:
        fit.saved_at = math.inf  # nothing is saved
        fit.train_epoch()
        fit.end_epoch()

    if options.device.type == "cuda":
        for _ in range(WARM_UP_STEPS + 1):  # the last batch of an epoch has a size of its own, captured after as many
            epoch()
    ready.parallel.train()
    seconds = interleave(
        {
            "epoch": epoch,
            "steps": repeated(lambda: ready.step(batch), num_steps),
            "views": whole_epochs(views, options.batch_size),
            "evaluation": lambda: evaluate(fit.model, fit.evaluation, precision=fit.execution.precision),
        },
        rounds=options.rounds,
        device=options.device,
    )
    # The last batch of an epoch is smaller.
    seconds["steps"] *= options.images / (options.batch_size * num_steps)
    epochs, steps = seconds["epoch"], seconds["steps"]
    how = {"batch_size": options.batch_size, **fit.execution.as_json()}
    count = f"{options.images:,}"
    return [
        alone(f"{name}, an epoch of {count} images", epochs, "s", **how),
        alone(f"{name}, steps of that epoch, on a batch that is there", steps, "s"),
        alone(f"{name}, edges of that epoch", 1e3 * (epochs - steps), "ms", share=float(np.median(1 - steps / epochs))),
        alone(f"{name}, views, share of that epoch", 100 * seconds["views"] / epochs, "%"),
        alone(f"{name}, making the views of {count} images", 1e3 * seconds["views"], "ms"),
        alone(f"{name}, evaluation of {len(fit.evaluation.labels):,} images", 1e3 * seconds["evaluation"], "ms"),
    ]


def make_fit(name: str, options: argparse.Namespace) -> Fit:
    """Prepare a run with cached labels and a split to evaluate."""
    num_views = 2
    images, labels = (values.to(options.device) for values in images_and_labels(options.images))
    with tempfile.TemporaryDirectory() as folder:
        cache = training.seal_random_labels(Path(folder) / "labels.h5", num_views=num_views, num_samples=options.images)
    fit = training.make_fit(
        name,
        Views(images, labels, training.recipe().views["default"]),
        cached_labels(cache, options.device),
        num_views=num_views,
        batch_size=options.batch_size,
        depth=options.depth,
    )
    few = max(1, options.images // EVALUATED)
    fit.evaluation = EvaluationData(images[:few], labels[:few], MEAN, STD, NUM_CLASSES, labels[:few])
    fit.recipe = dataclasses.replace(fit.recipe, lr=LOW_RATE)
    return fit


if __name__ == "__main__":
    main()
