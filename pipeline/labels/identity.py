"""A label cache's identity and provenance.

The identity says which images the labels are for, and must equal that of a student's data field by field; the
provenance says which teacher labelled them and how. Both are plain JSON values, and are equal if their canonical JSON
is. So caches of two teachers on one view recipe have the same identity and differ in provenance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.config.recipes import RESIZES, ViewRecipe, deciding_values
from pipeline.errors import DataError
from pipeline.system.canonical import canonical_json, is_sha256, sha256_of, show

SCHEMA_VERSION = 2
IDENTITY_FIELDS = (
    "schema_version",
    "dataset_sha256",
    "split",
    "num_samples",
    "class_names",
    "view_recipe",
)
# Written only where views are made from files, not from stored pixels.
IDENTITY_OPTIONS = ("rendition",)
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
MEMBER_FIELDS = ("teacher", "checkpoint_sha256", "mean", "std")
# Written only where they are not as in every file before them: folded true, the images' own size, no code of the
# user's, one teacher, which was run here.
TEACHER_OPTIONS = ("folded", "input_size", "code_sha256")
PROVENANCE_OPTIONS = (*TEACHER_OPTIONS, "members", "given")
GIVEN = "given"
"""Stands for precision and device where something else has computed the labels."""
MAX_CLASSES = 65535
MAX_INPUT_SIZE = 65535
MAX_MEMBERS = 64


def make_identity(
    *,
    dataset_sha256: str,
    split: str,
    view_recipe: ViewRecipe,
    class_names: Sequence[str],
    num_samples: int,
    rendition: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe what labels are for.

    The number of views is left out: a cache can be extended, and a student may use fewer.

    Args:
        dataset_sha256: Content digest of the prepared data set, 64 hexadecimal digits.
        split: Name of the labelled split.
        view_recipe: The augmentation, with its seed.
        class_names: One name a class, in the order of the labels; K of them.
        num_samples: Images in the split, N.
        rendition: Of a data set that keeps files, `image_size` and `resize`, by which they become pixels; None for one
            that keeps pixels.

    Returns:
        JSON values under the keys IDENTITY_FIELDS, and under those of IDENTITY_OPTIONS that are given.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset_sha256": dataset_sha256,
        "split": split,
        "num_samples": int(num_samples),
        "class_names": list(class_names),
        "view_recipe": deciding_values(view_recipe, but=("count",)),
        **({} if rendition is None else {"rendition": dict(rendition)}),
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
    folded: bool = True,
    input_size: int | None = None,
    code_sha256: str | None = None,
    members: Sequence[Mapping[str, Any]] = (),
    given: bool = False,
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
        folded: Whether batch norms are folded into weights, see pipeline.models.folding.
        input_size: Side to which the teacher upsamples the images, pixels; None for their own.
        code_sha256: Digest of the file of a model that is the user's own code.
        members: Of an ensemble, two at least, each as `make_member` describes it; see `make_ensemble`.
        given: Whether something else has computed the labels, and `checkpoint_sha256` is of the file that held them.

    Returns:
        JSON values under the keys PROVENANCE_FIELDS, and under those of PROVENANCE_OPTIONS that are not as usual.
    """
    member = make_member(
        teacher=teacher, checkpoint_sha256=checkpoint_sha256, mean=mean, std=std, folded=folded, input_size=input_size,
        code_sha256=code_sha256,
    )  # fmt: skip
    return {
        **member,
        "precision": precision,
        "device": device,
        "versions": dict(versions),
        "compiled": bool(compiled),
        "topk": int(topk),
        **({"members": [dict(one) for one in members]} if members else {}),
        **({"given": True} if given else {}),
    }


def make_member(
    *,
    teacher: str,
    checkpoint_sha256: str,
    mean: Sequence[float],
    std: Sequence[float],
    folded: bool = True,
    input_size: int | None = None,
    code_sha256: str | None = None,
) -> dict[str, Any]:
    """Describe one teacher, alone or in an ensemble; the arguments are those of `make_provenance`.

    Returns:
        JSON values under the keys MEMBER_FIELDS, and under those of TEACHER_OPTIONS that are not as usual.
    """
    return {
        "teacher": teacher,
        "checkpoint_sha256": checkpoint_sha256,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        **({} if folded else {"folded": False}),
        **({} if input_size is None else {"input_size": int(input_size)}),
        **({} if code_sha256 is None else {"code_sha256": code_sha256}),
    }


def make_ensemble(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the arguments of `make_provenance` that describe an ensemble; each member normalises images itself."""
    return {
        "teacher": " + ".join(member["teacher"] for member in members),
        "checkpoint_sha256": _sha256_of_members(members),
        "mean": (),
        "std": (),
        "members": members,
    }


def _sha256_of_members(members: Sequence[Mapping[str, Any]]) -> str:
    return sha256_of(canonical_json([dict(member) for member in members]))


def check_identity(identity: Mapping[str, Any]) -> None:
    """Raise ValueError, with the field and its value, for an identity that `make_identity` cannot have made."""
    _check_keys("identity", identity, IDENTITY_FIELDS, IDENTITY_OPTIONS)
    names, num_samples = identity["class_names"], identity["num_samples"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"identity.class_names is {show(names)}, expected a list of texts")
    label_dtype(len(names))
    if type(num_samples) is not int or num_samples < 1:
        raise ValueError(f"identity.num_samples is {show(num_samples)}, expected a positive number")
    _check_sha256("identity.dataset_sha256", identity["dataset_sha256"])
    if "rendition" in identity:
        _check_rendition(identity["rendition"])


def _check_rendition(rendition: Any) -> None:
    """Raise ValueError for a rendition of files that cannot be."""
    keys = ("image_size", "resize")
    if not isinstance(rendition, dict) or tuple(sorted(rendition)) != keys:
        raise ValueError(f"identity.rendition is {show(rendition)}, expected an object of {' and '.join(keys)}")
    size, resize = (rendition[key] for key in keys)
    if type(size) is not int or not 1 <= size <= MAX_INPUT_SIZE:
        raise ValueError(f"identity.rendition.image_size is {show(size)}, expected a number in 1..{MAX_INPUT_SIZE}")
    if resize not in RESIZES:
        raise ValueError(f"identity.rendition.resize is {show(resize)}, expected {' or '.join(RESIZES)}")


def check_provenance(provenance: Mapping[str, Any]) -> None:
    """Raise ValueError, with the field and its value, for a provenance that `make_provenance` cannot have made."""
    _check_keys("provenance", provenance, PROVENANCE_FIELDS, PROVENANCE_OPTIONS)
    _check_sha256("provenance.checkpoint_sha256", provenance["checkpoint_sha256"])
    topk, compiled = provenance["topk"], provenance["compiled"]
    if type(topk) is not int or not 0 <= topk <= MAX_CLASSES:
        raise ValueError(f"provenance.topk is {show(topk)}, expected a number in 0..{MAX_CLASSES}")
    if type(compiled) is not bool:
        raise ValueError(f"provenance.compiled is {show(compiled)}, expected true or false")
    _check_teacher_options("provenance", provenance)
    options = [key for key in PROVENANCE_OPTIONS if key in provenance]
    if "given" in provenance:
        _check_alone("given", provenance, options, {"precision": GIVEN, "device": GIVEN, "compiled": False})
        if provenance["given"] is not True:
            raise ValueError(f"provenance.given is {show(provenance['given'])}, expected true or nothing")
    if "members" in provenance:
        _check_alone("members", provenance, options, {})
        _check_members(provenance["members"])
        if provenance["checkpoint_sha256"] != _sha256_of_members(provenance["members"]):
            raise ValueError("provenance.checkpoint_sha256 is not that of its members")


def _check_alone(key: str, provenance: Mapping[str, Any], options: Sequence[str], expected: Mapping[str, Any]) -> None:
    """Refuse what cannot stand beside an option: other options, a normalisation, and values that it does not allow."""
    for name, value in {"mean": [], "std": [], **expected}.items():
        if provenance[name] != value:
            raise ValueError(f"provenance.{name} is {show(provenance[name])}, expected {show(value)} beside {key}")
    if list(options) != [key]:
        raise ValueError(f"provenance has the fields {show(sorted(options))}, expected {key} without the others")


def _check_members(members: Any) -> None:
    """Raise ValueError for members of an ensemble that `make_member` cannot have made."""
    if not isinstance(members, list) or not 2 <= len(members) <= MAX_MEMBERS:
        raise ValueError(f"provenance.members is {show(members)}, expected a list of 2 to {MAX_MEMBERS}")
    for index, member in enumerate(members):
        what = f"provenance.members[{index}]"
        if not isinstance(member, dict):
            raise ValueError(f"{what} is {show(member)}, expected an object")
        _check_keys(what, member, MEMBER_FIELDS, TEACHER_OPTIONS)
        if not isinstance(member["teacher"], str):
            raise ValueError(f"{what}.teacher is {show(member['teacher'])}, expected a text")
        _check_sha256(f"{what}.checkpoint_sha256", member["checkpoint_sha256"])
        for key in ("mean", "std"):
            values = member[key]
            if not isinstance(values, list) or not all(
                type(value) is float and math.isfinite(value) for value in values
            ):
                raise ValueError(f"{what}.{key} is {show(values)}, expected a list of finite numbers")
        _check_teacher_options(what, member)


def _check_teacher_options(what: str, fields: Mapping[str, Any]) -> None:
    """Raise ValueError for one of TEACHER_OPTIONS that cannot be, or need not be there."""
    if fields.get("folded", False) is not False:
        raise ValueError(f"{what}.folded is {show(fields['folded'])}, expected false or nothing")
    size = fields.get("input_size", 1)
    if type(size) is not int or not 1 <= size <= MAX_INPUT_SIZE:
        raise ValueError(f"{what}.input_size is {show(size)}, expected a number in 1..{MAX_INPUT_SIZE}")
    if "code_sha256" in fields:
        _check_sha256(f"{what}.code_sha256", fields["code_sha256"])


def _check_keys(what: str, fields: Mapping[str, Any], expected: Sequence[str], options: Sequence[str] = ()) -> None:
    if not set(expected) <= set(fields) <= {*expected, *options}:
        allowed = f", and perhaps {show(sorted(options))}" if options else ""
        raise ValueError(f"{what} has the fields {show(sorted(fields))}, expected {show(sorted(expected))}{allowed}")


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
