"""Cached labels against a teacher that runs in every step: `python -m benchmarks.distill`."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks import built_teachers, training
from benchmarks.measure import Report, Row, add_students, begin, compare, figure, option_parser, positive, text_table
from benchmarks.synthetic import images_and_labels
from pipeline.inference.speed import interleave, quartiles
from pipeline.labels.cache import LabelCache
from pipeline.labels.source import OnlineLabels, TeacherLabels, cached_labels
from pipeline.labels.teacher import label_view
from pipeline.models import TEACHERS
from pipeline.system.runtime import keep_freed_memory, resolve_precision
from pipeline.views.views import Views

EPOCH_IMAGES = 50_000
EPOCHS = VIEWS = 600
MODEL = "vgg16_bn"
QUICK_COSTS = ("mobilenet_v3_large",)
CACHED, UNDISTILLED = "cached labels", "without distillation"
ONLINE_STOCK, ONLINE_FOLDED = "online, stock fp32", "online, folded"
NOTE = (
    "For S students of E epochs over N images, cached labels cost V x N x t_label once and S x E x N x t_cached; "
    "online labels cost S x E x N x t_online. The cache pays when S x E x (t_online - t_cached) > V x t_label: above "
    "the number of students under 'S at V = E', or, for one student, below the number of views under 'V at S = 1'. "
    "Used once, by one student with as many views as epochs, it gains nothing: every label is made once either way, "
    "and the cache renders the views a second time. It pays with more students or runs, or fewer views than epochs."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__)
    parser.add_argument("--batch-size", type=positive, help="default: 128 on a CPU, 1024 on a GPU, 16 with --quick")
    parser.add_argument(
        "--steps", type=positive, help="of a timed turn; default: 3 on a CPU, 20 on a GPU, 1 with --quick"
    )
    add_students(parser, ("titn", "vit"))
    parser.add_argument("--teacher", choices=tuple(TEACHERS), default=MODEL, help=f"asked online; default: {MODEL}")
    options = parser.parse_args(arguments)
    report = begin("Distillation", options, rounds=(2, 7, 7), batch_size=(16, 128, 1024), steps=(1, 3, 20))
    if options.device.type == "cpu":
        keep_freed_memory()  # as training does
    with tempfile.TemporaryDirectory() as directory:
        report.rows.append(bytes_per_view(Path(directory)))
        cache = training.seal_random_labels(
            Path(directory) / "labels.h5", num_views=options.rounds + 1, num_samples=options.steps * options.batch_size
        )
    costs = {options.teacher: label_cost(options.teacher, options)}
    epochs = {name: student_epochs(name, cache, options) for name in options.students}
    for name in QUICK_COSTS if options.quick else TEACHERS:
        if name not in costs:
            costs[name] = label_cost(name, options)
    for name, seconds in epochs.items():
        report.rows += epoch_rows(name, seconds, options.teacher)
    report.rows += costs.values()
    add_break_even(report, epochs, costs[options.teacher], options.teacher)
    report.finish(Console(), options.json)


def student_epochs(name: str, cache: LabelCache, options: argparse.Namespace) -> dict[str, NDArray[np.float64]]:
    """Return the seconds of an epoch of EPOCH_IMAGES for each source of labels, `(rounds,)`, from a few steps."""
    device, batch_size, num_images = options.device, options.batch_size, cache.num_samples
    model = built_teachers.build(options.teacher)
    precision = resolve_precision("auto", device)
    sources: dict[str, TeacherLabels | None] = {
        CACHED: cached_labels(cache, device),
        ONLINE_STOCK: OnlineLabels(built_teachers.stock(model, device, batch_size)),
        ONLINE_FOLDED: OnlineLabels(built_teachers.folded(model, device, batch_size, precision)),
        UNDISTILLED: None,
    }
    images, labels = (values.to(device) for values in images_and_labels(num_images))
    contenders: dict[str, Callable[[], object]] = {}
    for source, teacher_labels in sources.items():
        torch.manual_seed(0)
        # Each source has its own views, so that none finds its view already made.
        views = Views(images, labels, training.recipe().views["default"])
        fit = training.make_fit(
            name, views, teacher_labels, num_views=cache.num_views, batch_size=batch_size, depth=options.depth
        )
        contenders[source] = lambda fit=fit: training.train_epoch(fit)  # type: ignore[misc]
    seconds = interleave(contenders, rounds=options.rounds, device=device)
    return {source: values * EPOCH_IMAGES / num_images for source, values in seconds.items()}


def epoch_rows(name: str, seconds: Mapping[str, NDArray[np.float64]], teacher: str) -> list[Row]:
    """Compare an epoch with cached labels with every other source of labels."""
    return [
        compare(
            f"{name} epoch of {EPOCH_IMAGES:,} images, {CACHED}",
            seconds[CACHED],
            values,
            source if source == UNDISTILLED else f"{source} {teacher}",
            unit="s",
            higher_is_better=False,
            scaled=True,
        )
        for source, values in seconds.items()
        if source != CACHED
    ]


def label_cost(name: str, options: argparse.Namespace) -> Row:
    """Compare the cost of a label, views included, between the folded teacher and torchvision's own."""
    device, batch_size, model = options.device, options.batch_size, built_teachers.build(name)
    precision = resolve_precision("auto", device)
    images, labels = (values.to(device) for values in images_and_labels(options.steps * batch_size))
    views = Views(images, labels, training.recipe().views["default"])
    light, plain = (
        built_teachers.folded(model, device, batch_size, precision),
        built_teachers.stock(model, device, batch_size),
    )
    numbers = itertools.count()  # shared, so that no contender finds its view's draws already made
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: label_view(light, views, next(numbers)),
        "peer": lambda: label_view(plain, views, next(numbers)),
    }
    seconds = interleave(contenders, rounds=options.rounds, device=device)
    costs = {who: 1e6 * values / views.num_samples for who, values in seconds.items()}
    what = f"label by {name}, folded {precision}, view included"
    return compare(what, costs["ours"], costs["peer"], "stock fp32", unit="us/image", higher_is_better=False)


def bytes_per_view(directory: Path) -> Row:
    """Measure what a view takes in real sealed files of EPOCH_IMAGES samples."""
    sizes = {}
    for num_views in (1, 9):
        path = directory / f"{num_views}.h5"
        training.seal_random_labels(path, num_views=num_views, num_samples=EPOCH_IMAGES)
        sizes[num_views] = path.stat().st_size
    view_bytes = (sizes[9] - sizes[1]) / 8
    return Row(
        what=f"label cache of {EPOCH_IMAGES:,} samples",
        ours=view_bytes,
        peer=float(EPOCH_IMAGES),
        peer_name="one byte a label, nothing else",
        unit="bytes/view",
        ratio=EPOCH_IMAGES / view_bytes,
        details={"bytes_of_views": sizes, f"extrapolated_bytes_of_{VIEWS}_views": sizes[9] + (VIEWS - 9) * view_bytes},
    )


def add_break_even(
    report: Report, epochs: Mapping[str, Mapping[str, NDArray[np.float64]]], label: Row, teacher: str
) -> None:
    """Find the number of students, or of views, at which the cache costs as much as asking in every step."""
    label_seconds = label.ours * 1e-6 * EPOCH_IMAGES
    entries = []
    for name, seconds in epochs.items():
        for online in (ONLINE_STOCK, ONLINE_FOLDED):
            saved = seconds[online] - seconds[CACHED]
            figures = break_even(label_seconds, float(np.median(saved)))
            spread = {"saved_seconds_per_epoch": quartiles(saved)}
            entries.append({"student": name, "online": f"{online} {teacher}", **figures, "spread": spread})
    report.extra["break_even"] = {
        "epochs": EPOCHS,
        "samples": EPOCH_IMAGES,
        "label_seconds_per_view": label_seconds,
        "found": entries,
        "note": NOTE,
    }
    keys = ("saved_seconds_per_epoch", "students_at_as_many_views_as_epochs", "views_for_one_student")
    cells = [(entry["student"], entry["online"], *(figure(entry[key]) for key in keys)) for entry in entries]
    columns = ("student", "cached instead of", "s saved an epoch", "S at V = E", "V at S = 1")
    title = f"Break-even: E = {EPOCHS}, N = {EPOCH_IMAGES:,}, {figure(label_seconds)} s to label a view"
    report.tables.append(text_table(title, columns, cells, NOTE))


def break_even(label_seconds: float, saved_seconds: float) -> dict[str, Any]:
    """Solve S x E x saved > V x label for the students S and for the views V.

    Args:
        label_seconds: Cost of labelling one view.
        saved_seconds: What cached labels save in an epoch; 0 or less where noise hides the difference.

    Returns:
        The number of students S above which the cache pays at V = E, and of views V below which it pays for one
        student of EPOCHS epochs; both None where nothing was saved.
    """
    pays = saved_seconds > 0
    return {
        "saved_seconds_per_epoch": saved_seconds,
        "students_at_as_many_views_as_epochs": label_seconds / saved_seconds if pays else None,
        "views_for_one_student": EPOCHS * saved_seconds / label_seconds if pays else None,
    }


if __name__ == "__main__":
    main()
