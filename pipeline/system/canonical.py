"""JSON written in the one way that equal values share, its SHA-256, and where two such values differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import DataError

_MAX_REPORTED = 4
_MAX_SHOWN = 80


def is_sha256(value: Any) -> bool:
    """Tell whether a value is a digest.

    Args:
        value: Anything.

    Returns:
        True for a text of 64 hexadecimal digits in lower case.
    """
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def canonical_json(value: Any) -> str:
    """Write a value in the one way that equal values share: sorted keys, no spaces, ASCII.

    Args:
        value: JSON values only.

    Returns:
        One line of text.

    Raises:
        TypeError: A value JSON does not have, such as a numpy scalar.
        ValueError: A number is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Digest an identity, or a provenance.

    Args:
        identity: As made by `make_identity` or `make_provenance`.

    Returns:
        SHA-256 of its canonical JSON, 64 hexadecimal digits.
    """
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def require_equal(what: str, found: Mapping[str, Any], expected: Mapping[str, Any], way_out: str) -> None:
    """Refuse an identity or provenance that differs, naming each field that does.

    Args:
        what: What was found, to open the message with.
        found: Its fields.
        expected: The fields that it must have.
        way_out: What the user can do.

    Raises:
        DataError: They differ: field, value found and value expected, and the way out, in one line.
    """
    different = _differences(found, expected, "")
    if different:
        shown = different[:_MAX_REPORTED]
        if len(different) > len(shown):
            shown.append(f"and {len(different) - len(shown)} more")
        raise DataError(f"{what} does not fit: {'; '.join(shown)}; {way_out}")


def _differences(found: Any, expected: Any, path: str) -> list[str]:
    """List where two JSON values differ, in a list only the first place."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        result: list[str] = []
        for key in sorted(found.keys() | expected.keys()):
            name = f"{path}.{key}" if path else key
            if key not in found:
                result.append(f"{name} is missing, expected {_show(expected[key])}")
            elif key not in expected:
                result.append(f"{name} is {_show(found[key])}, expected none")
            else:
                result += _differences(found[key], expected[key], name)
        return result
    if isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            return [f"{path} has {len(found)} entries, expected {len(expected)}"]
        for index, pair in enumerate(zip(found, expected, strict=True)):
            if different := _differences(*pair, f"{path}[{index}]"):
                return different
        return []
    if canonical_json(found) == canonical_json(expected):
        return []
    return [f"{path} is {_show(found)}, expected {_show(expected)}"]


def _show(value: Any) -> str:
    """Write a value for a message: one line, not too long."""
    text = canonical_json(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
