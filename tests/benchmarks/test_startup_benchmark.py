"""The benchmark of starting times: what it starts, and what it compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.measure import ROOT
from tests.support.benchmark_reports import rows, run

COMMIT = "0123456789ab"


def test_commands_are_compared_with_plain_pytorch_and_with_another_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Path, Sequence[str]]] = []

    def start(folder: Path, root: Path, arguments: Sequence[str]) -> None:
        assert {"titn", "weights.pt", "image.png", "params.yaml"} <= {path.name for path in folder.iterdir()}
        started.append((root, arguments))

    monkeypatch.setattr(startup, "start", start)
    monkeypatch.setattr(startup, "commit_of", lambda checkout: COMMIT)
    report = run(startup, monkeypatch, tmp_path / "startup.json", "--beside", str(tmp_path))
    ours, other = ((root, ("-m", "stages.cli", *startup.COMMANDS["predict"])) for root in (ROOT, tmp_path.resolve()))
    assert started.count(ours) == started.count(other) == 2, "once to warm up, once timed"
    assert set(rows(report, "predict")) == {startup.FORWARD, COMMIT}
    assert rows(report, "predict")[startup.FORWARD]["goal"] == pytest.approx(1 / 1.3)
    assert set(rows(report, "import torch")) == {startup.FORWARD}
    assert set(rows(report, "help")) == {startup.FORWARD, COMMIT}


@pytest.mark.slow
def test_every_command_is_up_to_date_when_it_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(startup, monkeypatch, tmp_path / "startup.json", "--only", *startup.COMMANDS)
    assert {row["what"] for row in report["rows"]} == {startup.TORCH, *startup.COMMANDS}
