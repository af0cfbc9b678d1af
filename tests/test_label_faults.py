"""Labelling survives kills and failing disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.label_parts import seal
from tests.label_samples import flip, label, parts_in, row_of
from tests.project import environment

CALLS = ("write", "fsync", "replace")


def count_calls(monkeypatch, at=None, failure=None):
    """Count the system calls that write; let the one numbered `at` raise `failure`."""
    calls = []

    def wrap(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) - 1 == at:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise failure
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name))
    return calls


def num_calls(tmp_path, sealed):
    """Count the system calls of extending two views to four."""
    path = start_from_two_views(tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        label(path.parent / "parts", path, 4, adopt=True)
    assert path.read_bytes() == sealed
    return len(calls)


def start_from_two_views(directory):
    label(directory / "parts", directory / "labels.h5", 2)
    return directory / "labels.h5"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whichever_system_call_fails_nothing_is_lost_and_running_again_finishes(tmp_path, sealed, number):
    total = num_calls(tmp_path, sealed)
    assert total > 10
    for at in range(total):
        path = start_from_two_views(tmp_path / f"failing-{at}")
        before = path.read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            count_calls(patch, at, OSError(number, os.strerror(number)))
            with pytest.raises(StorageError) as caught:
                label(path.parent / "parts", path, 4, adopt=True)
        assert os.strerror(number) in str(caught.value) and str(path.parent) in str(caught.value)
        assert path.read_bytes() in (before, sealed)
        assert not [entry for entry in path.parent.rglob("*.tmp")]
        label(path.parent / "parts", path, 4, adopt=True)
        assert path.read_bytes() == sealed
        assert [entry.name for entry in path.parent.iterdir()] == ["labels.h5"]


CHILD = """
import os, signal, sys
from pathlib import Path
from tests.label_samples import label
from tests.test_label_faults import CALLS

directory, at, when = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = []

def wrap(name):
    real = getattr(os, name)
    def call(*args):
        calls.append(name)
        dying = when and len(calls) - 1 == at
        if dying and name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
        if dying and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args)
        if dying:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for name in CALLS:
    setattr(os, name, wrap(name))
path = directory / "labels.h5"
label(directory / "parts", path, 4, adopt=path.exists())
"""


def run_child(directory, at, when):
    """Label four views in another process, which kills itself `when` (before, after, never) its call `at`."""
    command = [sys.executable, "-c", CHILD, str(directory), str(at), when]
    process = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert process.returncode == (-signal.SIGKILL if when else 0), process.stderr


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8, 0.9, 0.95, pytest.param(None, marks=pytest.mark.slow)])
def test_a_kill_at_any_system_call_loses_no_finished_view_and_running_again_finishes(tmp_path, sealed, share):
    total = num_calls(tmp_path, sealed)
    positions = range(total) if share is None else [int(total * share)]
    for at in positions:
        for when in ("before", "after"):
            path = start_from_two_views(tmp_path / f"killed-{when}-{at}")
            before = path.read_bytes()
            run_child(path.parent, at, when)
            assert path.read_bytes() in (before, sealed)
            finished = sorted(path.parent.glob("parts/*.part"))
            parts = parts_in(path.parent / "parts")
            assert all(parts.read(int(part.stem)) is not None for part in finished)
            label(path.parent / "parts", path, 4, adopt=True)
            assert path.read_bytes() == sealed
            assert [entry.name for entry in path.parent.iterdir()] == ["labels.h5"]


def test_a_file_that_reads_back_differently_is_refused_and_the_parts_remain(tmp_path, monkeypatch):
    parts = parts_in(tmp_path / "parts")
    parts.write(0, row_of(0))
    real = Path.read_bytes

    def read_bytes(path):
        data = real(path)
        return flip(data, len(data) - 1, 0) if path.suffix == ".h5" else data

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(StorageError, match="does not read back"):
            seal(tmp_path / "labels.h5", parts=parts, count=1, clean={})
    assert parts.missing(1) == []
