"""Data sets larger than the memory limit: read from their file on demand, prepared a few images at a time."""

from __future__ import annotations

import errno
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipeline.config.params import load_params
from pipeline.data import arrays as image_arrays
from pipeline.data.arrays import Selection, Spill, SpilledImages, StoredImages, chunks, select
from pipeline.data.datasets import Dataset, Split
from pipeline.data.folders import read_folder
from pipeline.data.listing import list_source
from pipeline.errors import DataError, StorageError, UsageError
from pipeline.system.runtime import RESIDENT_VARIABLE, resident_limit
from pipeline.system.stopping import StopSignal
from stages.prepare import prepare
from stages.shared.context import Context
from tests.pipeline.data.test_datasets import make_dataset, make_split
from tests.stages.test_prepare import make_recipe
from tests.support.project import Project

SIDE, NUM_IMAGES = 64, 400
BYTES = SIDE * SIDE * 3 * NUM_IMAGES


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Fail if Python and NumPy hold more bytes than this; memory of the decoders does not count."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < num_bytes, peak


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_arrays, "CHUNK_BYTES", 2**16)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved" / "dataset.json"
    make_dataset(0.2).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, and two files that are no images."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = root / "train" / ("cat", "dog")[number % 2] / f"{number:03}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
    for name in ("cat/100x.bmp", "dog/zzz.bmp"):
        (root / "train" / name).write_bytes(b"no image")
    return root


def prepared(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, memory: int) -> dict[str, bytes]:
    """Prepare a folder within a memory limit and return the files."""
    monkeypatch.setenv(RESIDENT_VARIABLE, str(limit))
    recipe = make_recipe("folder", image_size=SIDE, val_fraction=0.1)
    with at_most(memory):
        prepare(recipe, out=out, raw=out.parent / "raw", folder=folder, skip_bad=True)
    return {path.name: path.read_bytes() for path in out.iterdir()}


# --- loading ---------------------------------------------------------------------------------------------


def test_images_beyond_the_limit_stay_in_the_file_and_are_the_same(saved: Path) -> None:
    expected = make_dataset(0.2)
    total = sum(split.images.nbytes for split in expected.splits.values())
    for limit, stay in ((total - 1, True), (total, False), (None, False)):
        dataset = Dataset.load(saved, limit)
        assert (dataset.sha256, dataset.mean, dataset.std) == (expected.sha256, expected.mean, expected.std)
        for name, split in dataset.splits.items():
            assert isinstance(split.images, StoredImages) == stay
            assert np.array_equal(split.images[:], expected.splits[name].images)
            assert np.array_equal(split.labels, expected.splits[name].labels)


def test_nothing_can_be_written_into_the_file(saved: Path) -> None:
    images = Dataset.load(saved, 0).train.images
    images[:1][0] = 0
    assert images[:1].any()


Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def touch(path: Path) -> None:
    os.utime(path)


@pytest.mark.parametrize("damage", [cut, overwrite, touch])
def test_a_file_that_changes_while_it_is_in_use_is_an_error(saved: Path, damage: Damage) -> None:
    file = saved.with_name("test-images.npy")
    os.utime(file, (1, 1))
    images = Dataset.load(saved, 0).test.images
    damage(file)
    for rows in (slice(0, 1), np.array([3, 0]), slice(None)):
        with pytest.raises(
            StorageError, match=r"test-images.npy: cut short or overwritten while it was in use; .*run again"
        ):
            images[rows]


def test_a_file_that_is_replaced_goes_on_being_read(saved: Path) -> None:
    images, expected = Dataset.load(saved, 0).train.images, make_dataset(0.2).train.images
    make_dataset(0.5).save(saved)
    shutil.rmtree(saved.parent)
    assert np.array_equal(images[:], expected)


def test_short_reads_are_continued_and_a_disk_that_fails_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, expected, real = Dataset.load(saved, 0).train.images, make_dataset(0.2).train.images, os.preadv
    rows = np.array([5, 6, 7, 2, 0, 1, 47])
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, at, *_: real(descriptor, [views[0][:10]], at))
    assert np.array_equal(images[rows], expected[rows]) and np.array_equal(images[3:9], expected[3:9])
    assert images[rows[:0]].shape == images[5:5].shape == (0, 4, 4, 3)
    with pytest.raises(IndexError, match="images 0 to 48 of 48"):
        images[np.array([0, 48])]

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match=r"cannot read .*train-images.npy: Input/output error"):
        images[:]


def test_loading_and_summing_take_little_memory(tmp_path: Path) -> None:
    train = make_split(NUM_IMAGES, size=SIDE)
    make_dataset(train=train, test=make_split(3, size=SIDE)).save(tmp_path / "dataset.json")
    with at_most(BYTES // 4):
        dataset = Dataset.load(tmp_path / "dataset.json", BYTES // 2)
        assert dataset.mean[0] > 0
    np.testing.assert_allclose(dataset.mean, train.images.reshape(-1, 3).mean(0) / 255, rtol=1e-12)


def test_a_command_verifies_a_file_once_for_as_long_as_it_is_the_same(
    taught: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(taught.path, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    params = load_params(Path("params.yaml"))
    context = Context(params, params.select("smoke"), Console(), StopSignal())
    dataset = context.dataset()
    assert context.dataset() is dataset
    dataset.save(context.paths.dataset)
    assert context.dataset() is not dataset and context.dataset().sha256 == dataset.sha256
    with context.paths.dataset.open("r+b") as file:
        file.truncate(500)
    with pytest.raises(DataError):
        context.dataset()


# --- writing ---------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_disk_that_fails_at_any_write_leaves_the_earlier_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier, real, sizes, left = contents(saved.parent), os.write, list[int](), 0

    def noting(descriptor: int, data: bytes) -> int:
        sizes.append(len(data))
        if len(sizes) == left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    dataset = make_dataset(train=make_split(90))
    monkeypatch.setattr(os, "write", noting)
    dataset.save(saved.parent.with_name("whole") / "dataset.json")
    num_calls = len(sizes)
    for number in range(num_calls):
        left = number + 1
        sizes.clear()
        with pytest.raises(
            StorageError, match=r"cannot write .*(npy|dataset.json): No space left on device; free space"
        ):
            dataset.save(saved)
        assert contents(saved.parent) == earlier
    assert num_calls == 9 and Dataset.load(saved.parent.with_name("whole") / "dataset.json").sha256 == dataset.sha256


def test_short_writes_are_continued(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1000]))
    make_dataset(0.2).save(saved.parent.with_name("again") / "dataset.json")
    assert contents(saved.parent.with_name("again")) == contents(saved.parent)


# --- preparing -------------------------------------------------------------------------------------------


def test_a_folder_beyond_the_limit_is_prepared_to_the_same_files_in_little_memory(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepared(folder, tmp_path / "in_ram", monkeypatch, 10 * BYTES, 10 * BYTES)
    spilled = prepared(folder, tmp_path / "spilled", monkeypatch, BYTES // 2, BYTES // 2)
    assert spilled == expected and {"dataset.json", "train-images.npy", "summary.json"} < spilled.keys()
    assert Dataset.load(tmp_path / "spilled" / "dataset.json").sha256.encode() in spilled["dataset.json"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".train-images.npy.0123456789abcdef.tmp").write_bytes(b"half")
    assert not [name for name in prepared(folder, tmp_path / "out", monkeypatch, 1, BYTES) if name.startswith(".")]


def test_bad_files_refuse_a_spilled_folder_and_leave_nothing(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=": 2 bad: train/cat/100x.bmp"):
        read_folder(list_source(folder), SIDE, skip_bad=False, spill=Spill(tmp_path / "out", 0))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_while_spilling_is_a_storage_error(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fill_up)
    with pytest.raises(StorageError, match=r"decoded images in .*out: No space left on device; free space"):
        read_folder(list_source(folder), SIDE, skip_bad=True, spill=Spill(tmp_path / "out", 0))
    assert list((tmp_path / "out").iterdir()) == []


def test_spilled_images_outlive_their_folder_and_can_be_cut(tmp_path: Path) -> None:
    images = make_split(20).images
    with SpilledImages(tmp_path / "spill", images.shape) as spilled:
        for row in reversed(range(20)):
            spilled[row] = images[row]
        kept = spilled.read()
    shutil.rmtree(tmp_path / "spill")
    rows = np.array([19, 0, 7, 7])
    cut = Split(kept, np.arange(20)).take(rows).take(np.array([3, 0]))
    assert isinstance(cut.images, Selection) and cut.labels.tolist() == [7, 19]
    assert np.array_equal(cut.images[:], images[[7, 19]]) and np.array_equal(cut.images[np.array([1])], images[[19]])
    assert (cut.images.shape, cut.images.nbytes, len(cut.images)) == ((2, 4, 4, 3), 96, 2)
    assert isinstance(select(images, rows), np.ndarray)
    assert np.array_equal(np.concatenate(list(chunks(cut.images))), images[[7, 19]])


# --- the limit -------------------------------------------------------------------------------------------


def test_the_limit_is_a_share_of_ram_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RESIDENT_VARIABLE, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    alone = resident_limit(torch.device("cpu"))
    assert 2**20 < alone <= ram // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resident_limit(torch.device("cpu")) == alone // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(UsageError, match="LOCAL_WORLD_SIZE=0: not a number of processes"):
        resident_limit(torch.device("cpu"))
    monkeypatch.setenv(RESIDENT_VARIABLE, "12345")
    assert resident_limit(torch.device("cpu")) == 12345


@pytest.mark.parametrize("text", ["", "-1", "1e9", "4GB", "²"])
def test_a_limit_that_is_no_number_of_bytes_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(RESIDENT_VARIABLE, text)
    with pytest.raises(UsageError, match=f"{RESIDENT_VARIABLE}={text}: not a whole number of bytes"):
        resident_limit(torch.device("cpu"))
