"""Canonical JSON, its SHA-256, and where two values differ."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.system.canonical import MISSING, canonical_json, compare, fingerprint, require_equal

SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, -1.5]) | st.text("ab", max_size=1)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=1), inner, max_size=2)
)


@given(before=VALUES, after=VALUES)
def test_values_differ_somewhere_exactly_where_their_json_does(before: Any, after: Any) -> None:
    assert (compare(before, after) == []) == (canonical_json(before) == canonical_json(after))


def test_a_fingerprint_is_the_sha_256_of_json_in_one_writing() -> None:
    text = '{"a":1.0,"b":[true,null,"\\u00e9"]}'
    assert canonical_json({"b": [True, None, "é"], "a": 1.0}) == text
    assert fingerprint({"b": [True, None, "é"], "a": 1.0}) == hashlib.sha256(text.encode()).hexdigest()


def test_differences_are_named_with_both_values_and_missing_parts_too() -> None:
    before = {"same": 1, "list": [1, 2, 3], "inner": {"lr": 0.1}, "surplus": None, "kind": 1}
    after = {"inner": {"lr": 0.2, "clip": 1}, "list": [1, 5, 4], "same": 1, "more": {"a": 1}, "kind": True}
    assert [(difference.path, difference.before, difference.after) for difference in compare(before, after)] == [
        ("inner.lr", 0.1, 0.2),
        ("inner.clip", MISSING, 1),
        ("list[1]", 2, 5),
        ("more", MISSING, {"a": 1}),
        ("kind", 1, True),
        ("surplus", None, MISSING),
    ]


def test_a_damaged_number_is_a_difference_like_any_other() -> None:
    assert [difference.path for difference in compare({"a": float("inf")}, {"a": 1.0})] == ["a"]


def test_what_does_not_fit_is_refused_in_one_line_with_the_way_out() -> None:
    require_equal("labels.h5", {"seed": 1}, {"seed": 1}, "label again")
    given_, expected = {name: 1 for name in "abcdef"}, {name: 2 for name in "abcdef"}
    with pytest.raises(DataError) as refusal:
        require_equal("labels.h5", given_, expected, "label again")
    assert str(refusal.value) == (
        "labels.h5 does not fit: a is 1, expected 2; b is 1, expected 2; c is 1, expected 2; d is 1, expected 2; "
        "and 2 more; label again"
    )
