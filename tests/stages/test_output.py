"""Standard output that cannot be written: a reader that went away, a full disk, a closed terminal."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.system.storage import read_json
from stages import cli
from tests.support.commands import run
from tests.support.interruptions import stop_at_step
from tests.support.project import Project


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def gone_reader() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def closed_terminal() -> int:
    master, terminal = os.openpty()
    os.close(master)
    return terminal


LOST = {full_disk: errno.ENOSPC, gone_reader: errno.EPIPE, closed_terminal: errno.EIO}


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let a descriptor be standard output and standard error, as the interpreter opens them."""
    opened: list[int] = []

    def become(descriptor: int) -> None:
        opened.append(descriptor)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, open(descriptor, "w", closefd=False))

    yield become
    for descriptor in opened:
        os.close(descriptor)


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("arguments", [("distill", "--student", "models"), ("--debug", "report"), ()])
def test_output_that_is_lost_ends_no_command_that_leaves_files(
    streams: Callable[[int], None], lost: Callable[[], int], arguments: tuple[str, ...]
) -> None:
    streams(lost())
    cli.Output.replace_streams(arguments)
    for _ in range(3):
        print("epoch 1", flush=True)
        print("warning", file=sys.stderr, flush=True)


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("arguments", [("predict", "."), ("--debug", "models"), ("distill", "--dry-run")])
def test_a_command_that_only_prints_ends_with_its_output(
    streams: Callable[[int], None], lost: Callable[[], int], arguments: tuple[str, ...]
) -> None:
    streams(lost())
    cli.Output.replace_streams(arguments)
    print("an error", file=sys.stderr, flush=True)
    if LOST[lost] == errno.EPIPE:  # as after `| head`, which is no error to tell
        with pytest.raises(SystemExit) as ended:
            print("cat 0.9", flush=True)
        assert ended.value.code == 4
    else:
        with pytest.raises(StorageError, match=f"cannot write standard output: {os.strerror(LOST[lost])}"):
            print("cat 0.9", flush=True)
    sys.stdout.flush()  # as the interpreter does at its end, with what was left in the buffer


def test_what_can_be_written_arrives_whole_also_through_a_full_pipe(streams: Callable[[int], None]) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    streams(writing)
    cli.Output.replace_streams(())
    text = "0123456789" * 100_000
    with open(reading, "rb") as file, ThreadPoolExecutor() as pool:  # noqa: PTH123
        received = pool.submit(file.read, len(text))
        print(text, end="", flush=True)
        assert received.result() == text.encode()


def test_streams_that_are_no_files_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setattr(sys, "stderr", None)  # closed before the start
    cli.Output.replace_streams(())
    assert sys.stdout is text and sys.stderr is None


def hang_up() -> None:
    """Close the terminal in a step of training: shell and kernel send SIGHUP, and what is printed fails."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored where the tests run under nohup
    terminal = closed_terminal()
    sys.stdout = sys.stderr = sys.__stdout__ = open(terminal, "w")  # noqa: PTH123
    stop_at_step(3, (signal.SIGHUP, signal.SIGHUP))


def lose_output() -> None:
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = open(full_disk(), "w"), open(gone_reader(), "w")


def test_a_closed_terminal_saves_and_a_full_log_ends_nothing(taught: Project, tmp_path: Path) -> None:
    project = Project(shutil.copytree(taught.path, tmp_path / "project"))
    student = ("distill", "--student", "vit", "--set", "epochs=1")
    assert run(project.path, *student, before=hang_up).code == 128 + signal.SIGHUP
    state = read_json(project.path / "data/work/smoke/runs/vit-epochs-1/state-b.json")
    assert (state["epoch"], state["step"]) == (0, 3)
    assert run(project.path, *student, before=lose_output).code == 0
    assert project.run(*student).startswith("vit: up to date")
