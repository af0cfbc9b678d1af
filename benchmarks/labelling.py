"""Labels a second, beside the teacher as torchvision builds it: `python -m benchmarks.labelling`."""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import built_teachers, training
from benchmarks.measure import Row, begin, compare, option_parser, positive
from benchmarks.synthetic import MEAN, STD, images_and_labels
from pipeline.inference.speed import interleave
from pipeline.labels.teacher import Teacher, label_view
from pipeline.models import TEACHERS
from pipeline.system.runtime import resolve_precision
from pipeline.views.views import Views, normalize

MODEL = "vgg16_bn"
FOLDING_GOAL = 3.0
VIEWS_GOAL = 0.9
STOCK = "stock fp32"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--images", type=positive, help="images of a view; default: 512 on a CPU, 20480 on a GPU, 64 with --quick"
    )
    parser.add_argument("--batch-size", type=positive, help="default: 256 on a CPU, 1024 on a GPU, 64 with --quick")
    parser.add_argument("--teacher", choices=tuple(TEACHERS), default=MODEL, help=f"default: {MODEL}")
    options = parser.parse_args(arguments)
    report = begin("Labelling", options, images=(64, 512, 20_480), batch_size=(64, 256, 1024))
    images, labels = (values.to(options.device) for values in images_and_labels(options.images))
    views = Views(images, labels, training.recipe().views["default"])
    report.rows += ways_of_labelling(views, options)
    if not options.quick:
        for name in TEACHERS:
            report.rows.append(as_labels_are_made(name, views, options))
    report.finish(Console(), options.json)


def ways_of_labelling(views: Views, options: argparse.Namespace) -> list[Row]:
    """Compare what folding, bfloat16 and the making of views each change for one teacher."""
    device, batch_size, model = options.device, options.batch_size, built_teachers.build(options.teacher)
    fast = built_teachers.folded(model, device, batch_size, "bf16")
    light = built_teachers.folded(model, device, batch_size, "fp32")
    unfolded = _channels_last(model, device, batch_size, "bf16")
    plain = built_teachers.stock(model, device, batch_size)
    batches = normalized_batches(views, batch_size)
    numbers = itertools.count()
    contenders: dict[str, Callable[[], object]] = {
        "folded bf16": forward_passes(fast, batches),
        STOCK: forward_passes(plain, batches),
        "folded fp32": forward_passes(light, batches),
        "unfolded bf16": forward_passes(unfolded, batches),
        "label_view": lambda: label_view(fast, views, next(numbers)),
    }
    seconds = interleave(contenders, rounds=options.rounds, device=device)
    rates = {name: views.num_samples / values for name, values in seconds.items()}

    def row(what: str, ours: str, peer: str, peer_name: str, goal: float | None) -> Row:
        return compare(
            f"{options.teacher}, {what}",
            rates[ours],
            rates[peer],
            peer_name,
            unit="images/s",
            higher_is_better=True,
            goal=goal,
        )

    return [
        row("folded bf16 channels_last", "folded bf16", STOCK, STOCK, FOLDING_GOAL),
        row("folded fp32 channels_last", "folded fp32", STOCK, STOCK, None),
        row("unfolded bf16 channels_last", "unfolded bf16", STOCK, STOCK, None),
        row(
            "label_view, folded bf16",
            "label_view",
            "folded bf16",
            "its bare forward pass, of views made and normalised before",
            VIEWS_GOAL,
        ),
    ]


def as_labels_are_made(name: str, views: Views, options: argparse.Namespace) -> Row:
    """Compare label_view with the folded teacher to label_view with the teacher as torchvision builds it."""
    device, batch_size, model = options.device, options.batch_size, built_teachers.build(name)
    precision = resolve_precision("auto", device)
    numbers = itertools.count()  # shared, so that no contender finds its view's draws already made
    ours, plain = (
        built_teachers.folded(model, device, batch_size, precision),
        built_teachers.stock(model, device, batch_size),
    )
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: label_view(ours, views, next(numbers)),
        "peer": lambda: label_view(plain, views, next(numbers)),
    }
    seconds = interleave(contenders, rounds=options.rounds, device=device)
    rates = {who: views.num_samples / values for who, values in seconds.items()}
    what = f"{name}, label_view, folded {precision}"
    return compare(what, rates["ours"], rates["peer"], f"label_view, {STOCK}", unit="images/s", higher_is_better=True)


def forward_passes(teacher: Teacher, batches: Sequence[Tensor]) -> Callable[[], None]:
    """Return a loop of forward passes over images that are ready, `(B, 3, H, W)` float32."""

    def run() -> None:
        for images in batches:
            teacher.logits(images)

    return run


def normalized_batches(views: Views, batch_size: int) -> list[Tensor]:
    """Return the batches of view 0 as a network takes them, on the device."""
    parts = torch.split(torch.arange(views.num_samples), batch_size)
    return [normalize(views.batch(0, part).images, MEAN, STD) for part in parts]


def _channels_last(model: nn.Module, device: torch.device, batch_size: int, precision: str) -> Teacher:
    """Return the teacher unfolded, channels last."""
    copied = copy.deepcopy(model).to(device)
    copied.to(memory_format=torch.channels_last)
    return Teacher(copied, MEAN, STD, precision, batch_size)


if __name__ == "__main__":
    main()
