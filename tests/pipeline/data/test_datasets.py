"""Data sets: property tests of splits, reference tests of statistics, damage tests of the file."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import itertools
import math
import os
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.recipes import DatasetRecipe
from pipeline.data.datasets import SCHEMA, Dataset, Split, assemble, stratified_split
from pipeline.errors import DataError, StorageError

NAMES = ("ant", "bee", "çà et là")


def make_split(num_samples, first=0, size=4):
    """Images that all differ: the first pixels encode the index."""
    images = np.random.default_rng(first).integers(0, 256, (num_samples, size, size, 3), np.uint8)
    numbers = np.arange(first, first + num_samples)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // 256, numbers % 256
    return Split(images, numbers % len(NAMES))


def numbers_of(split):
    return (split.images[:, 0, 0, 0].astype(int) * 256 + split.images[:, 0, 0, 1]).tolist()


def make_dataset(val_fraction=0.0, source="folder", names=NAMES, train=None, test=None):
    recipe = DatasetRecipe(source=source, val_fraction=val_fraction)
    return assemble(source, names, train or make_split(60), test or make_split(30, first=1000), recipe)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "dataset.h5"
    make_dataset(0.2).save(path)
    return path


# --- splits ----------------------------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(0, 4), max_size=80).map(lambda some: np.array([*some, *some], np.int64)),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_split_is_disjoint_complete_sorted_and_stratified(labels, fraction, seed):
    names = tuple("abcde")
    rest, cut = stratified_split(labels, fraction, seed, names)
    assert sorted([*rest, *cut]) == list(range(len(labels)))
    assert rest.tolist() == sorted(rest) and cut.tolist() == sorted(cut)
    for label in np.unique(labels):
        num_members = int((labels == label).sum())
        num_cut = int((labels[cut] == label).sum())
        share = math.ceil(round(fraction * len(labels), 6)) * num_members / len(labels)
        assert 1 <= num_cut <= num_members - 1
        assert abs(num_cut - share) < 1 or num_cut in (1, num_members - 1)
    again = stratified_split(labels, fraction, seed, names)
    assert np.array_equal(rest, again[0]) and np.array_equal(cut, again[1])


@pytest.mark.parametrize(("fraction", "num_cut"), [(0.1, 100), (0.07, 70), (0.0701, 71), (0.2, 200)])
def test_the_whole_cut_is_the_fraction_rounded_up_without_rounding_errors(fraction, num_cut):
    labels = np.arange(1000) % 10
    assert len(stratified_split(labels, fraction, 0, tuple("0123456789"))[1]) == num_cut


def test_a_split_never_changes_with_a_version_of_a_library():
    labels = np.array([0, 1] * 8)
    assert stratified_split(labels, 0.25, 0, ("a", "b"))[1].tolist() == [4, 10, 11, 13]
    assert stratified_split(labels, 0.25, 1, ("a", "b"))[1].tolist() == [0, 3, 11, 12]


def test_a_class_with_a_single_sample_is_refused_by_name():
    with pytest.raises(DataError, match="class 'bee' has a single sample"):
        stratified_split(np.array([0, 0, 1, 2, 2]), 0.5, 0, NAMES)


def test_a_source_without_a_test_split_gets_test_then_validation_cut_off_train():
    recipe = DatasetRecipe(source="folder", test_fraction=0.2, val_fraction=0.25)
    dataset = assemble("folder", NAMES, make_split(300), None, recipe)
    parts = [numbers_of(split) for split in dataset.splits.values()]
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 180,
        "val": 60,
        "test": 60,
    }
    assert sorted(itertools.chain(*parts)) == list(range(300))
    assert all(part == sorted(part) for part in parts)
    for split in dataset.splits.values():
        assert len(set(np.bincount(split.labels))) == 1
        assert split.labels.tolist() == [number % 3 for number in numbers_of(split)]


def test_a_test_split_is_never_touched_by_the_validation_split():
    plain, cut = make_dataset(0.0), make_dataset(0.25)
    assert plain.val is None and plain.evaluation == ("test", plain.test)
    assert cut.evaluation == ("val", cut.val) and len(cut.val) == 15
    assert np.array_equal(plain.test.images, cut.test.images)
    assert sorted(numbers_of(cut.train) + numbers_of(cut.val)) == numbers_of(plain.train)


def test_a_single_class_is_refused():
    with pytest.raises(DataError, match="needs two"):
        assemble(
            "folder",
            ("a",),
            Split(make_split(4).images, np.zeros(4, int)),
            None,
            DatasetRecipe(source="folder"),
        )


# --- statistics and identity -------------------------------------------------------------------------------


def test_mean_and_std_are_those_of_the_training_pixels():
    dataset = make_dataset(train=make_split(2500))
    pixels = dataset.train.images.reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-9)
    assert dataset.image_size == 4 and dataset.num_classes == 3


def test_a_constant_channel_has_a_std_that_can_be_divided_by():
    split = make_split(6)
    split.images[..., 2] = 77
    dataset = make_dataset(train=split)
    assert dataset.mean[2] == pytest.approx(77 / 255, rel=1e-15) and dataset.std[2] == 1.0


def test_the_sha256_is_of_the_content_alone():
    digest = make_dataset().sha256
    assert make_dataset(source="digits").sha256 == digest
    train = make_split(60)
    strided = Split(np.asfortranarray(train.images), train.labels.astype(">i8"))
    assert make_dataset(train=strided).sha256 == digest


def test_the_sha256_changes_with_a_pixel_a_label_a_name_and_a_split():
    pixel, label = make_split(60), make_split(60)
    pixel.images[59, 3, 3, 2] ^= 1
    label.labels[0] = 1
    digests = [
        make_dataset().sha256,
        make_dataset(train=pixel).sha256,
        make_dataset(train=label).sha256,
        make_dataset(names=("ant", "bee", "wasp")).sha256,
        make_dataset(val_fraction=0.2).sha256,
        make_dataset(train=make_split(30, first=1000), test=make_split(60)).sha256,
    ]
    assert len(set(digests)) == len(digests)


# --- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_a_saved_data_set_loads_as_it_was(tmp_path, val_fraction):
    dataset = make_dataset(val_fraction)
    dataset.save(tmp_path / "new" / "dataset.h5")
    loaded = Dataset.load(tmp_path / "new" / "dataset.h5")
    assert (loaded.source, loaded.class_names, loaded.sha256) == ("folder", NAMES, dataset.sha256)
    assert loaded.splits.keys() == dataset.splits.keys()
    for name, split in dataset.splits.items():
        assert np.array_equal(loaded.splits[name].images, split.images)
        assert np.array_equal(loaded.splits[name].labels, split.labels)
        assert loaded.splits[name].images.dtype == np.uint8 and loaded.splits[name].labels.dtype == np.int64


def test_equal_data_sets_give_equal_bytes_without_a_time(tmp_path, saved):
    make_dataset(0.2).save(tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == saved.read_bytes()
    with h5py.File(saved) as file:
        names = ["class_names", "train/images", "val/labels"]
        assert [h5py.h5o.get_info(file[name].id).mtime for name in names] == [0, 0, 0]


def test_any_hdf5_tool_reads_the_documented_layout(saved):
    dataset = make_dataset(0.2)
    with h5py.File(saved) as file:
        attributes = {name: value.decode() for name, value in file.attrs.items()}
        assert attributes == {"schema": SCHEMA, "source": "folder", "sha256": dataset.sha256}
        assert tuple(file["class_names"].asstr()[()]) == NAMES
        assert set(file) == {"class_names", "train", "val", "test"}
        assert np.array_equal(file["val/images"], dataset.val.images)
        assert np.array_equal(file["val/labels"], dataset.val.labels)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(DataError, match=r"no prepared data set there; `pipeline prepare`"):
        Dataset.load(tmp_path / "dataset.h5")


def test_a_file_without_rights_is_a_storage_error(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        Dataset.load(saved)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(saved, monkeypatch, number):
    if number == errno.EAGAIN:  # HDF5 locks what it has open for writing
        held = os.open(saved, os.O_RDWR)
        fcntl.flock(held, fcntl.LOCK_EX)
    else:
        monkeypatch.setattr(h5py, "File", Mock(side_effect=OSError(number, "Unable to open file")))
    with pytest.raises(StorageError) as caught:
        Dataset.load(saved)
    busy = "another program holds it, perhaps to write; close it there, then run again"
    assert str(caught.value) == f"{saved}: " + (
        busy if number == errno.EAGAIN else f"cannot be read ({os.strerror(number)})"
    )
    if number == errno.EAGAIN:
        os.close(held)
        Dataset.load(saved)


def test_one_changed_pixel_is_refused(saved):
    content = bytearray(saved.read_bytes())
    at = content.index(make_dataset(0.2).test.images.tobytes())
    content[at + 5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged: the SHA-256 of its content is [0-9a-f]{64}, not"):
        Dataset.load(saved)


@pytest.mark.parametrize("content", [b"", b"no HDF5", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + b"\xff" * 3000])
def test_what_is_no_hdf5_file_is_refused(saved, content):
    saved.write_bytes(content)
    with pytest.raises(DataError, match="not a prepared data set"):
        Dataset.load(saved)


def test_a_folder_of_that_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a prepared data set"):
        Dataset.load(tmp_path)


@pytest.mark.parametrize("length", [100, 1000, 3000, -1000, -1])
def test_a_truncated_file_is_refused(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(DataError, match="not a prepared data set"):
        Dataset.load(saved)


def test_a_flipped_bit_is_refused_or_changes_nothing(saved):
    content = saved.read_bytes()
    expected = make_dataset(0.2)
    num_refused = 0
    for at in range(0, len(content), 13):
        saved.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            loaded = Dataset.load(saved)
        except DataError as error:
            assert "\n" not in str(error)
            num_refused += 1
        else:
            assert loaded.sha256 == expected.sha256 and loaded.class_names == expected.class_names
            assert np.array_equal(loaded.train.images, expected.train.images)
    assert num_refused > 100


def replace(file, name, data):
    del file[name]
    file[name] = data


def allocate_nothing(file):
    del file["train/images"]
    file.create_dataset("train/images", (10**9, 4, 4, 3), "u1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.attrs.__delitem__("sha256"), "sha256"),
        (lambda file: file.attrs.__setitem__("schema", np.bytes_("other/1")), "schema"),
        (lambda file: file.attrs.__setitem__("schema", SCHEMA), "decode"),
        (lambda file: file.__delitem__("test"), "test"),
        (lambda file: file.__delitem__("train/labels"), "labels"),
        (lambda file: replace(file, "train", np.zeros(3)), "not a prepared"),
        (lambda file: replace(file, "class_names", np.zeros(3)), "class_names: float64"),
        (
            lambda file: replace(file, "test/images", np.zeros((30, 4, 4, 3), np.float32)),
            "test/images: float32",
        ),
        (lambda file: replace(file, "test/images", np.zeros((30, 4, 4), np.uint8)), r"test/images: uint8 of"),
        (lambda file: replace(file, "test/images", np.zeros((30, 4, 5, 3), np.uint8)), r"\(30, 4, 5, 3\)"),
        (lambda file: replace(file, "test/images", np.zeros((29, 4, 4, 3), np.uint8)), r"\(29, 4, 4, 3\)"),
        (lambda file: replace(file, "test/labels", np.full(30, 3)), "labels outside 0 to 2"),
        (lambda file: replace(file, "test/labels", np.full(30, -1)), "labels outside 0 to 2"),
        (allocate_nothing, "1000000000"),
        (lambda file: file.__delitem__("val"), "damaged"),
    ],
)
def test_a_file_that_is_not_a_whole_data_set_is_refused(saved, damage, message):
    with h5py.File(saved, "r+") as file:
        damage(file)
    with pytest.raises(DataError, match=message) as caught:
        Dataset.load(saved)
    assert "\n" not in str(caught.value) and "pipeline prepare" in str(caught.value)


def with_paths(split: Split, name: str) -> Split:
    return dataclasses.replace(split, paths=np.array([f"{name}/é{i}.png".encode() for i in range(len(split))]))


def test_paths_go_with_their_images_through_splits_and_file_and_not_into_the_sha256(tmp_path):
    recipe = DatasetRecipe(source="folder", test_fraction=0.2, val_fraction=0.25)
    bare = assemble("folder", NAMES, make_split(60), None, recipe)
    dataset = assemble("folder", NAMES, with_paths(make_split(60), "train"), None, recipe)
    assert dataset.sha256 == bare.sha256 and bare.train.names is None
    for name in ("with", "bare"):
        (dataset if name == "with" else bare).save(tmp_path / f"{name}.h5")
    loaded, without = Dataset.load(tmp_path / "with.h5", 0), Dataset.load(tmp_path / "bare.h5")
    assert loaded.sha256 == without.sha256 and without.test.names is None
    every = {make_split(60).images[row].tobytes(): f"train/é{row}.png" for row in range(60)}
    for split in loaded.splits.values():
        assert split.names == [every[image.tobytes()] for image in split.images[:]]
    with h5py.File(tmp_path / "with.h5", "r+") as file:
        paths = file["test/paths"][:-1]
        del file["test/paths"]
        file["test/paths"] = paths
    with pytest.raises(DataError, match="test: 11 paths of 12 images"):
        Dataset.load(tmp_path / "with.h5")


@settings(max_examples=25)
@given(
    names=st.lists(
        st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1),
        min_size=2,
        max_size=5,
        unique=True,
    )
)
def test_class_names_of_any_script_survive_the_file(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("names") / "dataset.h5"
    labels = np.arange(10) % len(names)
    split = Split(np.zeros((10, 4, 4, 3), np.uint8), labels)
    make_dataset(names=tuple(names), train=split, test=split).save(path)
    assert Dataset.load(path).class_names == tuple(names)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_damage(saved, monkeypatch, number):
    opened = h5py.File

    def refuse(*args, locking=None):
        if locking is not False:
            raise OSError(number, f"unable to lock file, errno = {number}")
        return opened(*args, locking=locking)

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(StorageError, match=r"cannot lock .*: .*unable to lock.*set TITN_NO_LOCKS=1"):
        Dataset.load(saved)
    monkeypatch.setenv("TITN_NO_LOCKS", "1")
    assert len(Dataset.load(saved).train) > 0


ARRAYS, CLASSES = np.zeros((6, 4, 4, 3), np.uint8), np.array([0, 1] * 3)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (ARRAYS.astype(np.float32), CLASSES, "float32"),
        (ARRAYS[..., 0], CLASSES, "(6, 4, 4)"),
        (ARRAYS[:, :2], CLASSES, "(6, 2, 4, 3)"),
        (ARRAYS, CLASSES[:5], "give 6 integers"),
        (ARRAYS, CLASSES.astype(float), "float64"),
        (ARRAYS, CLASSES + 1, "from 1 to 2; there are 2"),
        (ARRAYS, CLASSES - 1, "from -1 to 0"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(images, labels, words):
    with pytest.raises(DataError) as error:
        Dataset.from_arrays(images, labels, ["a", "b"])
    assert words in str(error.value)


def test_a_test_split_of_arrays_is_kept_and_must_fit():
    dataset = Dataset.from_arrays(ARRAYS, CLASSES, ["a", "b"], test=(ARRAYS[:2] + 9, CLASSES[:2]))
    assert len(dataset.train) == 6 and dataset.test.images.max() == 9
    with pytest.raises(DataError, match="test images"):
        Dataset.from_arrays(ARRAYS, CLASSES, ["a", "b"], test=(np.zeros((2, 8, 8, 3), np.uint8), CLASSES[:2]))
