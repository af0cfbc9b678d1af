"""Label cache files with a top-k that are damaged, or forged and sealed again."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.labels.cache import LabelCache
from tests.pipeline.labels.test_soft_labels import TOPK, changed, label
from tests.support.forgery import forge, registry
from tests.support.label_mutations import damage
from tests.support.label_samples import NUM_SAMPLES, check_damaged, sealed_pair


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """The bytes of a sealed file of four views with their top 3."""
    directory = tmp_path_factory.mktemp("sealed")
    label(directory / "parts", directory / "labels.h5", 4)
    return (directory / "labels.h5").read_bytes()


@pytest.mark.parametrize("trials", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_random_damage_is_refused(tmp_path, sealed, trials):
    rng = random.Random(trials)
    other, _ = sealed_pair(tmp_path)
    for _ in range(trials):
        check_damaged(tmp_path / "labels.h5", damage(sealed, other, rng))


HOSTILE, hostile = registry()


def replace(file, name, data=None, **options):
    """Store an array of the top-k in another way, or another array, with the right digests."""
    topk = file["topk"]
    data = topk[name][...] if data is None else data
    fill = np.nan if name == "probabilities" else 255
    del topk[name]
    stored = {"chunks": (1, *data.shape[1:]), "fletcher32": True, "fillvalue": fill} | options
    topk.create_dataset(name, data=data, **stored)
    digest_again(file)


def digest_again(file):
    arrays = [file["labels"][...], file["topk/classes"][...], file["topk/probabilities"][...]]
    digests = [hashlib.sha256(b"".join(array[view].tobytes() for array in arrays)).digest() for view in range(4)]
    del file["digest"]
    file["digest"] = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])


@hostile("'topk' is a link")
def soft_link_to_the_group(file):
    file.move("topk", "clean/topk")
    file["topk"] = h5py.SoftLink("/clean/topk")


@hostile("'topk' is a link")
def dangling_link(file):
    del file["topk"]
    file["topk"] = h5py.SoftLink("/nowhere")


@hostile("'topk' is a link")
def external_link_to_the_group(file):
    del file["topk"]
    file["topk"] = h5py.ExternalLink("honest.h5", "/topk")


@hostile("'classes' is a link")
def soft_link_to_an_array(file):
    del file["topk/classes"]
    file["topk/classes"] = h5py.SoftLink("/labels")


@hostile("has a second name")
def second_name(file):
    del file["topk/classes"]
    file["topk/classes"] = file["topk/probabilities"]


@hostile("not stored in this file")
def virtual_probabilities(file):
    shape = (4, NUM_SAMPLES, TOPK)
    layout = h5py.VirtualLayout(shape, "<f2")
    layout[:] = h5py.VirtualSource("honest.h5", "topk/probabilities", shape)
    del file["topk/probabilities"]
    file["topk"].create_virtual_dataset("probabilities", layout, fillvalue=np.nan)


@hostile("not stored in this file")
def external_probabilities(file):
    del file["topk/probabilities"]
    shape = (4, NUM_SAMPLES, TOPK)
    file["topk"].create_dataset("probabilities", shape, "<f2", external=[("honest.h5", 0, 2 * 4 * 40 * 3)])


@hostile("not stored in this file")
def contiguous(file):
    replace(file, "classes", chunks=None, fletcher32=False)


@hostile("/topk does not hold exactly")
def extra_array(file):
    file["topk/extra"] = np.zeros(3)


@hostile("/topk does not hold exactly")
def extra_attribute_of_the_group(file):
    file["topk"].attrs["extra"] = 1


@hostile("/topk does not hold exactly")
def missing_array(file):
    del file["topk/probabilities"]


@hostile("/topk is not a group")
def a_dataset_for_the_group(file):
    del file["topk"]
    file["topk"] = np.zeros(3, np.uint8)


@hostile("without attributes")
def extra_attribute_of_an_array(file):
    file["topk/classes"].attrs["extra"] = 1


@hostile("'probabilities' is not a dataset of float16")
def wider_floats(file):
    replace(file, "probabilities", data=file["topk/probabilities"][...].astype("<f4"))


@hostile("'probabilities' is not a dataset of float16")
def big_endian_floats(file):
    replace(file, "probabilities", data=file["topk/probabilities"][...].astype(">f2"))


@hostile("'probabilities' is not a dataset of float16")
def floats_of_another_exponent(file):
    create_of_type(file, bias=14)


@hostile("'probabilities' is not of plain floats")
def floats_without_an_implied_bit(file):
    create_of_type(file, normalisation=h5py.h5t.NORM_NONE)


def create_of_type(file, bias=15, normalisation=None):
    """Store probabilities as another 16-bit float type, which NumPy would read as its own float16."""
    kind = h5py.h5t.IEEE_F16LE.copy()
    kind.set_ebias(bias)
    if normalisation is not None:
        kind.set_norm(normalisation)
    data, shape = file["topk/probabilities"][...], (4, NUM_SAMPLES, TOPK)
    del file["topk/probabilities"]
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((1, NUM_SAMPLES, TOPK))
    creation.set_fletcher32()
    space = h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(file["topk"].id, b"probabilities", kind, space, creation)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, data, kind)


@hostile("topk/classes is uint16")
def wider_classes(file):
    replace(file, "classes", data=file["topk/classes"][...].astype("<u2"), fillvalue=65535)


@hostile("'classes' is not a dataset of uint8 or uint16")
def signed_classes(file):
    replace(file, "classes", data=file["topk/classes"][...].astype("i1"), fillvalue=127)


@hostile("has the filters")
def compressed(file):
    replace(file, "probabilities", compression="gzip")


@hostile("has the filters")
def no_checksum(file):
    replace(file, "probabilities", fletcher32=False)


@hostile("not of fixed size")
def resizable(file):
    replace(file, "classes", maxshape=(None, NUM_SAMPLES, TOPK))


@hostile("stores 512 bytes")
def smaller_chunks(file):
    replace(file, "classes", chunks=(1, 20, TOPK))


@hostile("fill value 0")
def fill_is_a_class(file):
    replace(file, "classes", fillvalue=0)


@hostile("fill value 0.0")
def fill_is_a_probability(file):
    replace(file, "probabilities", fillvalue=0.0)


@hostile("stores 732 bytes")
def unwritten_view(file):
    rows = file["topk/probabilities"][:3]
    del file["topk/probabilities"]
    dataset = file["topk"].create_dataset(
        "probabilities", (4, NUM_SAMPLES, TOPK), "<f2", chunks=(1, NUM_SAMPLES, TOPK), fletcher32=True, fillvalue=np.nan
    )
    for view, row in enumerate(rows):
        dataset[view] = row


@hostile("stores 0 bytes")
def lying_shape(file):
    del file["topk/classes"]
    file["topk"].create_dataset(
        "classes", (2**40, NUM_SAMPLES, TOPK), "u1", chunks=(1, NUM_SAMPLES, TOPK), fletcher32=True, fillvalue=255
    )


@hostile("'classes' has a shape of (3, 40, 3) beside labels of (4, 40)")
def fewer_views(file):
    data = file["topk/classes"][:3]
    del file["topk/classes"]
    file["topk"].create_dataset("classes", data=data, chunks=(1, 40, 3), fletcher32=True, fillvalue=255)


@hostile("'classes' has a shape of (4, 120) beside labels of (4, 40)")
def two_axes(file):
    replace(file, "classes", data=file["topk/classes"][...].reshape(4, 120))


@hostile("topk/probabilities is float16 of shape (4, 40, 2)")
def another_k(file):
    replace(file, "probabilities", data=file["topk/probabilities"][..., :2])


@hostile("differ from their digest")
def another_probability(file):
    file["topk/probabilities"][2, 5, 2] = 0.0


@hostile("differ from their digest")
def views_exchanged(file):
    file["topk/classes"][...] = file["topk/classes"][...][::-1]


@hostile("view 2: sample 5: its probabilities do not descend")
def no_number(file):
    replace(file, "probabilities", data=changed(file["topk/probabilities"][...], (2, 5, 1), np.nan))


@hostile("view 3: sample 0: a class outside")
def no_class(file):
    replace(file, "classes", data=changed(file["topk/classes"][...], (3, 0, 2), 255))


@hostile("topk/classes is uint8 of shape (4, 40, 3), expected none")
def provenance_of_the_argmax(file):
    file["provenance"].attrs["topk"] = np.bytes_("0")


@hostile("topk/classes is missing")
def provenance_without_arrays(file):
    del file["topk"]
    digests = [hashlib.sha256(row.tobytes()).digest() for row in file["labels"][...]]
    file["digest"][...] = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])


@hostile("provenance.topk is 3.0")
def fractional_k(file):
    file["provenance"].attrs["topk"] = np.bytes_("3.0")


@hostile("topk is 100000000")
def enormous_k(file):
    file["provenance"].attrs["topk"] = np.bytes_("100000000")


@pytest.mark.parametrize(("change", "reason"), HOSTILE)
def test_a_hostile_file_is_refused_although_its_seal_is_valid(tmp_path, sealed, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    Path("honest.h5").write_bytes(sealed)
    check_damaged(tmp_path / "labels.h5", forge(sealed, change), reason)


@pytest.mark.parametrize("name", ["classes", "probabilities"])
def test_arrays_stored_again_without_a_change_are_accepted(sealed, name):
    assert LabelCache.from_bytes(forge(sealed, lambda file: replace(file, name))).num_views == 4
