"""Forged label caches: their seal is valid, what is behind it is not what a label cache holds."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.labels import LabelCache
from pipeline.seals import SEAL_SIZE
from tests.hostile_reader import HostileReader
from tests.label_mutations import checksummed, with_checksums
from tests.label_samples import NUM_CLASSES, NUM_SAMPLES, check_damaged, forge, reseal

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


def replace_clean(file, data=None, *, hdf5_type=None, **options):
    """Store other labels of the validation split, or none of another HDF5 type."""
    del file["clean/val"]
    if hdf5_type is None:
        file["clean"].create_dataset("val", data=data, **options)
    else:
        h5py.h5d.create(file["clean"].id, b"val", hdf5_type, h5py.h5s.create_simple((5,)))


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


@hostile("not a dataset of uint8 or uint16")
def object_references(file):
    replace_clean(file, np.array([file["labels"].ref] * 5, dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)


@hostile("not a dataset of uint8 or uint16")
def region_references(file):
    region = file["labels"].regionref[0]
    replace_clean(file, np.array([region] * 5, dtype=h5py.regionref_dtype), dtype=h5py.regionref_dtype)


@hostile("not a dataset of uint8 or uint16")
def compound(file):
    replace_clean(file, np.zeros(5, dtype=[("label", "u1")]))


@hostile("not a dataset of uint8 or uint16")
def array_type(file):
    del file["clean/val"]
    file["clean"].create_dataset("val", (5,), np.dtype(("u1", (3,))))


@hostile("not a dataset of uint8 or uint16")
def rows_of_variable_length(file):
    del file["clean/val"]
    file["clean"].create_dataset("val", (5,), h5py.vlen_dtype("u1"))


@hostile("not a dataset of uint8 or uint16")
def opaque(file):
    replace_clean(file, np.zeros(5, "V1"))


@hostile("not of plain integers")
def bit_field(file):
    replace_clean(file, hdf5_type=h5py.h5t.STD_B8LE)


@hostile("No NumPy equivalent")
def time_stamps(file):
    replace_clean(file, hdf5_type=h5py.h5t.UNIX_D32LE)


@hostile("not of plain integers")
def integers_of_four_bits(file):
    narrow = h5py.h5t.STD_U8LE.copy()
    narrow.set_precision(4)
    replace_clean(file, hdf5_type=narrow)


@hostile("has a second name")
def cycle_to_the_root(file):
    file["clean/more"] = file["/"]


@hostile("has a second name")
def cycle_to_itself(file):
    file["clean/more"] = file["clean"]


@hostile("'more' is not a dataset")
def deep_groups(file):
    group = file["clean"]
    for _ in range(2000):
        group = group.create_group("more")


@hostile("stores 172 bytes")
def chunk_without_its_checksum(file):
    file["labels"].id.write_direct_chunk((0, 0), file["labels"][0].tobytes(), filter_mask=1)


@hostile("filter returned failure")
def chunk_of_false_checksum(file):
    file["labels"].id.write_direct_chunk((0, 0), file["labels"][0].tobytes() + b"sums")


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


@hostile("split is not a text")
def reference_for_text(file):
    file["identity"].attrs.create("split", file["identity"].ref, dtype=h5py.ref_dtype)


@hostile("split is not a text")
def text_without_space(file):
    file["identity"].attrs["split"] = h5py.Empty("S7")


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


@hostile("of more than 4096 samples")
def canaries_of_every_sample_again_and_again(file):
    canary = {"samples": [0] * 5000, "sha256": "0" * 64, "view": 0}
    file.attrs["canaries"] = np.bytes_(json.dumps([canary], separators=(",", ":")))


def test_a_resealed_file_without_a_change_is_accepted(sealed):
    assert LabelCache.from_bytes(forge(sealed, lambda file: None)).num_views == 4


def patch(data, changes):
    """Change bytes, computing HDF5's and the seal's checksums again."""
    changed = bytearray(data)
    for at, value in changes.items():
        changed[at : at + len(value)] = value
    return reseal(with_checksums(bytes(changed), checksummed(data)))


def refuse_hdf5(monkeypatch):
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
    """Else a file of ten megabytes could claim a terabyte."""

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
    assert [each[1] == b"\xff" * 8 for each in layouts] == [False, True, True, True]
    shared = patch(data, {each.start(1): layouts[0][1] for each in layouts})
    assert len(shared) < 4 * 5000
    check_damaged(tmp_path / "labels.h5", shared, "the clean splits claim 20016 bytes")


def test_nothing_large_is_allocated_for_a_file_that_claims_to_be_large(sealed):
    """A reader with hardly any memory refuses each of these for what it is, not for want of memory."""
    reader = HostileReader()
    for change, reason in ((lying_shape, "stores 0 bytes"), (unwritten_row, "stores 176 bytes")):
        assert reason in reader.read(forge(sealed, change))
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
