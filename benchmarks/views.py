"""Views a second, beside torchvision's and kornia's: `python -m benchmarks.views`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks import training, view_peers
from benchmarks.measure import Report, Row, begin, compare, option_parser, positive
from benchmarks.synthetic import MEAN, NUM_CLASSES, SIZE, STD, images_and_labels
from pipeline.config.recipes import ViewRecipe
from pipeline.inference.speed import interleave, quartiles
from pipeline.labels.source import cached_labels
from pipeline.system.runtime import keep_freed_memory
from pipeline.training.batches import epoch_order, split_batches
from pipeline.views import operations
from pipeline.views.policies import CIFAR10_POLICY, POLICIES
from pipeline.views.views import Views, normalize

GOAL = 10.0
# The largest share of a training step that making its views should take, per cent.
STEP_SHARE = 10.0
ON_ONE_CORE = "torchvision PIL, one core"
IN_BATCHES = "transforms.v2 on the batch, one box for all"
MAX_OPERATION_IMAGES = 10_000
SINGLE = {
    "crop": ViewRecipe(count=1, crop=view_peers.PADDING),
    "flip": ViewRecipe(count=1, flip=True),
    "AutoAugment": ViewRecipe(count=1, autoaugment="cifar10"),
    "RandAugment": ViewRecipe(count=1, autoaugment="randaugment"),
    "TrivialAugment": ViewRecipe(count=1, autoaugment="trivialaugment"),
    "CutMix": ViewRecipe(count=1, mixing="cutmix"),
}


def ours_epoch(views: Views, view: int, order: Tensor, batch_size: int, *, normalized: bool = True) -> None:
    """Make one whole view in batches, as an epoch of training does.

    Args:
        views: Of all images.
        view: View index.
        order: `(N,)` int64.
        batch_size: Images a batch.
        normalized: Whether the batches are normalised too.
    """
    views.prepare(view)
    for part in split_batches(len(order), batch_size):
        batch = views.batch(view, order[part])
        if normalized:
            normalize(batch.images, MEAN, STD)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, threads=view_peers.NUM_WORKERS)
    parser.add_argument("--images", type=positive, help="images of an epoch; default: 50000, 2048 with --quick")
    parser.add_argument("--batch-size", type=positive, help="default: 1024, 256 with --quick")
    parser.add_argument(
        "--step-batch", type=positive, help="batch of TITN's training step; default: 1024 on a GPU, else not measured"
    )
    parser.add_argument("--depth", type=positive, help="blocks of TITN; default: the recipe's")
    options = parser.parse_args(arguments)
    if options.step_batch is None and options.device.type != "cpu":
        options.step_batch = 1024
    report = begin("Views", options, images=(2048, 50_000, 50_000), batch_size=(256, 1024, 1024))
    report.environment["versions"]["pillow"] = PIL.__version__
    if options.device.type == "cpu":
        keep_freed_memory()  # as training does
    images, labels = (values.to(options.device) for values in images_and_labels(options.images))
    report.rows += whole_view(report, images, labels, options)
    few = min(options.images // 2 if options.quick else options.images, MAX_OPERATION_IMAGES)
    with one_thread():
        report.rows += single_operations(report, images[:few], labels[:few], options)
    if options.step_batch:
        report.rows.append(step_share(options))
    report.finish(Console(), options.json)


def whole_view(report: Report, images: Tensor, labels: Tensor, options: argparse.Namespace) -> list[Row]:
    """Compare crop, flip, AutoAugment, CutMix and normalisation together."""
    views = Views(images, labels, training.recipe().views["default"])
    contenders: dict[str, Callable[[], object]] = {"ours": whole_epochs(views, options.batch_size)}
    contenders |= view_peers.loader_epochs(images, labels, options.batch_size, options.device)
    batches: dict[str, Callable[[Tensor, Tensor], object]] = {
        "transforms.v2 on whole batches, one draw for all": view_peers.v2_on_batches()
    }
    if report.has("kornia"):
        from benchmarks import kornia_peer

        batches[kornia_peer.NAME] = kornia_peer.whole_view(options.device)
    for name, transform in batches.items():
        contenders[name] = view_peers.BatchEpoch(images, labels, options.batch_size, transform)
    seconds = interleave(contenders, rounds=options.rounds, device=options.device)
    rates = {name: len(images) / values for name, values in seconds.items()}
    ours = rates.pop("ours")
    fair = options.device.type != "cpu" or torch.get_num_threads() == view_peers.NUM_WORKERS
    return [
        compare(
            "whole cifar view",
            ours,
            peer,
            name,
            unit="images/s",
            higher_is_better=True,
            goal=GOAL if fair and name == f"torchvision PIL, DataLoader {view_peers.NUM_WORKERS} workers" else None,
        )
        for name, peer in rates.items()
    ]


def whole_epochs(views: Views, batch_size: int, *, normalized: bool = True) -> Callable[[], None]:
    """Return what makes the next view at every call, drawing included."""
    numbers = itertools.count()
    order = epoch_order(0, 0, views.num_samples)
    return lambda: ours_epoch(views, next(numbers), order, batch_size, normalized=normalized)


class Single(NamedTuple):
    """One operation of AutoAugment where the policy has it: sub-policy, place in it, magnitude bin."""

    row: int
    place: int
    magnitude_bin: int | None

    def draws(self, num_images: int) -> NDArray[np.float64]:
        """Return draws `(N, 5)` that choose this operation and no other, half of them negative."""
        uniform = np.full((num_images, POLICIES["cifar10"].num_draws), np.nextafter(1.0, 0.0))
        uniform[:, 0] = (self.row + 0.5) / len(CIFAR10_POLICY)
        uniform[:, 1 + self.place] = 0.0
        uniform[::2, 3:] = 0.0
        return uniform


def policy_operations() -> dict[str, Single]:
    """Map each operation of the policy to its first place there with a probability above 0."""
    first_uses: dict[str, Single] = {}
    for row, sub_policy in enumerate(CIFAR10_POLICY):
        for place, (name, probability, magnitude_bin) in enumerate(sub_policy):
            if probability > 0:
                first_uses.setdefault(name, Single(row, place, magnitude_bin))
    return first_uses


def single_operations(report: Report, images: Tensor, labels: Tensor, options: argparse.Namespace) -> list[Row]:
    """Compare each operation alone, one core each; ours on the GPU where that is the device."""
    pictures, batch_size = view_peers.to_pil(images), options.batch_size
    normalize_pil = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    cutmix = v2.CutMix(alpha=view_peers.CUTMIX_ALPHA, num_classes=NUM_CLASSES)
    ours: dict[str, Callable[[], object]] = {
        name: whole_epochs(Views(images, labels, recipe), batch_size, normalized=False)
        for name, recipe in SINGLE.items()
    }
    ours["normalise"] = view_peers.in_batches(lambda part, _: normalize(part, MEAN, STD), images, labels, batch_size)
    peers: dict[str, tuple[str, Callable[[], object]]] = {
        "crop": (ON_ONE_CORE, view_peers.each(transforms.RandomCrop(SIZE, padding=view_peers.PADDING), pictures)),
        "flip": (ON_ONE_CORE, view_peers.each(transforms.RandomHorizontalFlip(), pictures)),
        "AutoAugment": (ON_ONE_CORE, view_peers.each(transforms.AutoAugment(view_peers.POLICY), pictures)),
        "RandAugment": (ON_ONE_CORE, view_peers.each(transforms.RandAugment(), pictures)),
        "TrivialAugment": (ON_ONE_CORE, view_peers.each(transforms.TrivialAugmentWide(), pictures)),
        "CutMix": (IN_BATCHES, view_peers.in_batches(cutmix, images, labels, batch_size)),
        "normalise": (ON_ONE_CORE, view_peers.each(normalize_pil, pictures)),
    }
    singles = policy_operations()
    for name, single in singles.items():
        ours[name] = _ours_single(single, images, batch_size)
        value = operations.magnitude(POLICIES["cifar10"].space, name, single.magnitude_bin or 0, SIZE, SIZE)
        peers[name] = ON_ONE_CORE, view_peers.each_with_magnitude(name, pictures, [value] * len(pictures))
    in_kornia: dict[str, Callable[[Tensor, Tensor], object]] = {}
    if report.has("kornia"):
        from benchmarks import kornia_peer

        bins = {name: single.magnitude_bin for name, single in singles.items()}
        in_kornia = kornia_peer.single_operations(bins, options.device)
    floats = images.float().div_(255)
    rows = []
    for name, (peer_name, peer) in peers.items():
        contenders = {"ours": ours[name], peer_name: peer}
        if name in in_kornia:
            contenders[kornia_peer.NAME] = view_peers.in_batches(in_kornia[name], floats, labels, batch_size)
        rows += _operation_rows(name, contenders, len(images), options)
    return rows


def _operation_rows(
    name: str, contenders: dict[str, Callable[[], object]], num_images: int, options: argparse.Namespace
) -> list[Row]:
    seconds = interleave(contenders, rounds=options.rounds, device=options.device)
    rates = {contender: num_images / values for contender, values in seconds.items()}
    ours = rates.pop("ours")
    return [
        compare(name, ours, peer, peer_name, unit="images/s", higher_is_better=True, threads=1)
        for peer_name, peer in rates.items()
    ]


def _ours_single(single: Single, images: Tensor, batch_size: int) -> Callable[[], None]:
    uniform = single.draws(len(images))

    def run() -> None:
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            operations.apply(images[part], POLICIES["cifar10"].choose(uniform[part], SIZE, SIZE))

    return run


def step_share(options: argparse.Namespace) -> Row:
    """Compare making a batch of views with a whole training step of TITN, which makes it too."""
    num_steps = 2 if options.quick else 10
    num_images = num_steps * options.step_batch
    images, labels = (values.to(options.device) for values in images_and_labels(num_images))
    views = Views(images, labels, training.recipe().views["default"])
    with tempfile.TemporaryDirectory() as directory:
        cache = training.seal_random_labels(Path(directory) / "labels.h5", num_views=2, num_samples=num_images)
    fit = training.make_fit(
        "titn",
        views,
        cached_labels(cache, options.device),
        num_views=cache.num_views,
        batch_size=options.step_batch,
        depth=options.depth,
    )
    contenders: dict[str, Callable[[], object]] = {
        "views": whole_epochs(views, options.step_batch),
        "steps": lambda: training.train_epoch(fit),
    }
    seconds = interleave(contenders, rounds=options.rounds, device=options.device)
    share = 100 * seconds["views"] / seconds["steps"]
    return Row(
        what="views, share of a TITN training step",
        ours=float(np.median(share)),
        peer=100.0,
        peer_name=f"whole step, batch {options.step_batch}, {fit.execution.precision}",
        unit="%",
        ratio=STEP_SHARE / float(np.median(share)),
        goal=1.0,
        spread={"ours": quartiles(share)},
        details={
            "views_ms": 1000 * float(np.median(seconds["views"])) / num_steps,
            "step_ms": 1000 * float(np.median(seconds["steps"])) / num_steps,
        },
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one CPU thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
