"""A label cache or a part of which one bit differs is never taken for whole."""

from __future__ import annotations

import random

import h5py
import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.labels import SCHEMA_VERSION, LabelCache
from pipeline.seals import SEAL_SIZE, make_seal
from tests.label_samples import check_damaged, flip, parts_in, row_of


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
