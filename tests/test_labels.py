"""The label cache round-trips, refuses whatever is not exactly itself, and survives any interruption."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, StorageError
from pipeline.label_identity import canonical_json, label_dtype, to_labels
from pipeline.label_parts import LabelParts, seal
from pipeline.labels import SCHEMA_VERSION, Canary, LabelCache, fingerprint, make_identity, make_provenance
from pipeline.recipes import ViewRecipe
from pipeline.seals import SEAL_SIZE, make_seal

NUM_SAMPLES = 40
NUM_CLASSES = 7
CANARIES = (Canary(view=0, samples=(3, 0, 39), sha256="c" * 64),)


def identity_of(**changes):
    arguments = {
        "dataset_sha256": "a" * 64,
        "split": "train",
        "view_recipe": ViewRecipe(seed=3, count=4, crop=4, flip=True, rotation=10.0, mixing="cutmix"),
        "class_names": [f"class {index}" for index in range(NUM_CLASSES)],
        "num_samples": NUM_SAMPLES,
    }
    return make_identity(**(arguments | changes))


def provenance_of(**changes):
    arguments = {
        "teacher": "vgg16_bn",
        "checkpoint_sha256": "b" * 64,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
        "precision": "fp32",
        "device": "cpu",
        "versions": {"torch": "2.6.0", "numpy": "1.26.0"},
    }
    return make_provenance(**(arguments | changes))


def row_of(view, num_samples=NUM_SAMPLES, num_classes=NUM_CLASSES):
    return np.random.default_rng(view).integers(0, num_classes, num_samples)


def parts_in(directory, identity=None, provenance=None):
    return LabelParts(directory, identity=identity or identity_of(), provenance=provenance or provenance_of())


def label(directory, path, count, *, adopt=False, parts=None):
    """Do what the command does: label the missing views, then seal."""
    parts = parts or parts_in(directory)
    if adopt:
        parts.adopt(LabelCache.open(path))
    for view in parts.missing(count):
        parts.write(view, row_of(view))
    return seal(path, parts=parts, count=count, clean=clean_of(), canaries=CANARIES)


def clean_of():
    return {"val": row_of(1000, 5), "test": row_of(1001, 11)}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """The bytes of a sealed file of four views."""
    directory = tmp_path_factory.mktemp("sealed")
    label(directory / "parts", directory / "labels.h5", 4)
    return (directory / "labels.h5").read_bytes()


# Round trips


def test_what_was_labelled_is_what_is_read(tmp_path):
    path = tmp_path / "labels.h5"
    returned = label(tmp_path / "parts", path, 4)
    for cache in (returned, LabelCache.open(path)):
        assert np.array_equal(cache.labels, np.stack([row_of(view) for view in range(4)]))
        assert cache.labels.dtype == np.uint8 and not cache.labels.flags.writeable
        assert set(cache.clean) == {"val", "test"} and np.array_equal(cache.clean["test"], row_of(1001, 11))
        assert cache.canaries == CANARIES
        assert cache.identity == identity_of() and cache.provenance == provenance_of()
        assert (cache.num_views, cache.num_samples, cache.num_classes) == (4, NUM_SAMPLES, NUM_CLASSES)
        assert cache.fingerprint == fingerprint(identity_of())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["labels.h5"]


@settings(max_examples=60)
@given(
    num_views=st.integers(1, 9),
    num_samples=st.integers(1, 300),
    num_classes=st.one_of(st.integers(1, 300), st.sampled_from([255, 256, 65535])),
    name=st.text(max_size=20),
    splits=st.lists(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True), unique=True, max_size=12),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape_any_number_of_classes_and_any_name_round_trips(
    num_views, num_samples, num_classes, name, splits, seed
):
    rng = np.random.default_rng(seed)
    dtype = label_dtype(num_classes)
    cache = LabelCache(
        labels=rng.integers(0, num_classes, (num_views, num_samples)).astype(dtype),
        clean={split: rng.integers(0, num_classes, num_samples).astype(dtype) for split in splits},
        canaries=(Canary(view=num_views - 1, samples=(), sha256="0" * 64),),
        identity=identity_of(class_names=[name] * num_classes, num_samples=num_samples),
        provenance=provenance_of(teacher=name),
    )
    data = cache.to_bytes()
    read = LabelCache.from_bytes(data)
    assert read.labels.dtype == dtype and np.array_equal(read.labels, cache.labels)
    assert read.clean.keys() == cache.clean.keys()
    assert all(np.array_equal(read.clean[split], cache.clean[split]) for split in splits)
    assert (read.identity, read.provenance, read.canaries) == (
        cache.identity,
        cache.provenance,
        cache.canaries,
    )
    assert read.to_bytes() == data


@pytest.mark.parametrize(
    ("num_classes", "dtype", "fill"), [(255, "u1", 255), (256, "<u2", 65535), (65535, "<u2", 65535)]
)
def test_the_fill_value_is_never_a_class(tmp_path, num_classes, dtype, fill):
    identity = identity_of(class_names=["x"] * num_classes)
    parts = parts_in(tmp_path / "parts", identity)
    parts.write(0, np.full(NUM_SAMPLES, num_classes - 1))
    cache = seal(tmp_path / "labels.h5", parts=parts, count=1, clean={})
    assert cache.labels.dtype == np.dtype(dtype) and cache.labels.min() == num_classes - 1
    with h5py.File(tmp_path / "labels.h5") as file:
        assert file["labels"].fillvalue == fill and file["labels"].dtype == np.dtype(dtype)
    with pytest.raises(DataError, match="outside"):
        parts.write(1, np.full(NUM_SAMPLES, fill))


def test_any_hdf5_tool_reads_the_documented_layout(tmp_path, sealed):
    path = tmp_path / "labels.h5"
    path.write_bytes(sealed)
    rows = np.stack([row_of(view) for view in range(4)]).astype(np.uint8)
    with h5py.File(path) as file:
        assert set(file) == {"labels", "digest", "clean", "identity", "provenance"}
        labels = file["labels"]
        assert labels.shape == (4, NUM_SAMPLES) and labels.chunks == (1, NUM_SAMPLES)
        assert labels.fletcher32 and labels.compression is None and labels.fillvalue == 255
        assert np.array_equal(labels[...], rows)
        digests = [np.frombuffer(hashlib.sha256(row.tobytes()).digest(), np.uint8) for row in rows]
        assert np.array_equal(file["digest"][...], digests)
        assert np.array_equal(file["clean/val"][...], row_of(1000, 5))
        assert {key: json.loads(file["identity"].attrs[key]) for key in file["identity"].attrs} == identity_of()
        assert {k: json.loads(file["provenance"].attrs[k]) for k in file["provenance"].attrs} == provenance_of()
        assert json.loads(file.attrs["canaries"]) == [
            {"view": 0, "samples": [3, 0, 39], "sha256": "c" * 64},
        ]
        for name in ("labels", "digest", "clean/val"):
            assert not file[name].id.get_create_plist().get_obj_track_times()


def test_the_user_block_is_the_documented_seal(sealed):
    content = sealed[512:]
    block = struct.pack("<8sIQ32s", b"\x93TITNLC\n", 2, len(content), hashlib.sha256(content).digest())
    assert sealed[:512] == block + bytes(512 - len(block))
    assert content.startswith(b"\x89HDF\r\n\x1a\n")


def test_equal_labels_give_equal_bytes_in_another_process(tmp_path, sealed):
    run_child(tmp_path, 0, "")
    assert (tmp_path / "labels.h5").read_bytes() == sealed


# Resuming and extending


def test_a_cache_extended_later_is_byte_for_byte_the_one_made_at_once(tmp_path, sealed):
    for count in (1, 3, 4):
        label(tmp_path / "parts", tmp_path / "labels.h5", count, adopt=count > 1)
    assert (tmp_path / "labels.h5").read_bytes() == sealed


def test_extending_labels_only_the_new_views(tmp_path):
    path = tmp_path / "labels.h5"
    label(tmp_path / "parts", path, 2)
    parts = parts_in(tmp_path / "parts")
    parts.adopt(LabelCache.open(path))
    assert parts.num_sealed == 2 and parts.missing(2) == [] and parts.missing(5) == [2, 3, 4]


def test_asking_for_fewer_views_drops_none(tmp_path, sealed):
    path = tmp_path / "labels.h5"
    path.write_bytes(sealed)
    assert label(tmp_path / "parts", path, 2, adopt=True).num_views == 4
    assert path.read_bytes() == sealed


def test_any_number_of_processes_can_take_over_from_any_other(tmp_path, sealed):
    first, second = parts_in(tmp_path / "parts"), parts_in(tmp_path / "parts")
    assert first.missing(4) == [0, 1, 2, 3]
    first.write(0, row_of(0))
    second.write(3, row_of(3))
    assert first.missing(4) == second.missing(4) == [1, 2]
    label(tmp_path / "parts", tmp_path / "labels.h5", 4)
    assert (tmp_path / "labels.h5").read_bytes() == sealed


def test_sealing_with_a_view_missing_is_refused_and_writes_nothing(tmp_path):
    parts = parts_in(tmp_path / "parts")
    parts.write(0, row_of(0))
    parts.write(2, row_of(2))
    with pytest.raises(DataError, match="3 views, 1 have no valid part"):
        seal(tmp_path / "labels.h5", parts=parts, count=3, clean={})
    assert not (tmp_path / "labels.h5").exists() and parts.missing(3) == [1]


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("teacher", "vgg19"),
        ("checkpoint_sha256", "d" * 64),
        ("mean", [0.5, 0.4, 0.25]),
        ("std", [0.2, 0.2]),
        ("precision", "bf16"),
        ("device", "cuda"),
        ("versions", {"torch": "2.7.0", "numpy": "1.26.0"}),
        ("compiled", True),
    ],
)
def test_labels_of_two_teachers_never_meet(tmp_path, field, changed):
    path = tmp_path / "labels.h5"
    label(tmp_path / "old", path, 1)
    parts = parts_in(tmp_path / "parts", provenance=provenance_of(**{field: changed}))
    with pytest.raises(DataError) as caught:
        parts.adopt(LabelCache.open(path))
    assert field in str(caught.value) and "--fresh" in str(caught.value) and "\n" not in str(caught.value)
    parts_in(tmp_path / "parts").write(0, row_of(0))
    assert parts.missing(1) == [0]
    with pytest.raises(DataError, match=field):
        LabelCache.open(path, expected_provenance={field: parts.provenance[field]})
    LabelCache.open(path, expected_provenance={field: provenance_of()[field]})


def test_parts_under_each_others_names_count_as_missing(tmp_path):
    parts = parts_in(tmp_path)
    for view in (0, 1, 2):
        parts.write(view, row_of(view))
    (tmp_path / "000001.part").rename(tmp_path / "other")
    (tmp_path / "000000.part").rename(tmp_path / "000001.part")
    (tmp_path / "other").rename(tmp_path / "000000.part")
    assert parts.missing(3) == [0, 1]


def test_every_flipped_bit_and_every_truncation_of_a_part_counts_as_missing(tmp_path):
    parts = parts_in(tmp_path)
    parts.write(5, row_of(5))
    path = tmp_path / "000005.part"
    data = path.read_bytes()
    assert np.array_equal(parts.read(5), row_of(5))
    for index in range(len(data)):
        path.write_bytes(flip(data, index, index % 8))
        assert parts.read(5) is None
        path.write_bytes(data[:index])
        assert parts.read(5) is None
    path.write_bytes(data + b"\0")
    assert parts.read(5) is None
    path.write_bytes(data)
    assert np.array_equal(parts.read(5), row_of(5))


def test_a_part_of_another_data_set_counts_as_missing(tmp_path):
    parts_in(tmp_path, identity_of(dataset_sha256="d" * 64)).write(0, row_of(0))
    assert parts_in(tmp_path).missing(1) == [0]


def test_deleting_takes_parts_and_leftovers_of_killed_writers_and_nothing_else(tmp_path):
    parts = parts_in(tmp_path / "parts")
    parts.write(0, row_of(0))
    for name in (".000001.part.0123456789abcdef.tmp", "lock"):
        (tmp_path / "parts" / name).write_bytes(b"half")
    assert parts.missing(2) == [1]
    parts.delete()
    assert [entry.name for entry in (tmp_path / "parts").iterdir()] == ["lock"]
    (tmp_path / "parts" / "lock").unlink()
    parts.delete()
    assert not (tmp_path / "parts").exists()
    parts.delete()


def test_sealing_removes_what_a_killed_sealing_left(tmp_path):
    (tmp_path / ".labels.h5.0123456789abcdef.tmp").write_bytes(b"half")
    label(tmp_path / "parts", tmp_path / "labels.h5", 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["labels.h5"]


# Labels that no teacher can have given


@pytest.mark.parametrize(
    "labels",
    [
        np.full(NUM_SAMPLES, NUM_CLASSES),
        np.full(NUM_SAMPLES, 255),
        np.full(NUM_SAMPLES, 256),
        np.full(NUM_SAMPLES, -1),
        np.zeros(NUM_SAMPLES),
        np.full(NUM_SAMPLES, np.nan),
        np.zeros(NUM_SAMPLES, dtype=bool),
        np.zeros((NUM_SAMPLES, 1), dtype=np.int64),
        np.zeros(NUM_SAMPLES - 1, dtype=np.int64),
        np.zeros(0, dtype=np.int64),
    ],
    ids=lambda labels: f"{labels.dtype}{labels.shape}",
)
def test_labels_that_are_no_classes_are_refused_and_nothing_is_written(tmp_path, labels):
    parts = parts_in(tmp_path / "parts")
    with pytest.raises(DataError, match="view 3"):
        parts.write(3, labels)
    assert not (tmp_path / "parts").exists()
    parts.write(0, row_of(0))
    if labels.shape != (NUM_SAMPLES - 1,):
        with pytest.raises(DataError, match="cannot seal"):
            seal(tmp_path / "labels.h5", parts=parts, count=1, clean={"test": labels})
        assert not (tmp_path / "labels.h5").exists()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64, ">i4"])
def test_labels_of_any_integer_type_keep_their_values(dtype):
    labels = to_labels(row_of(0).astype(dtype), NUM_CLASSES)
    assert labels.dtype == np.uint8 and np.array_equal(labels, row_of(0))


@pytest.mark.parametrize("num_classes", [0, 65536])
def test_a_number_of_classes_without_a_type_is_refused(num_classes):
    with pytest.raises(DataError, match=f"{num_classes} entries"):
        label_dtype(num_classes)


@pytest.mark.parametrize(
    "canary",
    [
        Canary(view=1, samples=(0,), sha256="c" * 64),
        Canary(view=-1, samples=(0,), sha256="c" * 64),
        Canary(view=0, samples=(NUM_SAMPLES,), sha256="c" * 64),
        Canary(view=0, samples=(0,), sha256="C" * 64),
    ],
)
def test_a_canary_of_pixels_that_were_not_labelled_is_refused(tmp_path, canary):
    parts = parts_in(tmp_path / "parts")
    parts.write(0, row_of(0))
    with pytest.raises(DataError, match="canary"):
        seal(tmp_path / "labels.h5", parts=parts, count=1, clean={}, canaries=[canary])


# Identity


def change(value):
    """Give a different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"cutmix": "mixup", "none": "cifar10"}.get(value, value[::-1] if value[::-1] != value else "d" * 64)
    if isinstance(value, list):
        return [*value[:-1], "\N{SNOWMAN}\n'"]
    return value + 1


@pytest.mark.parametrize("field", [name for name in identity_of() if name != "view_recipe"])
def test_a_foreign_cache_is_refused_naming_field_and_both_values(tmp_path, sealed, field):
    path = tmp_path / "labels.h5"
    path.write_bytes(sealed)
    expected = identity_of()
    expected[field] = change(expected[field])
    check_refusal(path, expected, field, identity_of()[field], expected[field])


@pytest.mark.parametrize("field", list(identity_of()["view_recipe"]))
def test_a_cache_of_another_view_recipe_is_refused_naming_field_and_both_values(tmp_path, sealed, field):
    path = tmp_path / "labels.h5"
    path.write_bytes(sealed)
    expected = identity_of()
    found = expected["view_recipe"][field]
    expected["view_recipe"][field] = change(found)
    check_refusal(path, expected, f"view_recipe.{field}", found, expected["view_recipe"][field])


def check_refusal(path, expected, field, found_value, expected_value):
    with pytest.raises(DataError) as caught:
        LabelCache.open(path, expected_identity=expected)
    message = str(caught.value)
    assert str(path) in message and field in message and "--fresh" in message and "\n" not in message
    if isinstance(found_value, list):
        found_value, expected_value = found_value[-1], expected_value[-1]
    assert json.dumps(found_value) in message and json.dumps(expected_value) in message
    assert fingerprint(expected) != fingerprint(identity_of())


def test_the_equal_identity_is_accepted_and_the_number_of_views_is_no_part_of_it(tmp_path, sealed):
    path = tmp_path / "labels.h5"
    path.write_bytes(sealed)
    view_recipe = ViewRecipe(seed=3, count=9, crop=4, flip=True, rotation=10, mixing="cutmix")
    expected = identity_of(
        view_recipe=view_recipe,
        num_samples=np.int64(NUM_SAMPLES),
        class_names=tuple(identity_of()["class_names"]),
    )
    cache = LabelCache.open(path, expected_identity=expected)
    assert cache.fingerprint == fingerprint(expected) and "count" not in expected["view_recipe"]


def test_missing_and_surplus_fields_and_lengths_are_named(tmp_path, sealed):
    path = tmp_path / "labels.h5"
    path.write_bytes(sealed)
    expected = identity_of(class_names=["a", "b"])
    del expected["split"]
    expected["colour"] = "red"
    with pytest.raises(DataError) as caught:
        LabelCache.open(path, expected_identity=expected)
    for piece in (
        "class_names has 7 entries, expected 2",
        'split is "train", expected none',
        "colour is missing",
    ):
        assert piece in str(caught.value)


def test_a_true_is_not_a_one():
    assert canonical_json({"b": True, "a": 1.0}) == '{"a":1.0,"b":true}'
    with pytest.raises(TypeError):
        canonical_json(np.float32(1))
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_a_missing_cache_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(DataError, match="does not exist.*pipeline teacher-select"):
        LabelCache.open(tmp_path / "labels.h5")
    with pytest.raises(StorageError, match="cannot read"):
        LabelCache.open(tmp_path)


# Damaged files


def flip(data, index, bit):
    return data[:index] + bytes([data[index] ^ (1 << bit)]) + data[index + 1 :]


def damage(data, rng):
    """Flip, cut, grow, zero, repeat or exchange some bytes."""
    start, length = rng.randrange(len(data)), rng.randrange(1, 600)
    other = rng.randrange(len(data))
    return rng.choice(
        [
            lambda: flip(data, start, rng.randrange(8)),
            lambda: flip(data, start, rng.randrange(8)),
            lambda: data[:start],
            lambda: data[start:],
            lambda: data + rng.randbytes(length),
            lambda: data[:start] + rng.randbytes(length) + data[start:],
            lambda: data[:start] + bytes(length) + data[start + length :],
            lambda: data[:start] + data[start + length :],
            lambda: data[:start] + data[other : other + length] + data[start + length :],
        ]
    )()


def check_damaged(path, damaged, reason=""):
    path.write_bytes(damaged)
    with pytest.raises(DataError) as caught:
        LabelCache.open(path)
    message = str(caught.value)
    assert str(path) in message and reason in message and "--fresh" in message and "\n" not in message


def test_every_byte_of_the_seal_is_fixed(tmp_path, sealed):
    for index in range(SEAL_SIZE):
        check_damaged(tmp_path / "labels.h5", flip(sealed, index, index % 8))


@pytest.mark.parametrize("trials", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_damage_is_refused(tmp_path, sealed, trials):
    rng = random.Random(trials)
    for _ in range(trials):
        damaged = damage(sealed, rng)
        if damaged != sealed:
            check_damaged(tmp_path / "labels.h5", damaged)


def test_the_seal_is_checked_before_hdf5_parses_anything(tmp_path, sealed, monkeypatch):
    def parse(*args, **kwargs):
        pytest.fail("HDF5 saw a file that was not sealed")

    monkeypatch.setattr(h5py, "File", parse)
    check_damaged(tmp_path / "labels.h5", flip(sealed, len(sealed) - 1, 0))
    check_damaged(tmp_path / "labels.h5", b"")


def test_a_file_of_another_schema_version_says_so(tmp_path, sealed):
    path = tmp_path / "labels.h5"
    path.write_bytes(make_seal(memoryview(sealed)[SEAL_SIZE:], 1) + sealed[SEAL_SIZE:])
    with pytest.raises(DataError, match="schema version is 1, this release reads 2"):
        LabelCache.open(path)


# Hostile files: their seal is valid

HOSTILE = []


def hostile(reason):
    """Register a change that a forger makes before sealing the file again, and what must be found wrong."""

    def register(change):
        HOSTILE.append(pytest.param(change, reason, id=change.__name__))
        return change

    return register


def replace_labels(file, data=None, **options):
    """Store the labels in another way, or others, with their right digests."""
    data = file["labels"][...] if data is None else data
    for name in ("labels", "digest"):
        del file[name]
    stored = {"chunks": (1, NUM_SAMPLES), "fletcher32": True, "fillvalue": 255} | options
    file.create_dataset("labels", data=data, **stored)
    digests = [np.frombuffer(hashlib.sha256(row.tobytes()).digest(), np.uint8) for row in data]
    file.create_dataset("digest", data=np.stack(digests))


def claim_shape(file, num_views, num_written):
    """Let the labels claim rows that nobody wrote."""
    rows = file["labels"][:num_written]
    del file["labels"]
    labels = file.create_dataset(
        "labels", (num_views, NUM_SAMPLES), "u1", chunks=(1, NUM_SAMPLES), fletcher32=True, fillvalue=255
    )
    for view, row in enumerate(rows):
        labels[view] = row


@hostile("does not hold exactly")
def soft_link(file):
    file["hidden"] = file["labels"]
    del file["labels"]
    file["labels"] = h5py.SoftLink("/hidden")


@hostile("'val' is a link")
def soft_link_alone(file):
    del file["clean/val"]
    file["clean/val"] = h5py.SoftLink("/clean/test")


@hostile("'labels' is a link")
def external_link(file):
    del file["labels"]
    file["labels"] = h5py.ExternalLink("honest.h5", "/labels")


@hostile("not stored in this file")
def virtual_labels(file):
    layout = h5py.VirtualLayout((4, NUM_SAMPLES), "u1")
    layout[:] = h5py.VirtualSource("honest.h5", "labels", (4, NUM_SAMPLES))
    del file["labels"]
    file.create_virtual_dataset("labels", layout, fillvalue=255)


@hostile("not stored in this file")
def external_clean(file):
    del file["clean/val"]
    file["clean"].create_dataset("val", (5,), "u1", external=[("honest.h5", 0, 5)])


@hostile("has a second name")
def second_name(file):
    del file["clean/val"]
    file["clean/val"] = file["clean/test"]


@hostile("stores 176 bytes")
def unwritten_row(file):
    claim_shape(file, 5, 4)


@hostile("stores 0 bytes")
def lying_shape(file):
    claim_shape(file, 2**40, 0)


@hostile("has the filters")
def extra_filter(file):
    replace_labels(file, compression="gzip")


@hostile("has the filters")
def shuffle_filter(file):
    replace_labels(file, shuffle=True)


@hostile("has the filters")
def no_checksum(file):
    replace_labels(file, fletcher32=False)


@hostile("not of fixed size")
def resizable(file):
    replace_labels(file, maxshape=(None, NUM_SAMPLES))


@hostile("stores 168 bytes")
def other_chunks(file):
    replace_labels(file, chunks=(2, NUM_SAMPLES))


@hostile("fill value 0")
def fill_is_a_class(file):
    replace_labels(file, fillvalue=0)


@hostile("labels is uint16")
def wider_type(file):
    replace_labels(file, data=file["labels"][...].astype("<u2"), fillvalue=65535)


@hostile("not a dataset of uint8 or uint16")
def big_endian(file):
    replace_labels(file, data=file["labels"][...].astype(">u2"), fillvalue=65535)


@hostile("not a dataset of uint8 or uint16")
def signed(file):
    replace_labels(file, data=file["labels"][...].astype("i1"), fillvalue=127)


@hostile("not of plain integers")
def enumeration(file):
    replace_labels(file, dtype=h5py.enum_dtype({f"class {index}": index for index in range(8)}, "u1"))


@hostile("39 columns for 40 samples")
def fewer_samples(file):
    replace_labels(file, data=file["labels"][:, :-1], chunks=(1, NUM_SAMPLES - 1))


@hostile("along 2 axes")
def three_axes(file):
    replace_labels(file, data=file["labels"][...].reshape(4, NUM_SAMPLES, 1), chunks=(1, NUM_SAMPLES, 1))


@hostile("differ from their digest")
def rows_exchanged(file):
    file["labels"][...] = file["labels"][...][::-1]


@hostile("labels holds 7")
def label_beyond_the_classes(file):
    replace_labels(file, data=file["labels"][...] + np.uint8(1))


@hostile("clean/val holds 255")
def clean_beyond_the_classes(file):
    file["clean/val"][0] = 255


@hostile("differ from their digest")
def short_digest(file):
    digests = file["digest"][:2]
    del file["digest"]
    file["digest"] = digests


@hostile("along 1 axes")
def clean_matrix(file):
    del file["clean/val"]
    file["clean/val"] = np.zeros((5, 1), np.uint8)


@hostile("not of fixed size")
def clean_scalar(file):
    del file["clean/val"]
    file["clean/val"] = np.uint8(0)


@hostile("stores 0 bytes")
def clean_empty(file):
    del file["clean/val"]
    file["clean/val"] = np.zeros(0, np.uint8)


@hostile("not of fixed size")
def clean_without_space(file):
    del file["clean/val"]
    file["clean/val"] = h5py.Empty("u1")


@hostile("is not a name")
def clean_without_a_name(file):
    file.move("clean/val", "clean/no name")


@hostile("'more' is not a dataset")
def clean_nested(file):
    file.create_group("clean/more")


@hostile("/clean is not a group")
def clean_is_a_dataset(file):
    del file["clean"]
    file["clean"] = np.zeros(3, np.uint8)


@hostile("'labels' is not a dataset")
def labels_are_a_group(file):
    del file["labels"]
    file.create_group("labels")


@hostile("'labels' is not a dataset")
def labels_are_a_type(file):
    del file["labels"]
    file["labels"] = np.dtype("u1")


@hostile("/ does not hold exactly")
def extra_object(file):
    file["extra"] = np.zeros(3)


@hostile("/identity does not hold exactly")
def extra_object_beside_identity(file):
    file["identity/extra"] = np.zeros(3)


@hostile("/ does not hold exactly")
def missing_object(file):
    del file["digest"]


@hostile("/ does not hold exactly")
def extra_attribute(file):
    file.attrs["extra"] = 1


@hostile("without attributes")
def extra_attribute_of_the_labels(file):
    file["labels"].attrs["extra"] = 1


@hostile("/identity does not hold exactly")
def extra_field(file):
    file["identity"].attrs["extra"] = np.bytes_("1")


@hostile("/provenance does not hold exactly")
def missing_field(file):
    del file["provenance"].attrs["device"]


@hostile("split is not a text")
def text_of_variable_length(file):
    file["identity"].attrs["split"] = '"train"'


@hostile("split is not a text")
def several_texts(file):
    file["identity"].attrs["split"] = np.array([b'"train"', b'"test"'])


@hostile("num_samples is not a text")
def number_for_text(file):
    file["identity"].attrs["num_samples"] = NUM_SAMPLES


@hostile("split is not canonical")
def loose_json(file):
    file["identity"].attrs["split"] = np.bytes_('"train" ')


@hostile("Unterminated")
def broken_json(file):
    file["identity"].attrs["split"] = np.bytes_('"train')


@hostile("recursion")
def deep_json(file):
    file["identity"].attrs["split"] = np.bytes_("[" * 100_000)


@hostile("num_samples is 40.0")
def fractional_samples(file):
    file["identity"].attrs["num_samples"] = np.bytes_("40.0")


@hostile("class_names is")
def classes_without_names(file):
    file["identity"].attrs["class_names"] = np.bytes_(json.dumps(list(range(NUM_CLASSES)), separators=(",", ":")))


@hostile("0 entries")
def no_classes(file):
    file["identity"].attrs["class_names"] = np.bytes_("[]")


@hostile("dataset_sha256 is")
def no_digest_of_the_data(file):
    file["identity"].attrs["dataset_sha256"] = np.bytes_('"latest"')


@hostile("checkpoint_sha256 is")
def no_digest_of_the_teacher(file):
    file["provenance"].attrs["checkpoint_sha256"] = np.bytes_("null")


@hostile("samples")
def canaries_of_something_else(file):
    file.attrs["canaries"] = np.bytes_('[{"view":0}]')


@hostile("not iterable")
def canaries_are_no_list(file):
    file.attrs["canaries"] = np.bytes_("7")


def reseal(data):
    return make_seal(memoryview(data)[SEAL_SIZE:], SCHEMA_VERSION) + data[SEAL_SIZE:]


def forge(data, change):
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+", libver=("v108", "latest")) as file:
        change(file)
    return reseal(buffer.getvalue())


def test_a_resealed_file_without_a_change_is_accepted(sealed):
    assert LabelCache.from_bytes(forge(sealed, lambda file: None)).num_views == 4


@pytest.mark.parametrize(("change", "reason"), HOSTILE)
def test_a_hostile_file_is_refused_although_its_seal_is_valid(tmp_path, sealed, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    Path("honest.h5").write_bytes(sealed)
    check_damaged(tmp_path / "labels.h5", forge(sealed, change), reason)


def test_labels_stored_again_without_a_change_are_accepted(sealed):
    assert LabelCache.from_bytes(forge(sealed, replace_labels)).num_views == 4


def test_a_sealed_file_with_more_behind_the_hdf5_file_is_refused(tmp_path, sealed):
    check_damaged(tmp_path / "labels.h5", reseal(sealed + bytes(100)))


def test_a_sealed_file_that_is_no_hdf5_file_is_refused(tmp_path, sealed):
    check_damaged(tmp_path / "labels.h5", reseal(sealed[:SEAL_SIZE] + b"not HDF5"))
    check_damaged(tmp_path / "labels.h5", reseal(sealed[:SEAL_SIZE]))
    check_damaged(tmp_path / "labels.h5", reseal(bytes(SEAL_SIZE) + sealed))


# Failures and kills at every system call

CALLS = ("write", "fsync", "replace")


def count_calls(monkeypatch, at=None, failure=None):
    """Count the system calls that write; let the one numbered `at` raise `failure`."""
    calls = []

    def wrap(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) - 1 == at:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise failure
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name))
    return calls


def num_calls(tmp_path, sealed):
    """Count the system calls of extending two views to four."""
    path = start_from_two_views(tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        label(path.parent / "parts", path, 4, adopt=True)
    assert path.read_bytes() == sealed
    return len(calls)


def start_from_two_views(directory):
    label(directory / "parts", directory / "labels.h5", 2)
    return directory / "labels.h5"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whichever_system_call_fails_nothing_is_lost_and_running_again_finishes(tmp_path, sealed, number):
    total = num_calls(tmp_path, sealed)
    assert total > 10
    for at in range(total):
        path = start_from_two_views(tmp_path / f"failing-{at}")
        before = path.read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            count_calls(patch, at, OSError(number, os.strerror(number)))
            with pytest.raises(StorageError) as caught:
                label(path.parent / "parts", path, 4, adopt=True)
        assert os.strerror(number) in str(caught.value) and str(path.parent) in str(caught.value)
        assert path.read_bytes() in (before, sealed)
        assert not [entry for entry in path.parent.rglob("*.tmp")]
        label(path.parent / "parts", path, 4, adopt=True)
        assert path.read_bytes() == sealed
        assert [entry.name for entry in path.parent.iterdir()] == ["labels.h5"]


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:6]
from test_labels import CALLS, label

directory, at, when = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = []

def wrap(name):
    real = getattr(os, name)
    def call(*args):
        calls.append(name)
        dying = when and len(calls) - 1 == at
        if dying and name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
        if dying and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args)
        if dying:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for name in CALLS:
    setattr(os, name, wrap(name))
path = directory / "labels.h5"
label(directory / "parts", path, 4, adopt=path.exists())
"""


def run_child(directory, at, when):
    """Label four views in another process, which kills itself `when` (before, after, never) its call `at`."""
    tests = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(directory), str(at), when, str(tests), str(tests.parent)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == (-signal.SIGKILL if when else 0), process.stderr


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8, 0.9, 0.95, pytest.param(None, marks=pytest.mark.slow)])
def test_a_kill_at_any_system_call_loses_no_finished_view_and_running_again_finishes(tmp_path, sealed, share):
    total = num_calls(tmp_path, sealed)
    positions = range(total) if share is None else [int(total * share)]
    for at in positions:
        for when in ("before", "after"):
            path = start_from_two_views(tmp_path / f"killed-{when}-{at}")
            before = path.read_bytes()
            run_child(path.parent, at, when)
            assert path.read_bytes() in (before, sealed)
            finished = sorted(path.parent.glob("parts/*.part"))
            parts = parts_in(path.parent / "parts")
            assert all(parts.read(int(part.stem)) is not None for part in finished)
            label(path.parent / "parts", path, 4, adopt=True)
            assert path.read_bytes() == sealed
            assert [entry.name for entry in path.parent.iterdir()] == ["labels.h5"]


def test_a_file_that_reads_back_differently_is_refused_and_the_parts_remain(tmp_path, monkeypatch):
    parts = parts_in(tmp_path / "parts")
    parts.write(0, row_of(0))
    real = Path.read_bytes

    def read_bytes(path):
        data = real(path)
        return flip(data, len(data) - 1, 0) if path.suffix == ".h5" else data

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(StorageError, match="does not read back"):
            seal(tmp_path / "labels.h5", parts=parts, count=1, clean={})
    assert parts.missing(1) == []
