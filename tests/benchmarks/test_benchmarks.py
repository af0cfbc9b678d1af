"""The benchmarks' contract, on sizes so small that their figures mean nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from benchmarks import measure, synthetic, view_peers, views
from pipeline.inference.speed import interleave
from pipeline.views import operations
from pipeline.views.policies import POLICIES
from tests.support.benchmark_reports import rows, run
from tests.support.pillow_reference import on_pil, sample_images

PEER_OF_THE_GOAL = "torchvision PIL, DataLoader 2 workers"


def test_contenders_take_turns_after_a_turn_that_is_not_timed() -> None:
    turns: list[str] = []
    contenders = {name: lambda name=name: turns.append(name) for name in ("ours", "peer")}
    seconds = interleave(contenders, rounds=3, device=torch.device("cpu"))
    assert turns == ["ours", "peer"] * 4
    assert all(values.shape == (3,) and (values > 0).all() for values in seconds.values())


@pytest.mark.parametrize(("higher_is_better", "ratio"), [(True, 0.5), (False, 2.0)])
def test_a_ratio_above_one_means_that_ours_is_better(higher_is_better: bool, ratio: float) -> None:
    ours, peer = np.array([1.0, 5.0, 9.0]), np.array([2.0, 10.0, 18.0])
    row = measure.compare("it", ours, peer, "theirs", unit="s", higher_is_better=higher_is_better)
    assert (row.ours, row.peer, row.ratio) == (5.0, 10.0, ratio)
    assert row.spread == {"ours": [3.0, 7.0], "peer": [6.0, 14.0], "ratio": [ratio, ratio]}


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        views.main(["--quick", "--json", str(tmp_path / "missing" / "views.json")])
    assert stopped.value.code == 2
    assert "is not a file in an existing folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", views.policy_operations())
def test_an_operation_alone_does_what_its_peer_does(name: str) -> None:
    images = sample_images(synthetic.SIZE, synthetic.SIZE)
    single = views.policy_operations()[name]
    size = synthetic.SIZE
    value = operations.magnitude(POLICIES["cifar10"].space, name, single.magnitude_bin or 0, size, size)
    uniform = single.draws(len(images))
    negative = (uniform[:, 3 + single.place] < 0.5) & (name not in operations.UNSIGNED_OPERATIONS)
    expected = on_pil(
        lambda image, magnitude: _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None),
        images,
        np.where(negative, -value, value).tolist(),
    )
    assert torch.equal(operations.apply(images, POLICIES["cifar10"].choose(uniform, size, size)), expected)


def test_every_loader_gives_what_a_network_takes() -> None:
    images, labels = synthetic.images_and_labels(6)
    epochs = view_peers.loader_epochs(images, labels, 6, torch.device("cpu"))
    assert PEER_OF_THE_GOAL in epochs
    for name, epoch in epochs.items():
        samples = [epoch.loader.dataset[index] for index in range(6)]
        batch, mixed_labels = epoch.loader.collate_fn(samples)
        assert batch.dtype == torch.float32 and batch.shape == images.shape, name
        assert batch.min() < -0.5 and batch.max() < 5, "normalised"
        assert mixed_labels.shape == (6, synthetic.NUM_CLASSES)
        assert torch.allclose(mixed_labels.sum(1), torch.ones(6))


def test_synthetic_images_are_the_same_on_every_run_and_as_bright_as_cifar100() -> None:
    images, labels = synthetic.images_and_labels(synthetic.NUM_DISTINCT + 1)
    again, _ = synthetic.images_and_labels(synthetic.NUM_DISTINCT + 1)
    assert torch.equal(images, again)
    assert images.shape == (synthetic.NUM_DISTINCT + 1, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images[-1], images[0]) and 0 <= labels.min() and labels.max() < synthetic.NUM_CLASSES
    levels = images.float() / 255
    assert torch.allclose(levels.mean((0, 2, 3)), torch.tensor(synthetic.MEAN), atol=0.02)
    assert torch.allclose(levels.std((0, 2, 3)), torch.tensor(synthetic.STD), atol=0.04)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_views_are_compared_and_a_missing_peer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    sizes = ("--images", "64", "--batch-size", "32", "--step-batch", "4", "--depth", "1")
    report = run(views, monkeypatch, tmp_path / "views.json", *sizes, threads=2)
    assert report["missing"] == ["kornia"]
    assert "missing, so not compared: kornia; pip install -e '.[bench]'" in capsys.readouterr().out
    whole = rows(report, "whole cifar view")
    assert whole[PEER_OF_THE_GOAL]["goal"] == 10.0
    assert [row["goal"] for name, row in whole.items() if name != PEER_OF_THE_GOAL] == [None] * (len(whole) - 1)
    measured = {row["what"] for row in report["rows"]}
    assert measured >= {*views.SINGLE, "normalise", *views.policy_operations()}
    [share] = rows(report, "views, share of a TITN training step").values()
    assert share["goal"] == 1.0 and share["ratio"] == pytest.approx(10 / share["ours"])


def test_kornia_knows_every_operation_of_the_policy() -> None:
    pytest.importorskip("kornia", reason="a peer, in the extra `bench`")
    from benchmarks import kornia_peer

    device = torch.device("cpu")
    images, labels = synthetic.images_and_labels(8)
    bins = {name: single.magnitude_bin for name, single in views.policy_operations().items()}
    assert set(kornia_peer.NAMES) == set(bins)
    single = kornia_peer.single_operations(bins, device)
    assert set(single) == {*bins, "crop", "flip", "AutoAugment", "CutMix", "normalise"}
    for name, transform in single.items():
        result = transform(images.float() / 255, labels)
        pixels = result[0] if name == "CutMix" else result
        assert pixels.shape == images.shape, name
    report = measure.Report("", {"versions": {}})
    assert report.has("kornia") and "kornia" in report.environment["versions"]
    pixels, mixed_labels = kornia_peer.whole_view(device)(images, labels)
    assert pixels.shape == images.shape and pixels.min() < -0.5
    assert mixed_labels.shape == (1, 8, 3)


def test_labelling_is_compared_with_the_stock_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import labelling

    sizes = ("--images", "8", "--batch-size", "4", "--teacher", "mobilenet_v3_large")
    report = run(labelling, monkeypatch, tmp_path / "labelling.json", *sizes)
    [folded] = rows(report, "mobilenet_v3_large, folded bf16 channels_last").values()
    assert (folded["peer_name"], folded["goal"]) == ("stock fp32", 3.0)
    [share] = rows(report, "mobilenet_v3_large, label_view, folded bf16").values()
    assert share["goal"] == 0.9


def test_cached_labels_are_compared_with_online_ones_and_the_break_even_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import distill

    sizes = ("--batch-size", "4", "--steps", "1", "--depth", "1", "--teacher", "squeezenet1_1", "--students", "titn")
    report = run(distill, monkeypatch, tmp_path / "distill.json", *sizes)
    sources = {"online, stock fp32 squeezenet1_1", "online, folded squeezenet1_1", "without distillation"}
    assert set(rows(report, "titn epoch of 50,000 images, cached labels")) == sources
    [file] = rows(report, "label cache of 50,000 samples").values()
    assert 50_000 < file["ours"] < 51_000
    assert 30.0e6 < file["extrapolated_bytes_of_600_views"] < 30.6e6
    assert sum("label by" in row["what"] for row in report["rows"]) == 2
    assert [entry["online"] for entry in report["break_even"]["found"]] == [
        "online, stock fp32 squeezenet1_1",
        "online, folded squeezenet1_1",
    ]
    assert "it gains nothing" in " ".join(capsys.readouterr().out.split())


def test_images_in_a_file_are_read_streamed_digested_and_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import streaming

    report = run(streaming, monkeypatch, tmp_path / "streaming.json", "--megabytes", "1", "--folder", str(tmp_path))
    assert [row["peer_name"] for row in report["rows"]] == [
        *["numpy.memmap", "ours, resident"] * 2,
        "hashlib on all of it at once",
        *["decoding alone"] * 2,
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["streaming.json"]


@pytest.mark.slow
def test_a_photographs_view_is_compared_with_every_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import photographs

    sizes = ("--images", "8", "--batch-size", "4")
    report = run(photographs, monkeypatch, tmp_path / "photographs.json", *sizes, threads=2)
    plain = rows(report, "photograph's view of 32x32")
    assert [row["goal"] for row in plain.values()] == [1.2, 1.2, 1.2, 0.85] and photographs.BARE in plain
    assert [row["goal"] for row in rows(report, "photograph's view of 32x32, CutMix").values()] == [1.1] * 3
    assert [row["goal"] for row in rows(report, "JPEG files collected by prepare").values()] == [0.9]
    assert 70_000 < report["environment"]["bytes_per_file"] < 82_000


def test_the_break_even_solves_the_inequality() -> None:
    from benchmarks.distill import EPOCHS, break_even

    solution = break_even(label_seconds=3.0, saved_seconds=2.0)
    assert solution["students_at_as_many_views_as_epochs"] == 1.5
    assert solution["views_for_one_student"] == EPOCHS * 2 / 3
    nothing = break_even(label_seconds=3.0, saved_seconds=-0.1)
    assert nothing["students_at_as_many_views_as_epochs"] is nothing["views_for_one_student"] is None


def test_an_unknown_student_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import distill

    with pytest.raises(SystemExit):
        distill.main(["--quick", "--students", "titn,resnet"])
    assert "--students: resnet: is no student; choose from " in capsys.readouterr().err


def test_work_is_timed_alone_and_beside_busy_processes_that_end_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import neighbours

    started: list[subprocess.Popen[bytes]] = []

    class Kept(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr("subprocess.Popen", Kept)
    sizes = ("--teacher", "squeezenet1_1", "--depth", "1")
    report = run(neighbours, monkeypatch, tmp_path / "neighbours.json", *sizes)
    beside = {"beside a spinning process", "beside a process that copies arrays"}
    works = list(dict.fromkeys(row["what"] for row in report["rows"]))
    assert len(works) == 5 and all(set(rows(report, what)) == beside for what in works)
    assert all(row["goal"] == 2.5 and row["ratio"] == row["peer"] / row["ours"] for row in report["rows"])
    assert set(report["environment"]["waiting"]) == {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    ended = [process.returncode for process in started if "print(flush=True)" in str(process.args)]
    assert ended == [-signal.SIGKILL] * 2
