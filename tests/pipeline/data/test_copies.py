"""Images that occur more than once, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data import arrays
from pipeline.data.copies import Copies, find_copies
from pipeline.data.datasets import Dataset, Split


def split(numbers: list[int], labels: list[int], name: str) -> Split:
    """A split of images that are each of one number."""
    images = np.repeat(np.array(numbers, np.uint8), 12).reshape(-1, 2, 2, 3)
    names = np.array([f"{name}/{index}" for index in range(len(numbers))], np.bytes_)
    return Split(images, np.array(labels), names)


def make(train: Split, test: Split, val: Split | None = None) -> Dataset:
    return Dataset("folder", ("a", "b"), train, val, test, "0" * 64)


@pytest.mark.parametrize("chunk_bytes", [1, 2**22])
def test_copies_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk_bytes)
    train = split([1, 2, 3, 3, 3, 4], [0, 0, 1, 1, 1, 0], "train")  # 3 is repeated twice
    val = split([5, 1, 6], [0, 1, 0], "val")  # 1 is of train, under another class
    test = split([7, 5, 3, 3, 8, 6], [0, 0, 1, 1, 0, 1], "test")  # 3 is of train, and repeated; 6 is under two classes
    assert find_copies(make(train, test, val)) == Copies(
        in_train={"val": 1, "test": 2},
        repeated=3,
        in_two_classes=2,
        examples={
            "val": ["val/1", "train/0"],
            "test": ["test/2", "train/2"],
            "repeated": ["train/3", "train/2"],
            "in_two_classes": ["val/1", "train/0"],
        },
    )


def test_images_that_differ_in_one_level_are_no_copies_and_nothing_is_named_without_paths() -> None:
    train, test = split([1, 2], [0, 1], "train"), split([1, 2], [0, 1], "test")
    for images in (train.images, test.images):
        assert isinstance(images, np.ndarray)
    test.images[0, 1, 1, 2] += 1  # type: ignore[index]
    bare = make(Split(train.images, train.labels), Split(test.images, test.labels))
    assert find_copies(bare) == Copies(in_train={"test": 1}, repeated=0, in_two_classes=0, examples={})
