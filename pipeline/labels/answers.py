"""A teacher's stored answers to one view: its labels, and where asked its top-k classes.

Part files and the label cache both take from here which answers are valid and in what order their bytes are written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.labels.identity import label_dtype, to_labels

PROBABILITY_DTYPE = np.dtype("<f2")
_MAX_COMPARED = 32


@dataclass(frozen=True, eq=False)
class ViewLabels:
    """A teacher's answers to the N samples of one view, with C classes, of which it may keep the K most probable.

    Attributes:
        labels: `(N,)` integers in [0, C), the argmax of its logits.
        classes: `(N, K)` integers in [0, C), its K most probable classes, descending, the label first; None where
            only labels are kept.
        probabilities: `(N, K)` float16 in [0, 1], descending, of those classes among all C; None without `classes`.
    """

    labels: NDArray[Any]
    classes: NDArray[Any] | None = None
    probabilities: NDArray[Any] | None = None

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The arrays that are kept, in the order of writing and digesting."""
        arrays = (self.labels, self.classes, self.probabilities)
        return tuple(array for array in arrays if array is not None)

    @property
    def topk(self) -> int:
        """K, or 0 where only labels are kept."""
        return 0 if self.classes is None else int(self.classes.shape[-1])

    def take(self, rows: NDArray[np.int64]) -> ViewLabels:
        """Return the answers to some samples, `(n,)`, in their order."""
        return ViewLabels(*(array[rows] for array in self.arrays))

    def digest(self) -> bytes:
        """Return SHA-256 of all arrays' bytes in C order, 32 bytes."""
        sha256 = hashlib.sha256()
        for array in self.arrays:
            sha256.update(np.ascontiguousarray(array).data)
        return sha256.digest()

    def to_bytes(self) -> bytes:
        """Return all arrays' bytes in C order, one after the other."""
        return b"".join(array.tobytes() for array in self.arrays)

    @staticmethod
    def num_bytes(*, num_samples: int, num_classes: int, topk: int) -> int:
        """Return how many bytes `to_bytes` gives."""
        size = label_dtype(num_classes).itemsize
        return num_samples * (size + topk * (size + PROBABILITY_DTYPE.itemsize))

    @classmethod
    def from_bytes(cls, data: bytes, *, num_samples: int, num_classes: int, topk: int) -> ViewLabels:
        """Read what `to_bytes` wrote into read-only arrays, without checking the values.

        Raises:
            ValueError: There are more or fewer bytes than N samples take.
        """
        dtype, num_kept = label_dtype(num_classes), num_samples * topk
        sizes = [num_samples * dtype.itemsize, num_kept * dtype.itemsize, num_kept * PROBABILITY_DTYPE.itemsize]
        if len(data) != sum(sizes):
            raise ValueError(f"{len(data)} bytes for {num_samples} samples, expected {sum(sizes)}")
        labels = np.frombuffer(data, dtype, num_samples)
        if topk == 0:
            return cls(labels)
        classes = np.frombuffer(data, dtype, num_kept, sizes[0]).reshape(num_samples, topk)
        kept = np.frombuffer(data, PROBABILITY_DTYPE, num_kept, sizes[0] + sizes[1]).reshape(num_samples, topk)
        return cls(labels, classes, kept)

    def stored(self, *, num_samples: int, num_classes: int, topk: int) -> ViewLabels:
        """Check the answers and copy them to the stored types, without ever changing a value.

        Raises:
            ValueError: As for `check`, or an array is of another kind of number.
        """
        labels = to_labels(self.labels, num_classes)
        ViewLabels(labels, self.classes, self.probabilities).check(
            num_samples=num_samples, num_classes=num_classes, topk=topk
        )
        if self.classes is None or self.probabilities is None:
            return ViewLabels(labels)
        for name, array, kind in (
            ("classes", self.classes, np.integer),
            ("probabilities", self.probabilities, np.float16),
        ):
            if not np.issubdtype(array.dtype, kind):
                raise ValueError(f"{name} are {array.dtype}, expected {kind.__name__}")
        return ViewLabels(
            labels,
            np.array(self.classes, labels.dtype, order="C"),
            np.array(self.probabilities, PROBABILITY_DTYPE, order="C"),
        )

    def check(self, *, num_samples: int, num_classes: int, topk: int) -> None:
        """Refuse what no teacher can have answered.

        Args:
            num_samples: N that is expected.
            num_classes: C.
            topk: K that is expected, or 0.

        Raises:
            ValueError: What is wrong, and the first sample with the fault.
        """
        if self.labels.shape != (num_samples,):
            raise ValueError(f"{self.labels.size} labels for {num_samples} samples")
        if int(self.labels.max()) >= num_classes:
            raise ValueError(f"labels holds {self.labels.max()}, outside of the {num_classes} classes")
        if topk > num_classes:
            raise ValueError(f"topk is {topk}, more than the {num_classes} classes")
        for name, array in (("classes", self.classes), ("probabilities", self.probabilities)):
            shape = (num_samples, topk) if topk else None
            actual = None if array is None else array.shape
            if actual != shape:
                raise ValueError(f"{name} are of shape {actual}, expected {shape} for a topk of {topk}")
        if self.classes is not None and self.probabilities is not None:
            for fault, wrong in _faults(self.labels, self.classes, self.probabilities, num_classes).items():
                if wrong.any():
                    raise ValueError(f"sample {int(wrong.argmax())}: {fault}")


def indexable(stored: NDArray[Any], num_classes: int) -> NDArray[Any]:
    """Copy stored labels, classes or probabilities for a tensor that is indexed on any device.

    PyTorch has uint16, but does not index it on CUDA.

    Args:
        stored: Of any shape, as ViewLabels and the label cache hold it.
        num_classes: C, of the values that are classes.

    Returns:
        The same values, writable; in place of uint16 int16 up to 32,767 classes, else int32.
    """
    if stored.dtype != np.uint16:
        return np.array(stored)
    return stored.astype(np.int16 if num_classes <= np.iinfo(np.int16).max else np.int32)


def sum_tolerance(topk: int) -> float:
    """Return by how much K probabilities may sum to more than 1.

    Rounding to float16 changes a probability by at most 2^-11 of itself, or 2^-25 where it is subnormal; twice that
    leaves room for the float32 softmax that it came from.
    """
    return 2.0**-10 + topk * 2.0**-24


def _faults(
    labels: NDArray[Any], classes: NDArray[Any], probabilities: NDArray[Any], num_classes: int
) -> dict[str, NDArray[np.bool_]]:
    """Return for each fault the samples that have it, `(N,)`."""
    # Transposed, because numpy is slow along an axis of a few values.
    ranked = np.ascontiguousarray(classes.T)
    shares = probabilities.T.astype(np.float32, order="C")
    in_order = (shares[0] > 0) & (shares[0] <= 1) & (shares[-1] >= 0) & (shares[1:] <= shares[:-1]).all(axis=0)
    allowed = sum_tolerance(len(ranked))
    return {
        f"a class outside of the {num_classes} classes": ((ranked < 0) | (ranked >= num_classes)).any(axis=0),
        "one class twice": _repeats(ranked),
        "its first class is not its label": ranked[0] != labels,
        "its probabilities do not descend from at most 1 to at least 0": ~in_order,
        f"its probabilities sum to more than 1 + {allowed:.2g}": ~(shares.sum(axis=0) <= 1 + allowed),
    }


def _repeats(columns: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which columns of `(K, N)` hold a value twice, `(N,)`."""
    # For a few values, comparing all pairs is many times as fast as sorting; for many it is quadratic.
    if len(columns) > _MAX_COMPARED:
        columns = np.sort(columns, axis=0)
        return np.asarray((columns[1:] == columns[:-1]).any(axis=0))
    repeated = np.zeros(columns.shape[1], np.bool_)
    for distance in range(1, len(columns)):
        repeated |= (columns[distance:] == columns[:-distance]).any(axis=0)
    return repeated
