"""Device, precision, ranks, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

from pipeline.errors import Interrupted, UsageError
from pipeline.system.runtime import (
    Ranks,
    autocast,
    commit_of,
    current_ranks,
    deciding,
    environment,
    images_at_once,
    resolve_device,
    resolve_precision,
    versions,
)
from pipeline.system.stopping import StopSignal
from stages.cli import run


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert current_ranks() == Ranks(0, 1, 0)
    assert current_ranks().is_main


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "")])
def test_ranks_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch, rank: str, world: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UsageError, match="torchrun"):
        current_ranks()


def test_a_device_that_is_not_there_is_refused() -> None:
    for name in ("tpu", "cuda:77", "nonsense:1"):
        with pytest.raises(UsageError, match=f"--device {name}"):
            resolve_device(name)
    assert resolve_device("cpu") == torch.device("cpu")


def test_precision_is_taken_as_given_and_auto_is_resolved() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")
    with autocast(cpu, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(cpu, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_auto_asks_the_device_that_is_named_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextlib.contextmanager
    def chosen(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr("torch.cuda.device", chosen)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: current[-1] == 1)
    assert [resolve_precision("auto", torch.device("cuda", index)) for index in (0, 1)] == ["fp32", "bf16"]
    assert current == [0]


def test_float32_is_not_rounded_where_classes_are_decided() -> None:
    convolutions = torch.backends.cudnn.conv
    assert convolutions.fp32_precision == "tf32", "PyTorch's default, in which training computes"
    with deciding(CUDA, "fp32"):
        assert convolutions.fp32_precision == "ieee"
    with pytest.raises(ZeroDivisionError), deciding(CUDA, "fp32"):
        raise ZeroDivisionError
    assert convolutions.fp32_precision == "tf32" and torch.backends.cudnn.allow_tf32
    with deciding(CPU, "bf16"):
        assert convolutions.fp32_precision == "tf32" and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.gpu
def test_a_gpu_convolves_in_float32_where_classes_are_decided() -> None:
    generator = torch.Generator().manual_seed(0)
    images, weights = torch.randn(8, 64, 16, 16, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    exact = torch.nn.functional.conv2d(images.double(), weights.double())
    with deciding(CUDA, "fp32"):
        decided = torch.nn.functional.conv2d(images.cuda(), weights.cuda())
    assert (decided.cpu() - exact).abs().max() < 1e-5 * exact.abs().max(), "tf32 is off by 1e-4 and more"


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "size", "tokens", "asked", "expected"),
    [
        (CPU, 32, 64, None, 256),
        (CUDA, 32, 64, None, 4096),
        (CPU, 8, 0, None, 256),  # small images are no reason for more
        (CUDA, 224, 0, None, 83),  # of VGG16_bn's first activations 1.07 GB instead of 52
        (CPU, 224, 0, None, 5),
        (CUDA, 1024, 0, None, 4),
        (CPU, 1024, 0, None, 1),
        (CUDA, 32, 256, None, 1024),  # patches of 2
        (CUDA, 224, 784, None, 83),  # patches of 8: the pixels decide
        (CUDA, 224, 12544, None, 20),
        (CPU, 32, 0, 1024, 1024),  # what a recipe asks of a teacher that labels
        (CPU, 224, 0, 1024, 83),
        (CUDA, 224, 0, 16, 16),
    ],
)
def test_images_at_once_go_by_their_pixels_and_tokens(
    device: torch.device, size: int, tokens: int, asked: int | None, expected: int
) -> None:
    model = SimpleNamespace(tokens_per_image=tokens) if tokens else torch.nn.Identity()
    assert images_at_once(device, size, model, asked=asked) == expected


def test_a_run_says_where_and_when_it_took_place() -> None:
    described = environment(torch.device("cpu"))
    assert described["versions"]["torch"] == torch.__version__
    assert described["device_type"] == "cpu"
    assert f"{torch.get_num_threads()} threads" in described["device"]


def test_a_signal_is_raised_at_once_outside_deferred_work() -> None:
    stop = StopSignal()
    with pytest.raises(Interrupted) as error:
        stop._handle(signal.SIGINT, None)
    assert error.value.exit_code == 130


def test_a_signal_is_noted_inside_and_raised_at_the_end() -> None:
    stop, done = StopSignal(), []
    with pytest.raises(Interrupted), stop.deferred():
        with stop.deferred():
            stop._handle(signal.SIGTERM, None)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_a_signal_passed_on_twice_to_a_rank_is_one_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    stop = StopSignal()
    stop.install(is_rank=True)
    with pytest.raises(Interrupted, match="finished is saved"), stop.deferred():
        stop._handle(signal.SIGTERM, None)
        stop._handle(signal.SIGTERM, None)


def test_a_second_signal_is_raised_even_inside() -> None:
    stop = StopSignal()
    with pytest.raises(Interrupted), stop.deferred():
        stop._handle(signal.SIGINT, None)
        stop._handle(signal.SIGINT, None)
        pytest.fail("not reached")


def test_a_hangup_is_no_second_signal_nor_has_one() -> None:
    stop = StopSignal()
    with pytest.raises(Interrupted, match="finished is saved") as error, stop.deferred():
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            stop._handle(number, None)
    assert error.value.exit_code == 143
    with pytest.raises(Interrupted), stop.deferred():
        stop._handle(signal.SIGTERM, None)
        pytest.fail("not reached")


@pytest.mark.parametrize("has_nohup", [False, True])
def test_a_hangup_ends_a_run_unless_nohup_started_it(has_nohup: bool) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if has_nohup else signal.SIG_DFL)
        stop = StopSignal()
        stop.install()
        assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == has_nohup
        if not has_nohup:
            with pytest.raises(Interrupted) as error:
                os.kill(os.getpid(), signal.SIGHUP)
            assert error.value.exit_code == 129
        stop.end()
        assert {signal.getsignal(number) for number in numbers} == {signal.SIG_IGN}
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_a_signal_that_arrives_where_nothing_can_be_raised_ends_the_run_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    referred = set()
    kill = weakref.ref(referred, lambda reference: os.kill(os.getpid(), signal.SIGTERM))
    fail = weakref.ref(referred, lambda reference: 1 / 0)
    try:
        StopSignal().install()
        with pytest.raises(Interrupted) as error:
            del referred
            time.sleep(10)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert error.value.exit_code == 143
    assert [type(dropped.exc_value) for dropped in told] == [ZeroDivisionError]  # others are told as before
    assert capsys.readouterr().err == "" and kill() is fail() is None


def test_a_signal_is_told_as_such_where_a_reader_makes_another_error_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*arguments: object) -> None:
        raise Interrupted("stopped by SIGINT; run the same command again", 130)

    file = tmp_path / "default.h5"
    file.write_bytes(b"labels")
    monkeypatch.setattr("pipeline.labels.cache.check_beginning", stopped)
    assert run(["labels", "inspect", str(file)]) == 130
    assert capsys.readouterr().err == "stopped by SIGINT; run the same command again\n"


def test_torchvisions_version_is_what_it_says_itself() -> None:
    assert versions()["torchvision"] == torchvision.__version__
    assert versions()["torch"] == torch.__version__


def test_a_commit_is_marked_where_code_differs_and_not_where_results_do(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        done = subprocess.run(["git", *author, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    code = ("pipeline/__init__.py", "stages/cli.py", "benchmarks/views.py")
    files = (*code, "results/runs.jsonl", "params.yaml", "dvc.lock")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1\n")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    assert commit_of(tmp_path) is None, "there is no checkout"
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "state")
    head = git("rev-parse", "HEAD")[:12]
    assert commit_of(tmp_path) == head
    for file in files[len(code) :]:
        (tmp_path / file).write_text("2\n")
    assert commit_of(tmp_path) == head
    for file in code:
        (tmp_path / file).write_text("2\n")
        assert commit_of(tmp_path) == f"{head}+"
        git("checkout", "-q", file)
    (tmp_path / "pipeline/new.py").write_text("1\n")
    assert commit_of(tmp_path) == f"{head}+"
    installed = tmp_path / ".venv/lib/pipeline/__init__.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert commit_of(tmp_path / ".venv/lib") is None, "another project's repository"
