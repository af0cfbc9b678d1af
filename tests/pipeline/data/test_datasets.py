"""Data sets: property tests of splits, reference tests of statistics, damage tests of the files."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.recipes import DatasetRecipe
from pipeline.data.datasets import Dataset, Split, assemble, stratified_split
from pipeline.data.file import SCHEMA
from pipeline.errors import DataError, StorageError
from pipeline.system.canonical import seal
from pipeline.system.storage import to_json

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
    path = tmp_path / "saved" / "dataset.json"
    make_dataset(0.2).save(path)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    with pytest.raises(DataError, match="class 'bee' has 1 sample, and is to be in 2 splits; add"):
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


def test_each_class_needs_a_sample_for_each_split_that_is_cut():
    recipe = DatasetRecipe(source="folder", test_fraction=0.2, val_fraction=0.25)
    images, labels = make_split(8).images, np.array([0, 0, 0, 1, 1, 2, 2, 2])
    with pytest.raises(DataError, match=r"class 'bee' has 2 samples, and is to be in 3 splits; add samples, or give"):
        assemble("folder", NAMES, Split(images, labels), None, recipe)


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


def test_the_sha256_of_pixels_is_that_of_all_versions():
    assert make_dataset().sha256 == "eeaa902900c7cc39952be0e3a1851fe2d04be2a48798a0e1060b333cd3e2beb2"
    assert make_dataset(0.2).sha256 == "ff14ccf2fdb6e985467800770ca0051dedbe9f0990b4dcde23745d56088d5f7f"


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
    dataset.save(tmp_path / "new" / "dataset.json")
    loaded = Dataset.load(tmp_path / "new" / "dataset.json")
    assert (loaded.source, loaded.class_names, loaded.sha256) == ("folder", NAMES, dataset.sha256)
    assert loaded.splits.keys() == dataset.splits.keys()
    for name, split in dataset.splits.items():
        assert np.array_equal(loaded.splits[name].images, split.images)
        assert np.array_equal(loaded.splits[name].labels, split.labels)
        assert loaded.splits[name].images.dtype == np.uint8 and loaded.splits[name].labels.dtype == np.int64


def test_equal_data_sets_give_equal_bytes_without_a_time(tmp_path, saved):
    make_dataset(0.2).save(tmp_path / "again" / "dataset.json")
    assert contents(tmp_path / "again") == contents(saved.parent)


def test_numpy_and_json_read_the_documented_layout(saved):
    dataset = make_dataset(0.2)
    described = json.loads(saved.read_bytes())
    assert (described["schema"], described["store"], described["source"]) == (SCHEMA, "pixels", "folder")
    assert (described["sha256"], tuple(described["class_names"])) == (dataset.sha256, NAMES)
    assert described["splits"] == {"train": 48, "val": 12, "test": 30}
    assert set(contents(saved.parent)) == {"dataset.json", *described["files"]}
    for split in ("train", "val", "test"):
        for part in ("images", "labels"):
            stored = np.load(saved.with_name(f"{split}-{part}.npy"))
            assert np.array_equal(stored, getattr(dataset.splits[split], part))


def test_the_rule_by_which_pixels_became_squares_is_kept_beside_them_and_decides_nothing_else(tmp_path, saved):
    recipe = DatasetRecipe(source="folder", val_fraction=0.2, resize="crop")
    assemble("folder", NAMES, make_split(60), make_split(30, first=1000), recipe).save(tmp_path / "crop/dataset.json")
    cropped, squeezed = Dataset.load(tmp_path / "crop/dataset.json"), Dataset.load(saved)
    assert (cropped.resize, squeezed.resize) == ("crop", "squeeze") and cropped.sha256 == squeezed.sha256
    described = json.loads((tmp_path / "crop/dataset.json").read_bytes())
    assert described.pop("resize") == "crop"
    assert to_json(seal(described)) == saved.read_bytes()
    (tmp_path / "crop/dataset.json").write_bytes(to_json(seal({**described, "resize": "other"})))
    with pytest.raises(DataError, match=r"not a prepared data set \(resize 'other'\)"):
        Dataset.load(tmp_path / "crop/dataset.json")


def test_what_belongs_to_a_former_data_set_is_removed(saved):
    for name in ("dataset.h5", "notes.txt", "train-paths.npy"):
        saved.with_name(name).write_bytes(b"")
    make_dataset().save(saved)
    names = {f"{split}-{part}.npy" for split in ("train", "test") for part in ("images", "labels")}
    assert set(contents(saved.parent)) == {"dataset.json", "notes.txt", *names}


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(DataError, match=r"no prepared data set there; `pipeline prepare`"):
        Dataset.load(tmp_path / "dataset.json")


def test_one_of_a_former_layout_is_named(tmp_path):
    (tmp_path / "dataset.h5").write_bytes(b"")
    with pytest.raises(DataError, match=r"dataset\.h5: of a former layout; run `pipeline prepare` again"):
        Dataset.load(tmp_path / "dataset.json")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("name", ["dataset.json", "test-images.npy", "val-labels.npy"])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(saved, monkeypatch, name, number):
    real = Path.open

    def fail(path, *args, **kwargs):
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(StorageError) as caught:
        Dataset.load(saved)
    assert str(caught.value) == f"cannot read {saved.with_name(name)}: {os.strerror(number)}"


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[]", b"null", b"{}", b'{"schema": "titn-dataset/1"}', b"\xff"])
def test_what_is_no_data_set_is_refused(saved, content):
    saved.write_bytes(content)
    with pytest.raises(DataError, match="not a prepared data set") as caught:
        Dataset.load(saved)
    assert "\n" not in str(caught.value)


def test_a_folder_of_that_name_is_refused(tmp_path):
    with pytest.raises(StorageError, match="Is a directory"):
        Dataset.load(tmp_path)


def test_damage_at_any_byte_is_told_and_the_file_is_named(saved):
    num_bytes = 0
    for path in sorted(saved.parent.iterdir()):
        content = path.read_bytes()
        for at in [*range(0, min(len(content), 200), 9), *range(200, len(content), 397), len(content) - 1]:
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            with pytest.raises(DataError) as caught:
                Dataset.load(saved)
            message = str(caught.value)
            assert path.name in message and "\n" not in message and "pipeline prepare` again" in message
            num_bytes += 1
        for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
            path.write_bytes(changed)
            for max_bytes in (None, 0):
                with pytest.raises(DataError, match=path.name):
                    Dataset.load(saved, max_bytes)
        path.write_bytes(content)
    assert num_bytes > 150 and Dataset.load(saved).sha256 == make_dataset(0.2).sha256


def test_one_changed_pixel_is_refused(saved):
    path = saved.with_name("test-images.npy")
    content = bytearray(path.read_bytes())
    content[content.index(make_dataset(0.2).test.images.tobytes()) + 5] ^= 1
    path.write_bytes(content)
    for max_bytes in (None, 0):
        with pytest.raises(DataError, match=r"test-images.npy: damaged: the SHA-256 of the data set is [0-9a-f]{64}, "):
            Dataset.load(saved, max_bytes)


def without(description, *keys):
    *outer, last = keys
    for key in outer:
        description = description[key]
    del description[last]


IMAGES = "test-images.npy"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: without(d, "sha256"), "sha256"),
        (lambda d: d.update(sha256="0"), "SHA-256 '0'"),
        (lambda d: d.update(sha256="0" * 64), "dataset.json: damaged: the SHA-256"),
        (lambda d: d.update(schema="other/1"), "schema 'other/1', expected"),
        (lambda d: d.update(store="other"), "other"),
        (lambda d: d.update(class_names=[]), "0 class names"),
        (lambda d: d.update(class_names=[1, 2, 3]), "3 class names"),
        (lambda d: d.update(class_names=["a", "b"]), "test-labels.npy: labels outside 0 to 1|train-labels"),
        (lambda d: without(d, "splits", "test"), "splits train, val"),
        (lambda d: d["splits"].update(more=1), "splits .*more"),
        (lambda d: d["splits"].update(test=29), r"test-images.npy: .* for 29 samples"),
        (lambda d: d["splits"].update(test=True), r"test-images.npy: .* for True samples"),
        (lambda d: without(d, "files", IMAGES), IMAGES),
        (lambda d: d["files"][IMAGES].update(dtype="<f4"), r"test-images.npy: <f4 of shape \(30, 4, 4, 3\)"),
        (lambda d: d["files"][IMAGES].update(dtype="|O"), r"test-images.npy: \|O of"),
        (lambda d: d["files"][IMAGES].update(shape=[30, 4, 4]), r"\(30, 4, 4\)"),
        (lambda d: d["files"][IMAGES].update(shape=[30, 4, 5, 3]), r"\(30, 4, 5, 3\)"),
        (lambda d: d["files"][IMAGES].update(shape=[30, 8, 8, 3]), "damaged: 1568 bytes, not"),
        (lambda d: d["files"][IMAGES].update(shape=[30.0, 4, 4, 3]), r"\(30.0"),
        (lambda d: d["files"][IMAGES].update(shape=[-30, -4, -4, 3]), r"\(-30"),
        (lambda d: (d["files"][IMAGES].update(shape=[10**9, 4, 4, 3]), d["splits"].update(test=10**9)), "1000000000"),
        (lambda d: without(d, "splits", "val"), "damaged"),
    ],
)
def test_what_anyone_can_seal_is_not_believed(saved, damage, message):
    described = json.loads(saved.read_bytes())
    damage(described)
    saved.write_bytes(to_json(seal(described)))
    with pytest.raises(DataError, match=message) as caught:
        Dataset.load(saved)
    assert "\n" not in str(caught.value) and "pipeline prepare" in str(caught.value)


def test_a_missing_array_is_named(saved):
    saved.with_name(IMAGES).unlink()
    with pytest.raises(DataError, match="test-images.npy: missing"):
        Dataset.load(saved)


def with_paths(split: Split, name: str) -> Split:
    return dataclasses.replace(split, paths=np.array([f"{name}/é{i}.png".encode() for i in range(len(split))]))


def test_paths_go_with_their_images_through_splits_and_file_and_not_into_the_sha256(tmp_path):
    recipe = DatasetRecipe(source="folder", test_fraction=0.2, val_fraction=0.25)
    bare = assemble("folder", NAMES, make_split(60), None, recipe)
    dataset = assemble("folder", NAMES, with_paths(make_split(60), "train"), None, recipe)
    assert dataset.sha256 == bare.sha256 and bare.train.names is None
    for name in ("with", "bare"):
        (dataset if name == "with" else bare).save(tmp_path / name / "dataset.json")
    loaded, without = Dataset.load(tmp_path / "with/dataset.json", 0), Dataset.load(tmp_path / "bare/dataset.json")
    assert loaded.sha256 == without.sha256 and without.test.names is None
    every = {make_split(60).images[row].tobytes(): f"train/é{row}.png" for row in range(60)}
    for split in loaded.splits.values():
        assert split.names == [every[image.tobytes()] for image in split.images[:]]


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
    path = tmp_path_factory.mktemp("names") / "dataset.json"
    labels = np.arange(10) % len(names)
    split = Split(np.zeros((10, 4, 4, 3), np.uint8), labels)
    make_dataset(names=tuple(names), train=split, test=split).save(path)
    assert Dataset.load(path).class_names == tuple(names)


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
        (ARRAYS.tolist(), CLASSES, "images are int64"),
        (ARRAYS[:0], CLASSES[:0], "images are of shape (0, 4, 4, 3); give at least one"),
        (ARRAYS[:, :0, :0], CLASSES, "images are of shape (6, 0, 0, 3)"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(images, labels, words):
    with pytest.raises(DataError) as error:
        Dataset.from_arrays(images, labels, ["a", "b"])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("ab", "class names are 'ab'; give a list with a text for each class"),
        (2, "class names are 2"),
        (["a", None], "class name 1 is None; give a text that is not empty, or a whole number"),
        ([0.5, "b"], "class name 0 is 0.5"),
        ([False, True], "class name 0 is False"),
        ([b"a", b"b"], "class name 0 is b'a'"),
        (["a", " "], "class name 1 is ' '"),
        (["a", "b", "a"], "class names have 'a' more than once; give each class a name of its own"),
        ([1, "1"], "class names have '1' more than once"),
        (["\u00e9", "e\u0301"], "one name in two Unicode forms"),
    ],
)
def test_class_names_that_cannot_be_kept_are_refused(names, words):
    with pytest.raises(DataError) as error:
        Dataset.from_arrays(ARRAYS, CLASSES, names)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("names", [range(2), np.arange(2), np.array(["0", "1"]), ("0", "1")])
def test_class_names_may_be_whole_numbers_and_labels_a_list(tmp_path, names):
    dataset = Dataset.from_arrays(ARRAYS, CLASSES.tolist(), names)
    assert list(map(type, dataset.class_names)) == [str, str]
    dataset.save(tmp_path / "dataset.json")
    assert Dataset.load(tmp_path / "dataset.json").class_names == ("0", "1")


def test_the_rule_by_which_arrays_became_squares_may_be_named():
    assert Dataset.from_arrays(ARRAYS, CLASSES, ["a", "b"]).resize == "squeeze"
    assert Dataset.from_arrays(ARRAYS, CLASSES, ["a", "b"], resize="crop").resize == "crop"
    with pytest.raises(DataError, match="resize: 'middle'; choose from squeeze, crop"):
        Dataset.from_arrays(ARRAYS, CLASSES, ["a", "b"], resize="middle")


def test_a_test_split_of_arrays_is_kept_and_must_fit():
    dataset = Dataset.from_arrays(ARRAYS, CLASSES, ["a", "b"], test=(ARRAYS[:2] + 9, CLASSES[:2]))
    assert len(dataset.train) == 6 and dataset.test.images.max() == 9
    with pytest.raises(DataError, match="test images"):
        Dataset.from_arrays(ARRAYS, CLASSES, ["a", "b"], test=(np.zeros((2, 8, 8, 3), np.uint8), CLASSES[:2]))
