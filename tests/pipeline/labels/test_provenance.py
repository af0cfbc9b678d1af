"""What the provenance says of teachers that are not the paper's: its options, and files of two teachers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import pytest

from pipeline.errors import DataError
from pipeline.labels.cache import LabelCache
from pipeline.labels.identity import PROVENANCE_FIELDS, make_ensemble, make_member
from tests.support.label_samples import identity_of, label, parts_in, provenance_of

MEMBERS = [
    make_member(teacher="resnet50", checkpoint_sha256="1" * 64, mean=[0.5] * 3, std=[0.25] * 3),
    make_member(
        teacher="timm/vit_tiny", checkpoint_sha256="2" * 64, mean=[0.4] * 3, std=[0.2] * 3, input_size=64, folded=False
    ),
]
UNUSUAL: dict[str, dict[str, Any]] = {
    "own input": {"input_size": 224},
    "own code": {"code_sha256": "c" * 64, "folded": False},
    "ensemble": make_ensemble(MEMBERS),
    "given": {"mean": (), "std": (), "precision": "given", "device": "given", "given": True},
}


def with_provenance(sealed: bytes, **changes: Any) -> LabelCache:
    return dataclasses.replace(LabelCache.from_bytes(sealed), provenance=provenance_of(**changes))


@pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)
def test_any_teachers_labels_round_trip_under_the_same_fingerprint(sealed: bytes, changes: dict[str, Any]) -> None:
    cache = with_provenance(sealed, **changes)
    data = dataclasses.replace(cache, accuracy={"test": 62.5}).to_bytes()
    read = LabelCache.from_bytes(data)
    assert read.provenance == cache.provenance and read.accuracy == {"test": 62.5} and read.to_bytes() == data
    honest = LabelCache.from_bytes(sealed)
    assert read.fingerprint == honest.fingerprint and read.identity == honest.identity
    assert read.provenance != honest.provenance


def test_a_usual_teachers_file_says_nothing_of_options(sealed: bytes, tmp_path: Path) -> None:
    usual = {"folded": True, "input_size": None, "code_sha256": None, "members": (), "given": False}
    cache = with_provenance(sealed, **usual)
    assert set(cache.provenance) == set(PROVENANCE_FIELDS) and cache.to_bytes() == sealed
    (tmp_path / "labels.h5").write_bytes(sealed)
    with h5py.File(tmp_path / "labels.h5") as file:
        assert set(file.attrs) == {"canaries"}


RENDITION = {"image_size": 64, "resize": "crop"}


def test_labels_of_files_say_how_these_become_pixels(sealed: bytes) -> None:
    honest = LabelCache.from_bytes(sealed)
    cache = dataclasses.replace(honest, identity=identity_of(rendition=RENDITION))
    read = LabelCache.from_bytes(cache.to_bytes())
    assert read.identity == {**honest.identity, "rendition": RENDITION} and read.fingerprint != honest.fingerprint
    assert identity_of(rendition=None) == honest.identity


@pytest.mark.parametrize(
    "rendition",
    [{}, "crop", {**RENDITION, "more": 1}, {**RENDITION, "image_size": 0}, {**RENDITION, "image_size": True},
     {**RENDITION, "resize": "stretch"}, {**RENDITION, "resize": ["crop"]}],
)  # fmt: skip
def test_a_rendition_that_cannot_be_is_refused(sealed: bytes, rendition: Any) -> None:
    cache = LabelCache.from_bytes(sealed)
    with pytest.raises(ValueError, match=r"identity\.rendition"):
        dataclasses.replace(cache, identity={**cache.identity, "rendition": rendition})


def test_an_ensembles_digest_is_that_of_its_members() -> None:
    text = json.dumps(MEMBERS, sort_keys=True, separators=(",", ":"))
    ensemble = provenance_of(**make_ensemble(MEMBERS))
    assert ensemble["checkpoint_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert ensemble["teacher"] == "resnet50 + timm/vit_tiny" and ensemble["mean"] == ensemble["std"] == []
    assert ensemble["members"][1] == {**MEMBERS[1], "input_size": 64, "folded": False}
    assert "folded" not in ensemble["members"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"folded": True}, "folded is true"),
        ({"input_size": 1.5}, "input_size is 1.5"),
        ({"input_size": 70000}, "input_size is 70000"),
        ({"code_sha256": "latest"}, 'code_sha256 is "latest"'),
        ({"given": 1}, "given"),
        ({"unknown": 1}, "has the fields"),
        ({"members": [{}, {}]}, "members"),
    ],
)
def test_what_make_provenance_never_writes_is_refused(sealed: bytes, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(LabelCache.from_bytes(sealed), provenance={**provenance_of(), **changes})
    for key in ("given", "members"):
        unusual = provenance_of(**UNUSUAL["given" if key == "given" else "ensemble"])
        with pytest.raises(ValueError):
            dataclasses.replace(LabelCache.from_bytes(sealed), provenance={**unusual, **changes})


@pytest.mark.parametrize("key", ["teacher", "checkpoint_sha256", "mean", "std"])
@pytest.mark.parametrize("value", [None, 7, [float(1)] * 2 + [None], {}])
def test_a_members_fields_are_checked(sealed: bytes, key: str, value: Any) -> None:
    members = [MEMBERS[0], {**MEMBERS[1], key: value}]
    text = json.dumps(members, sort_keys=True, separators=(",", ":"))
    forged = {**provenance_of(**make_ensemble(MEMBERS)), "members": members}
    forged["checkpoint_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(ValueError, match=rf"members\[1\]\.{key}"):
        dataclasses.replace(LabelCache.from_bytes(sealed), provenance=forged)


def test_an_accuracy_needs_the_labels_that_it_is_of(sealed: bytes) -> None:
    cache = LabelCache.from_bytes(sealed)
    assert dataclasses.replace(cache, accuracy={}).accuracy == {}
    for wrong in ({"train": 50.0}, {"test": 100.5}, {"test": -1.0}, {"test": 50}, {"test": None}):
        with pytest.raises(ValueError, match="accuracy"):
            dataclasses.replace(cache, accuracy=wrong)


def test_labels_of_two_members_orders_never_meet(tmp_path: Path) -> None:
    path = tmp_path / "labels.h5"
    provenance = provenance_of(**make_ensemble(MEMBERS))
    label(tmp_path / "old", path, 1, parts=parts_in(tmp_path / "old", provenance=provenance))
    other = parts_in(tmp_path / "new", provenance=provenance_of(**make_ensemble(MEMBERS[::-1])))
    with pytest.raises(DataError, match="checkpoint_sha256"):
        other.adopt(LabelCache.open(path))
