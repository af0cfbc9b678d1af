"""Device, precision, ranks, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import Interrupted, UsageError
from pipeline.system.runtime import Ranks, autocast, current_ranks, environment, resolve_device, resolve_precision
from pipeline.system.stopping import StopSignal
from stages.cli import run
from tests.support.project import environment as command_environment


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


@pytest.mark.parametrize(("given", "expected"), [(None, "10000"), ("7", "7")])
def test_spinning_threads_are_limited_before_torch_unless_the_user_chose(given: str | None, expected: str) -> None:
    env = {key: value for key, value in command_environment().items() if key != "GOMP_SPINCOUNT"}
    if given is not None:
        env["GOMP_SPINCOUNT"] = given
    program = "import sys, os, stages; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == expected


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
