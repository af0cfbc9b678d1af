"""Finding images wherever they lie, and reading them a batch ahead."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.folders import ImageFile, find_images, find_labelled_images, read_images
from pipeline.errors import DataError, UsageError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(path: Path, left_out: Counter[str] | None = None) -> list[str]:
    files = find_images(path, Counter() if left_out is None else left_out)
    return [
        os.fsdecode(os.path.relpath(file.path, path)) if file.problem is None else f"!{file.problem}" for file in files
    ]


def test_images_of_any_depth_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    touch(
        tmp_path, "b/z.png", "b/a/1.PNG", "a.jpg", "é.bmp", "z.webp", "B.ppm", os.fsdecode(b"b/\xff.pgm"), "c.png/1.png"
    )
    expected = ["B.ppm", "a.jpg", "b/a/1.PNG", "b/z.png", os.fsdecode(b"b/\xff.pgm"), "c.png/1.png", "z.webp", "é.bmp"]
    assert found(tmp_path) == expected


def test_other_files_are_counted_and_what_desktops_leave_is_not(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "a.mp4", "d/b.MP4", "d/c", ".hidden.png", ".cache/1.png", "Thumbs.db", "notes.txt")
    left_out: Counter[str] = Counter()
    assert found(tmp_path, left_out) == ["1.png"]
    assert left_out == {".mp4": 2, "": 1}


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "in/1.png", "elsewhere/2.png")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/same").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/3.png").symlink_to(tmp_path / "elsewhere/2.png")
    (tmp_path / "in/broken.png").symlink_to(tmp_path / "nothing")
    assert found(tmp_path / "in") == ["1.png", "3.png", "!cannot be read: No such file or directory", "out/2.png"]


def test_what_is_not_there_is_a_problem_and_not_an_error(tmp_path: Path) -> None:
    assert found(tmp_path / "nothing") == ["!no such file or folder"]
    assert found(tmp_path / ("x" * 300)) == ["!cannot be read: File name too long"]
    (only,) = found(tmp_path)
    assert only.startswith("!no image in it")
    touch(tmp_path, "any.name")
    assert found(tmp_path / "any.name") == ["."], "a file that is named is taken whatever its suffix"


def test_images_are_read_at_most_two_batches_ahead_in_order_with_their_problems(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (3, 3), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"")
    asked: list[int] = []

    def files() -> Iterator[ImageFile]:
        for number in range(10):
            asked.append(number)
            yield ImageFile(tmp_path / f"{number}.png", label=number)

    batches = read_images(files(), 2, 2)
    first = next(batches)
    assert len(asked) <= 6, "two batches beyond the one in hand"
    rest = [file for batch in batches for file in batch]
    reds = [None if file.pixels is None else int(file.pixels[0, 0, 0]) for file in (*first, *rest)]
    assert reds == [0, 1, 2, 3, None, 5, 6, 7, 8, 9]
    assert [file.label for file in (*first, *rest)] == list(range(10))
    assert [file.problem for file in rest if file.problem] == ["empty"]


def test_closing_the_reader_leaves_no_thread_behind(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "1.png")
    before = threading.active_count()
    batches = read_images((ImageFile(tmp_path / "1.png") for _ in range(50)), 2, 2)
    next(batches)
    batches.close()
    assert threading.active_count() == before


# Folders with a folder for each class


@pytest.mark.parametrize("split", ["", "test/"])
def test_labels_go_by_the_names_of_folders(tmp_path: Path, split: str) -> None:
    touch(tmp_path, f"{split}dog/2.png", f"{split}ant/1.png")
    if split:
        touch(tmp_path, "train/unknown/1.png", "readme.json")
    files, bad = find_labelled_images(tmp_path, ("cat", "dog", "ant"))
    assert [(file.path.name, file.label) for file in files] == [("1.png", 2), ("2.png", 1)]
    assert bad == []


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    touch(tmp_path, "test/1.png", "rest/2.png")
    files, _ = find_labelled_images(tmp_path, ("rest", "test"))
    assert [file.label for file in files] == [0, 1]


def test_what_is_in_no_class_is_bad_and_an_unknown_class_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "loose.png", "cat/film.mp4", "cat/deep/1.png")
    _, bad = find_labelled_images(tmp_path, ("cat", "dog"))
    assert {file.path for file in bad} == {"loose.png", "cat/film.mp4", "cat/deep"}
    touch(tmp_path, "Cat/1.png")
    with pytest.raises(DataError, match=r"/Cat: not one of the model's 2 classes \(cat, dog\); rename or remove"):
        find_labelled_images(tmp_path, ("cat", "dog"))
    with pytest.raises(DataError, match=r"12 classes \(0, 1, .*, 9, \.\.\.\)"):
        find_labelled_images(tmp_path, tuple(map(str, range(12))))


def test_a_folder_without_images_or_none_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="no image in it"):
        find_labelled_images(tmp_path, ("cat", "dog"))
    with pytest.raises(UsageError, match="no such folder"):
        find_labelled_images(tmp_path / "nothing", ("cat", "dog"))
