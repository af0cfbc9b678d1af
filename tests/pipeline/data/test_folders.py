"""Image folders whole, odd and damaged; images wherever they lie, read a batch ahead."""

from __future__ import annotations

import os
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.datasets import Split
from pipeline.data.decoding import fit
from pipeline.data.folders import ImageFile, find_images, find_labelled_images, read_folder, read_images
from pipeline.data.images import BadFile
from pipeline.data.listing import list_source
from pipeline.errors import DataError, StorageError, UsageError


def make_folder(root, files):
    """Write `files`, path -> content: bytes, an image, or None for a fresh 3 x 3 one."""
    for number, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            with path.open("wb") as file:
                (content or Image.new("RGB", (3, 3), (number, 0, 0))).save(file, format="PNG")
    return root


def read(
    source: Path, image_size: int, *, skip_bad: bool
) -> tuple[tuple[str, ...], Split, Split | None, list[BadFile]]:
    """Read a folder: its classes, train, test and bad files."""
    listing = list_source(source)
    splits, findings = read_folder(listing, image_size, skip_bad=skip_bad)
    return listing.class_names, splits["train"], splits.get("test"), findings.bad


def order_of(split):
    """The numbers that make_folder gave its images."""
    return split.images[:, 0, 0, 0].tolist()


def png(number=0):
    return Image.new("RGB", (3, 3), (number, 0, 0))


def test_classes_and_images_are_ordered_by_bytes(tmp_path):
    ordered = ["A", "Zoë", "a", "a b", "a\nb", "e\u0301e", "Ärger", "é", "日本", "\U0001f600"]
    ordered.sort(key=os.fsencode)
    names = ["1.png", "10.png", "2.png", "B.png", "a\nb.png", "b.png", "é.png", "\udcff.png"]
    names.sort(key=os.fsencode)
    files = {f"train/{cls}/{name}": None for cls in ordered for name in names}
    for name in reversed(files):
        make_folder(tmp_path, {name: png(list(files).index(name))})
    class_names, train, test, bad = read(tmp_path, 3, skip_bad=False)
    assert class_names == tuple(ordered) and test is None and bad == []
    assert order_of(train) == list(range(len(files)))
    assert train.labels.tolist() == [label for label in range(len(ordered)) for _ in names]
    assert class_names.index("A") < class_names.index("a") < class_names.index("é") < class_names.index("日本")


@pytest.mark.parametrize("resize", ["squeeze", "crop"])
def test_images_become_squares_by_the_rule_of_the_recipe(tmp_path, resize):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8))
    make_folder(tmp_path, {"train/a/x.png": image, "train/b/x.png": image})
    splits, _ = read_folder(list_source(tmp_path), 8, skip_bad=False, resize=resize)
    assert all(np.array_equal(pixels, fit(image, 8, resize)) for pixels in splits["train"].images)
    [batch] = read_images([ImageFile(tmp_path / "train/a/x.png")], 8, 2, resize)
    assert np.array_equal(batch[0].pixels, splits["train"].images[0])


def test_train_decides_the_classes_and_test_may_lack_some(tmp_path):
    make_folder(tmp_path, {"train/a/x.png": None, "train/b/x.png": None, "test/b/x.png": None})
    class_names, train, test, _ = read(tmp_path, 3, skip_bad=False)
    assert class_names == ("a", "b") and train.labels.tolist() == [0, 1] and test.labels.tolist() == [1]


def test_a_class_of_test_that_train_lacks_is_refused_by_name(tmp_path):
    make_folder(tmp_path, {"train/a/x.png": None, "test/a/x.png": None, "test/other/x.png": None})
    with pytest.raises(DataError, match="test/other: a class that `train` does not have"):
        read(tmp_path, 3, skip_bad=False)


def test_what_desktops_and_authors_leave_is_no_image(tmp_path):
    clutter = [
        "train/.DS_Store",
        "train/a/.hidden.png",
        "train/a/Thumbs.db",
        "train/b/desktop.ini",
        "train/README.md",
    ]
    make_folder(tmp_path, {"train/a/x.png": None, "train/b/x.png": None, "train/.cache/x.png": None, "more/c/x": b""})
    make_folder(tmp_path, {name: b"clutter" for name in [*clutter, "train/b/LICENSE.txt", "labels.csv"]})
    class_names, train, _, bad = read(tmp_path, 3, skip_bad=False)
    assert class_names == ("a", "b") and len(train) == 2 and bad == []


@pytest.fixture
def spoiled(tmp_path):
    """Three good images among files bad in every way, and two that are no images by their names."""
    make_folder(tmp_path, {"train/a/1.png": png(1), "train/b/2.png": png(2), "test/a/3.png": png(3)})
    make_folder(tmp_path, {
        "train/a/empty.png": b"",
        "train/a/not\nan image.jpg": b"plain text",
        "train/a/\udcff.png": b"\x89PNG\r\n\x1a\n",
        "train/a/movie.mp4": b"",
        "train/a/deeper/x.png": None,
        "train/loose.png": None,
        "test/a/broken.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
    })  # fmt: skip
    os.mkfifo(tmp_path / "train/b/pipe.png")
    (tmp_path / "train/b/dangling.png").symlink_to("nowhere.png")
    (tmp_path / "train/loop").symlink_to("loop")
    return tmp_path


def test_bad_files_are_named_and_counted(spoiled):
    with pytest.raises(DataError) as caught:
        read(spoiled, 3, skip_bad=False)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    assert ": 8 bad: " in message and message.endswith("; and 5 more; mend them or add --skip-bad")
    assert "train/a/deeper (a folder inside a class folder)" in message


def test_bad_files_can_be_skipped_and_are_reported(spoiled):
    class_names, train, test, bad = read(spoiled, 3, skip_bad=True)
    assert class_names == ("a", "b")
    assert order_of(train) == [1, 2] and train.labels.tolist() == [0, 1]
    assert order_of(test) == [3] and test.labels.tolist() == [0]
    reasons = {file.path: file.reason for file in bad}
    assert len(bad) == len(reasons) == 8
    assert reasons["train/a/empty.png"] == "empty"
    assert reasons["train/a/not\\nan image.jpg"] == "not an image of a known format"
    assert reasons["train/a/\\xff.png"].startswith(("cannot be read", "not an image"))
    assert reasons["train/loose.png"] == "not in a class folder"
    names = list_source(spoiled).left_out.names
    assert names == {".mp4 file": ["train/a/movie.mp4"], "other file": ["train/loop"]}
    assert reasons["train/b/pipe.png"] == "not a regular file"
    assert reasons["train/b/dangling.png"] == "a link to nothing"
    assert "test/a/broken.webp" in reasons
    assert all(reason.isprintable() for reason in reasons.values())


def test_bad_files_are_in_the_order_of_the_listing_whichever_thread_is_first(tmp_path):
    make_folder(tmp_path, {f"train/a/{number:03}.png": b"" if number % 3 else None for number in range(100)})
    bad = read(tmp_path, 3, skip_bad=True)[3]
    assert bad == [BadFile(f"train/a/{number:03}.png", "empty") for number in range(100) if number % 3]


@pytest.mark.parametrize("files", [{"train/b/x.png": b"damaged"}, {"train/b/movie.mp4": b""}])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images_is_refused_by_name(tmp_path, files, split):
    make_folder(tmp_path, {"train/a/x.png": None, "train/b/y.png": None, "test/a/x.png": None})
    (tmp_path / "train/b/y.png").rename(tmp_path / "train/a/y.png")
    if split == "test":
        make_folder(tmp_path, {"train/b/y.png": None})
    make_folder(tmp_path, {name.replace("train", split): content for name, content in files.items()})
    with pytest.raises(DataError, match=f"{split}/b: no image in it"):
        read(tmp_path, 3, skip_bad=True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_classes_is_refused(tmp_path, split):
    make_folder(tmp_path, {"train/a/x.png": None} if split == "test" else {})
    (tmp_path / split).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=f"{split}: no image in it"):
        read(tmp_path, 3, skip_bad=False)


def test_a_class_name_that_is_not_utf8_is_refused(tmp_path):
    make_folder(tmp_path, {"train/a\udcff/x.png": None})
    with pytest.raises(DataError, match=r"train/a\\xff: class name is not UTF-8"):
        read(tmp_path, 3, skip_bad=False)


def test_linked_class_folders_and_images_are_followed(tmp_path):
    make_folder(tmp_path, {"elsewhere/x.png": png(9), "train/a/x.png": png(8)})
    (tmp_path / "train/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/a/y.png").symlink_to(tmp_path / "elsewhere/x.png")
    class_names, train, _, _ = read(tmp_path, 3, skip_bad=False)
    assert class_names == ("a", "b") and order_of(train) == [8, 9, 9]


def test_a_folder_that_is_not_there_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match=r"--from .*nowhere: no such folder"):
        read(tmp_path / "nowhere", 3, skip_bad=False)


def test_a_folder_without_train_says_where_images_go(tmp_path):
    with pytest.raises(DataError, match="no folder `train` in it; images go in train/<class>/<image>"):
        read(tmp_path, 3, skip_bad=False)


def test_a_folder_that_cannot_be_listed_is_a_storage_error(tmp_path, monkeypatch):
    make_folder(tmp_path, {"train/a/x.png": None})

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(StorageError, match="cannot list"):
        read(tmp_path, 3, skip_bad=False)


def test_an_image_that_may_not_be_read_is_a_bad_file(tmp_path, monkeypatch):
    make_folder(tmp_path, {"train/a/x.png": None, "train/a/y.png": None})

    def refuse(path, formats):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match=r"2 bad: train/a/x.png \(cannot be read: Permission denied\)"):
        read(tmp_path, 3, skip_bad=False)


# --- images of any depth ---------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(path: Path, left_out: Counter[str] | None = None) -> list[str]:
    files = find_images(path, Counter() if left_out is None else left_out)
    return [
        os.fsdecode(os.path.relpath(file.path, path)) if file.problem is None else f"!{file.problem}" for file in files
    ]


def test_images_of_any_depth_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    touch(
        tmp_path, "b/z.png", "b/a/1.PNG", "a.jpg", "é.bmp", "z.webp", "B.ppm", os.fsdecode(b"b/\xff.pgm"), "c.png/1.png"
    )
    expected = ["B.ppm", "a.jpg", "b/a/1.PNG", "b/z.png", os.fsdecode(b"b/\xff.pgm"), "c.png/1.png", "z.webp", "é.bmp"]
    assert listed(tmp_path) == expected


def test_other_files_are_counted_and_what_desktops_leave_is_not(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "a.mp4", "d/b.MP4", "d/c", ".hidden.png", ".cache/1.png", "Thumbs.db", "notes.txt")
    touch(tmp_path, "@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "d/__MACOSX/2.png")
    left_out: Counter[str] = Counter()
    assert listed(tmp_path, left_out) == ["1.png"]
    assert left_out == {".mp4": 2, "": 1}


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "in/1.png", "elsewhere/2.png")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/same").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/3.png").symlink_to(tmp_path / "elsewhere/2.png")
    (tmp_path / "in/broken.png").symlink_to(tmp_path / "nothing")
    assert listed(tmp_path / "in") == ["1.png", "3.png", "!cannot be read: No such file or directory", "out/2.png"]


def test_what_is_not_there_is_a_problem_and_not_an_error(tmp_path: Path) -> None:
    assert listed(tmp_path / "nothing") == ["!no such file or folder"]
    assert listed(tmp_path / ("x" * 300)) == ["!cannot be read: File name too long"]
    (only,) = listed(tmp_path)
    assert only.startswith("!no image in it")
    touch(tmp_path, "any.name")
    assert listed(tmp_path / "any.name") == ["."], "a file that is named is taken whatever its suffix"


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


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_classes_are_known_in_either_unicode_form_and_test_in_any_case(tmp_path: Path, form: str) -> None:
    touch(tmp_path, f"TEST/{unicodedata.normalize(form, 'café')}/1.png", "TEST/@eaDir/1.png", "TEST/dog/@eaDir/2.png")
    for name in ("caf\u00e9", "cafe\u0301"):
        files, bad = find_labelled_images(tmp_path, ("ant", name))
        assert [file.label for file in files] == [1] and bad == []


def test_what_is_in_no_class_is_bad_and_an_unknown_class_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "loose.png", "cat/film.mp4", "cat/deep/1.png")
    _, bad = find_labelled_images(tmp_path, ("cat", "dog"))
    assert {file.path for file in bad} == {"loose.png", "cat/deep"}
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
