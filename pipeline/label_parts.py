"""Labelling under way: one part file for each finished view, and sealing them into the label cache.

A part is written once and whole, so that a run can be killed at any moment and resumed, by another number of
processes too: what is missing is what has no valid part. Nothing is trusted to its name: a part says what it
belongs to, and one of another teacher, data set or view counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, StorageError
from pipeline.label_identity import fingerprint, label_dtype, require_equal, to_labels
from pipeline.labels import RELABEL, Canary, LabelCache
from pipeline.storage import read_if_exists, remove_leftovers, write_atomic

# SHA-256 of the identity, of the provenance, view index; then SHA-256 of these and of the labels, which follow. Without
# these in it a digest and its labels could stand behind another view's index.
_OWNER = struct.Struct("<32s32sQ")
_HEADER_SIZE = _OWNER.size + 32
_NAME = re.compile(r"(\d{6,})\.part|\.\d{6,}\.part\.[0-9a-f]+\.tmp")


class LabelParts:
    """The views labelled so far, in a directory of their own and, when extending, in a sealed cache.

    Several processes may write different views at once.

    Args:
        directory: Where the part files lie; made by the first write.
        identity: What the labels are for, see `make_identity`.
        provenance: Who labels and how, see `make_provenance`.

    Raises:
        DataError: More classes than a label cache can hold.
    """

    def __init__(self, directory: Path, *, identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        self.directory = directory
        self.identity = dict(identity)
        self.provenance = dict(provenance)
        self._num_samples = int(identity["num_samples"])
        self._num_classes = len(identity["class_names"])
        self._dtype = label_dtype(self._num_classes)
        self._owner = bytes.fromhex(fingerprint(identity)), bytes.fromhex(fingerprint(provenance))
        self._sealed: NDArray[Any] = np.empty((0, self._num_samples), self._dtype)

    def adopt(self, cache: LabelCache) -> None:
        """Count the views of a sealed cache as labelled, so that extending it labels only the new ones.

        Args:
            cache: An opened cache.

        Raises:
            DataError: Another teacher, device or data set made it; the message names each differing field.
        """
        require_equal("the sealed label cache", cache.identity, self.identity, RELABEL)
        require_equal("the sealed label cache", cache.provenance, self.provenance, RELABEL)
        self._sealed = cache.labels

    @property
    def num_sealed(self) -> int:
        """Number of views adopted from a sealed cache, always the first ones."""
        return len(self._sealed)

    def write(self, view: int, labels: Any) -> None:
        """Store a finished view.

        Args:
            view: View index.
            labels: `(N,)` integers in [0, K).

        Raises:
            DataError: A label is no class, or there is not one for each sample.
            StorageError: Writing failed; run again.
        """
        try:
            row = to_labels(labels, self._num_classes)
        except ValueError as error:
            raise DataError(f"view {view}: {error}; check that the teacher was trained for this data set") from error
        if row.size != self._num_samples:
            raise DataError(
                f"view {view}: {row.size} labels for {self._num_samples} samples; prepare the data set again"
            )
        write_atomic(self._path(view), self._header(view, row.tobytes()) + row.tobytes())

    def read(self, view: int) -> NDArray[Any] | None:
        """Read a finished view.

        Args:
            view: View index.

        Returns:
            `(N,)` uint8 or uint16, or None where the view has no valid part.

        Raises:
            StorageError: The part exists and cannot be read.
        """
        if view < len(self._sealed):
            row: NDArray[Any] = self._sealed[view]
            return row
        data = read_if_exists(self._path(view))
        if data is None:
            return None
        content = data[_HEADER_SIZE:]
        if len(content) != self._num_samples * self._dtype.itemsize:
            return None
        if data[:_HEADER_SIZE] != self._header(view, content):
            return None
        row = np.frombuffer(content, self._dtype)
        return row if int(row.max()) < self._num_classes else None

    def missing(self, count: int) -> list[int]:
        """List the views still to be labelled.

        Args:
            count: Number of views wanted, V.

        Returns:
            Ascending view indices below `count` without a valid part.

        Raises:
            StorageError: A part exists and cannot be read.
        """
        return [view for view in range(count) if self.read(view) is None]

    def delete(self, *, below: int | None = None) -> None:
        """Delete parts, whoever wrote them, and what killed writers left.

        Only for the holder of the run's lock.

        Args:
            below: Keep the valid parts of this view and of later ones.

        Raises:
            StorageError: The file system refuses.
        """
        try:
            if not self.directory.is_dir():
                return
            for entry in self.directory.iterdir():
                name = _NAME.fullmatch(entry.name)
                if name is None:
                    continue
                kept = below is not None and name[1] is not None and int(name[1]) >= below
                if not (kept and self.read(int(name[1])) is not None):
                    entry.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot delete the parts in {self.directory}: {error.strerror}") from error
        with contextlib.suppress(OSError):  # other files, such as the run's lock, may live there
            self.directory.rmdir()

    def _path(self, view: int) -> Path:
        return self.directory / f"{view:06d}.part"

    def _header(self, view: int, content: bytes) -> bytes:
        owner = _OWNER.pack(*self._owner, view)
        return owner + hashlib.sha256(owner + content).digest()


def seal(
    path: Path,
    *,
    parts: LabelParts,
    count: int,
    clean: Mapping[str, Any],
    canaries: Sequence[Canary] = (),
) -> LabelCache:
    """Write the label cache from complete parts, read it back, and delete the parts.

    The bytes depend on the arguments alone: a cache extended later is the same file as one made at once.
    Views of an adopted cache are never dropped, so that asking for fewer keeps them all.

    Args:
        path: The sealed file; one that stands there is replaced, never opened for writing.
        parts: The views; `parts.missing(count)` is empty.
        count: Number of views, V.
        clean: Split name to `(n,)` labels in [0, K) of its unaugmented images.
        canaries: Digests of a few views' pixels.

    Returns:
        The cache as read back.

    Raises:
        DataError: A view is missing, or a label is no class.
        StorageError: Writing or reading back failed; the parts remain.
    """
    count = max(count, parts.num_sealed)
    rows = [row for view in range(count) if (row := parts.read(view)) is not None]
    if len(rows) < count:
        raise DataError(f"{path} needs {count} views, {count - len(rows)} have no valid part; run again")
    num_classes = len(parts.identity["class_names"])
    try:
        data = LabelCache(
            labels=np.stack(rows),
            clean={split: to_labels(labels, num_classes) for split, labels in clean.items()},
            canaries=tuple(canaries),
            identity=parts.identity,
            provenance=parts.provenance,
        ).to_bytes()
    except ValueError as error:
        raise DataError(f"cannot seal {path}: {error}; {RELABEL}") from error
    remove_leftovers(path)
    write_atomic(path, data)
    if read_if_exists(path) != data:
        raise StorageError(f"{path} does not read back as written; check the disk, then run again")
    cache = LabelCache.from_bytes(data)
    parts.delete()
    return cache
