"""Why a run's outputs are not up to date: the fields in which what was trained differs from what is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoints import read_meta
from pipeline.errors import DataError

NOT_TRAINED = "not trained"
MAX_NAMED = 3
_ABSENT = object()
# In the place of values that say nothing to people.
_PHRASES = {"dataset_sha256": "other data", "teacher": "another teacher", "weights_sha256": "other initial weights"}
# Follow from the data.
_CONSEQUENCES = ("class_names", "image_size", "mean", "std", "num_classes")


def why_stale(out: Path, files: Sequence[str], fingerprint: str, expected: Mapping[str, Any]) -> str | None:
    """Say in a phrase why a directory does not hold a run's outputs; None where it does.

    Args:
        out: The run's directory.
        files: What a finished run has there beside its checkpoint.
        fingerprint: Of everything that decides the result.
        expected: The same as plain JSON values, as far as the checkpoint's JSON keeps it.
    """
    try:
        meta = read_meta(out)
    except DataError:
        return "its checkpoint is damaged"  # what runs the stage again must not be stopped by it
    if meta is None:
        return "a checkpoint without its other files" if any((out / name).exists() for name in files) else NOT_TRAINED
    missing = [name for name in files if not (out / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    if meta.get("fingerprint") == fingerprint:
        return None
    found = differences(meta, expected)
    more = f", {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more if found else "trained under other settings, or by another version"


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two trees of JSON values differ, as `lr 0.1 -> 0.05`.

    Args:
        found: What was; what `expected` does not have does not count.
        expected: What is asked for. A part of it that `found` lacks altogether is passed over: an older version of
            this project did not keep it.
    """
    named: dict[str, str] = {}
    for part, wanted in expected.items():
        if part in found:
            _compare(part, found[part], wanted, named)
    if "other data" in named.values():
        named = {name: phrase for name, phrase in named.items() if name not in _CONSEQUENCES}
    return list(named.values())


def _compare(name: str, found: Any, wanted: Any, named: dict[str, str]) -> None:
    """Add what differs below a field, each under its own name."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        inner = f"{name}." if name == "views" else ""
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            _compare(f"{inner}{key}", found.get(key, _ABSENT), wanted.get(key, _ABSENT), named)
    elif found != wanted and name not in named:
        named[name] = _PHRASES.get(name, f"{name} {_text(found)} -> {_text(wanted)}")


def _text(value: Any) -> str:
    """Write a value as params.yaml does, a long one cut."""
    if value is _ABSENT or value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
