"""Images that occur more than once in a data set, found by the SHA-256 of their pixels, or of their files."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.arrays import chunks
from pipeline.data.datasets import Dataset
from pipeline.data.encoded import EncodedImages


@dataclass(frozen=True)
class Copies:
    """How many images are copies of others, as they are stored: pixel by pixel, of encoded ones byte by byte.

    Attributes:
        in_train: For each split but train, the number of its images that train holds too.
        repeated: Images that occurred before in the same split.
        in_two_classes: Different images that occur under two classes or more, in any split.
        examples: For each split of `in_train`, for `repeated` and for `in_two_classes` the paths of the first such
            image and of its like, where there are paths.
    """

    in_train: dict[str, int]
    repeated: int
    in_two_classes: int
    examples: dict[str, list[str]]

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def find_copies(dataset: Dataset) -> Copies:
    """Count the copies in a data set; pixels are read once, encoded files not at all."""
    splits = dataset.splits
    keys = {name: _keys(dataset, name) for name in splits}
    every = np.concatenate(list(keys.values()))
    labels = np.concatenate([split.labels for split in splits.values()])
    which = np.repeat(np.arange(len(splits)), [len(split) for split in splits.values()])
    # Equal images side by side, in the order of splits: train is first.
    order = np.argsort(every, kind="stable")
    same = every[order][1:] == every[order][:-1]
    before, after = order[:-1][same], order[1:][same]
    pairs = {"repeated": which[before] == which[after], "in_two_classes": labels[before] != labels[after]}
    found = {kind: (after[is_pair], before[is_pair]) for kind, is_pair in pairs.items()}
    in_train = {}
    for number, name in enumerate(splits):
        if number:
            copied = np.flatnonzero((which == number) & np.isin(every, keys["train"]))
            in_train[name] = len(copied)
            found[name] = copied, np.array([np.argmax(every == every[index]) for index in copied[:1]])
    examples: dict[str, list[str]] = {}
    for kind, (copy, original) in found.items():
        if len(copy):
            first = np.argmin(copy)
            paths = [_path(dataset, int(end[first])) for end in (copy, original)]
            examples |= {kind: [path for path in paths if path is not None]} if None not in paths else {}
    return Copies(
        in_train=in_train,
        repeated=int(pairs["repeated"].sum()),
        in_two_classes=len(np.unique(every[after[pairs["in_two_classes"]]])),
        examples=examples,
    )


def _path(dataset: Dataset, index: int) -> str | None:
    """Return the path of an image, counted through all splits; None where it has none."""
    for split in dataset.splits.values():
        if index < len(split):
            return None if split.paths is None else bytes(split.paths[index]).decode()
        index -= len(split)
    raise IndexError(index)


def _keys(dataset: Dataset, split: str) -> NDArray[np.uint64]:
    """Return the first 64 bits of the SHA-256 of each image, `(N,)`; two of a million differ with 1 - 3e-8."""
    images = dataset.splits[split].images
    if isinstance(images, EncodedImages):
        return np.ascontiguousarray(images.index.sha256[:, :8]).view(np.uint64).reshape(-1)
    digests = b"".join(hashlib.sha256(image.data).digest()[:8] for part in chunks(images) for image in part)
    return np.frombuffer(digests, np.uint64)
