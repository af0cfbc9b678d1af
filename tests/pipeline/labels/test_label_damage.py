"""A label cache or a part of which one bit differs is never taken for whole."""

from __future__ import annotations

import fcntl
import random

import h5py
import numpy as np
import pytest

from pipeline.errors import DataError, StorageError
from pipeline.labels.cache import SCHEMA_VERSION, LabelCache
from pipeline.labels.file import SEAL_SIZE, make_seal
from tests.support.label_campaign import NUM_DAMAGED, NUM_FORGED
from tests.support.label_mutations import damage_files, damage_parts, read_forged
from tests.support.label_samples import check_damaged, flip, parts_in, row_of


@pytest.fixture(params=["argmax"])
def whole(request, sealed_pair):
    """A sealed file, and another from which pieces may come."""
    return {"argmax": sealed_pair}[request.param]


def test_every_byte_of_the_seal_is_fixed(tmp_path, sealed):
    for index in range(SEAL_SIZE):
        check_damaged(tmp_path / "labels.h5", flip(sealed, index, index % 8))


@pytest.mark.parametrize("trials", [500, pytest.param(NUM_DAMAGED, marks=pytest.mark.slow)])
def test_random_damage_is_refused(tmp_path, whole, trials):
    tally = damage_files(tmp_path / "labels.h5", *whole, trials, random.Random(trials))
    assert tally.wrong == [] and tally.counts["found"] == trials


@pytest.mark.parametrize("trials", [300, pytest.param(NUM_FORGED, marks=pytest.mark.slow)])
def test_a_forged_file_is_refused_or_gives_the_labels_that_it_holds(whole, trials):
    """The reader does not hang or crash, and does not allocate what the file claims."""
    tally = read_forged(*whole, trials, random.Random(trials))
    assert tally.wrong == [] and tally.counts["accepted"] + tally.counts["refused"] == trials
    assert tally.counts["accepted"] > trials // 20 and tally.counts["refused"] > trials // 2


@pytest.mark.parametrize("trials", [200, pytest.param(NUM_DAMAGED, marks=pytest.mark.slow)])
def test_a_randomly_damaged_part_counts_as_missing(tmp_path, trials):
    tally = damage_parts(tmp_path, trials, random.Random(trials))
    assert tally.wrong == [] and tally.counts["found"] == trials


def test_the_seal_is_checked_before_hdf5_parses_anything(tmp_path, sealed, monkeypatch):
    def parse(*args, **kwargs):
        pytest.fail("HDF5 saw a file that was not sealed")

    monkeypatch.setattr(h5py, "File", parse)
    check_damaged(tmp_path / "labels.h5", flip(sealed, len(sealed) - 1, 0))
    check_damaged(tmp_path / "labels.h5", b"")


def test_what_looks_damaged_while_another_program_holds_it_is_busy(tmp_path, sealed):
    parts, labels = parts_in(tmp_path), tmp_path / "labels.h5"
    parts.write(5, row_of(5))
    labels.write_bytes(sealed)
    for path, read in ((labels, lambda: LabelCache.open(labels)), (tmp_path / "000005.part", lambda: parts.read(5))):
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert read() is not None
            file.truncate(len(path.read_bytes()) - 1)
            with pytest.raises(StorageError, match=f"{path.name}: another program holds it.*run again"):
                read()
    assert parts.read(5) is None
    with pytest.raises(DataError, match="not a valid label cache"):
        LabelCache.open(labels)


def test_a_file_of_another_schema_version_says_so(tmp_path, sealed):
    path = tmp_path / "labels.h5"
    path.write_bytes(make_seal(memoryview(sealed)[SEAL_SIZE:], SCHEMA_VERSION + 1) + sealed[SEAL_SIZE:])
    with pytest.raises(DataError, match=f"schema version is {SCHEMA_VERSION + 1}, this release reads {SCHEMA_VERSION}"):
        LabelCache.open(path)


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
