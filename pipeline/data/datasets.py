"""Data sets: uint8 images, labels, class names and splits, held in memory or in the files that they are read from.

The SHA-256 of a data set is of its content, not of its files; label caches and checkpoints refer to it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.recipes import RESIZES, SQUEEZE, DatasetRecipe
from pipeline.data.arrays import Images, chunks, select
from pipeline.data.encoded import FIXED_POINT, EncodedImages
from pipeline.data.file import Channels as Channels
from pipeline.data.file import Content, damaged_array, encoding, read_content, write_content
from pipeline.data.listing import by_one_form
from pipeline.errors import DataError
from pipeline.system.text import counted

# In the SHA-256 of pixels and in that of files, however they are stored.
PIXELS_SCHEMA, FILES_SCHEMA = "titn-dataset/1", "titn-dataset/2"


@dataclass(frozen=True, eq=False)
class Split:
    """One split.

    Attributes:
        images: `(N, H, W, 3)` uint8 RGB; an array, or images read from a file on demand.
        labels: `(N,)` int64, each in [0, K).
        paths: `(N,)` UTF-8, each image's path relative to the folder or CSV file it comes from, as
            `pipeline.errors.printable` writes it; None where images come from elsewhere.
    """

    images: Images
    labels: NDArray[np.int64]
    paths: NDArray[np.bytes_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Split:
        """Return the samples at `indices`, an `(n,)` int64 array, in its order."""
        paths = None if self.paths is None else self.paths[indices]
        return Split(select(self.images, indices), self.labels[indices], paths)

    @property
    def names(self) -> list[str] | None:
        """The paths as text, or None."""
        return None if self.paths is None else [path.decode() for path in self.paths.tolist()]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images, labels, class names and splits; made by `assemble` or `Dataset.load`.

    Attributes:
        source: Where the images come from, one of pipeline.config.recipes.SOURCES.
        class_names: K names; a label is an index into them.
        train: The training split.
        val: The validation split, the source's own or cut off train, or None.
        test: The test split.
        sha256: SHA-256, hexadecimal, of class names, splits, shapes, pixels and labels. It depends neither on
            `source` nor on paths nor on how the data set is stored. Of encoded images, files stand for shapes and
            pixels: it does not depend on the size and the rule under which these are shown.
        recorded: Mean and standard deviation as they were recorded with encoded images, else None.
        resize: How its images became squares, and those must that are asked about later; see DatasetRecipe.
    """

    source: str
    class_names: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split
    sha256: str
    recorded: tuple[Channels, Channels] | None = None
    resize: str = SQUEEZE

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """The side of the square images, pixels."""
        return int(self.train.images.shape[1])

    @property
    def rendition(self) -> dict[str, Any] | None:
        """What makes the files of an encoded store pixels, as JSON values; None where pixels are stored."""
        if not isinstance(self.train.images, EncodedImages):
            return None
        return {"image_size": self.image_size, "resize": self.resize}

    @property
    def splits(self) -> dict[str, Split]:
        """The splits there are, by name."""
        return _splits(self.train, self.val, self.test)

    @property
    def evaluation(self) -> tuple[str, Split]:
        """The name and the split that models are compared on: `val` where there is one, else `test`."""
        return ("test", self.test) if self.val is None else ("val", self.val)

    @property
    def mean(self) -> Channels:
        """The mean of each channel of train, in [0, 1], over all pixels; of encoded images, over a few of each."""
        return self._statistics[0]

    @property
    def std(self) -> Channels:
        """The standard deviation of each channel of train, in [0, 1], over the same pixels; 1 where it is zero."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[Channels, Channels]:
        """Mean and standard deviation by channel, from sums of integers: exact in any order of addition."""
        images = self.train.images
        if self.recorded is not None:
            return self.recorded
        if isinstance(images, EncodedImages):
            assert images.index.moments is not None, "encoded images come with one of the two"
            count = len(images) << FIXED_POINT
            totals, squares = images.index.moments.sum(axis=0).reshape(2, 3).tolist()
        else:
            sums = np.zeros((2, 3), np.int64)
            for chunk in chunks(images):
                pixels = chunk.astype(np.uint16)  # holds 255 squared
                # Summing over samples first keeps NumPy's inner loop long: eight times as fast as all at once.
                for row, values in zip(sums, (pixels, pixels * pixels), strict=True):
                    row += values.sum(axis=0, dtype=np.int64).sum(axis=(0, 1))
            count, (totals, squares) = images.nbytes // 3, sums.tolist()
        red, green, blue = (
            (total / (count * 255), math.sqrt(max(count * square - total**2, 0)) / (count * 255) or 1.0)
            for total, square in zip(totals, squares, strict=True)
        )
        return (red[0], green[0], blue[0]), (red[1], green[1], blue[1])

    def shown(self, image_size: int, resize: str) -> Dataset:
        """Return an encoded data set of the same files that gives images of another size, or under another rule."""
        splits = self.splits
        for name, split in splits.items():
            assert isinstance(split.images, EncodedImages), "pixels have one size"
            splits[name] = replace(split, images=split.images.shown(image_size, resize))
        return replace(self, train=splits["train"], val=splits.get("val"), test=splits["test"], resize=resize)

    def save(self, path: Path, *, may_move: bool = False) -> None:
        """Write the data set as `path`, a dataset.json, and what belongs beside it; equal data sets give equal bytes.

        Args:
            path: The file dataset.json; missing folders above it are made.
            may_move: Whether the file of encoded images is nobody else's, see `write_together`.

        Raises:
            StorageError: A file cannot be written.
        """
        splits = {name: (split.images, split.labels, split.paths) for name, split in self.splits.items()}
        statistics = self._statistics if isinstance(self.train.images, EncodedImages) else None
        content = Content(self.source, self.class_names, splits, self.sha256, statistics, self.resize)
        write_content(path, content, may_move=may_move)

    @classmethod
    def from_arrays(
        cls,
        images: NDArray[np.uint8],
        labels: NDArray[np.integer[Any]],
        class_names: Sequence[str] | Sequence[int],
        *,
        test: tuple[NDArray[np.uint8], NDArray[np.integer[Any]]] | None = None,
        val_fraction: float = 0.0,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        resize: str = SQUEEZE,
    ) -> Dataset:
        """Make a data set from arrays, as in a notebook.

        Args:
            images: `(N, S, S, 3)` uint8 RGB, N and S at least 1.
            labels: `(N,)` integers in [0, K).
            class_names: K names that differ; whole numbers are written out.
            test: Images and labels of the test split; None cuts `test_fraction` off.
            val_fraction: See `DatasetRecipe`.
            test_fraction: See `DatasetRecipe`.
            split_seed: See `DatasetRecipe`.
            resize: How the images became squares, and those must that are asked about later; see `DatasetRecipe`.

        Raises:
            DataError: An argument is not as above, or there are too few samples to split.
        """
        if resize not in RESIZES:
            raise DataError(f"resize: {resize!r}; choose from {', '.join(RESIZES)}")
        recipe = DatasetRecipe(
            source="folder", val_fraction=val_fraction, test_fraction=test_fraction, split_seed=split_seed,
            resize=resize,
        )  # fmt: skip
        names = _checked_names(class_names)
        train, held_out = _checked(images, labels, len(names)), None
        if test is not None:
            held_out = _checked(*test, len(names))
            if held_out.images.shape[1:] != train.images.shape[1:]:
                raise DataError(f"test images are of shape {held_out.images.shape}, the others {train.images.shape}")
        return assemble("folder", names, train, held_out, recipe)

    @classmethod
    def load(cls, path: Path, max_bytes: int | None = None) -> Dataset:
        """Read a data set that `save` wrote, and verify its SHA-256; encoded images are verified as they are read.

        Args:
            path: Its dataset.json.
            max_bytes: Larger images stay in their files, and are read on demand; None reads any number. Labels are
                always read, encoded images never.

        Raises:
            DataError: There is no such file, it is not a data set, or its content has another SHA-256.
            StorageError: A file cannot be read.
        """
        content = read_content(path, max_bytes)
        splits = {name: Split(*arrays) for name, arrays in content.splits.items()}
        dataset = _make(
            content.source, content.class_names, splits["train"], splits.get("val"), splits["test"],
            content.resize, content.statistics,
        )  # fmt: skip
        if dataset.sha256 != content.sha256:
            raise DataError(
                f"{damaged_array(path)}: damaged: the SHA-256 of the data set is {dataset.sha256}, not "
                f"{content.sha256} as recorded; run `pipeline prepare` again"
            )
        return dataset


def _checked_names(class_names: Iterable[object]) -> tuple[str, ...]:
    """Return a user's class names as texts, after checking them."""
    if isinstance(class_names, str) or not isinstance(class_names, Iterable):
        raise DataError(f"class names are {class_names!r}; give a list with a text for each class")
    names: list[str] = []
    for name in class_names:
        is_number = isinstance(name, int | np.integer) and not isinstance(name, bool)
        if not (is_number or (isinstance(name, str) and name.strip())):
            raise DataError(f"class name {len(names)} is {name!r}; give a text that is not empty, or a whole number")
        names.append(str(name))
    if len(by_one_form(names, "class names")) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(f"class names have {repeated!r} more than once; give each class a name of its own")
    return tuple(names)


def _checked(images: NDArray[np.uint8], labels: NDArray[np.integer[Any]], num_classes: int) -> Split:
    """Make a split from a user's arrays, after checking them."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise DataError(f"images are {images.dtype} of shape {images.shape}; give uint8 RGB, (N, S, S, 3)")
    if not images.size:
        raise DataError(f"images are of shape {images.shape}; give at least one, of at least one pixel")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels are {labels.dtype} of shape {labels.shape}; give {len(images)} integers")
    if not (0 <= labels.min() and labels.max() < num_classes):
        raise DataError(f"labels go from {labels.min()} to {labels.max()}; there are {num_classes} class names")
    return Split(images, labels.astype(np.int64))


def stratified_split(
    labels: NDArray[np.int64], fraction: float, seed: int, class_names: tuple[str, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut off a share of the samples, the same share of each class.

    The cut has ceil(fraction N) samples, distributed over the classes by largest remainder; then each class gets at
    least one sample on either side. Which samples of a class are cut depends only on the seed and their indices,
    through SHA-256, so that no version of a library can change a split.

    Args:
        labels: `(N,)` int64.
        fraction: The share to cut, in (0, 1).
        seed: Another seed cuts other samples.
        class_names: K names, for messages.

    Returns:
        The indices that stay and those that are cut, `(n,)` int64 each, ascending.

    Raises:
        DataError: A class has a single sample.

    Source: largest remainder and the rounding up as in scikit-learn's `StratifiedShuffleSplit`.
    Differs: scikit-learn draws from NumPy's generator, and can leave a small class out of one side.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    _require_samples(counts, 2, class_names)
    num_cut = math.ceil(round(fraction * len(labels), 6))
    shares = counts * num_cut / max(len(labels), 1)
    cuts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(cuts - shares, kind="stable")
    cuts[by_remainder[: num_cut - cuts.sum()]] += 1
    cuts = np.clip(cuts, np.minimum(counts, 1), np.maximum(counts - 1, 0))
    cut: list[int] = []
    for label in range(len(class_names)):
        members = np.flatnonzero(labels == label).tolist()
        members.sort(key=lambda index: hashlib.sha256(f"{seed}/{index}".encode()).digest())
        cut += members[: cuts[label]]
    is_cut = np.zeros(len(labels), bool)
    is_cut[cut] = True
    return np.flatnonzero(~is_cut), np.flatnonzero(is_cut)


def _require_samples(counts: NDArray[np.int64], needed: int, class_names: tuple[str, ...]) -> None:
    """Check that each class that has samples has one for each of the splits that they are for."""
    for name, count in zip(class_names, counts.tolist(), strict=True):
        if 0 < count < needed:
            raise DataError(
                f"class {name!r} has {counted(count, 'sample')}, and is to be in {needed} splits; add samples, or give "
                "a test set and set dataset.val_fraction to 0"
            )


def assemble(
    source: str,
    class_names: tuple[str, ...],
    train: Split,
    test: Split | None,
    recipe: DatasetRecipe,
    *,
    val: Split | None = None,
) -> Dataset:
    """Make a data set, cutting the splits that the source lacks and the recipe asks for.

    Args:
        source: One of pipeline.config.recipes.SOURCES.
        class_names: K names.
        train: The source's training samples.
        test: Its test samples; None cuts `recipe.test_fraction` off train.
        recipe: Gives the fractions, of which `val_fraction` is cut off the rest of train, and `resize`, the rule under
            which the images are squares.
        val: The source's validation samples; `recipe.val_fraction` is not applied then.

    Raises:
        DataError: There are fewer than two classes, or too few samples to split.
    """
    require_classes(source, class_names)
    needed = 1 + (test is None) + (val is None and recipe.val_fraction > 0)
    _require_samples(np.bincount(train.labels, minlength=len(class_names)), needed, class_names)
    if test is None:
        rest, cut = stratified_split(train.labels, recipe.test_fraction, recipe.split_seed, class_names)
        train, test = train.take(rest), train.take(cut)
    if val is None and recipe.val_fraction > 0:
        rest, cut = stratified_split(train.labels, recipe.val_fraction, recipe.split_seed, class_names)
        train, val = train.take(rest), train.take(cut)
    return _make(source, class_names, train, val, test, recipe.resize)


def require_classes(source: str, class_names: Sequence[str]) -> None:
    """Check that there is something to classify.

    Raises:
        DataError: There are fewer than two classes.
    """
    if len(class_names) < 2:
        raise DataError(f"{source}: {len(class_names)} class, a classifier needs two: add another")


def _make(
    source: str,
    class_names: tuple[str, ...],
    train: Split,
    val: Split | None,
    test: Split,
    resize: str,
    recorded: tuple[Channels, Channels] | None = None,
) -> Dataset:
    """Make a data set with the SHA-256 of its content."""
    sha256 = _content_sha256(class_names, _splits(train, val, test))
    return Dataset(source, class_names, train, val, test, sha256, recorded, resize)


def _splits(train: Split, val: Split | None, test: Split) -> dict[str, Split]:
    """The splits there are, by name, in the order in which they are stored and digested."""
    return {"train": train, "test": test} if val is None else {"train": train, "val": val, "test": test}


def _content_sha256(class_names: tuple[str, ...], splits: dict[str, Split]) -> str:
    """SHA-256 of a JSON header, then of pixels (of files, of their SHA-256) and labels, in the order of `splits`."""
    first = splits["train"].images
    if isinstance(first, EncodedImages):
        header: dict[str, Any] = {
            "schema": FILES_SCHEMA,
            "splits": [[name, len(split)] for name, split in splits.items()],
            **encoding(first),
        }
    else:
        header = {"schema": PIXELS_SCHEMA, "splits": [[name, split.images.shape] for name, split in splits.items()]}
    header["class_names"] = class_names
    digest = hashlib.sha256(json.dumps(header, separators=(",", ":"), sort_keys=True).encode())
    for split in splits.values():
        images = split.images
        for part in [images.index.sha256] if isinstance(images, EncodedImages) else chunks(images):
            digest.update(np.ascontiguousarray(part).data)
        digest.update(np.ascontiguousarray(split.labels, "<i8").data)
    return digest.hexdigest()
