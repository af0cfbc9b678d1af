"""Labels that something else has computed, as a teacher that is no Python, or an API: numpy's files, checked.

FILE.npy holds integers (V, N): the label of each of N samples in each of V views. FILE.npz holds `labels` (V, N), or
`classes` and `probabilities` (V, N, K) of the K most probable classes, descending, or all three, and where known
`clean_<split>` (n,), the labels of a split's unaugmented images.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, StorageError
from pipeline.labels.answers import ViewLabels
from pipeline.labels.identity import GIVEN, make_provenance, to_labels
from pipeline.system.storage import read_bytes

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_CLEAN = "clean_"
_ARRAYS = ("labels", "classes", "probabilities")


@dataclass(frozen=True, eq=False)
class GivenLabels:
    """Labels of a file, as a teacher of these data could have given them.

    Attributes:
        path: The file.
        sha256: Of its bytes, 64 hexadecimal digits.
        labels: `(V, N)` integers in [0, C).
        classes: `(V, N, K)` integers, the label first; None where only labels are given.
        probabilities: `(V, N, K)` float16; None without `classes`.
        clean: Split name to `(n,)` integers in [0, C), of those splits that are given.
    """

    path: Path
    sha256: str
    labels: NDArray[Any]
    classes: NDArray[Any] | None
    probabilities: NDArray[Any] | None
    clean: Mapping[str, NDArray[Any]]

    @property
    def num_views(self) -> int:
        """How many views it labels, V."""
        return len(self.labels)

    @property
    def topk(self) -> int:
        """K, or 0 where only labels are given."""
        return 0 if self.classes is None else int(self.classes.shape[2])

    @property
    def provenance(self) -> dict[str, Any]:
        """Who labelled: nobody knows, but what brought the labels."""
        return make_provenance(
            teacher=self.path.name, checkpoint_sha256=self.sha256, mean=(), std=(), precision=GIVEN, device=GIVEN,
            versions={}, topk=self.topk, given=True,
        )  # fmt: skip

    def view(self, index: int) -> ViewLabels:
        """Return the answers to a view, below V."""
        if self.classes is None or self.probabilities is None:
            return ViewLabels(self.labels[index])
        return ViewLabels(self.labels[index], self.classes[index], self.probabilities[index])

    @classmethod
    def read(
        cls, path: Path, *, num_samples: int, num_classes: int, num_clean: Mapping[str, int], max_views: int
    ) -> GivenLabels:
        """Read a .npy or .npz file, trusting nothing in it.

        Args:
            path: The file.
            num_samples: N, which it must have.
            num_classes: C.
            num_clean: By evaluation split its number of images, n.
            max_views: The largest V.

        Raises:
            DataError: It is no such file, or holds what no teacher of these data can have answered.
            StorageError: It cannot be read.
        """
        content = read_bytes(path)
        try:
            arrays = dict(_arrays(path, content))
            classes, probabilities = arrays.get("classes"), arrays.get("probabilities")
            if (classes is None) != (probabilities is None):
                raise ValueError("it holds one of classes and probabilities, which belong together")
            if classes is not None and probabilities is not None:
                if classes.ndim != 3 or classes.shape != probabilities.shape or not classes.size:
                    shapes = f"{classes.shape} and {probabilities.shape}"
                    raise ValueError(f"classes and probabilities are of shapes {shapes}, expected one (V, N, K)")
                if probabilities.dtype.kind != "f":
                    raise ValueError(f"probabilities are {probabilities.dtype}, expected floats")
                with np.errstate(over="ignore"):  # infinite ones are refused below
                    probabilities = probabilities.astype(np.float16)
            labels = arrays.get("labels", None if classes is None else classes[..., :1].reshape(classes.shape[:2]))
            if labels is None:
                raise ValueError("it holds neither labels nor classes and probabilities")
            if labels.ndim != 2 or labels.shape[1] != num_samples or not 1 <= len(labels) <= max_views:
                shape = f"(V, {num_samples}), the training images, with V up to {max_views}"
                raise ValueError(f"labels are of shape {labels.shape}, expected {shape}")
            clean = {}
            for key in arrays.keys() - set(_ARRAYS):
                split = key.removeprefix(_CLEAN)
                if not key.startswith(_CLEAN) or split not in num_clean:
                    known = ", ".join((*_ARRAYS, *(f"{_CLEAN}{name}" for name in num_clean)))
                    raise ValueError(f"it holds {key!a}; known are {known}")
                if arrays[key].shape != (num_clean[split],):
                    raise ValueError(f"{key} is of shape {arrays[key].shape}, expected ({num_clean[split]},)")
                clean[split] = _named(key, arrays[key], num_classes)
            given = cls(path, hashlib.sha256(content).hexdigest(), labels, classes, probabilities, clean)
            for index in range(given.num_views):
                given._check_view(index, num_samples, num_classes)
        except StorageError:
            raise
        except Exception as error:  # a hostile file can make numpy and zipfile raise anything
            reason = " ".join(str(error if isinstance(error, ValueError) else repr(error)).split())
            raise DataError(
                f"{path}: no labels of these data ({reason}); save integers (V, N) by numpy.save, or see "
                "docs/label-cache.md"
            ) from error
        return given

    def _check_view(self, index: int, num_samples: int, num_classes: int) -> None:
        try:
            self.view(index).stored(num_samples=num_samples, num_classes=num_classes, topk=self.topk)
        except ValueError as error:
            raise ValueError(f"view {index}: {error}") from error


def _named(key: str, array: NDArray[Any], num_classes: int) -> NDArray[Any]:
    try:
        return to_labels(array, num_classes)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _arrays(path: Path, content: bytes) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the arrays of a file by name; that of a .npy file is called `labels`."""
    if path.suffix == ".npy":
        yield "labels", _read(io.BytesIO(content), len(content), "labels")
        return
    if path.suffix != ".npz":
        raise ValueError("its name ends neither in .npy nor in .npz")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        seen: set[str] = set()
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in seen or not re.fullmatch(r"[a-z0-9_-]{1,80}", name):
                raise ValueError(f"it holds {member.filename!a}, no name or one that is there twice")
            seen.add(name)
            with archive.open(member) as file:
                yield name, _read(file, member.file_size, name)


def _read(file: IO[bytes], size: int, name: str) -> NDArray[Any]:
    """Read an array after checking that the bytes that it claims are there, and that it is plain numbers."""
    header = _HEADERS.get(np.lib.format.read_magic(file))
    if header is None:
        raise ValueError(f"{name} is of an unknown version of numpy's format")
    shape, _, dtype = header(file)
    if dtype.kind not in "iuf" or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"{name} claims {dtype} of shape {shape} in {size} bytes")
    file.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array
