"""Images that stay in a file: reading, streaming, checking and preparing them: `python -m benchmarks.streaming`."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from benchmarks import training
from benchmarks.measure import Row, begin, compare, option_parser, positive
from benchmarks.synthetic import NUM_CLASSES
from pipeline.data.arrays import StoredImages, chunks
from pipeline.data.decoding import fit, in_rgb
from pipeline.data.streaming import HostImages, place_images
from pipeline.inference.speed import interleave
from pipeline.system.runtime import keep_freed_memory
from pipeline.training.batches import epoch_order
from pipeline.views.views import Views

BATCH_SIZES = {64: 1024, 224: 128}
PHOTOGRAPH = (500, 375)  # width and height, ImageNet's most frequent
QUALITY = 90


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__)
    parser.add_argument("--megabytes", type=positive, help="size of the file; default: 2000, 20 with --quick")
    parser.add_argument("--folder", type=Path, help="where the file is made; default: the temporary folder")
    options = parser.parse_args(arguments)
    report = begin("Images in a file", options, megabytes=(20, 2000, 2000))
    options.folder = options.folder and str(options.folder)
    if options.device.type == "cpu":
        keep_freed_memory()  # as training does
    with tempfile.TemporaryFile(dir=options.folder) as file:
        generator, size = np.random.default_rng(0), options.megabytes * 10**6
        for _ in range(0, size, 10**6):
            file.write(generator.integers(0, 256, 10**6, np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
        for side, batch_size in BATCH_SIZES.items():
            shape = (size // (side * side * 3), side, side, 3)
            report.rows += [
                cold_batches(file.fileno(), shape, batch_size, options),
                whole_view(file.fileno(), shape, batch_size, options),
            ]
        report.rows.append(digest(file.fileno(), shape, options))
    report.rows += [decode(side, options) for side in BATCH_SIZES]
    report.finish(Console(), options.json)


def cold_batches(descriptor: int, shape: tuple[int, ...], batch_size: int, options: argparse.Namespace) -> Row:
    """Read four batches of random images that the system has forgotten."""
    generator = np.random.default_rng(1)
    num_batches = 1 if options.quick else 4

    def read(mapped: Callable[[], StoredImages | np.memmap]) -> Callable[[], None]:
        def batches() -> None:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            images = mapped()
            for _ in range(num_batches):
                images[generator.integers(0, len(images), batch_size)]

        return batches

    def plain() -> np.memmap:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return np.memmap(file, np.uint8, "r", shape=shape)

    contenders = {"ours": read(lambda: StoredImages(descriptor, shape)), "numpy.memmap": read(plain)}
    what = f"random images of {shape[1]}x{shape[1]} read from the disk, batches of {batch_size}"
    return rates(what, contenders, num_batches * batch_size, options)


def whole_view(descriptor: int, shape: tuple[int, ...], batch_size: int, options: argparse.Namespace) -> Row:
    """Make a whole view of images in the system's cache, against one of images on the device."""
    num_images = min(shape[0], 2048 if options.quick else 8192)
    images = StoredImages(descriptor, (num_images, *shape[1:]))
    labels, recipe = torch.arange(num_images) % NUM_CLASSES, training.recipe().views["default"]
    parts = list(torch.split(epoch_order(0, 0, num_images), batch_size))

    def epochs(views: Views) -> Callable[[], None]:
        turn = iter(range(10**6))

        def epoch() -> None:
            for _ in views.batches(next(turn), parts):
                pass

        return epoch

    resident = place_images(images, options.device, images.nbytes)
    contenders = {
        "ours": epochs(Views(HostImages(images, options.device), labels, recipe)),
        "ours, resident": epochs(Views(resident, labels, recipe)),
    }
    what = f"a whole view of {shape[1]}x{shape[1]} streamed from the system's cache, batches of {batch_size}"
    return rates(what, contenders, num_images, options)


def digest(descriptor: int, shape: tuple[int, ...], options: argparse.Namespace) -> Row:
    """Digest the images, as opening a data set does, from the system's cache."""
    images = StoredImages(descriptor, shape)

    def ours() -> None:
        sha256 = hashlib.sha256()
        for chunk in chunks(images):
            sha256.update(chunk.data)

    def alone() -> None:
        hashlib.sha256(images[:].data)

    contenders = {"ours": ours, "hashlib on all of it at once": alone}
    return rates("SHA-256 of images in the system's cache", contenders, images.nbytes / 1e6, options, "MB/s")


def decode(side: int, options: argparse.Namespace) -> Row:
    """Decode and resize a smooth photograph of ImageNet's usual size, on one core."""
    number = 10 if options.quick else 100
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (38, 50, 3), np.uint8))
    photograph = io.BytesIO()
    small.resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(photograph, "JPEG", quality=QUALITY)

    def ours() -> None:
        for _ in range(number):
            fit(in_rgb(Image.open(photograph)), side)

    def alone() -> None:
        for _ in range(number):
            Image.open(photograph).convert("RGB")

    contenders = {"ours": ours, "decoding alone": alone}
    what = f"JPEG of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]} decoded and resized to {side}x{side}, one core"
    return rates(what, contenders, number, options)


def rates(
    what: str,
    contenders: dict[str, Callable[[], None]],
    amount: float,
    options: argparse.Namespace,
    unit: str = "images/s",
) -> Row:
    """Time ours and one peer in turns and compare what they do in a second."""
    seconds = interleave(contenders, rounds=options.rounds, device=options.device)
    ours, (name, peer) = seconds.pop("ours"), seconds.popitem()
    return compare(what, amount / ours, amount / peer, name, unit=unit, higher_is_better=True)


if __name__ == "__main__":
    main()
