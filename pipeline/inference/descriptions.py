"""What the JSON of a checkpoint or an export says of its model: enough to build it and to use it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.recipes import StudentRecipe
from pipeline.data.datasets import Channels
from pipeline.errors import DataError, UsageError

KINDS = ("student", "teacher")
CLASSES = (int, 2, 65535)
IMAGE_SIZES = (int, 4, 1024)


@dataclass(frozen=True)
class Description:
    """A model and its inputs.

    Attributes:
        kind: `student` or `teacher`.
        model: Its name in pipeline.models.students.STUDENTS or pipeline.models.teachers.TEACHERS.
        arguments: What it is built with. Never a teacher's `weights`: a file must not make us read or download more.
        class_names: K names.
        image_size: Side of the images, pixels.
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel, above 0.
    """

    kind: str
    model: str
    arguments: Mapping[str, Any]
    class_names: tuple[str, ...]
    image_size: int
    mean: Channels
    std: Channels

    @classmethod
    def read(cls, meta: Mapping[str, Any], file: Path) -> Description:
        """Read a description, before anything is built from it.

        Args:
            meta: The JSON.
            file: Where it lies, for the message.

        Raises:
            DataError: Fields are missing or out of range; the message names them.
        """
        arguments, names = meta.get("arguments"), meta.get("class_names")
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        limits = _limits(meta.get("kind"))
        checks = {
            "kind": meta.get("kind") in KINDS,
            "model": isinstance(meta.get("model"), str),
            "arguments": isinstance(arguments, dict) and _are_own(meta, arguments.keys() - limits.keys()),
            "class_names": is_list and len(set(names or ())) == len(names or ()),
            "image_size": _is_within(meta.get("image_size"), *IMAGE_SIZES),
            "mean": _is_channels(meta.get("mean"), 0.0),
            "std": _is_channels(meta.get("std"), sys.float_info.min),
        }
        if isinstance(arguments, dict):
            known = sorted(limits.keys() & arguments.keys())
            checks |= {f"arguments.{key}": _is_within(arguments[key], *limits[key]) for key in known}
            checks["arguments.num_classes"] = is_list and arguments.get("num_classes") == len(names or ())
            size = meta.get("image_size")
            checks["arguments.image_size"] = arguments.get("image_size", size) == size
        if wrong := [key for key, is_right in checks.items() if not is_right]:
            raise DataError(f"{file}: {', '.join(wrong)} missing or impossible; name a checkpoint that a stage wrote")
        channels = {key: tuple(meta[key]) for key in ("mean", "std")}
        return cls(meta["kind"], meta["model"], meta["arguments"], tuple(names or ()), meta["image_size"], **channels)


def _limits(kind: Any) -> dict[str, tuple[type, float, float]]:
    """Return type, least and largest value of each argument that a model of a kind is built from."""
    if kind == "teacher":
        return {"num_classes": CLASSES, "bn_momentum": (float, 0.0, 1.0)}
    from pipeline.models.students import GEOMETRY

    ranges = {field.name: field.metadata.get("range", ()) for field in dataclasses.fields(StudentRecipe)}
    return {"num_classes": CLASSES, "image_size": IMAGE_SIZES, **{name: (int, *ranges[name]) for name in GEOMETRY}}


def _are_own(meta: Mapping[str, Any], names: AbstractSet[str]) -> bool:
    """Tell whether arguments other than those of every model fit the constructor of a student."""
    from pipeline.models.students import STUDENTS, check_arguments

    model = meta.get("model")
    if meta.get("kind") != "student" or not isinstance(model, str) or model not in STUDENTS:
        return not names
    try:
        check_arguments(model, {name: meta["arguments"][name] for name in names}, "arguments")
    except UsageError:
        return False
    return True


def _is_within(value: Any, kind: type, low: float, high: float) -> bool:
    return type(value) is kind and isinstance(value, int | float) and low <= value <= high


def _is_channels(value: Any, low: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_within(number, float, low, 1.0) for number in value)
