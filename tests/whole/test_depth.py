"""The number of calls between the command `distill` and the loss that it trains with."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config.params import load_params
from pipeline.system.stopping import StopSignal
from stages.distill import distill
from stages.shared.context import Context
from tests.support.in_process import invoke
from tests.support.project import ROOT, Project

MOST = 6


def test_few_calls_lie_between_distill_and_equation_10(
    taught: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(taught.path, tmp_path / "project")
    invoke(Project(tmp_path / "project"), "label")

    def hybrid_loss(*arguments: Any, **options: Any) -> None:
        raise ArithmeticError

    monkeypatch.setattr("pipeline.losses.hybrid_loss", hybrid_loss)
    monkeypatch.chdir(tmp_path / "project")
    params = load_params(Path("params.yaml"))
    context = Context(params, params.select("smoke"), Console(quiet=True), StopSignal(), "cpu")
    with pytest.raises(ArithmeticError) as raised:
        distill(context, "titn", fresh=True)
    frames = traceback.extract_tb(raised.value.__traceback__)
    homes = (ROOT / "pipeline", ROOT / "stages")
    ours = [frame.name for frame in frames if any(Path(frame.filename).is_relative_to(home) for home in homes)]
    assert ours[0] == "distill" and frames[-1].name == "hybrid_loss"
    assert len(ours) - 1 <= MOST, " -> ".join([*ours, "hybrid_loss"])
