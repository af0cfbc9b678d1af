"""The label cache round-trips, is resumed and extended to the same bytes, and refuses what belongs to others."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.recipes import ViewRecipe
from pipeline.errors import DataError, StorageError
from pipeline.labels.cache import Canary, LabelCache, fingerprint
from pipeline.labels.identity import label_dtype, to_labels
from pipeline.labels.parts import seal
from pipeline.system.canonical import canonical_json
from tests.support.label_samples import (
    CANARIES,
    NUM_CLASSES,
    NUM_SAMPLES,
    identity_of,
    label,
    parts_in,
    provenance_of,
    row_of,
)
from tests.support.project import environment

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


@settings(max_examples=30)
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
    program = (
        "from tests.support.label_samples import *; from pathlib import Path as P; label(P('parts'), P('labels.h5'), 4)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment(), check=True)
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


def test_parts_under_each_others_names_count_as_missing(tmp_path):
    parts = parts_in(tmp_path)
    for view in (0, 1, 2):
        parts.write(view, row_of(view))
    (tmp_path / "000001.part").rename(tmp_path / "other")
    (tmp_path / "000000.part").rename(tmp_path / "000001.part")
    (tmp_path / "other").rename(tmp_path / "000000.part")
    assert parts.missing(3) == [0, 1]


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


def test_whole_parts_of_later_views_can_be_kept_whoever_labelled_them(tmp_path):
    parts = parts_in(tmp_path)
    for view in range(4):
        parts.write(view, row_of(view))
    parts_in(tmp_path, provenance=provenance_of(device="cuda")).write(4, row_of(4))
    (tmp_path / "000003.part").write_bytes(b"damaged")
    (tmp_path / ".000002.part.0123456789abcdef.tmp").write_bytes(b"half")
    parts.delete(below=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["000002.part", "000004.part"]
    assert parts.missing(5) == [0, 1, 3, 4], "the last counts for its own device alone"


def test_parts_of_other_pixels_count_as_missing(tmp_path):
    parts, pixels = parts_in(tmp_path / "parts"), hashlib.sha256(b"pixels").digest()
    parts.write(0, row_of(0))  # as older versions did, which noted no pixels
    parts.pixels = pixels
    parts.write(1, row_of(1))
    assert parts.missing(2) == []
    later = parts_in(tmp_path / "parts")
    assert later.missing(2) == [], "the views are not made yet"
    later.pixels = hashlib.sha256(b"other").digest()
    assert later.missing(2) == later.invalid(range(2)) == [1]
    whole, path = label(tmp_path / "whole", tmp_path / "whole.h5", 2), tmp_path / "labels.h5"
    assert label(tmp_path / "parts", path, 2, parts=later).to_bytes() == whole.to_bytes()
    assert not (tmp_path / "parts").exists()
    part = tmp_path / "parts/000000.part"
    parts.write(0, row_of(0))
    part.write_bytes(part.read_bytes()[:-32] + later.pixels)
    assert parts.invalid([0]) == [0], "its digest covers the pixels'"


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
    recorded = expected["view_recipe"][field]
    expected["view_recipe"][field] = change(recorded)
    check_refusal(path, expected, f"view_recipe.{field}", recorded, expected["view_recipe"][field])


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
