"""The label cache: the teacher's label for every view of every training image, in one sealed file.

For soft distillation it also keeps the teacher's K most probable classes and their probabilities. Students train
against it without the teacher. pipeline.labels.parts.seal writes the file as a whole, and nothing changes it later;
pipeline.labels.file documents its layout.

Source: arXiv:2502.16762 §3.5 (the label y_t of equation 10).
Differs: the paper asks the teacher in every step; we keep its answers for a fixed number of views.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, StorageError
from pipeline.labels.answers import PROBABILITY_DTYPE, ViewLabels
from pipeline.labels.file import SEAL_SIZE, Canary, Contents, check_beginning, decode, encode
from pipeline.labels.identity import (
    SCHEMA_VERSION,
    check_identity,
    check_provenance,
    label_dtype,
    make_identity,
    make_provenance,
)
from pipeline.system.canonical import fingerprint, require_equal, show
from pipeline.system.storage import busy, is_busy, read_bytes, read_if_exists

__all__ = [
    "SCHEMA_VERSION",
    "Canary",
    "LabelCache",
    "fingerprint",
    "make_identity",
    "make_provenance",
]

RELABEL = "label again with `pipeline label --fresh`"
_SPLIT = re.compile(r"[a-z0-9][a-z0-9_-]*")
# Every student's run first renders them; some dozens take milliseconds.
MAX_CANARY_SAMPLES = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelCache(Contents):
    """A consistent label cache in memory; its attributes are those of Contents."""

    def __post_init__(self) -> None:
        """Refuse what no teacher can have made.

        Raises:
            ValueError: What is wrong.
        """
        check_identity(self.identity)
        check_provenance(self.provenance)
        dtype = label_dtype(self.num_classes)
        arrays = {"labels": self.labels, **{f"clean/{split}": row for split, row in self.clean.items()}}
        for name, array in arrays.items():
            num_axes = 2 if name == "labels" else 1
            if array.ndim != num_axes or array.size == 0 or array.dtype != dtype:
                raise ValueError(
                    f"{name} is {array.dtype} of shape {array.shape}, expected {dtype} along {num_axes} axes"
                )
            if int(array.max()) >= self.num_classes:
                raise ValueError(f"{name} holds {array.max()}, outside of the {self.num_classes} classes")
        if self.labels.shape[1] != self.num_samples:
            raise ValueError(f"labels has {self.labels.shape[1]} columns for {self.num_samples} samples")
        self._check_topk()
        for split in self.clean:
            if not _SPLIT.fullmatch(split):
                raise ValueError(f"split {split!a} is not a name")
        num_rendered = sum(1 + len(canary.samples) for canary in self.canaries)
        if num_rendered > MAX_CANARY_SAMPLES:
            raise ValueError(f"its canaries are of more than {MAX_CANARY_SAMPLES} samples")
        for canary in self.canaries:
            canary.check(self.num_views, self.num_samples)
        self._check_accuracy()

    def _check_accuracy(self) -> None:
        """Refuse an accuracy of what has no clean labels, or one that is no share."""
        if self.accuracy is None:
            return
        if not isinstance(self.accuracy, Mapping) or not self.accuracy.keys() <= self.clean.keys():
            raise ValueError(f"accuracy is {show(self.accuracy)}, expected numbers by split of {sorted(self.clean)}")
        for split, value in self.accuracy.items():
            if type(value) is not float or not 0.0 <= value <= 100.0:
                raise ValueError(f"accuracy.{split} is {show(value)}, expected a percentage")

    def _check_topk(self) -> None:
        """Refuse top-k answers that no teacher can have given, a view at a time to spare memory."""
        for name, array, dtype in (
            ("topk/classes", self.classes, self.labels.dtype),
            ("topk/probabilities", self.probabilities, PROBABILITY_DTYPE),
        ):
            shape = (*self.labels.shape, self.topk) if self.topk else None
            if (None if array is None else array.shape) != shape or (array is not None and array.dtype != dtype):
                actual = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
                raise ValueError(f"{name} is {actual}, expected {f'{dtype} of shape {shape}' if shape else 'none'}")
        for index in range(self.num_views if self.topk else 0):
            try:
                self.view(index).check(num_samples=self.num_samples, num_classes=self.num_classes, topk=self.topk)
            except ValueError as error:
                raise ValueError(f"view {index}: {error}") from error

    @property
    def topk(self) -> int:
        """Classes kept of each sample with their probabilities, K; 0 where only labels are."""
        return int(self.provenance["topk"])

    @property
    def num_views(self) -> int:
        """Number of labelled views, V."""
        return int(self.labels.shape[0])

    @property
    def num_samples(self) -> int:
        """Number of samples, N."""
        return int(self.identity["num_samples"])

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.identity["class_names"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity, 64 hexadecimal digits."""
        return fingerprint(self.identity)

    def digest(self, num_views: int, *, topk: bool) -> str:
        """Return SHA-256 of what a student learns from, 64 hexadecimal digits: the answers to the first views.

        Args:
            num_views: How many views.
            topk: Whether it reads the kept classes and probabilities too.
        """
        views = (self.view(index) for index in range(num_views))
        return hashlib.sha256(
            b"".join((view if topk else ViewLabels(view.labels)).digest() for view in views)
        ).hexdigest()

    @property
    def clean_digest(self) -> str:
        """SHA-256 of the labels of unaugmented images, 64 hexadecimal digits."""
        rows = (split.encode() + labels.tobytes() for split, labels in sorted(self.clean.items()))
        return hashlib.sha256(b"".join(rows)).hexdigest()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        expected_identity: Mapping[str, Any] | None = None,
        way_out: str = RELABEL,
    ) -> LabelCache:
        """Read a label cache into read-only arrays, trusting nothing in the file.

        Args:
            path: The sealed file.
            expected_identity: Every field of the identity that it must have; None accepts any.
            way_out: What an error advises.

        Raises:
            DataError: The file is missing, damaged, not a label cache, or belongs to something else; the
                message names each differing field, the file's value and the expected one.
            StorageError: The file cannot be read, or does not hold a label cache while another program holds it.
        """
        beginning = read_if_exists(path, SEAL_SIZE)
        if beginning is None:
            raise DataError(f"{path} does not exist; make it with `pipeline teacher-select`")
        try:
            # A large file of another kind is refused before it is read.
            check_beginning(beginning)
            cache = cls.from_bytes(read_bytes(path))
        except StorageError:
            raise
        except Exception as error:  # a hostile file can make HDF5 raise anything
            if is_busy(path):
                raise busy(path) from error
            reason = " ".join(str(error if isinstance(error, ValueError) else repr(error)).split())
            raise DataError(f"{path} is not a valid label cache: {reason}; {way_out}") from error
        if expected_identity is not None:
            require_equal(f"{path}", cache.identity, expected_identity, way_out)
        return cache

    @classmethod
    def from_bytes(cls, data: bytes) -> LabelCache:
        """Read a whole sealed file from memory; as pipeline.labels.file.decode, and the values are checked too."""
        return cls(**vars(decode(data)))

    def to_bytes(self) -> bytes:
        """Return the whole sealed file; equal caches give equal bytes."""
        return encode(self)
