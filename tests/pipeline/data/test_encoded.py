"""Data sets of the files themselves: pixels, identity, statistics, damage, and what is gone on with after a kill."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.recipes import DatasetRecipe, ViewRecipe, deciding_values
from pipeline.data import collecting, encoded
from pipeline.data.copies import find_copies
from pipeline.data.datasets import Dataset
from pipeline.data.decoding import cut, decode, decoders, fit, opened
from pipeline.data.encoded import QUALITY, EncodedImages
from pipeline.data.streaming import HostImages, place_images
from pipeline.errors import DataError, StorageError, UsageError
from pipeline.system import threads
from pipeline.system.canonical import seal
from pipeline.system.neighbours import usable_cores
from pipeline.system.storage import to_json
from pipeline.views.views import Views
from stages.prepare import prepare
from tests.stages.test_prepare import make_recipe
from tests.support.commands import CONTEXT

SIDE = 8
TURNED = Image.Exif()
TURNED[0x0112] = 6
# By suffix, how each is saved.
KINDS: dict[str, dict[str, Any]] = {
    "444.jpg": {"quality": 90, "subsampling": 0},
    "420.jpg": {"quality": 60, "progressive": True},
    "turned.jpeg": {"exif": TURNED},
    "a.png": {},
    "a.webp": {"lossless": False},
    "a.bmp": {},
    "a.tif": {"compression": "tiff_lzw"},
}


def noise(number: int) -> Image.Image:
    generator = np.random.default_rng(number)
    height, width = 9 + number % 13, 7 + number % 17
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty-two small images of two classes and several formats, six of them in `test`."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(42):
        kind = list(KINDS)[number % len(KINDS)]
        split = "test" if number >= 36 else "train"
        path = root / split / ("cat", "dog")[number % 2] / f"{number:02}{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(path, **KINDS[kind])
    return root


def make(photos: Path, out: Path, *, skip_bad: bool = False, **settings: Any) -> Dataset:
    """Prepare an encoded data set, and load it."""
    recipe = make_recipe("folder", **{"store": "encoded", "image_size": SIDE, "val_fraction": 0.25, **settings})
    prepare(recipe, out=out, raw=out.parent / "raw", folder=photos, skip_bad=skip_bad)
    return Dataset.load(out / "dataset.json")


@pytest.fixture(scope="module")
def stored(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they are prepared."""
    out = tmp_path_factory.mktemp("stored") / "prepared"
    make(photos, out)
    return out


@pytest.fixture
def own(stored: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    shutil.copytree(stored, tmp_path / "prepared")
    return tmp_path / "prepared"


def files_of(dataset: Dataset) -> dict[str, tuple[EncodedImages, int]]:
    """Map each image's path to its split's images and its row there."""
    found = {}
    for split in dataset.splits.values():
        assert isinstance(split.images, EncodedImages) and split.names is not None
        found |= {name: (split.images, row) for row, name in enumerate(split.names)}
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is kept, and what comes of it ------------------------------------------------------------------


def test_files_are_kept_byte_for_byte_and_other_formats_without_loss(photos: Path, stored: Path) -> None:
    content, files = (stored / "files.bin").read_bytes(), files_of(Dataset.load(stored / "dataset.json"))
    assert len(files) == 42
    for name, (images, row) in files.items():
        start, stop = images.index.offsets[row].tolist()
        original = (photos / name).read_bytes()
        if name.endswith((".bmp", ".tif")):
            with Image.open(io.BytesIO(content[start:stop])) as image:
                assert image.format == "PNG"
                assert np.array_equal(np.asarray(image), np.asarray(decode(original)))
        else:
            assert content[start:stop] == original
    assert sum(np.ptp(images.index.offsets[row]) for images, row in files.values()) == len(content)


@pytest.mark.parametrize("resize", ["squeeze", "crop"])
def test_pixels_are_those_of_the_files_and_boxes_are_cut_from_them(photos: Path, tmp_path: Path, resize: str) -> None:
    files = files_of(Dataset.load(make_saved(photos, tmp_path, resize=resize)))
    for name, (images, row) in files.items():
        image = decode((photos / name).read_bytes())
        assert tuple(images.sizes[row]) == image.size
        assert np.array_equal(images[row : row + 1][0], fit(image, SIDE, resize)), name
        box = np.array([[1, 2, image.width - 1, image.height]])
        assert np.array_equal(images.read(np.array([row]), box)[0], cut(image, SIDE, box[0])), name
    images = next(iter(files.values()))[0]
    rows = np.array([3, 0, 3])
    assert np.array_equal(images[rows], images[:][rows]) and images[rows[:0]].shape == (0, SIDE, SIDE, 3)
    assert np.array_equal(images.select(rows)[:], images[rows]) and images.nbytes == len(images) * SIDE * SIDE * 3
    with pytest.raises(IndexError, match=f"of {len(images)}"):
        images[np.array([len(images)])]


def make_saved(photos: Path, tmp_path: Path, **settings: Any) -> Path:
    make(photos, tmp_path / "made", **settings)
    return tmp_path / "made" / "dataset.json"


def test_an_exif_turned_photograph_has_upright_sizes(photos: Path, stored: Path) -> None:
    files = files_of(Dataset.load(stored / "dataset.json"))
    turned = [(images.sizes[row], name) for name, (images, row) in files.items() if "turned" in name]
    assert len(turned) == 6
    for size, name in turned:
        with Image.open(photos / name) as image:
            assert tuple(size) == image.size[::-1]


def test_images_of_the_host_are_read_with_boxes_and_have_sizes(stored: Path) -> None:
    images = Dataset.load(stored / "dataset.json").train.images
    host = HostImages(images, torch.device("cpu"))
    rows, boxes = np.array([2, 5]), np.array([[0, 0, 3, 4], [1, 1, 5, 6]])
    assert host.sizes is images.sizes and host.shape == (len(images), 3, SIDE, SIDE)
    assert np.array_equal(host.read(rows, boxes).numpy(), images.read(rows, boxes))
    assert np.array_equal(host.read(rows).numpy(), images[rows])
    placed = place_images(images)
    assert isinstance(placed, torch.Tensor) and np.array_equal(placed.permute(0, 2, 3, 1).numpy(), images[:])
    assert HostImages(images[:], torch.device("cpu")).sizes is None


def test_views_of_files_are_the_views_of_their_pixels(stored: Path) -> None:
    split = Dataset.load(stored / "dataset.json").train
    recipe, labels = ViewRecipe(count=2, crop=2, flip=True, mixing="cutmix"), torch.from_numpy(split.labels)
    host = Views(HostImages(split.images, torch.device("cpu")), labels, recipe)
    placed = Views(place_images(split.images), labels, recipe)
    parts = list(torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).split(10))
    for one, other in zip(host.batches(1, parts), placed.batches(1, parts), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.partner_labels, other.partner_labels)
    assert host.digest(0) == placed.digest(0)


def test_mean_and_std_count_each_image_alike(photos: Path, stored: Path) -> None:
    dataset, grid = Dataset.load(stored / "dataset.json"), collecting.GRID
    means, squares, whole = [], [], 0
    assert dataset.train.names is not None
    for name in dataset.train.names:
        pixels = np.asarray(decode((photos / name).read_bytes())) / 255
        rows, columns = (
            # All of them, or those in the middle of equal parts.
            np.arange(side) if side <= grid else ((np.arange(grid) + 0.5) * side / grid).astype(int)
            for side in pixels.shape[:2]
        )
        whole += min(pixels.shape[:2]) <= grid
        pixels = pixels[rows][:, columns].reshape(-1, 3)
        means.append(pixels.mean(0))
        squares.append((pixels**2).mean(0))
    mean = np.mean(means, axis=0)
    assert 0 < whole < len(means)
    np.testing.assert_allclose(dataset.mean, mean, atol=1e-8)
    np.testing.assert_allclose(dataset.std, np.sqrt(np.mean(squares, axis=0) - mean**2), atol=1e-7)


# --- identity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (8, 8), (9, 7), (31, 20), (500, 375)])
def test_the_grid_of_an_image_is_pillows_nearest_and_its_moments_are_means(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    few = image.resize((min(size[0], collecting.GRID), min(size[1], collecting.GRID)), Image.Resampling.NEAREST)
    assert collecting.grid_of(image) == few.tobytes()
    pixels = np.asarray(few).reshape(-1, 3).astype(object)  # exact
    sums = [*pixels.sum(axis=0), *(pixels**2).sum(axis=0)]
    expected = [(total << 20) // len(pixels) for total in sums]
    assert collecting.moments([bytes(6), few.tobytes(), bytes(3)]).tolist() == [[0] * 6, expected, [0] * 6]


def test_the_sha256_is_of_names_splits_files_labels_and_rules_by_hand(photos: Path, stored: Path) -> None:
    dataset, content = Dataset.load(stored / "dataset.json"), (stored / "files.bin").read_bytes()
    header = {
        "schema": "titn-dataset/2",
        "class_names": ["cat", "dog"],
        "exif": "upright",
        "max_side": 0,
        "quality": None,
        "splits": [["train", 27], ["val", 9], ["test", 6]],
    }
    digest = hashlib.sha256(json.dumps(header, separators=(",", ":"), sort_keys=True).encode())
    for split in dataset.splits.values():
        assert isinstance(split.images, EncodedImages)
        for start, stop in split.images.index.offsets.tolist():
            digest.update(hashlib.sha256(content[start:stop]).digest())
        digest.update(split.labels.astype("<i8").tobytes())
    assert dataset.sha256 == digest.hexdigest()


def test_size_and_resize_rule_are_no_part_of_the_sha256_and_all_else_is(
    photos: Path, stored: Path, tmp_path: Path
) -> None:
    expected = Dataset.load(stored / "dataset.json").sha256
    same = make(photos, tmp_path / "same", image_size=12, resize="crop")
    assert same.sha256 == expected and same.image_size == 12
    digests = {expected, make(photos, tmp_path / "reduced", max_side=64).sha256}
    digests |= {make(photos, tmp_path / "cut", val_fraction=0.1).sha256}
    changed = tmp_path / "changed"
    shutil.copytree(photos, changed)
    with (changed / "train/cat/00444.jpg").open("ab") as file:
        file.write(b"\0")  # behind the end: the same pixels
    digests |= {make(changed, tmp_path / "file").sha256}
    (changed / "train/cat").rename(changed / "train/cow")
    (changed / "test/cat").rename(changed / "test/cow")
    digests |= {make(changed, tmp_path / "name").sha256}
    assert len(digests) == 5


def test_threads_in_any_order_give_the_same_files(
    photos: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)

    def slow(*arguments: Any) -> AbstractContextManager[Image.Image]:
        time.sleep(rng.random() * 0.01)
        return opened(*arguments)

    monkeypatch.setattr(collecting, "opened", slow)
    monkeypatch.setattr(threads, "usable_cores", lambda: 5)
    make(photos, tmp_path / "prepared")
    assert contents(tmp_path / "prepared") == contents(stored)


def test_ranks_of_a_machine_share_its_cores(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(encoded, "usable_cores", lambda: 8)
    monkeypatch.setattr(encoded, "_pool", functools.cache(encoded._pool.__wrapped__))
    running, most, entering = [0], [0], threading.Lock()

    @contextlib.contextmanager
    def slow(content: bytes) -> Iterator[Image.Image]:
        with entering:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with opened(content) as image:
            yield image
        with entering:
            running[0] -= 1

    monkeypatch.setattr(encoded, "opened", slow)
    assert len(Dataset.load(stored / "dataset.json").train.images[:12]) == 12
    assert most == [2]


def test_copies_are_found_by_the_bytes_of_files(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    shutil.copy(folder / "train/cat/00444.jpg", folder / "test/dog/copy.jpg")
    copies = find_copies(make(folder, tmp_path / "prepared", val_fraction=0.0))
    assert copies.in_train == {"test": 1} and copies.in_two_classes == 1 and copies.repeated == 0
    assert copies.examples["test"] == ["test/dog/copy.jpg", "train/cat/00444.jpg"]


def test_larger_images_are_reduced_and_smaller_ones_stay(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    pixels = np.linspace(0, 255, 200 * 100 * 3).reshape(100, 200, 3).astype(np.uint8)
    for name, image in {
        "a/large.png": pixels,
        "a/small.png": pixels[:64, :64],
        "b/tall.webp": pixels.transpose(1, 0, 2),
    }.items():
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "train" / name)
    shutil.copytree(folder / "train", folder / "test")
    dataset = make(folder, tmp_path / "prepared", max_side=64, val_fraction=0.0)
    files = files_of(dataset)
    sizes = {name: images.sizes[row].tolist() for name, (images, row) in files.items() if name.startswith("train")}
    assert sizes == {"train/a/large.png": [64, 32], "train/a/small.png": [64, 64], "train/b/tall.webp": [32, 64]}
    images, row = files["train/a/large.png"]
    start, stop = images.index.offsets[row].tolist()
    with Image.open(io.BytesIO((tmp_path / "prepared/files.bin").read_bytes()[start:stop])) as image:
        assert image.format == "JPEG" and image.size == (64, 32)
        expected = np.asarray(Image.fromarray(pixels).resize((64, 32), Image.Resampling.LANCZOS), int)
        assert np.abs(np.asarray(image, int) - expected).mean() < 3
    described = json.loads((tmp_path / "prepared/dataset.json").read_bytes())
    assert (described["max_side"], described["quality"]) == (64, QUALITY)


# --- damage ----------------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    for split in Dataset.load(path).splits.values():
        assert isinstance(split.images, EncodedImages)
        split.images.verify()


def test_damage_at_any_byte_is_told_by_name(own: Path) -> None:
    path, files = own / "dataset.json", files_of(Dataset.load(own / "dataset.json"))
    for file in sorted(own.iterdir()):
        content = file.read_bytes()
        if file.name == "files.bin":
            for name, (images, row) in files.items():
                start, stop = images.index.offsets[row].tolist()
                for at in (start, (start + stop) // 2, stop - 1):
                    file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
                    images = files_of(Dataset.load(path))[name][0]
                    with pytest.raises(DataError, match=f"files.bin: {name}: damaged .*prepare` again"):
                        images[np.array([row])]
                    if row == 0:
                        with pytest.raises(DataError, match=name):
                            read_all(path)
        elif file.name != "summary.json":
            for at in range(0, len(content), 41):
                file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
                with pytest.raises(DataError, match=file.name):
                    Dataset.load(path)
        if file.name != "summary.json":
            for changed in (content[:-1], content + b"\0", b""):
                file.write_bytes(changed)
                with pytest.raises(DataError, match=file.name):
                    Dataset.load(path)
        file.write_bytes(content)
    read_all(path)


def test_a_file_that_changes_while_it_is_in_use_is_a_storage_error(own: Path) -> None:
    images = Dataset.load(own / "dataset.json").train.images
    assert images[:2].any()
    os.truncate(own / "files.bin", 100)
    with pytest.raises(StorageError, match=r"files.bin: cut short or overwritten while it was in use"):
        images[-2:]


def test_bytes_are_verified_once_in_a_process(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, real, hashed = Dataset.load(own / "dataset.json").train.images, hashlib.sha256, list[int]()

    def counting(content: bytes = b"") -> Any:
        hashed.append(len(content))
        return real(content)

    monkeypatch.setattr(hashlib, "sha256", counting)
    for _ in range(2):
        images[np.array([0, 4])]
    assert len(hashed) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 0),
        ("image_size", 10**9),
        ("image_size", None),
        ("resize", "other"),
        ("max_side", -1),
        ("mean", [1]),
    ],
)
def test_rules_that_nothing_writes_are_refused(own: Path, key: str, value: Any) -> None:
    described = json.loads((own / "dataset.json").read_bytes())
    (own / "dataset.json").write_bytes(to_json(seal({**described, key: value})))
    with pytest.raises(DataError, match="not a prepared data set") as caught:
        Dataset.load(own / "dataset.json")
    assert "\n" not in str(caught.value)


# --- preparing: bad files, kills, disk -------------------------------------------------------------------


class Counting:
    """Decodes, counts it, and stops at a number."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.names, self.stop_at = list[bytes](), stop_at

    def __call__(self, content: bytes, notes: list[str] | None = None) -> AbstractContextManager[Image.Image]:
        self.names.append(content)
        if len(self.names) == self.stop_at:
            raise KeyboardInterrupt
        return opened(content, notes)


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core, and files too large to be read several at a time."""
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    monkeypatch.setattr(collecting, "GROUP_BYTES", 1)


def interrupted(photos: Path, out: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stop while the files are collected; return the folder of what there is."""
    monkeypatch.setattr(collecting, "opened", Counting(stop_at))
    with pytest.raises(KeyboardInterrupt):
        make(photos, out)
    assert not (out / "dataset.json").exists()
    return out.with_name("prepared.part")


def resumed(photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> int:
    """Prepare; return the number of files that were decoded for it."""
    monkeypatch.setattr(collecting, "opened", counting := Counting())
    make(photos, out, **settings)
    assert not out.with_name("prepared.part").exists()
    return len(counting.names)


def tear(part: Path) -> None:
    with (part / "files.jsonl").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 5)


def lose(part: Path) -> None:
    os.truncate(part / "files.bin", (part / "files.bin").stat().st_size - 1)


def zero(part: Path) -> None:
    """As after a power cut: the journal is ahead of the bytes."""
    size = (part / "files.bin").stat().st_size
    os.truncate(part / "files.bin", size - 20)
    os.truncate(part / "files.bin", size)


def forget(part: Path) -> None:
    (part / "files.jsonl").unlink()


@pytest.mark.parametrize(
    ("damage", "again"),
    [(lambda part: None, 42 - 19), (tear, 42 - 18), (lose, 42 - 18), (zero, 42 - 18), (forget, 42)],
)
def test_a_killed_run_goes_on_where_it_was_to_the_same_files(
    photos: Path,
    stored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_core: None,
    damage: Callable[[Path], None],
    again: int,
) -> None:
    part = interrupted(photos, tmp_path / "prepared", 20, monkeypatch)
    damage(part)
    assert resumed(photos, tmp_path / "prepared", monkeypatch) == again
    assert contents(tmp_path / "prepared") == contents(stored)


KILLED_GROUP = 2


class Killing(Counting):
    """Kills its process at a number."""

    def __call__(self, content: bytes, notes: list[str] | None = None) -> AbstractContextManager[Image.Image]:
        if len(self.names) == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(content, notes)


def make_and_die(photos: Path, out: Path) -> None:
    collecting.opened = Killing()  # type: ignore[assignment]
    collecting.GROUP = KILLED_GROUP
    make(photos, out)


def test_a_process_that_is_killed_is_gone_on_with(
    photos: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = CONTEXT.Process(target=make_and_die, args=(photos, tmp_path / "prepared"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "prepared").exists()
    ahead = 4 * usable_cores() * KILLED_GROUP  # decoded, and not appended yet
    assert 42 - 25 <= resumed(photos, tmp_path / "prepared", monkeypatch) <= 42 - 25 + ahead
    assert contents(tmp_path / "prepared") == contents(stored)


def test_only_files_that_are_still_so_are_taken_over(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_core: None
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    interrupted(folder, tmp_path / "prepared", 20, monkeypatch)
    names = sorted(str(path.relative_to(folder)) for path in (folder / "train/cat").iterdir())
    os.utime(folder / names[7], (5, 5))
    assert resumed(folder, tmp_path / "prepared", monkeypatch) == 42 - 7
    (folder / "train/cat/00000.png").write_bytes(b"bad, and first")
    interrupted(folder, tmp_path / "again/prepared", 20, monkeypatch)
    assert resumed(folder, tmp_path / "again/prepared", monkeypatch, max_side=100, skip_bad=True) == 43
    (folder / "train/cat/00000.png").unlink()
    interrupted(folder, tmp_path / "other/prepared", 20, monkeypatch)
    monkeypatch.setattr(collecting, "decoders", lambda: {**decoders(), "pillow": "0"})
    assert resumed(folder, tmp_path / "other/prepared", monkeypatch) == 42


def test_bad_files_are_named_and_what_was_collected_is_not_lost(
    photos: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "prepared"
    shutil.copytree(photos, folder)
    whole = (folder / "train/dog/01420.jpg").read_bytes()
    (folder / "train/dog/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "train/cat/empty.png").write_bytes(b"")
    (folder / "train/cat/gone.png").symlink_to("nowhere")
    monkeypatch.setattr(collecting, "MAX_BYTES", 20_000)
    (folder / "train/cat/huge.jpg").write_bytes(bytes(20_001))
    with pytest.raises(DataError) as caught:
        make(folder, out)
    reason = str(caught.value)
    for words in ("4 bad: train/cat/empty.png (empty)", "train/cat/gone.png (a link to nothing)", "add --skip-bad"):
        assert words in reason
    assert "train/cat/huge.jpg (20001 bytes, more than 20000)" in reason and not out.exists()
    assert resumed(folder, out, monkeypatch, skip_bad=True) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_skipped"] == 4
    expected = contents(stored)
    assert all(data == expected[name] for name, data in contents(out).items() if name != "summary.json")


def test_what_has_another_name_is_never_written_into(photos: Path, tmp_path: Path) -> None:
    part, out = tmp_path / "prepared.part", tmp_path / "prepared"
    make(photos, out)
    part.mkdir()
    os.link(out / "files.bin", part / "files.bin")  # as a kill at the very end leaves it
    before = contents(out)
    with pytest.raises(DataError):
        broken = tmp_path / "broken"
        shutil.copytree(photos, broken)
        (broken / "train/cat/00444.jpg").write_bytes(b"")
        make(broken, out)
    assert contents(out) == before


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", fail)


def test_where_there_are_no_links_a_data_set_is_saved_elsewhere_as_a_copy(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    before = contents(own)
    Dataset.load(own / "dataset.json").save(tmp_path / "other/dataset.json")
    assert contents(own) == before
    assert contents(tmp_path / "other").items() == before.items() - {("summary.json", before["summary.json"])}


@pytest.mark.parametrize("links", [True, False])
def test_the_disk_holds_each_file_once_while_preparing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        refuse_links(monkeypatch)
    folder, generator, most = tmp_path / "photos", np.random.default_rng(0), 0
    for number in range(30):
        path = folder / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (300, 400, 3), np.uint8)).save(path)
    total = sum(path.stat().st_size for path in folder.rglob("*.jpg"))

    def used() -> int:
        found = [path.stat() for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
        return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in found}.values())

    real = os.fsync

    def noting(descriptor: int) -> None:
        nonlocal most
        most = max(most, used())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    make(folder, tmp_path / "prepared")
    assert total < most <= 1.02 * total and used() <= 1.02 * total


def test_files_read_together_are_lost_together_and_the_end_is_the_same(
    photos: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    monkeypatch.setattr(collecting, "GROUP", 4)
    monkeypatch.setattr(collecting, "FLUSHED", 10_000)  # brought to the disk many times meanwhile
    interrupted(photos, tmp_path / "prepared", 20, monkeypatch)
    assert 42 - 19 < resumed(photos, tmp_path / "prepared", monkeypatch) <= 42 - 19 + 4
    assert contents(tmp_path / "prepared") == contents(stored)


def test_a_disk_that_fails_while_others_are_read_is_a_storage_error(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_core: None
) -> None:
    failures = [OSError(5, "Input/output error")]  # the system tells of it once

    def fail(descriptor: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(collecting, "FLUSHED", 10_000)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=r"cannot write .*files.bin: Input/output error"):
        make(photos, tmp_path / "prepared")
    assert not failures


def test_a_full_disk_is_a_storage_error_and_what_is_there_is_gone_on_with(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_core: None
) -> None:
    real = collecting._write
    written: list[int] = []

    def fill(file: Any, data: bytes) -> None:
        written.append(len(data))
        if len(written) == 30:
            raise OSError(28, "No space left on device")
        real(file, data)

    monkeypatch.setattr(collecting, "_write", fill)
    with pytest.raises(StorageError, match=r"cannot write .*files.bin: No space left on device; free space"):
        make(photos, tmp_path / "prepared")
    monkeypatch.setattr(collecting, "_write", real)
    assert resumed(photos, tmp_path / "prepared", monkeypatch) < 42 - 10


def test_a_source_without_files_is_refused(tmp_path: Path) -> None:
    recipe = make_recipe("digits", store="encoded")
    with pytest.raises(UsageError, match=r"recipes.own.dataset.store: encoded keeps image files, and digits comes"):
        prepare(recipe, out=tmp_path / "prepared", raw=tmp_path / "raw")


def test_the_fields_decide_only_where_they_differ_from_what_was() -> None:
    plain = deciding_values(DatasetRecipe(source="folder"))
    assert not {"store", "resize", "max_side"} & plain.keys()
    other = deciding_values(DatasetRecipe(source="folder", store="encoded", resize="crop", max_side=512))
    assert other == {**plain, "store": "encoded", "resize": "crop", "max_side": 512}


def test_another_size_of_the_same_files_is_shown_without_decoding_them(
    photos: Path, stored: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resumed(photos, own, monkeypatch, image_size=12, resize="crop") == 0
    expected = make(photos, own.with_name("fresh") / "prepared", image_size=12, resize="crop")
    assert contents(own) == contents(own.with_name("fresh") / "prepared") and expected.image_size == 12
    assert resumed(photos, own, monkeypatch, image_size=12, val_fraction=0.1) == 42, "mean and std are of other images"


def test_what_is_too_narrow_for_the_middle_is_a_bad_file(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    Image.new("L", (20_000, 1)).save(folder / "train/cat/line.png")
    make(folder, tmp_path / "prepared")
    with pytest.raises(
        DataError, match=r"1 bad: train/cat/line.png \(20000 x 1 pixels, too narrow to be cut to a square"
    ):
        make(folder, tmp_path / "prepared", resize="crop", image_size=64)


def test_what_was_too_narrow_is_taken_where_it_fits(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    Image.new("L", (20_000, 1)).save(folder / "train/cat/line.png")
    out, settings = tmp_path / "prepared", {"skip_bad": True, "image_size": 64}
    assert len(files_of(make(folder, out, resize="crop", **settings))) == 42
    assert len(files_of(make(folder, out, resize="squeeze", **settings))) == 43
    assert json.loads((out / "summary.json").read_text())["skipped"] == []
