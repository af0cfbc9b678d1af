"""Runs of benchmarks on sizes so small that their figures mean nothing, and the form of their reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROW_KEYS = {"what", "ours", "peer", "peer_name", "unit", "ratio", "goal"}


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, path: Path, *options: str, threads: int = 1) -> dict[str, Any]:
    """Run a benchmark's command line, check the form of its report, and return the report."""
    # Its setting would stay for all later tests.
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None, raising=False)
    shared = ["--quick", "--json", str(path), "--device", "cpu", "--threads", str(threads), "--rounds", "1"]
    before = torch.get_num_threads()
    try:
        benchmark.main([*shared, *options])
    finally:
        torch.set_num_threads(before)
    report: dict[str, Any] = json.loads(path.read_text())
    environment = report["environment"]
    assert environment["device_type"] == "cpu"
    assert environment["threads"] == threads
    assert {"device", "commit", "date", "versions", "cores", "load_average", "options"} <= set(environment)
    assert report["rows"]
    for row in report["rows"]:
        assert set(row) >= ROW_KEYS
        assert row["ours"] > 0 and all(row[key] is None or row[key] > 0 for key in ("peer", "ratio"))
    return report


def rows(report: dict[str, Any], what: str) -> dict[str, dict[str, Any]]:
    """A report's rows of one measurement, by the peer's name."""
    return {row["peer_name"]: row for row in report["rows"] if row["what"] == what}
