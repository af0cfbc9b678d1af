"""Forging label caches: changes made before a file is sealed again, with what must be found wrong."""

from __future__ import annotations

import io

import h5py
import pytest

from tests.support.label_mutations import checksummed, with_checksums
from tests.support.label_samples import reseal


def registry():
    """Return a list of forgeries, and a decorator that adds a change to it with the expected reason of refusal."""
    forgeries = []

    def hostile(reason):
        def register(change):
            forgeries.append(pytest.param(change, reason, id=change.__name__))
            return change

        return register

    return forgeries, hostile


HOSTILE, hostile = registry()


def forge(data, change):
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+", libver=("v108", "latest")) as file:
        change(file)
    return reseal(buffer.getvalue())


def patch(data, changes):
    """Change bytes, computing HDF5's and the seal's checksums again."""
    changed = bytearray(data)
    for at, value in changes.items():
        changed[at : at + len(value)] = value
    return reseal(with_checksums(bytes(changed), checksummed(data)))
