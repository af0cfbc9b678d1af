"""Canonical JSON, its SHA-256, and the differences between two JSON values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError

SEAL = "seal"
_MAX_REPORTED = 4
_MAX_SHOWN = 80


class _Missing:
    """Stands for a value that is absent on one side of a comparison."""

    def __repr__(self) -> str:
        return "none"


MISSING = _Missing()


def is_sha256(value: Any) -> bool:
    """Tell whether a value is a text of 64 hexadecimal digits in lower case."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def canonical_json(value: Any) -> str:
    """Write JSON values so that equal ones give equal text: one line, sorted keys, no spaces, ASCII.

    Raises:
        TypeError: A value JSON does not have, such as a numpy scalar.
        ValueError: A number is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a value's canonical JSON, 64 hexadecimal digits; see `canonical_json` for errors."""
    return sha256_of(canonical_json(value))


def sha256_of(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with one more field, SEAL: the SHA-256 of all the others, so that any change is told."""
    return {**content, SEAL: fingerprint(_unsealed(content))}


def is_whole(content: Mapping[str, Any]) -> bool:
    """Tell whether a JSON object is as `seal` made it; one without a seal, of an older version, counts as whole."""
    return SEAL not in content or content[SEAL] == fingerprint(_unsealed(content))


def _unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != SEAL}


@dataclass(frozen=True)
class Difference:
    """One place in which two JSON values differ.

    Attributes:
        place: The keys and indices that lead to it.
        before: The first value there, or MISSING.
        after: The second value there, or MISSING.
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
    """List the places in which two JSON values differ, in the order of `after`; within a list only the first.

    The result is empty exactly if `canonical_json` writes both alike.
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
    """Write a value like `canonical_json`, but also infinite numbers, which a damaged file may hold."""
    return json.dumps(value, sort_keys=True)


def require_equal(what: str, given: Mapping[str, Any], expected: Mapping[str, Any], way_out: str) -> None:
    """Refuse an identity or provenance that differs, naming the fields that do.

    Args:
        what: What was read; begins the message.
        given: Its fields.
        expected: The fields that it must have.
        way_out: What the user can do; ends the message.

    Raises:
        DataError: They differ: field, value and expected value, and the way out, in one line.
    """
    if differences := compare(given, expected):
        shown = [_refusal(difference) for difference in differences[:_MAX_REPORTED]]
        if len(differences) > len(shown):
            shown.append(f"and {len(differences) - len(shown)} more")
        raise DataError(f"{what} does not fit: {'; '.join(shown)}; {way_out}")


def _refusal(difference: Difference) -> str:
    """Describe a field's value and the expected one."""
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
