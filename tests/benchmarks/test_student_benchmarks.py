"""The benchmarks of training, on sizes so small that their figures mean nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import budget, epoch, exactness, floor, peak_memory, students, teachers
from benchmarks.student_contenders import COMPILED, FORWARD, GRAPHS, TRAINING, Contender
from pipeline.models.students.fused import guard
from tests.support.benchmark_reports import rows, run

TITN = Contender("titn", "fp32", blocks="plain", kind="plain")
MEBIBYTE = 2**20
JUDGED = "titn training step b128"


def fake_memory(who: Contender, device: torch.device, *, batch_size: int, **sizes: Any) -> int:
    """A mebibyte for each image, ten for timm's TNT in bf16, and too little for lucidrains' in bf16."""
    if (who.model, who.precision) == ("lucidrains TNT", "bf16"):
        raise MemoryError("too little")
    return batch_size * MEBIBYTE * (10 if (who.model, who.precision) == ("timm TNT", "bf16") else 1)


@pytest.fixture
def quick_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "find_peaks", lambda device, **sizes: floor.H200)
    monkeypatch.setattr(peak_memory, "measure", fake_memory)
    monkeypatch.setattr(peak_memory, "available", lambda device: 200 * MEBIBYTE)


@pytest.mark.usefixtures("quick_surroundings")
def test_only_who_is_asked_for_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="a peer, in the extra `bench`")
    sizes = ("--depth", "1", "--students", "vit", "--batch-sizes", "4")
    asked = ("--only", "=vit plain bf16 eager,=vit plain bf16,ViT bf16", "--measure", "forward")
    report = run(students, monkeypatch, tmp_path / "students.json", *sizes, *asked)
    names = {row["what"].split(", ")[0] for row in report["rows"]}
    assert names == {"vit", "vit plain bf16 eager", "timm ViT bf16 eager"}
    assert all(", forward at" in row["what"] for row in report["rows"])


def test_the_budget_of_a_step_has_every_operation_in_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--depth", "1", "--students", "titn", "--batch-size", "4")
    report = run(budget, monkeypatch, tmp_path / "budget.json", *sizes)
    found = {row["what"].removeprefix("titn fp32 b4, "): row for row in report["rows"]}
    assert set(found) >= {*budget.PARTS, budget.WHOLE} - {"inner blocks"}
    parts = [row["ours"] for what, row in found.items() if what != budget.WHOLE]
    assert all(part > 0 for part in parts)
    for operation, part in {
        "aten::addmm": "matrix products",
        "aten::add_": "sums, biases, LayerNorm",
        "titn::inner_block_cpp_backward": "inner blocks",
        "_AttendBackward": "attention",
        "aten::gelu_backward": "GELU",
        "aten::_fused_sgd_": "clipping and update",
        "AccumulateGrad": budget.REST,
    }.items():
        assert budget.part_of(operation) == part


@pytest.mark.usefixtures("quick_surroundings")
def test_students_are_compared_with_every_peer_and_who_is_left_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="a peer, in the extra `bench`")
    pytest.importorskip("transformer_in_transformer", reason="a peer, in the extra `bench`")
    sizes = ("--depth", "1", "--students", "titn,deit", "--batch-sizes", "4,128")
    report = run(students, monkeypatch, tmp_path / "students.json", *sizes)
    assert set(report["parameters"]) == {"titn", "deit", "timm TNT", "lucidrains TNT", "timm DeiT"}
    [judged] = [row for row in report["rows"] if JUDGED in row["what"]]
    assert judged["what"] == JUDGED and judged["unit"] == "ms"
    assert judged["goal"] is None, "one block is not what the goal is stated for"
    assert judged["peer_name"] in {"timm TNT fp32 eager", "lucidrains TNT fp32 eager"}
    assert judged["floor_ratio"] == pytest.approx(judged["ours"] / judged["floor"])
    what = {row["what"] for row in report["rows"]}
    for at in ("training step at batch 4", "forward at batch 4", "forward at batch 128"):
        assert {f"titn, {at}", f"deit, {at}", f"titn plain bf16 eager, {at}", f"timm DeiT bf16 eager, {at}"} <= what
    [memory] = rows(report, "lucidrains TNT fp32 eager, peak memory of a training step at batch 128").values()
    assert (memory["ours"], memory["peer"], memory["unit"]) == (128.0, 128.0, "MiB")
    left_out = report["left_out"]
    assert left_out["lucidrains TNT bf16 eager at batch 4"] == "MemoryError: too little"
    assert left_out["timm TNT bf16 eager at batch 128"] == "needs about 1.2 GiB, 0.2 GiB are free"
    assert "left out: timm TNT bf16 eager at batch 128" in capsys.readouterr().out
    assert not any("timm TNT bf16 eager" in text and "128" in text for text in what)


def test_the_goal_is_for_the_best_setting_that_a_recipe_has_beside_the_fastest_peer() -> None:
    figures = {
        TITN: np.array([4.0]),
        Contender("titn", "bf16", blocks="fused", kind="c++"): np.array([2.0]),
        Contender("titn", "bf16", COMPILED, blocks="plain", kind="plain"): np.array([1.0]),
        Contender("titn", "bf16", GRAPHS, blocks="plain", kind="plain"): np.array([0.5]),
        Contender("timm TNT", "fp32"): np.array([8.0]),
        Contender("timm TNT", "bf16", COMPILED): np.array([6.0]),
    }
    options = argparse.Namespace(depth=None)
    floors = {who: 0.5 for who in figures}
    rows = {row.what: row for row in students.rows(["titn"], figures, TRAINING, 128, "ms", 1e3, floors, options)}
    judged = rows.pop(JUDGED)
    assert (judged.ours, judged.peer, judged.ratio, judged.goal) == (1000.0, 6000.0, 6.0, 1.5)
    assert judged.peer_name == "timm TNT bf16 compiled"
    assert judged.details["ours_name"] == "titn plain bf16 compiled"
    assert (judged.details["floor_ratio"], judged.details["peer_floor_ratio"]) == (2.0, 12.0)
    assert not any(JUDGED in what for what in rows)
    assert rows["titn c++ bf16 eager, training step at batch 128"].ratio == 3.0
    assert rows["timm TNT fp32 eager, training step at batch 128"].ratio == 8.0


def test_students_stand_alone_where_no_peer_is_installed() -> None:
    options = argparse.Namespace(depth=None)
    rows = students.rows(["titn"], {TITN: np.array([4.0])}, TRAINING, 128, "ms", 1.0, {}, options)
    assert [(row.what, row.ours, row.peer, row.ratio) for row in rows] == [
        ("titn, training step at batch 128", 4.0, None, None),
        ("titn plain fp32 eager, training step at batch 128", 4.0, None, None),
    ]
    assert students.rows(["titn"], {}, FORWARD, 128, "ms", 1.0, {}, options) == []


@pytest.mark.slow
def test_peak_memory_of_a_step_is_a_fresh_process_own() -> None:
    peak = peak_memory.measure(TITN, torch.device("cpu"), student="titn", batch_size=128, depth=1)
    pixels = 4 * 128 * 16 * 16 * 12
    assert 10 * pixels < peak < 500 * pixels, "a plain block keeps some dozen tensors of the pixels' size"


@pytest.mark.parametrize("sizes", ["0", "128,", "4,x"])
def test_batch_sizes_that_are_none_are_refused(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        students.main(["--quick", "--batch-sizes", sizes])
    assert "is not a whole number above 0" in capsys.readouterr().err


def test_teachers_are_compared_with_the_common_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(teachers, monkeypatch, tmp_path / "teachers.json", "--batch-size", "4")
    for operation in ("training step", "forward"):
        settings = rows(report, f"squeezenet1_1, {operation} at batch 4")
        assert list(settings) == [
            "torchvision fp32 NCHW eager",
            "torchvision bf16 NCHW eager",
            "torchvision bf16 channels_last eager",
        ]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_surroundings")
def test_compiled_students_are_compared_too(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="a peer, in the extra `bench`")
    path = tmp_path / "students.json"
    sizes = ["--rounds", "1", "--depth", "1", "--students", "vit", "--batch-sizes", "4"]
    students.main(["--json", str(path), "--device", "cpu", *sizes])
    text = path.read_text()
    assert "vit plain bf16 compiled, training step at batch 4" in text
    assert "timm ViT fp32 compiled, forward at batch 4" in text


def test_what_is_not_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        students.main(["--quick", "--measure", "memory,train"])
    assert "--measure train: is not measured; choose from memory, training, forward" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "option"), [(students, "--students"), (teachers, "--teachers")])
def test_an_unknown_model_is_refused(module: Any, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main(["--quick", option, "resnet"])
    assert f"resnet: is no {option[2:-1]}; choose from " in capsys.readouterr().err


def test_exactness_is_compared_with_the_guard_s_bound_and_what_is_not_finite_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = dict(exactness.geometries())
    assert next(iter(blocks)) == "titn of cifar100: 16 tokens of width 12, 2 heads, 48 hidden"
    assert len({block.inner_geometry for block in blocks.values()}) == len(blocks) > 1
    found = {"results": guard.Errors(2e-7, 1e-7), "gradients": guard.Errors(float("nan"), 1e-7)}
    monkeypatch.setattr(guard, "compare_inner", lambda *given, **named: found)
    right = {"results": guard.Errors(2e-7, 1e-7)}
    monkeypatch.setattr(guard, "compare_outer", lambda *given, **named: right)
    path = tmp_path / "exactness.json"
    with pytest.raises(SystemExit, match=r"^not finite: titn of cifar100: .*; bf16, gradients; .*; fp32, gradients$"):
        exactness.main(["--quick", "--device", "cpu", "--json", str(path)])
    row, other, *outer = json.loads(path.read_text())["rows"]
    assert [row["what"].split("; ")[0] for row in outer] == ["titn of cifar100: outer block"] * 2
    assert (row["ours"], row["peer"], row["ratio"], row["goal"]) == (2e-7, 1.4e-6, pytest.approx(7.0), 1.0)
    assert row["what"].endswith("bf16, results") and other["what"].endswith("fp32, results")


def test_an_epoch_is_its_steps_and_its_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch, "keep_freed_memory", lambda: None)
    seconds = {
        "epoch": np.array([4.0]),
        "steps": np.array([3.0]),
        "views": np.array([0.2]),
        "evaluation": np.array([0.1]),
    }
    monkeypatch.setattr(
        epoch, "interleave", lambda contenders, **named: {name: seconds[name].copy() for name in contenders}
    )
    path = tmp_path / "epoch.json"
    epoch.main(["--quick", "--device", "cpu", "--json", str(path), "--images", "40", "--depth", "1"])
    rows = {row["what"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["titn, an epoch of 40 images"]["ours"] == 4.0
    steps = rows["titn, steps of that epoch, on a batch that is there"]["ours"]
    assert steps == pytest.approx(3.0 * 40 / 48), "two steps of 16 images and one of 8"
    assert rows["titn, edges of that epoch"]["ours"] == pytest.approx(1000 * (4.0 - steps))
    assert rows["titn, views, share of that epoch"]["ours"] == pytest.approx(5.0)
    assert rows["titn, evaluation of 8 images"]["ours"] == pytest.approx(100.0)
