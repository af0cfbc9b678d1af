"""The bytes of a label cache: a sealed HDF5 file, written in one way only and fully checked when read.

Layout, open to any HDF5 tool:

    user block       512 bytes, the seal, see `make_seal`
    labels           (V, N) uint8 or little-endian uint16; chunk (1, N), fletcher32;
                     fill value the largest of the type, never a label
    topk             group, only where the K most probable classes are kept
      classes        (V, N, K) as `labels`; chunk (1, N, K)
      probabilities  (V, N, K) little-endian float16; chunk (1, N, K), fletcher32, fill value NaN
    digest           (V, 32) uint8, SHA-256 of each view's row of `labels` and, where kept, of its `classes` and
                     `probabilities`, in C order one after the other
    clean/<split>    (n,) as `labels`
    identity         group whose attributes are the fields of the identity, each as canonical JSON
    provenance       likewise
    canaries         attribute of the root, canonical JSON
    accuracy         likewise, only where it is recorded

This module knows the layout and what HDF5 can do; pipeline.labels.cache knows what the values mean.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.labels.answers import PROBABILITY_DTYPE, ViewLabels
from pipeline.labels.identity import (
    IDENTITY_FIELDS,
    IDENTITY_OPTIONS,
    PROVENANCE_FIELDS,
    PROVENANCE_OPTIONS,
    SCHEMA_VERSION,
)
from pipeline.system.canonical import canonical_json, is_sha256

SEAL_SIZE = 512
MAGIC = b"\x93TITNLC\n"
_LAYOUT = struct.Struct("<8sIQ32s")

# Signature and version, sizes of offsets and lengths, flags, addresses of base, extension and end of file.
_SUPERBLOCK = struct.Struct("<9s3BQQQ")
_SIGNATURE = b"\x89HDF\r\n\x1a\n\x02"
_NOWHERE = 2**64 - 1
_LABEL_DTYPES = (np.dtype("u1"), np.dtype("<u2"))


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A digest of labelled pixels, by which a student checks that its views are the same.

    Attributes:
        view: View index.
        samples: Sample indices, in the order of the digest.
        sha256: Digest of those samples' pixels, 64 hexadecimal digits.
    """

    view: int
    samples: tuple[int, ...]
    sha256: str

    def check(self, num_views: int, num_samples: int) -> None:
        """Raise ValueError for pixels outside of a cache of V views and N samples, or for no digest."""
        if type(self.view) is not int or not 0 <= self.view < num_views:
            raise ValueError(f"a canary is of view {self.view!a}, there are {num_views}")
        if not all(type(sample) is int and 0 <= sample < num_samples for sample in self.samples):
            raise ValueError(f"a canary of view {self.view} is of samples outside of 0..{num_samples - 1}")
        if not is_sha256(self.sha256):
            raise ValueError(f"a canary of view {self.view} has no SHA-256")


@dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """The contents of a label cache file.

    Attributes:
        labels: `(V, N)` uint8 or uint16, the teacher's argmax in [0, C).
        clean: Split name to `(n,)` of the same type, its argmax on unaugmented images.
        canaries: Digests of a few views' pixels.
        identity: JSON values under IDENTITY_FIELDS and perhaps IDENTITY_OPTIONS, see `make_identity`.
        provenance: JSON values under PROVENANCE_FIELDS and some of PROVENANCE_OPTIONS, see `make_provenance`.
        classes: `(V, N, K)` as `labels`, its K most probable classes, descending, the label first; None where
            `provenance["topk"]` is 0.
        probabilities: `(V, N, K)` float16 in [0, 1], descending, of those classes; None without `classes`.
        accuracy: Split name to the share of its unaugmented images, in percent, that `clean` has right; None where it
            is not recorded, as in the files of the eight teachers of the paper, whose bytes stay as they were.
    """

    labels: NDArray[Any]
    clean: Mapping[str, NDArray[Any]]
    canaries: tuple[Canary, ...]
    identity: dict[str, Any]
    provenance: dict[str, Any]
    classes: NDArray[Any] | None = None
    probabilities: NDArray[Any] | None = None
    accuracy: Mapping[str, float] | None = None

    def view(self, index: int) -> ViewLabels:
        """Return the answers to a view, below V, sharing memory with these arrays."""
        if self.classes is None or self.probabilities is None:
            return ViewLabels(self.labels[index])
        return ViewLabels(self.labels[index], self.classes[index], self.probabilities[index])


def encode(contents: Contents) -> bytes:
    """Return contents as a whole sealed file; equal contents give equal bytes."""
    buffer = io.BytesIO()
    # A fixed format version, so that the bytes do not depend on the library's default. Before 1.8 an attribute has at
    # most 64 KiB, too little for the names of many classes.
    with h5py.File(buffer, "w", userblock_size=SEAL_SIZE, libver=("v108", "v108")) as file:
        file.attrs["canaries"] = np.bytes_(canonical_json([asdict(canary) for canary in contents.canaries]))
        if contents.accuracy is not None:
            file.attrs["accuracy"] = np.bytes_(canonical_json(dict(contents.accuracy)))
        for name, fields in (("identity", contents.identity), ("provenance", contents.provenance)):
            group = _create_group(file, name, len(fields))
            for key in sorted(fields):
                group.attrs[key] = np.bytes_(canonical_json(fields[key]))
        _write_views(file, "labels", contents.labels)
        if contents.classes is not None and contents.probabilities is not None:
            topk = file.create_group("topk")
            _write_views(topk, "classes", contents.classes)
            _write_views(topk, "probabilities", contents.probabilities)
        file.create_dataset("digest", data=_digests(contents), track_times=False)
        clean = file.create_group("clean")
        for split in sorted(contents.clean):
            clean.create_dataset(split, data=contents.clean[split], track_times=False)
    seal = make_seal(buffer.getbuffer()[SEAL_SIZE:])
    buffer.seek(0)
    buffer.write(seal)
    return buffer.getvalue()


def _create_group(file: h5py.File, name: str, num_fields: int) -> h5py.Group:
    """Create a group with all attributes in its header; beyond 8 HDF5 would use a heap and a tree for them."""
    properties = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    # The number is stored, so without options it must stay what it was before there were any.
    properties.set_attr_phase_change(max(len(PROVENANCE_FIELDS), num_fields), 0)
    properties.set_obj_track_times(False)
    return h5py.Group(h5py.h5g.create(file.id, name.encode(), gcpl=properties))


def _write_views(group: h5py.Group, name: str, array: NDArray[Any]) -> None:
    """Write a dataset with one chunk for each view."""
    dataset = group.create_dataset(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(1, *array.shape[1:]),
        fletcher32=True,
        fillvalue=_fill(array.dtype),
        track_times=False,
    )
    for view, row in enumerate(array):
        dataset[view] = row


def _fill(dtype: np.dtype[Any]) -> Any:
    """Return the value of rows that were never written: no class, or no probability."""
    return np.iinfo(dtype).max if dtype.kind == "u" else dtype.type(np.nan)


def decode(data: bytes) -> Contents:
    """Read a whole sealed file into read-only arrays.

    The seal is checked before HDF5 sees a byte. Since anyone can make a seal, each object must then be stored as
    `encode` stores it before any of its content is read.

    Raises:
        ValueError: What is wrong. HDF5 may raise any other exception on a hostile file.
    """
    check_seal(data)
    if len(data) < SEAL_SIZE + _SUPERBLOCK.size:
        raise ValueError("it holds no HDF5 file")
    signature, *_, base, extension, end = _SUPERBLOCK.unpack_from(data, SEAL_SIZE)
    if signature != _SIGNATURE or end != len(data):
        raise ValueError(f"it holds no HDF5 file that ends after {len(data)} bytes")
    # An extension can name drivers, a cache image or shared messages, which HDF5 acts upon when it opens the file.
    if base != SEAL_SIZE or extension != _NOWHERE:
        raise ValueError("its HDF5 superblock is not that of a label cache")
    with h5py.File(io.BytesIO(data), "r") as file:
        if file.userblock_size != SEAL_SIZE:
            raise ValueError(f"its user block has {file.userblock_size} bytes")
        keeps_topk = "topk" in set(file)  # of the names; `in file` would follow a link
        optional = {"topk"} if keeps_topk else set()
        members = {"labels", "digest", "clean", "identity", "provenance"} | optional
        _require_members(file, members, {"canaries"}, {"accuracy"})
        _require_members(file["identity"], set(), set(IDENTITY_FIELDS), set(IDENTITY_OPTIONS))
        _require_members(file["provenance"], set(), set(PROVENANCE_FIELDS), set(PROVENANCE_OPTIONS))
        _require_members(file["clean"], None, set())
        if keeps_topk:
            _require_members(file["topk"], {"classes", "probabilities"}, set())
        _require_room(file["clean"], len(data))
        contents = Contents(
            labels=_read_array(file, "labels", _LABEL_DTYPES, len(data), chunked=True),
            clean={split: _read_array(file["clean"], split, _LABEL_DTYPES, len(data)) for split in file["clean"]},
            canaries=tuple(
                Canary(**{**canary, "samples": tuple(canary["samples"])}) for canary in _read_json(file, "canaries")
            ),
            identity=_read_fields(file["identity"], (*IDENTITY_FIELDS, *IDENTITY_OPTIONS)),
            provenance=_read_fields(file["provenance"], (*PROVENANCE_FIELDS, *PROVENANCE_OPTIONS)),
            accuracy=_read_json(file, "accuracy") if "accuracy" in file.attrs else None,
        )
        if keeps_topk:
            contents = replace(
                contents,
                classes=_read_array(file["topk"], "classes", _LABEL_DTYPES, len(data), chunked=True),
                probabilities=_read_array(file["topk"], "probabilities", (PROBABILITY_DTYPE,), len(data), chunked=True),
            )
        digest = _read_array(file, "digest", _LABEL_DTYPES[:1], len(data))
    for name, array in (("classes", contents.classes), ("probabilities", contents.probabilities)):
        if array is not None and (array.ndim != 3 or array.shape[:2] != contents.labels.shape):
            raise ValueError(f"{name!a} has a shape of {array.shape} beside labels of {contents.labels.shape}")
    if not np.array_equal(digest, _digests(contents)):
        raise ValueError("the labels of a view differ from their digest")
    return contents


def _require_members(group: Any, links: set[str] | None, attributes: set[str], optional: Collection[str] = ()) -> None:
    """Refuse a group with other members, or members with more than one hard link; `links` None allows any names."""
    if not isinstance(group, h5py.Group):
        raise ValueError(f"{group.name} is not a group")
    names, given = set(group), set(group.attrs)
    if names != (names if links is None else links) or not attributes <= given <= attributes.union(optional):
        raise ValueError(f"{group.name} does not hold exactly what a label cache holds")
    for name in names:
        # Checked before the object is opened, which would follow soft and external links.
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name!a} is a link")
        if h5py.h5o.get_info(group.id, name.encode()).rc != 1:
            raise ValueError(f"{name!a} has a second name")


def _require_room(clean: h5py.Group, file_size: int) -> None:
    """Refuse splits that share their bytes: a small file could claim any number of large ones."""
    claimed = sum(dataset.id.get_storage_size() for dataset in clean.values() if isinstance(dataset, h5py.Dataset))
    if claimed >= file_size:
        raise ValueError(f"the clean splits claim {claimed} bytes")


def _read_fields(group: h5py.Group, keys: Sequence[str]) -> dict[str, Any]:
    """Read those of the attributes that a group has."""
    return {key: _read_json(group, key) for key in keys if key in group.attrs}


def _read_json(group: h5py.Group, key: str) -> Any:
    """Read an attribute that holds canonical JSON."""
    attribute = group.attrs.get_id(key)
    kind = attribute.get_type()
    if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str() or attribute.shape != ():
        raise ValueError(f"{key} is not a text of fixed length")
    text = bytes(group.attrs[key]).decode("ascii")
    value = json.loads(text)
    if canonical_json(value) != text:
        raise ValueError(f"{key} is not canonical JSON")
    return value


def _read_array(
    group: h5py.Group, name: str, dtypes: Sequence[np.dtype[Any]], file_size: int, *, chunked: bool = False
) -> NDArray[Any]:
    """Read a dataset after checking that all of it lies in this file, stored as `encode` stores it."""
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype not in dtypes:
        raise ValueError(f"{name!a} is not a dataset of {' or '.join(map(str, dtypes))}")
    shape, dtype, creation = dataset.shape, dataset.dtype, dataset.id.get_create_plist()
    # To numpy an enumeration or a boolean looks like its integer, and a float with another exponent like a plain one.
    if not dataset.id.get_type().equal(h5py.h5t.py_create(np.dtype(dtype.str))):
        raise ValueError(f"{name!a} is not of plain {'floats' if dtype.kind == 'f' else 'integers'}")
    if not shape or dataset.maxshape != shape or len(dataset.attrs):
        raise ValueError(f"{name!a} is not of fixed size and without attributes")
    layout = h5py.h5d.CHUNKED if chunked else h5py.h5d.CONTIGUOUS
    if creation.get_layout() != layout or creation.get_external_count():
        raise ValueError(f"{name!a} is not stored in this file in the layout of a label cache")
    filters = [creation.get_filter(index)[0] for index in range(creation.get_nfilters())]
    if filters != ([h5py.h5z.FILTER_FLETCHER32] if chunked else []):
        raise ValueError(f"{name!a} has the filters {filters}")
    # Before anything is allocated: a dataset may claim any size.
    size, checksums = math.prod(shape) * dtype.itemsize, 4 * shape[0] if chunked else 0
    if not 0 < size < file_size or dataset.id.get_storage_size() != size + checksums:
        raise ValueError(f"{name!a} stores {dataset.id.get_storage_size()} bytes for a shape of {shape}")
    fills = np.array_equal(dataset.fillvalue, _fill(dtype), equal_nan=True)
    if chunked and (dataset.chunks != (1, *shape[1:]) or not fills):
        raise ValueError(f"{name!a} has chunks of {dataset.chunks} and fill value {dataset.fillvalue}")
    array: NDArray[Any] = dataset[...]
    array.flags.writeable = False
    return array


def _digests(contents: Contents) -> NDArray[np.uint8]:
    """Digest each view's answers, `(V, 32)` uint8."""
    digests = b"".join(contents.view(index).digest() for index in range(len(contents.labels)))
    return np.frombuffer(digests, dtype=np.uint8).reshape(len(contents.labels), 32)


def make_seal(content: memoryview, version: int = SCHEMA_VERSION) -> bytes:
    """Return the SEAL_SIZE bytes that go before a content of a schema version."""
    digest = hashlib.sha256(content).digest()
    return _LAYOUT.pack(MAGIC, version, len(content), digest).ljust(SEAL_SIZE, b"\0")


def check_beginning(data: bytes) -> None:
    """Raise ValueError, to follow the file's name, unless the first SEAL_SIZE bytes begin a sealed file."""
    if len(data) < SEAL_SIZE:
        raise ValueError(f"it has {len(data)} bytes, less than a seal")
    magic, version, *_ = _LAYOUT.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it does not begin with the seal of a label cache")
    if version != SCHEMA_VERSION:
        raise ValueError(f"its schema version is {version}, this release reads {SCHEMA_VERSION}")


def check_seal(data: bytes) -> None:
    """Raise ValueError, to follow the file's name, if any byte of a whole file differs from what was sealed."""
    check_beginning(data)
    *_, length, _ = _LAYOUT.unpack_from(data)
    content = memoryview(data)[SEAL_SIZE:]
    if length != len(content):
        raise ValueError(f"it holds {len(content)} bytes behind the seal, sealed were {length}")
    if data[:SEAL_SIZE] != make_seal(content):
        raise ValueError("its bytes are not those that were sealed (SHA-256 differs)")
