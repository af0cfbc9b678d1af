"""The teacher's top-k in parts and label cache: round trips, extension, and the refusal of whatever is not whole."""

from __future__ import annotations

import dataclasses
import hashlib

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, StorageError
from pipeline.labels.answers import ViewLabels, sum_tolerance
from pipeline.labels.cache import Canary, LabelCache
from pipeline.labels.identity import label_dtype
from pipeline.labels.parts import LabelParts, seal
from tests.support.killing import full_at_each_call
from tests.support.label_samples import (
    CANARIES,
    NUM_CLASSES,
    NUM_SAMPLES,
    clean_of,
    identity_of,
    provenance_of,
    row_of,
)

TOPK = 3
HALF = np.float16


def answers_of(view, topk=TOPK, num_samples=NUM_SAMPLES, num_classes=NUM_CLASSES, sharpness=4.0):
    """Made-up answers of a teacher, as labelling gives them."""
    logits = sharpness * np.random.default_rng(view).standard_normal((num_samples, num_classes))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    classes = np.argsort(-shares, axis=1, kind="stable")[:, :topk]
    return ViewLabels(classes[:, 0], classes, np.take_along_axis(shares, classes, axis=1).astype(HALF))


def parts_in(directory, topk=TOPK):
    return LabelParts(directory, identity=identity_of(), provenance=provenance_of(topk=topk))


def label(directory, path, count, *, adopt=False, topk=TOPK):
    parts = parts_in(directory, topk)
    if adopt:
        parts.adopt(LabelCache.open(path))
    for view in parts.missing(count):
        parts.write(view, answers_of(view, topk))
    return seal(path, parts=parts, count=count, clean=clean_of(), canaries=CANARIES)


def cache_of(num_views=2, num_classes=NUM_CLASSES, num_samples=NUM_SAMPLES, topk=TOPK, sharpness=4.0, **changes):
    dtype = label_dtype(num_classes)
    views = [answers_of(view, topk, num_samples, num_classes, sharpness) for view in range(num_views)]
    fields = {
        "labels": np.stack([view.labels for view in views]).astype(dtype),
        "classes": np.stack([view.classes for view in views]).astype(dtype),
        "probabilities": np.stack([view.probabilities for view in views]),
        "clean": {},
        "canaries": (Canary(view=0, samples=(), sha256="0" * 64),),
        "identity": identity_of(class_names=["x"] * num_classes, num_samples=num_samples),
        "provenance": provenance_of(topk=topk),
    }
    return LabelCache(**(fields | changes))


def same(cache, other):
    return all(
        np.array_equal(getattr(cache, name), getattr(other, name)) for name in ("labels", "classes", "probabilities")
    )


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """The bytes of a sealed file of four views with their top 3."""
    directory = tmp_path_factory.mktemp("sealed")
    label(directory / "parts", directory / "labels.h5", 4)
    return (directory / "labels.h5").read_bytes()


# Round trips


def test_what_was_kept_is_what_is_read(tmp_path):
    path = tmp_path / "labels.h5"
    for cache in (label(tmp_path / "parts", path, 4), LabelCache.open(path)):
        assert cache.topk == TOPK and cache.classes.dtype == np.uint8 and cache.probabilities.dtype == HALF
        assert not cache.classes.flags.writeable and not cache.probabilities.flags.writeable
        for view in range(4):
            kept, expected = cache.view(view), answers_of(view)
            assert np.array_equal(kept.labels, expected.labels) and np.array_equal(kept.classes, expected.classes)
            assert np.array_equal(kept.probabilities, expected.probabilities)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["labels.h5"]


@settings(max_examples=30)
@given(
    num_views=st.integers(1, 5),
    num_samples=st.integers(1, 60),
    num_classes=st.one_of(st.integers(1, 300), st.sampled_from([255, 256])),
    share=st.floats(0.0, 1.0),
    sharpness=st.sampled_from([0.0, 1.0, 10.0, 100.0]),
    data=st.data(),
)
def test_any_k_round_trips_through_parts_and_file(
    tmp_path_factory, num_views, num_samples, num_classes, share, sharpness, data
):
    topk = data.draw(st.sampled_from([1, num_classes, max(1, int(share * num_classes))]))
    cache = cache_of(num_views, num_classes, num_samples, topk, sharpness)
    sealed = cache.to_bytes()
    read = LabelCache.from_bytes(sealed)
    assert same(read, cache) and read.topk == topk and read.to_bytes() == sealed
    directory = tmp_path_factory.mktemp("parts")
    parts = LabelParts(directory / "parts", identity=cache.identity, provenance=cache.provenance)
    for view in range(num_views):
        kept = cache.view(view)
        parts.write(view, ViewLabels(kept.labels.astype(np.int64), kept.classes.astype(np.int32), kept.probabilities))
    path = directory / "labels.h5"
    assert same(seal(path, parts=parts, count=num_views, clean={}, canaries=cache.canaries), cache)
    assert path.read_bytes() == sealed


def test_any_hdf5_tool_reads_the_documented_layout(tmp_path, sealed):
    path = tmp_path / "labels.h5"
    path.write_bytes(sealed)
    with h5py.File(path) as file:
        assert set(file) == {"labels", "topk", "digest", "clean", "identity", "provenance"}
        assert set(file["topk"]) == {"classes", "probabilities"}
        for name, dtype in (("classes", np.dtype("u1")), ("probabilities", np.dtype("<f2"))):
            dataset = file["topk"][name]
            assert dataset.shape == (4, NUM_SAMPLES, TOPK) and dataset.chunks == (1, NUM_SAMPLES, TOPK)
            assert dataset.fletcher32 and dataset.compression is None and dataset.dtype == dtype
            assert not dataset.id.get_create_plist().get_obj_track_times()
        assert file["topk/classes"].fillvalue == 255 and np.isnan(file["topk/probabilities"].fillvalue)
        for view in range(4):
            kept = answers_of(view)
            content = kept.labels.astype("u1").tobytes() + kept.classes.astype("u1").tobytes()
            digest = hashlib.sha256(content + kept.probabilities.astype("<f2").tobytes()).digest()
            assert file["digest"][view].tobytes() == digest


def test_a_file_of_the_argmax_alone_has_nothing_of_the_top_k(tmp_path):
    path = tmp_path / "labels.h5"
    parts = parts_in(tmp_path / "parts", topk=0)
    parts.write(0, row_of(0))
    cache = seal(path, parts=parts, count=1, clean={})
    assert (cache.topk, cache.classes, cache.probabilities) == (0, None, None)
    with h5py.File(path) as file:
        assert set(file) == {"labels", "digest", "clean", "identity", "provenance"}
        assert file["digest"][0].tobytes() == hashlib.sha256(row_of(0).astype("u1").tobytes()).digest()


# Parts


def test_a_cache_with_its_top_k_extended_later_is_byte_for_byte_the_one_made_at_once(tmp_path, sealed):
    for count in (1, 3, 4):
        label(tmp_path / "parts", tmp_path / "labels.h5", count, adopt=count > 1)
    assert (tmp_path / "labels.h5").read_bytes() == sealed


def test_parts_of_another_k_count_as_missing_and_a_cache_of_another_k_is_not_adopted(tmp_path):
    parts_in(tmp_path / "parts").write(0, answers_of(0))
    assert parts_in(tmp_path / "parts").missing(1) == []
    for other in (0, 2):
        assert parts_in(tmp_path / "parts", other).missing(1) == [0]
        assert parts_in(tmp_path / "parts", other).invalid([0, 1]) == [0]
    label(tmp_path / "others", tmp_path / "labels.h5", 1)
    with pytest.raises(DataError, match="topk is 3, expected 2"):
        parts_in(tmp_path / "parts", 2).adopt(LabelCache.open(tmp_path / "labels.h5"))


def test_what_is_kept_must_be_what_the_provenance_says(tmp_path):
    for topk, answers in ((TOPK, row_of(0)), (TOPK, answers_of(0, 2)), (0, answers_of(0))):
        with pytest.raises(DataError, match=f"view 4: classes are of shape .* for a topk of {topk}"):
            parts_in(tmp_path / "parts", topk).write(4, answers)
    assert not (tmp_path / "parts").exists()


def test_sealing_keeps_the_finished_parts_of_later_views_whatever_they_keep(tmp_path):
    parts = parts_in(tmp_path / "parts")
    for view in (0, 1, 3):
        parts.write(view, answers_of(view))
    parts_in(tmp_path / "parts", topk=2).write(4, answers_of(4, 2))
    (tmp_path / "parts/.000005.part.0123456789abcdef.tmp").write_bytes(b"half")
    seal(tmp_path / "labels.h5", parts=parts, count=2, clean=clean_of(), canaries=CANARIES)
    assert sorted(entry.name for entry in (tmp_path / "parts").iterdir()) == ["000003.part", "000004.part"]
    again = parts_in(tmp_path / "parts")
    again.adopt(LabelCache.open(tmp_path / "labels.h5"))
    assert again.missing(5) == [2, 4] and again.missing(4, 3) == []


def test_whichever_system_call_fails_nothing_is_lost_and_running_again_finishes(tmp_path, sealed, monkeypatch):
    folder = tmp_path / "failing"
    path = folder / "labels.h5"

    def again():
        label(folder / "parts", path, 4, adopt=path.exists())
        assert path.read_bytes() == sealed and [entry.name for entry in folder.iterdir()] == ["labels.h5"]
        path.unlink()

    assert full_at_each_call(monkeypatch, lambda: label(folder / "parts", path, 4), again, StorageError) > 10


# Answers that no teacher can have given


def changed(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


UNBELIEVABLE = {
    "a class that is none": (("classes", (0, 2), NUM_CLASSES), "sample 0: a class outside of the 7 classes"),
    "the fill value": (("classes", (9, 2), 255), "sample 9: a class outside"),
    "a class below none": (("classes", (9, 2), -1), "sample 9: a class outside"),
    "another first class": (("labels", 3, None), "sample 3: its first class is not its label"),
    "more than 1": (("probabilities", (4, 0), 1.001), "sample 4: its probabilities do not descend"),
    "less than 0": (("probabilities", (4, 2), -0.001), "sample 4: its probabilities do not descend"),
    "nothing at all": (("probabilities", 4, 0.0), "sample 4: its probabilities do not descend"),
    "not a number": (("probabilities", (4, 1), np.nan), "sample 4: its probabilities do not descend"),
    "not a number first": (("probabilities", (4, 0), np.nan), "sample 4: its probabilities do not descend"),
    "infinite": (("probabilities", (4, 0), np.inf), "sample 4: its probabilities do not descend"),
    "infinite last": (("probabilities", (4, 2), -np.inf), "sample 4: its probabilities do not descend"),
    "a rise": (("probabilities", 4, (0.2, 0.3, 0.1)), "sample 4: its probabilities do not descend"),
    "too much in all": (("probabilities", 39, (0.5, 0.5, 0.25)), "sample 39: its probabilities sum to more than 1"),
}


@pytest.mark.parametrize("fault", UNBELIEVABLE)
def test_answers_that_no_teacher_gives_are_refused_wherever_they_enter(tmp_path, fault):
    (name, index, value), reason = UNBELIEVABLE[fault]
    honest = answers_of(1)
    if value is None:
        value = (honest.labels[index] + 1) % NUM_CLASSES
    broken = dataclasses.replace(honest, **{name: changed(getattr(honest, name), index, value)})
    with pytest.raises(DataError, match=f"view 1: {reason}"):
        parts_in(tmp_path / "parts").write(1, broken)
    assert not (tmp_path / "parts").exists()
    if value == -1:
        return  # the stored type has no such value
    cache = cache_of()
    with pytest.raises(ValueError, match=f"view 1: {reason}"):
        dataclasses.replace(cache, **{name: changed(getattr(cache, name), (1, *np.atleast_1d(index)), value)})


@pytest.mark.parametrize("topk", [2, 3, 32, 33, 60])
def test_one_class_twice_is_refused(topk):
    sizes = {"num_samples": 9, "num_classes": 60, "topk": topk}
    honest = answers_of(1, topk, 9, 60, sharpness=1.0)
    honest.check(**sizes)
    for place in {1, topk // 2, topk - 1} - {0}:
        twice = changed(honest.classes, (7, place), honest.classes[7, 0])
        with pytest.raises(ValueError, match="sample 7: one class twice"):
            dataclasses.replace(honest, classes=twice).check(**sizes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": None, "probabilities": None}, "topk/classes is missing, expected uint8 of shape"),
        ({"probabilities": None}, "topk/probabilities is missing"),
        ({"classes": None}, "topk/classes is missing"),
        ({"provenance": provenance_of()}, "topk/classes is uint8 of shape .* expected none"),
        ({"provenance": provenance_of(topk=2)}, r"expected uint8 of shape \(2, 40, 2\)"),
        ({"probabilities": np.ones((2, NUM_SAMPLES, TOPK), np.float32)}, "topk/probabilities is float32"),
        ({"classes": np.ones((2, NUM_SAMPLES, TOPK), np.uint16)}, "topk/classes is uint16"),
        ({"classes": np.ones((3, NUM_SAMPLES, TOPK), np.uint8)}, r"topk/classes is uint8 of shape \(3, 40, 3\)"),
        ({"provenance": provenance_of() | {"topk": "3"}}, 'provenance.topk is "3"'),
        ({"provenance": provenance_of() | {"topk": True}}, "provenance.topk is true"),
        ({"provenance": provenance_of(topk=-1)}, "provenance.topk is -1"),
        ({"provenance": provenance_of() | {"compiled": 0}}, "provenance.compiled is 0"),
    ],
)
def test_a_cache_and_its_provenance_agree_on_what_is_kept(changes, reason):
    with pytest.raises(ValueError, match=reason):
        cache_of(**changes)


def test_more_classes_than_there_are_cannot_be_kept():
    answers = answers_of(0)
    with pytest.raises(ValueError, match="topk is 8, more than the 7 classes"):
        answers.check(num_samples=NUM_SAMPLES, num_classes=NUM_CLASSES, topk=8)


@pytest.mark.parametrize("topk", [1, 5, 100, 1000])
def test_rounded_softmax_never_passes_the_tolerance_of_the_sum(topk):
    rng = np.random.default_rng(topk)
    logits = rng.standard_normal((2000, topk)) * rng.uniform(0, 20, (2000, 1))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    sums = (shares / shares.sum(axis=1, keepdims=True)).astype(HALF).astype(np.float64).sum(axis=1)
    assert sums.max() <= 1 + sum_tolerance(topk)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_probabilities_of_another_type_are_not_rounded_in_silence(tmp_path, dtype):
    answers = answers_of(0)
    certain = np.zeros_like(answers.probabilities)
    certain[:, 0] = 1.0
    with pytest.raises(DataError, match=f"probabilities are {np.dtype(dtype)}, expected float16"):
        parts_in(tmp_path).write(0, dataclasses.replace(answers, probabilities=certain.astype(dtype)))
