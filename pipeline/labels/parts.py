"""Labelling in progress: one part file for each finished view, and sealing them into the label cache.

A part is written in one go, so that a run can be killed at any moment and resumed, also by another number of
processes: they label the views without a valid part. A part is known by its header, not by its name; one of another
teacher, data set or view is not valid.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, StorageError
from pipeline.labels.answers import ViewLabels
from pipeline.labels.cache import RELABEL, Canary, LabelCache
from pipeline.labels.identity import label_dtype, to_labels
from pipeline.system.canonical import fingerprint, require_equal
from pipeline.system.storage import busy, is_busy, read_if_exists, remove_leftovers, write_atomic

# SHA-256 of identity and provenance, and the view index; then the SHA-256 of these and of what follows, so that answers
# and their digest cannot be moved to another view's part. That is the answers (ViewLabels.to_bytes) and the SHA-256 of
# some of the pixels that were labelled; parts of older versions have no pixels' digest.
_OWNER = struct.Struct("<32s32sQ")
_HEADER_SIZE = _OWNER.size + 32
_NAME = re.compile(r"(\d{6,})\.part|\.\d{6,}\.part\.[0-9a-f]+\.tmp|fresh")


class LabelParts:
    """The views labelled so far, in a directory of their own and, when extending, in a sealed cache.

    Several processes may write different views at once.

    Args:
        directory: Where the part files lie; made by the first write.
        identity: What the labels are for, see `make_identity`.
        provenance: Who labels and how, see `make_provenance`.

    Attributes:
        pixels: SHA-256 of some of today's pixels, which follow from the code too, not from the other two alone. None
            until the views are made: parts of any pixels are valid then.

    Raises:
        DataError: More classes than a label cache can hold.
    """

    def __init__(self, directory: Path, *, identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        self.directory = directory
        self.identity = dict(identity)
        self.provenance = dict(provenance)
        self._num_classes = len(identity["class_names"])
        label_dtype(self._num_classes)  # there is one for it
        self._sizes = {
            "num_samples": int(identity["num_samples"]),
            "num_classes": self._num_classes,
            "topk": int(provenance["topk"]),
        }
        self._owner = bytes.fromhex(fingerprint(identity)), bytes.fromhex(fingerprint(provenance))
        self._sealed: LabelCache | None = None
        self.pixels: bytes | None = None

    @property
    def topk(self) -> int:
        """Classes kept of each sample with their probabilities, K; 0 where only labels are."""
        return self._sizes["topk"]

    def adopt(self, cache: LabelCache, way_out: str = RELABEL) -> None:
        """Count the views of a sealed cache as labelled, so that extending it labels only the new ones.

        Args:
            cache: The cache.
            way_out: What an error advises.

        Raises:
            DataError: Another teacher, device or data set made it; the message names each differing field.
        """
        require_equal("the sealed label cache", cache.identity, self.identity, way_out)
        require_equal("the sealed label cache", cache.provenance, self.provenance, way_out)
        self._sealed = cache

    @property
    def num_sealed(self) -> int:
        """Number of views adopted from a sealed cache, always the first ones."""
        return 0 if self._sealed is None else self._sealed.num_views

    def write(self, view: int, labels: ViewLabels | Any) -> None:
        """Store a finished view.

        Args:
            view: View index.
            labels: The teacher's answers; a plain row of `(N,)` integers in [0, C) where `topk` is 0.

        Raises:
            DataError: No teacher can have given them, or N or K differs from the identity's or provenance's.
            StorageError: Writing failed; run again.
        """
        answers = labels if isinstance(labels, ViewLabels) else ViewLabels(np.asarray(labels))
        try:
            stored = answers.stored(**self._sizes)
        except ValueError as error:
            raise DataError(f"view {view}: {error}; check that the teacher was trained for this data set") from error
        content = stored.to_bytes() + (self.pixels or b"")
        write_atomic(self._path(view), self._header(view, content) + content)

    def read(self, view: int) -> NDArray[Any] | None:
        """Read a view's labels, `(N,)` uint8 or uint16; otherwise as `answers`."""
        answers = self.answers(view)
        return None if answers is None else answers.labels

    def answers(self, view: int) -> ViewLabels | None:
        """Read the teacher's answers to a view; None where it has no valid part.

        Raises:
            StorageError: The part exists and cannot be read, or is not valid while another program holds it.
        """
        if self._sealed is not None and view < self._sealed.num_views:
            return self._sealed.view(view)
        path = self._path(view)
        data = read_if_exists(path)
        answers = None if data is None else self._parse(view, data)
        if data is not None and answers is None and is_busy(path):
            raise busy(path)
        return answers

    def _parse(self, view: int, data: bytes) -> ViewLabels | None:
        """Return what a part holds; None where it is not valid."""
        content = data[_HEADER_SIZE:]
        if data[:_HEADER_SIZE] != self._header(view, content):
            return None
        size = ViewLabels.num_bytes(**self._sizes)
        content, pixels = content[:size], content[size:]
        if pixels and self.pixels not in (None, pixels):
            return None
        try:
            answers = ViewLabels.from_bytes(content, **self._sizes)
        except ValueError:
            return None
        # By the digest it is what `write` checked, and sealing checks it once more.
        return answers if int(answers.labels.max()) < self._num_classes else None

    def missing(self, count: int, start: int = 0) -> list[int]:
        """Return the views from `start` and below `count` without a valid part, ascending.

        Raises:
            StorageError: A part exists and cannot be read.
        """
        return [view for view in range(start, count) if self.answers(view) is None]

    @property
    def are_fresh(self) -> bool:
        """Whether a run that labels these views anew has begun, and has not sealed them: it goes on from the parts."""
        return read_if_exists(self.directory / "fresh") == b"".join(self._owner)

    def begin_anew(self) -> None:
        """Delete the parts, and remember that the sealed file is to be replaced; needs the run's lock.

        Raises:
            StorageError: The file system refuses.
        """
        self.delete()
        write_atomic(self.directory / "fresh", b"".join(self._owner))

    def invalid(self, views: Iterable[int]) -> list[int]:
        """Return the views with an invalid part: damaged, or of another teacher, data set, K or other pixels."""
        return [view for view in views if self._path(view).exists() and self.answers(view) is None]

    def delete(self, *, below: int | None = None) -> None:
        """Delete the parts of any run and the temporary files of killed writers; needs the run's lock.

        Args:
            below: Keep the whole parts of this view and of later ones, also those that another teacher or device made:
                it may come back, and whoever labels these views writes them anew.

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
                later = below is not None and name[1] is not None and int(name[1]) >= below
                if not (later and _is_whole(entry)):
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


def _is_whole(part: Path) -> bool:
    """Return whether a part is as it was written, whoever labelled it."""
    data = read_if_exists(part) or b""
    owner, digest, content = data[: _OWNER.size], data[_OWNER.size : _HEADER_SIZE], data[_HEADER_SIZE:]
    return digest == hashlib.sha256(owner + content).digest()


def seal(
    path: Path,
    *,
    parts: LabelParts,
    count: int,
    clean: Mapping[str, Any],
    canaries: Sequence[Canary] = (),
    accuracy: Mapping[str, float] | None = None,
) -> LabelCache:
    """Write the label cache from complete parts, read it back, and delete its parts.

    The bytes depend on the arguments alone: a cache extended later is the same file as one made at once. All views of
    an adopted cache are kept, also if `count` is smaller; finished views beyond `count` remain parts.

    Args:
        path: The sealed file; an existing one is replaced, never opened for writing.
        parts: The views; `parts.missing(count)` is empty.
        count: Number of views, V.
        clean: Split name to `(n,)` labels in [0, C) of its unaugmented images.
        canaries: Digests of a few views' pixels.
        accuracy: See pipeline.labels.file.Contents.

    Returns:
        The cache as read back.

    Raises:
        DataError: A view is missing, or a label is no class.
        StorageError: Writing or reading back failed; the parts remain.
    """
    count = max(count, parts.num_sealed)
    try:
        labels, classes, probabilities = _gather(path, parts, count)
        num_classes = len(parts.identity["class_names"])
        data = LabelCache(
            labels=labels,
            classes=classes,
            probabilities=probabilities,
            clean={split: to_labels(row, num_classes) for split, row in clean.items()},
            canaries=tuple(canaries),
            identity=parts.identity,
            provenance=parts.provenance,
            accuracy=accuracy,
        ).to_bytes()
    except ValueError as error:
        raise DataError(f"cannot seal {path}: {error}; {RELABEL}") from error
    del labels, classes, probabilities  # they are as large as the file, which is read back below
    remove_leftovers(path)
    write_atomic(path, data)
    if read_if_exists(path) != data:
        raise StorageError(f"{path} does not read back as written; check the disk, then run again")
    cache = LabelCache.from_bytes(data)
    parts.delete(below=count)
    return cache


def _gather(path: Path, parts: LabelParts, count: int) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
    """Return the answers of the first views, `(V, N)` labels and `(V, N, K)` classes and probabilities."""
    stacked: list[NDArray[Any]] = []
    num_missing = 0
    for view in range(count):
        answers = parts.answers(view)
        if answers is None:
            num_missing += 1
            continue
        stacked = stacked or [np.empty((count, *array.shape), array.dtype) for array in answers.arrays]
        for stack, array in zip(stacked, answers.arrays, strict=True):
            stack[view] = array
    if num_missing:
        raise DataError(f"{path} needs {count} views, {num_missing} have no valid part; run again")
    labels, classes, probabilities = [*stacked, None, None][:3]
    assert labels is not None
    return labels, classes, probabilities
