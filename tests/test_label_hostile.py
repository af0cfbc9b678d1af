"""Forged label caches: their seal is valid, what is behind it is not what a label cache holds."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.labels import LabelCache
from pipeline.seals import SEAL_SIZE
from tests.label_samples import NUM_CLASSES, NUM_SAMPLES, check_damaged, reseal

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
