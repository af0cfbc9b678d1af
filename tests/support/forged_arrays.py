"""Forged labels, digests and clean splits."""

from __future__ import annotations

import hashlib

import h5py
import numpy as np

from tests.support.forgery import hostile
from tests.support.label_samples import NUM_SAMPLES


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
