"""A label cache's identity and provenance.

The identity says which images the labels are for, and must equal that of a student's data field by field; the
provenance says which teacher labelled them and how. Both are plain JSON values, and are equal if their canonical JSON
is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.config.recipes import ViewRecipe, deciding_values
from pipeline.errors import DataError
from pipeline.system.canonical import is_sha256, show

SCHEMA_VERSION = 2
IDENTITY_FIELDS = (
    "schema_version",
    "dataset_sha256",
    "split",
    "num_samples",
    "class_names",
    "view_recipe",
)
PROVENANCE_FIELDS = (
    "teacher",
    "checkpoint_sha256",
    "mean",
    "std",
    "precision",
    "device",
    "versions",
    "compiled",
    "topk",
)
MAX_CLASSES = 65535


def make_identity(
    *,
    dataset_sha256: str,
    split: str,
    view_recipe: ViewRecipe,
    class_names: Sequence[str],
    num_samples: int,
) -> dict[str, Any]:
    """Describe what labels are for.

    The number of views is left out: a cache can be extended, and a student may use fewer.

    Args:
        dataset_sha256: Content digest of the prepared data set, 64 hexadecimal digits.
        split: Name of the labelled split.
        view_recipe: The augmentation, with its seed.
        class_names: One name a class, in the order of the labels; K of them.
        num_samples: Images in the split, N.

    Returns:
        JSON values under the keys IDENTITY_FIELDS.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset_sha256": dataset_sha256,
        "split": split,
        "num_samples": int(num_samples),
        "class_names": list(class_names),
        "view_recipe": deciding_values(view_recipe, but=("count",)),
    }


def make_provenance(
    *,
    teacher: str,
    checkpoint_sha256: str,
    mean: Sequence[float],
    std: Sequence[float],
    precision: str,
    device: str,
    versions: Mapping[str, str],
    compiled: bool = False,
    topk: int = 0,
) -> dict[str, Any]:
    """Describe who labels, how, and what is kept of the answers.

    Args:
        teacher: Name of the architecture.
        checkpoint_sha256: Digest of its weights, 64 hexadecimal digits.
        mean: Normalisation, one number a channel, in units of [0, 1] pixels.
        std: As `mean`.
        precision: `fp32` or `bf16`.
        device: Kind of device, such as `cpu` or `cuda`.
        versions: Library name to version.
        compiled: Whether the teacher was compiled, which changes its rounding.
        topk: Classes of each sample that are kept with their probabilities, K; 0 keeps the argmax alone.

    Returns:
        JSON values under the keys PROVENANCE_FIELDS.
    """
    return {
        "teacher": teacher,
        "checkpoint_sha256": checkpoint_sha256,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "precision": precision,
        "device": device,
        "versions": dict(versions),
        "compiled": bool(compiled),
        "topk": int(topk),
    }


def check_identity(identity: Mapping[str, Any]) -> None:
    """Raise ValueError, with the field and its value, for an identity that `make_identity` cannot have made."""
    _check_keys("identity", identity, IDENTITY_FIELDS)
    names, num_samples = identity["class_names"], identity["num_samples"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"identity.class_names is {show(names)}, expected a list of texts")
    label_dtype(len(names))
    if type(num_samples) is not int or num_samples < 1:
        raise ValueError(f"identity.num_samples is {show(num_samples)}, expected a positive number")
    _check_sha256("identity.dataset_sha256", identity["dataset_sha256"])


def check_provenance(provenance: Mapping[str, Any]) -> None:
    """Raise ValueError, with the field and its value, for a provenance that `make_provenance` cannot have made."""
    _check_keys("provenance", provenance, PROVENANCE_FIELDS)
    _check_sha256("provenance.checkpoint_sha256", provenance["checkpoint_sha256"])
    topk, compiled = provenance["topk"], provenance["compiled"]
    if type(topk) is not int or not 0 <= topk <= MAX_CLASSES:
        raise ValueError(f"provenance.topk is {show(topk)}, expected a number in 0..{MAX_CLASSES}")
    if type(compiled) is not bool:
        raise ValueError(f"provenance.compiled is {show(compiled)}, expected true or false")


def _check_keys(what: str, fields: Mapping[str, Any], expected: Sequence[str]) -> None:
    if set(fields) != set(expected):
        raise ValueError(f"{what} has the fields {show(sorted(fields))}, expected {show(sorted(expected))}")


def _check_sha256(field: str, value: Any) -> None:
    if not is_sha256(value):
        raise ValueError(f"{field} is {show(value)}, expected a SHA-256")


def label_dtype(num_classes: int) -> np.dtype[Any]:
    """Return the type of stored labels: uint8 up to 255 classes, else little-endian uint16.

    Its largest value is the fill value and never a class.

    Raises:
        DataError: There is no class, or too many.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise DataError(f"class_names has {num_classes} entries; a label cache holds 1 to {MAX_CLASSES} classes")
    return np.dtype("u1") if num_classes <= 255 else np.dtype("<u2")


def to_labels(values: Any, num_classes: int) -> NDArray[Any]:
    """Convert labels to the stored type without ever changing a value.

    Numpy and HDF5 would both clip or wrap 300 into a uint8 and read NaN as class 0.

    Args:
        values: `(N,)` integers in [0, num_classes).
        num_classes: K.

    Returns:
        `(N,)` of `label_dtype(num_classes)`, contiguous, sharing nothing with `values`.

    Raises:
        ValueError: Not a row of integers, or one is no class.
    """
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be a row of integers, not {array.dtype} of shape {array.shape}")
    outside = np.flatnonzero((array < 0) | (array >= num_classes))
    if outside.size:
        first = int(outside[0])
        raise ValueError(f"label {array[first]} of sample {first} is outside of the {num_classes} classes")
    dtype: DTypeLike = label_dtype(num_classes)
    return np.array(array, dtype=dtype, order="C")
