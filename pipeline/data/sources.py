"""Where images come from: the bundled digits, torchvision's MNIST and CIFAR, or a user's image folder."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.recipes import ENCODED, PIXELS, SQUEEZE, Recipe
from pipeline.data.arrays import Spill
from pipeline.data.collecting import Collector
from pipeline.data.datasets import Dataset, Split, assemble, require_classes
from pipeline.data.decoding import fit, in_rgb
from pipeline.data.folders import Findings, read_folder, require_images
from pipeline.data.images import refusal
from pipeline.data.listing import Listing
from pipeline.errors import DataError, StorageError, UsageError, printable
from pipeline.system.storage import lock, remove_leftovers, sha256_file, write_atomic

UNPACK_ATTEMPTS = 600  # half a minute
TORCHVISION_CLASSES = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
# Of the unpacked files. torchvision only has checksums of the archives; it would neither accept nor replace a file
# whose unpacking was interrupted.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# Their downloads: the archive or archives, and what is unpacked from them.
ARCHIVES = {
    "mnist": [f"{name}.gz" for name in MNIST_SHA256],
    "cifar10": ["cifar-10-python.tar.gz"],
    "cifar100": ["cifar-100-python.tar.gz"],
}
UNPACKED = {"mnist": list(MNIST_SHA256), "cifar10": ["cifar-10-batches-py"], "cifar100": ["cifar-100-python"]}
# Numbers of training images, test images and classes of the sources that never change.
KNOWN_SIZES = {
    "digits": (1797, 0, 10),
    "mnist": (60000, 10000, 10),
    "cifar10": (50000, 10000, 10),
    "cifar100": (50000, 10000, 100),
}
# Their classes, in the order of the original files.
DIGITS = tuple("0123456789")
KNOWN_CLASSES = {
    "digits": DIGITS,
    "mnist": DIGITS,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """.split()
    ),
}


def read_source(
    recipe: Recipe,
    *,
    raw: Path,
    folder: Listing | None = None,
    download: bool = False,
    skip_bad: bool = False,
    spill: Spill | None = None,
    collector: Collector | None = None,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Dataset, Findings]:
    """Read what a recipe's `dataset` describes.

    Args:
        recipe: The recipe; `recipe.dataset.source` says what to read.
        raw: Folder of torchvision's downloads.
        folder: The listing of an image folder or CSV file to read instead of the source's own files.
        download: Download missing files to `raw`.
        skip_bad: Leave an image folder's bad files out instead of refusing it.
        spill: Where images go that are too many for RAM; None keeps any number in RAM.
        collector: Collects the files of an encoded store.
        advance: Called after each file of a listing that was read.

    Returns:
        The data set, and what was found.

    Raises:
        UsageError: The source is `folder` and none is given.
        DataError: The files are missing, damaged, or no data set; or the folder is not the source, see `check_known`.
        StorageError: Downloading, reading or writing failed.
    """
    source, image_size, resize = recipe.dataset.source, recipe.dataset.image_size, recipe.dataset.resize
    val: Split | None = None
    test: Split | None
    findings = Findings()
    if folder is not None:
        splits, findings = read_folder(
            folder,
            image_size,
            skip_bad=skip_bad,
            resize=resize,
            spill=spill,
            collector=collector,
            advance=advance,
        )
        counts = {name: len(split) for name, split in splits.items()}
        findings.notes += check_known(source, folder.class_names, counts)
        class_names, train, val, test = folder.class_names, splits["train"], splits.get("val"), splits.get("test")
        if val is not None and recipe.dataset.val_fraction > 0:
            findings.notes.append(
                f"the folder has a validation split: val_fraction {recipe.dataset.val_fraction:g} is not applied"
            )
    elif source == "folder":
        raise _unnamed_folder(recipe)
    elif recipe.dataset.store == ENCODED:
        raise UsageError(_no_files(recipe))
    elif source == "digits":
        class_names, train, test = *_read_digits(image_size, resize), None
    else:
        class_names, train, test = _read_torchvision(recipe, raw, download)
    dataset = assemble(source, class_names, train, test, recipe.dataset, val=val)
    findings.notes += _enlarged(dataset, recipe, test_is_cut=test is None, val_is_cut=val is None)
    return dataset, findings


def _enlarged(dataset: Dataset, recipe: Recipe, *, test_is_cut: bool, val_is_cut: bool) -> list[str]:
    """Say which splits became larger than the recipe asks for, because each class has one image there at least."""
    of_both = len(dataset.train) + (len(dataset.val) if dataset.val is not None and val_is_cut else 0)
    cut: list[tuple[str, Split | None, int, float]] = []
    if test_is_cut:
        cut.append(("test", dataset.test, of_both + len(dataset.test), recipe.dataset.test_fraction))
    if val_is_cut:
        cut.append(("val", dataset.val, of_both, recipe.dataset.val_fraction))
    return [
        f"{name}_fraction {fraction:g}: {len(split)} of {whole} images, since each class has one there at least"
        for name, split, whole, fraction in cut
        if split is not None and len(split) > math.ceil(round(fraction * whole, 6))
    ]


def check_listing(recipe: Recipe, listing: Listing, *, skip_bad: bool) -> None:
    """Refuse what is seen without reading a file to be no data set, or not the recipe's; see `read_source`.

    Raises:
        DataError: It is not.
    """
    check_known(recipe.dataset.source, listing.class_names, listing.counts)
    if listing.bad and not skip_bad:
        raise refusal(listing.source, listing.bad)
    require_images(listing, {split: {name for name, paths in classes.items() if paths}
                             for split, classes in listing.splits.items()})  # fmt: skip
    require_classes(recipe.dataset.source, listing.class_names)


def check_known(source: str, class_names: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """Check that a folder is what its recipe calls it: class names and numbers of images decide.

    A part of the training images is accepted, with all classes and all test images, because its scores can be compared.

    Args:
        source: One of pipeline.config.recipes.SOURCES; `folder` may be anything.
        class_names: The folder's classes.
        counts: Its numbers of images by split.

    Returns:
        What to say of it: nothing, or one line that it is a part.

    Raises:
        DataError: It is something else.
    """
    if source not in KNOWN_SIZES:
        return []
    train, test, num_classes = KNOWN_SIZES[source]
    given, given_test = counts["train"] + counts.get("val", 0), counts.get("test", 0)
    way_out = "for images of your own take a recipe with dataset: {source: folder}, as `folder` or `folder-small`"
    # torchvision calls MNIST's classes `0 - zero`.
    names = {name.casefold().partition(" - ")[0].replace(" ", "_"): name for name in class_names}
    unknown = [name for plain, name in names.items() if plain not in KNOWN_CLASSES[source]]
    if unknown or len(names) != num_classes:
        what = f"{unknown[0]!r} is none of them" if unknown else f"the folder has {len(names)}"
        raise DataError(f"dataset.source: {source} has {num_classes} classes, {what}; {way_out}")
    if given_test != test or given > train:
        raise DataError(
            f"dataset.source: {source} has {train} training and {test} test images, the folder {given} and "
            f"{given_test}; {way_out}"
        )
    return [] if given == train else [f"a part of {source}: {given} of {train} training images"]


def load_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Read the handwritten digits that come with this package, see digits.txt beside the file.

    Returns:
        Grey levels `(1797, 8, 8)` float64, whole numbers in [0, 16]; labels `(1797,)` int64 in [0, 10).

    Source: https://doi.org/10.24432/C50P49, as in scikit-learn's `load_digits`.
    """
    table = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def _read_digits(image_size: int, resize: str) -> tuple[tuple[str, ...], Split]:
    """Read the digits, their 17 levels of grey scaled to 255."""
    levels, labels = load_digits()
    return DIGITS, Split(_to_rgb(np.rint(levels * (255 / 16)).astype(np.uint8), image_size, resize), labels)


def _read_torchvision(recipe: Recipe, raw: Path, download: bool) -> tuple[tuple[str, ...], Split, Split]:
    """Read MNIST, CIFAR-10 or CIFAR-100 in the order of the original files."""
    import torchvision.datasets  # takes seconds to import

    source, image_size, resize = recipe.dataset.source, recipe.dataset.image_size, recipe.dataset.resize
    source_class = getattr(torchvision.datasets, TORCHVISION_CLASSES[source])
    if source == "mnist":
        _unpack_mnist(raw / "MNIST" / "raw")
        has_archive = False
    else:
        archive = raw / source_class.filename
        has_archive = torchvision.datasets.utils.check_integrity(archive, source_class.tgz_md5)
    try:
        # CIFAR's pickles are so old that NumPy 2.4 warns of them (pytorch/vision issue 9340).
        with warnings.catch_warnings(action="ignore", category=np.exceptions.VisibleDeprecationWarning):
            train, test = (
                source_class(raw, train=is_train, download=download or has_archive) for is_train in (True, False)
            )
    except (OSError, RuntimeError, HTTPException) as error:
        if isinstance(error, RuntimeError) and not download:
            raise DataError(f"{source}: not found in {raw}, or damaged; {_ways(recipe, raw)}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"{source}: cannot be fetched to {raw} ({reason}); {_ways(recipe, raw)}") from error
    return tuple(train.classes), _make_split(train, image_size, resize), _make_split(test, image_size, resize)


def _ways(recipe: Recipe, raw: Path) -> str:
    command = f"`pipeline prepare --recipe {recipe.name} --download`, or `--from FOLDER` for an image folder"
    return f"put {_own_files(recipe.dataset.source, raw)}, or run {command}"


def _own_files(source: str, raw: Path) -> str:
    """Say which files of a source belong where."""
    first, *others = ARCHIVES[source]
    what = f"{first} and the {len(others)} files beside it" if others else first
    return f"{what} in {raw / 'MNIST' / 'raw' if source == 'mnist' else raw}"


def _unnamed_folder(recipe: Recipe) -> UsageError:
    return UsageError(
        f"recipe {recipe.name}: its source is `folder`; say which with "
        f"`pipeline prepare --recipe {recipe.name} --from FOLDER`, or dataset: {{source: folder, path: FOLDER}}"
    )


def _no_files(recipe: Recipe) -> str:
    return (
        f"recipes.{recipe.name}.dataset.store: {ENCODED} keeps image files, and {recipe.dataset.source} comes without; "
        f"name a folder of them with --from, or take store: {PIXELS}"
    )


def check_source(recipe: Recipe, raw: Path) -> None:
    """Check, by the names of files only, that `read_source` needs neither a folder nor a download.

    Args:
        recipe: The recipe.
        raw: Folder of torchvision's downloads.

    Raises:
        UsageError: The source is `folder` without a path, or there is nothing at its path.
        DataError: The files are missing.
    """
    source, path = recipe.dataset.source, recipe.dataset.path
    if path:
        if not Path(path).exists():
            raise UsageError(
                f"recipes.{recipe.name}.dataset.path: {path!r} does not exist; mend it, or name another folder with "
                f"`pipeline prepare --recipe {recipe.name} --from FOLDER`"
            )
        return
    if source == "folder":
        raise _unnamed_folder(recipe)
    if recipe.dataset.store == ENCODED:
        raise UsageError(_no_files(recipe))
    if source not in TORCHVISION_CLASSES:
        return
    import torchvision.datasets  # takes seconds to import

    source_class = getattr(torchvision.datasets, TORCHVISION_CLASSES[source])
    if source == "mnist":
        folder = raw / "MNIST" / "raw"
        is_there = all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in MNIST_SHA256)
    else:
        names = [name for name, _ in [*source_class.train_list, *source_class.test_list]]
        is_unpacked = all((raw / source_class.base_folder / name).is_file() for name in names)
        is_there = is_unpacked or (raw / source_class.filename).is_file()
    if not is_there:
        raise DataError(f"{source}: not found in {raw}; {_ways(recipe, raw)}")


def check_folder(recipe: Recipe, raw: Path, folder: Path) -> None:
    """Refuse a folder that holds the source's own files and no folder of images, and say where they belong.

    Args:
        recipe: The recipe.
        raw: Folder of torchvision's downloads.
        folder: What `--from` names.

    Raises:
        UsageError: It is such a folder, or one of these files.
    """
    source = recipe.dataset.source
    own = {*ARCHIVES.get(source, ()), *UNPACKED.get(source, ())}
    entries: list[os.DirEntry[str]] = []
    with contextlib.suppress(OSError):  # `list_source` says what cannot be listed
        entries += os.scandir(folder)
    has_folders = any(entry.is_dir() and entry.name not in own for entry in entries)
    if not has_folders and not own.isdisjoint([folder.name, *(entry.name for entry in entries)]):
        raise UsageError(
            f"--from {printable(folder)}: these are {source}'s own files, and no image folder; put "
            f"{_own_files(source, raw)}, and leave --from out"
        )


def _unpack_mnist(folder: Path) -> None:
    """Unpack archives that a user put there, whatever their compression, and verify the unpacked files."""
    for name, sha256 in MNIST_SHA256.items():
        archive, unpacked = folder / f"{name}.gz", folder / name
        if unpacked.is_file():
            if sha256_file(unpacked) != sha256:
                raise DataError(f"{unpacked}: damaged, or not MNIST's; delete it and run again with --download")
        elif archive.is_file():
            # Two recipes may want the same files. torchvision downloads an incomplete archive again.
            held = lock(folder.with_name("raw.lock"), attempts=UNPACK_ATTEMPTS)
            with held, contextlib.suppress(OSError, EOFError, zlib.error):
                data = gzip.decompress(archive.read_bytes())
                if hashlib.sha256(data).hexdigest() == sha256:
                    remove_leftovers(unpacked)
                    write_atomic(unpacked, data)


def _make_split(part: Any, image_size: int, resize: str) -> Split:
    """Convert one of torchvision's data sets, which hold tensors, arrays or lists."""
    import torch  # has been imported by torchvision

    images, labels = torch.as_tensor(part.data).numpy(), torch.as_tensor(part.targets).numpy()
    return Split(_to_rgb(images, image_size, resize), labels)


def _to_rgb(images: NDArray[np.uint8], image_size: int, resize: str) -> NDArray[np.uint8]:
    """Convert `(N, H, W)` or `(N, H, W, 3)` uint8 to RGB of the size asked for."""
    if images.shape[1:] == (image_size, image_size, 3) and resize == SQUEEZE:
        return np.ascontiguousarray(images)
    return np.stack([fit(in_rgb(Image.fromarray(image)), image_size, resize) for image in images])
