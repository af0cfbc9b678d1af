"""JSON written in the one way that equal values share, its SHA-256, and where two such values differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError

_MAX_REPORTED = 4
_MAX_SHOWN = 80


class _Missing:
    """What stands where one of two values has nothing."""

    def __repr__(self) -> str:
        return "none"


MISSING = _Missing()


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
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Mapping[str, Any]) -> str:
    """Digest what decides a result: an identity, a provenance, a run. Values are the same where their digests are.

    Args:
        value: JSON values only.

    Returns:
        SHA-256 of its canonical JSON, 64 hexadecimal digits.
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Difference:
    """One place in which two JSON values differ.

    Attributes:
        place: The keys and indices that lead there.
        before: What the first has there; MISSING where it has nothing.
        after: What the second has there; MISSING where it has nothing.
    """

    place: tuple[str | int, ...]
    before: Any
    after: Any

    @property
    def path(self) -> str:
        """The place as `view_recipe.seed` or `class_names[3]`."""
        parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.place]
        return "".join(parts).removeprefix(".")


def compare(before: Any, after: Any) -> list[Difference]:
    """List every place in which two JSON values differ, of a list only the first.

    Nothing is passed over: the list is empty exactly where `canonical_json` writes both alike.

    Args:
        before: JSON values.
        after: JSON values; the places come in the order of its keys.
    """
    return list(_compare(before, after, ()))


def _compare(before: Any, after: Any, place: tuple[str | int, ...]) -> Iterator[Difference]:
    """Yield the differences below a place."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*after, *sorted(before.keys() - after.keys())]:
            yield from _compare(before.get(key, MISSING), after.get(key, MISSING), (*place, key))
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            if inside := list(_compare(*pair, (*place, index))):
                yield from inside
                return
    elif before is MISSING or after is MISSING or _loose_json(before) != _loose_json(after):
        yield Difference(place, before, after)


def _loose_json(value: Any) -> str:
    """Write a value as `canonical_json` does, and an infinite number, which a damaged file may hold, too."""
    return json.dumps(value, sort_keys=True)


def require_equal(what: str, given: Mapping[str, Any], expected: Mapping[str, Any], way_out: str) -> None:
    """Refuse an identity or provenance that differs, naming the fields that do.

    Args:
        what: What was read, to open the message with.
        given: Its fields.
        expected: The fields that it must have.
        way_out: What the user can do.

    Raises:
        DataError: They differ: field, value and expected value, and the way out, in one line.
    """
    if differences := compare(given, expected):
        shown = [_refusal(difference) for difference in differences[:_MAX_REPORTED]]
        if len(differences) > len(shown):
            shown.append(f"and {len(differences) - len(shown)} more")
        raise DataError(f"{what} does not fit: {'; '.join(shown)}; {way_out}")


def _refusal(difference: Difference) -> str:
    """Say what a field is and what it should be."""
    path, given, expected = difference.path, difference.before, difference.after
    if given is MISSING:
        return f"{path} is missing, expected {show(expected)}"
    if expected is MISSING:
        return f"{path} is {show(given)}, expected none"
    if isinstance(given, list) and isinstance(expected, list):  # of the same length, an entry would be named
        return f"{path} has {len(given)} entries, expected {len(expected)}"
    return f"{path} is {show(given)}, expected {show(expected)}"


def show(value: Any) -> str:
    """Write a JSON value for a message: one line, cut after 80 characters."""
    text = canonical_json(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
