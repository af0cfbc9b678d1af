"""Timing in turns."""

from __future__ import annotations

import torch

from pipeline.inference.speed import interleave, quartiles


def test_each_of_a_turns_calls_is_timed() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleave(contenders, rounds=2, device=torch.device("cpu"), repeats={"a": 1, "b": 3})
    assert "".join(calls) == "ab" + "abbb" * 2
    assert {name: values.shape for name, values in seconds.items()} == {"a": (2,), "b": (6,)}


def test_quartiles_lie_between_the_values() -> None:
    seconds = interleave({"a": lambda: None}, rounds=5, device=torch.device("cpu"))["a"]
    low, high = quartiles(seconds)
    assert seconds.min() <= low <= high <= seconds.max()
