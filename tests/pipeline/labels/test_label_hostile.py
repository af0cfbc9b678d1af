"""Forged label caches: their seal is valid, what is behind it is not what a label cache holds."""

from __future__ import annotations

import re
import struct
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.labels.cache import LabelCache
from pipeline.labels.file import SEAL_SIZE
from tests.support.forged_arrays import replace_clean, replace_labels
from tests.support.forged_groups import soft_link_alone
from tests.support.forgery import HOSTILE, forge, patch
from tests.support.hostile_reader import HostileReader
from tests.support.label_samples import check_damaged, reseal


def test_a_resealed_file_without_a_change_is_accepted(sealed):
    assert LabelCache.from_bytes(forge(sealed, lambda file: None)).num_views == 4


def refuse_hdf5(monkeypatch):
    """Fail a test in which HDF5 opens a file."""
    monkeypatch.setattr(h5py, "File", lambda *args, **kwargs: pytest.fail("HDF5 saw the file"))


@pytest.mark.parametrize(("change", "reason"), HOSTILE)
def test_a_hostile_file_is_refused_although_its_seal_is_valid(tmp_path, sealed, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    Path("honest.h5").write_bytes(sealed)
    check_damaged(tmp_path / "labels.h5", forge(sealed, change), reason)


def test_what_hdf5_may_store_in_other_ways_is_read_as_it_is(sealed):
    """Such a file holds the same labels under the same digests; refusing it would gain nothing."""

    def committed_type(file):
        file["type"] = np.dtype("u1")
        replace_clean(file, file["clean/val"][...], dtype=file["type"])
        del file["type"]

    def ordered_members(file):
        rows = {split: row[...] for split, row in file["clean"].items()}
        del file["clean"]
        clean = file.create_group("clean", track_order=True)
        for split, row in rows.items():
            clean[split] = row

    honest = LabelCache.from_bytes(sealed)
    for change in (replace_labels, committed_type, ordered_members):
        cache = LabelCache.from_bytes(forge(sealed, change))
        assert np.array_equal(cache.labels, honest.labels) and (cache.labels == honest.labels).all()
        assert all(np.array_equal(cache.clean[split], honest.clean[split]) for split in ("val", "test"))


def test_a_link_of_a_users_own_type_is_refused(tmp_path, sealed):
    data = forge(sealed, soft_link_alone)
    link = b"\x01\x08\x01\x03val"  # version, flags, class, and the name after its length
    check_damaged(tmp_path / "labels.h5", patch(data, {data.index(link) + 2: b"\x41"}), "nknown link")


def test_a_superblock_with_an_extension_is_refused_before_hdf5_reads_it(tmp_path, sealed, monkeypatch):
    refuse_hdf5(monkeypatch)
    for at, address in ((SEAL_SIZE + 20, 48), (SEAL_SIZE + 20, 2**40), (SEAL_SIZE + 12, 0), (SEAL_SIZE + 12, 1024)):
        hostile_file = patch(sealed, {at: struct.pack("<Q", address)})
        check_damaged(tmp_path / "labels.h5", hostile_file, "superblock is not that of a label cache")


def test_a_file_open_for_concurrent_writing_is_refused_before_hdf5_reads_it(tmp_path, sealed, monkeypatch):
    refuse_hdf5(monkeypatch)
    check_damaged(
        tmp_path / "labels.h5", patch(sealed, {SEAL_SIZE + 8: b"\x03", SEAL_SIZE + 11: b"\x05"}), "no HDF5 file"
    )


def test_splits_that_share_their_bytes_cannot_claim_more_than_the_file_holds(tmp_path, sealed):
    """Without the check, a file of ten megabytes could claim a terabyte."""

    def claim(file):
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((5000,))
        for index in range(4):
            h5py.h5d.create(file["clean"].id, b"claim%d" % index, h5py.h5t.STD_U8LE, space, dcpl=creation)
        file["clean/claim0"][...] = 3

    data = forge(sealed, claim)
    # The layout message of contiguous storage: version 3, class 1, address, size.
    layouts = list(re.finditer(rb"\x03\x01(.{8})" + re.escape(struct.pack("<Q", 5000)), data, re.DOTALL))
    assert [layout[1] == b"\xff" * 8 for layout in layouts] == [False, True, True, True]
    shared = patch(data, {layout.start(1): layouts[0][1] for layout in layouts})
    assert len(shared) < 4 * 5000
    check_damaged(tmp_path / "labels.h5", shared, "the clean splits claim 20016 bytes")


def test_nothing_large_is_allocated_for_a_file_that_claims_to_be_large(sealed):
    """A reader with hardly any memory refuses each of these for what it is, not for want of memory."""
    reader = HostileReader()
    for change, reason in (parameters.values for parameters in HOSTILE):
        verdict = reader.read(forge(sealed, change))
        assert verdict.startswith("refused: ") and reason in verdict.replace("\\'", "'"), (change, verdict)
    assert reader.read(sealed) == "accepted"
    reader.close()


def test_a_large_file_of_another_kind_is_refused_without_being_read(tmp_path):
    path = tmp_path / "labels.h5"
    with path.open("wb") as file:
        file.truncate(2**36)
    tracemalloc.start()
    with pytest.raises(DataError, match="does not begin with the seal"):
        LabelCache.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_sealed_file_with_more_behind_the_hdf5_file_is_refused(tmp_path, sealed):
    check_damaged(tmp_path / "labels.h5", reseal(sealed + bytes(100)))


def test_a_sealed_file_that_is_no_hdf5_file_is_refused(tmp_path, sealed):
    check_damaged(tmp_path / "labels.h5", reseal(sealed[:SEAL_SIZE] + b"not HDF5"))
    check_damaged(tmp_path / "labels.h5", reseal(sealed[:SEAL_SIZE]))
    check_damaged(tmp_path / "labels.h5", reseal(bytes(SEAL_SIZE) + sealed))
