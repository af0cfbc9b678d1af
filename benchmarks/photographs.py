"""Views of photographs, from the bytes of JPEG files to batches: `python -m benchmarks.photographs`."""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import itertools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from benchmarks.measure import Report, Row, begin, compare, option_parser, positive
from benchmarks.synthetic import NUM_CLASSES
from benchmarks.view_peers import CUTMIX_ALPHA, NUM_WORKERS, Collate, LoaderEpoch, Samples
from benchmarks.views import one_thread
from pipeline.config.recipes import ViewRecipe
from pipeline.data.arrays import StoredFile
from pipeline.data.collecting import Collector
from pipeline.data.decoding import decode, decoders
from pipeline.data.encoded import EncodedImages, Index
from pipeline.data.streaming import HostImages
from pipeline.inference.speed import interleave
from pipeline.system.neighbours import usable_cores
from pipeline.system.runtime import keep_freed_memory
from pipeline.training.batches import epoch_order
from pipeline.views.views import Views

PHOTOGRAPH = (500, 375)  # width and height, ImageNet's most frequent
QUALITY = 90
NOISE = 15  # levels to either side; makes files of about 76 KB
NUM_DISTINCT = 256
COLLECTED = 4  # times the photographs of an epoch
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
GOAL, MIXING_GOAL, BARE_GOAL, COLLECTING_GOAL = 1.2, 1.1, 0.85, 0.9
# Without timm's noise of 0.5: a magnitude of 10 then asks for 0 bits of colour, which Pillow 13 refuses.
TIMM_CONFIG = "rand-m9-inc1"
OURS, OURS_LIKE_TIMM = "ours", "ours, RandAugment like timm's"
BARE = "decode and resize alone, on the same threads"

Box = tuple[int, int, int, int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, threads=NUM_WORKERS)
    parser.add_argument("--images", type=positive, help="photographs of an epoch; default: 1024, 64 with --quick")
    parser.add_argument("--batch-size", type=positive, help="default: 128, 16 with --quick")
    parser.add_argument("--side", type=positive, help="of the views, pixels; default: 224, 32 with --quick")
    options = parser.parse_args(arguments)
    report = begin("Photographs", options, images=(64, 1024, 1024), batch_size=(16, 128, 128), side=(32, 224, 224))
    report.environment["versions"] |= {"pillow": PIL.__version__, **decoders()}
    if options.device.type == "cpu":
        keep_freed_memory()  # as training does
    contents = [photograph(seed) for seed in range(min(options.images, NUM_DISTINCT))]
    report.environment["bytes_per_file"] = round(sum(map(len, contents)) / len(contents))
    contents = list(itertools.islice(itertools.cycle(contents), options.images))
    with tempfile.TemporaryDirectory() as folder:
        for mixing in (False, True):
            report.rows += whole_view(report, contents, options, Path(folder), mixing=mixing)
        report.rows.append(collecting(contents, options, Path(folder)))
    report.rows.append(decoding_alone(contents[: 16 if options.quick else NUM_DISTINCT], options))
    report.finish(Console(), options.json)


def photograph(seed: int) -> bytes:
    """Write a JPEG of PHOTOGRAPH's size with coarse and fine structures and noise, as large as ImageNet's."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((*PHOTOGRAPH[::-1], 3))
    for cells, weight in ((4, 0.5), (16, 0.25), (64, 0.15)):
        few = rng.integers(0, 256, (cells * 3 // 4, cells, 3), np.uint8)
        pixels += weight * np.asarray(Image.fromarray(few).resize(PHOTOGRAPH, Image.Resampling.BICUBIC))
    pixels += rng.integers(-NOISE, NOISE + 1, pixels.shape[:2])[..., None]
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def random_box() -> Box:
    """Draw a box as torchvision does."""
    image = torch.empty(1, *PHOTOGRAPH[::-1])
    top, left, height, width = transforms.RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
    return left, top, left + width, top + height


def host_images(contents: Sequence[bytes], options: argparse.Namespace, folder: Path) -> HostImages:
    """Return photographs as the views read them: from a file, in the system's cache."""
    ends, path = np.cumsum([len(content) for content in contents]), folder / "files.bin"
    path.write_bytes(b"".join(contents))
    index = Index(
        offsets=np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1),
        sizes=np.tile(np.array(PHOTOGRAPH, np.int32), (len(contents), 1)),
        sha256=np.stack([np.frombuffer(hashlib.sha256(content).digest(), np.uint8) for content in contents]),
        names=np.array([f"{row}.jpg".encode() for row in range(len(contents))]),
    )
    file = StoredFile.opened(path, path.stat().st_size)
    return HostImages(EncodedImages(file, path, index, image_size=options.side), options.device)


def recipe(*, mixing: bool, like_timm: bool = False) -> ViewRecipe:
    """Return the recipe of a photograph's view, with RandAugment as torchvision or as timm has it."""
    fields: dict[str, Any] = {"flip": True, "autoaugment": "randaugment"}
    fields |= {"magnitudes": "timm", "probability": 0.5} if like_timm else {}
    fields["resized_crop"] = {"scale": list(SCALE), "ratio": list(RATIO)}
    fields |= {"mixing": "cutmix", "partner": "paired"} if mixing else {}
    return ViewRecipe(count=1, **fields)


def epochs_of(views: Views, batch_size: int) -> Callable[[], None]:
    """Return what makes the next view at every call, drawing included."""
    numbers = itertools.count()

    def epoch() -> None:
        view = next(numbers)
        order = epoch_order(0, view, views.num_samples, paired=views.pairs(view))
        for _ in views.batches(view, list(torch.split(order, batch_size))):
            pass

    return epoch


def whole_view(
    report: Report, contents: Sequence[bytes], options: argparse.Namespace, folder: Path, *, mixing: bool
) -> list[Row]:
    """Compare decoding, resized crop, flip, RandAugment and perhaps CutMix together: uint8 batches on the device."""
    labels, images = torch.arange(len(contents)) % NUM_CLASSES, host_images(contents, options, folder)
    contenders: dict[str, Callable[[], object]] = {
        name: epochs_of(Views(images, labels, recipe(mixing=mixing, like_timm=name != OURS)), options.batch_size)
        for name in (OURS, OURS_LIKE_TIMM)
    }
    contenders |= loader_epochs(report, contents, labels, options, mixing=mixing)
    if not mixing:
        contenders[BARE] = bare(contents, options.side)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torchvision's decoder is to go
        seconds = interleave(contenders, rounds=options.rounds, device=options.device)
    rates = {name: len(contents) / values for name, values in seconds.items()}
    what = f"photograph's view of {options.side}x{options.side}"
    mine, like_timm = rates.pop(OURS), rates.pop(OURS_LIKE_TIMM)
    goals = {name: MIXING_GOAL if mixing else BARE_GOAL if name == BARE else GOAL for name in rates}
    fair = options.device.type != "cpu" or torch.get_num_threads() == NUM_WORKERS
    return [
        compare(
            f"{what}, CutMix" if mixing else what, like_timm if name.startswith("timm") else mine, rate, name,
            unit="images/s", higher_is_better=True, goal=goals[name] if fair else None,
        )
        for name, rate in rates.items()
    ]  # fmt: skip


def bare(contents: Sequence[bytes], side: int) -> Callable[[], None]:
    """Return what decodes, cuts and resizes with Pillow and does nothing else."""
    pool, boxes = ThreadPoolExecutor(torch.get_num_threads()), [random_box() for _ in contents]

    def make(content: bytes, box: Box) -> NDArray[np.uint8]:
        image = Image.open(io.BytesIO(content))
        return np.asarray(image.crop(box).resize((side, side), Image.Resampling.BILINEAR))

    def epoch() -> None:
        for _ in pool.map(make, contents, boxes):
            pass

    return epoch


def to_picture(content: bytes) -> Image.Image:
    """Decode by Pillow, as torchvision's and timm's data sets do."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def to_tensor(content: bytes) -> Tensor:
    """Decode by torchvision, `(3, H, W)` uint8."""
    image: Tensor = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    return image


class Files(Dataset[tuple[Any, int]]):
    """JPEG files and labels; `transform` is timm's to set."""

    def __init__(self, contents: Sequence[bytes], labels: Tensor) -> None:
        self.contents, self.labels, self.transform = contents, labels.tolist(), None

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = to_picture(self.contents[index])
        return (image if self.transform is None else self.transform(image)), self.labels[index]


def loader_epochs(
    report: Report, contents: Sequence[bytes], labels: Tensor, options: argparse.Namespace, *, mixing: bool
) -> dict[str, Callable[[], object]]:
    """Return a DataLoader's epochs: torchvision on PIL images, on tensors, and timm's own loader."""
    crop = functools.partial(v2.RandomResizedCrop, options.side, scale=SCALE, ratio=RATIO, antialias=True)
    operations = [crop(), v2.RandomHorizontalFlip(), v2.RandAugment()]
    collate = Collate(normalized=True) if mixing else default_collate  # samples stay uint8
    kinds: dict[str, list[Any]] = {
        "torchvision v2 on PIL": [to_picture, *operations, v2.PILToTensor()],
        "torchvision v2 on tensors": [to_tensor, *operations],
    }
    epochs: dict[str, Callable[[], object]] = {
        f"{name}, DataLoader {NUM_WORKERS} workers": LoaderEpoch(
            Samples(contents, labels, transforms.Compose(steps)), collate, options.batch_size, options.device
        )
        for name, steps in kinds.items()
    }
    if report.has("timm"):
        epochs[f"timm {TIMM_CONFIG}, {NUM_WORKERS} workers"] = timm_epoch(contents, labels, options, mixing=mixing)
    return epochs


def timm_epoch(
    contents: Sequence[bytes], labels: Tensor, options: argparse.Namespace, *, mixing: bool
) -> Callable[[], None]:
    """Return an epoch of timm's loader with its RandAugment; its batches are taken before it normalises them."""
    from timm.data import FastCollateMixup, create_loader

    mixup = FastCollateMixup(mixup_alpha=0.0, cutmix_alpha=CUTMIX_ALPHA, label_smoothing=0.0, num_classes=NUM_CLASSES)
    loader = create_loader(
        Files(contents, labels), (3, options.side, options.side), options.batch_size, is_training=True,
        color_jitter=0.0, auto_augment=TIMM_CONFIG, interpolation="bilinear", num_workers=NUM_WORKERS,
        device=options.device, persistent_workers=True, collate_fn=mixup if mixing else None,
    )  # fmt: skip

    def epoch() -> None:
        for images, _ in loader.loader:
            images.to(options.device)

    return epoch


def collecting(contents: Sequence[bytes], options: argparse.Namespace, folder: Path) -> Row:
    """Compare what `prepare` does with files of an encoded store with a thread pool that reads and decodes them."""
    contents = list(contents) * COLLECTED  # waiting for the disk at the end is no work, and a folder has thousands
    paths, numbers = [folder / f"{number}.jpg" for number in range(len(contents))], itertools.count()
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    pool = ThreadPoolExecutor(usable_cores())

    def ours() -> None:
        place = folder / f"collected-{next(numbers)}"  # removed with the folder, which takes time
        with Collector(place, image_size=options.side, resize="squeeze", max_side=0) as collector:
            collector.collect({"train": paths}, folder)

    def peer() -> None:
        for _ in pool.map(lambda path: to_picture(path.read_bytes()), paths):
            pass

    seconds = interleave({"ours": ours, "peer": peer}, rounds=options.rounds, device=options.device)
    rates = {name: len(contents) / values for name, values in seconds.items()}
    what, name = "JPEG files collected by prepare", "read and decoded by Pillow in a thread pool"
    return compare(
        what, rates["ours"], rates["peer"], name, unit="files/s", higher_is_better=True, goal=COLLECTING_GOAL
    )


def decoding_alone(contents: Sequence[bytes], options: argparse.Namespace) -> Row:
    """Compare the decoder, Pillow with our checks, with torchvision's, on one core."""
    contenders: dict[str, Callable[[], object]] = {
        OURS: lambda: [decode(content) for content in contents],
        "torchvision.io": lambda: [to_tensor(content) for content in contents],
    }
    with one_thread(), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        seconds = interleave(contenders, rounds=options.rounds, device=options.device)
    ours, peer = (len(contents) / seconds[name] for name in contenders)
    what = f"JPEG of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]} decoded, one core"
    return compare(what, ours, peer, "torchvision.io", unit="images/s", higher_is_better=True)


if __name__ == "__main__":
    main()
