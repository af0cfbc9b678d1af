"""Files are whole or absent whatever fails, and a run's lock has one holder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from pipeline.errors import DataError, StorageError, UsageError
from pipeline.system import storage
from pipeline.system.storage import (
    is_locked,
    lock,
    read_bytes,
    read_json,
    remove_leftovers,
    sha256_file,
    write_atomic,
    write_json,
    write_together,
)

FAILING_CALLS = ("open", "write", "fsync", "replace")
REASONS = (errno.ENOSPC, errno.EIO, errno.EACCES)

HOLDER = """
import sys
from pathlib import Path
from pipeline.system.storage import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(path: Path) -> subprocess.Popen[bytes]:
    """Start a process that holds the lock until its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def end_holder(process: subprocess.Popen[bytes]) -> None:
    process.communicate()


def test_a_written_file_holds_exactly_the_bytes_and_nothing_else_remains(tmp_path):
    path = tmp_path / "new" / "directory" / "file.bin"
    for data in (b"", b"one", bytearray(b"two"), memoryview(b"three")):
        write_atomic(path, data)
        assert path.read_bytes() == bytes(data)
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_a_written_file_gets_the_rights_that_the_umask_allows(tmp_path):
    previous = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"data")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    target, link = tmp_path / "cache", tmp_path / "link"
    target.write_bytes(b"cached")
    link.symlink_to(target)
    hard = tmp_path / "hard"
    hard.hardlink_to(target)
    write_atomic(link, b"new")
    write_atomic(hard, b"newer")
    assert target.read_bytes() == b"cached"
    assert not link.is_symlink() and link.read_bytes() == b"new" and hard.read_bytes() == b"newer"


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write_atomic(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_the_file_is_flushed_before_the_rename_and_the_directory_after_it(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(source, destination):
        calls.append("rename")
        real_replace(source, destination)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "file", b"data")
    assert calls == ["file", "rename", "directory"]


@pytest.mark.parametrize("call", FAILING_CALLS)
@pytest.mark.parametrize("number", REASONS)
def test_a_failing_system_call_leaves_the_earlier_file_and_no_leftover(tmp_path, monkeypatch, call, number):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError) as caught:
            write_atomic(path, b"later")
    message = str(caught.value)
    assert str(path) in message and os.strerror(number) in message and "\n" not in message
    assert path.read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_in_mid_file_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    real, written = os.write, []

    def fill_up(descriptor, data):
        if sum(written) >= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(real(descriptor, data[:5]))
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill_up)
        with pytest.raises(StorageError, match="No space left"):
            write_atomic(path, b"x" * 100)
    assert path.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


def test_a_directory_that_cannot_be_flushed_is_reported_and_the_file_is_whole(tmp_path, monkeypatch):
    real = os.fsync

    def fail_on_directories(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_directories)
    with pytest.raises(StorageError, match="Input/output error"):
        write_atomic(tmp_path / "file", b"later")
    assert (tmp_path / "file").read_bytes() == b"later"


def test_an_interrupt_leaves_the_earlier_file_and_no_leftover(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"later")
    assert path.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


def refuse_links(monkeypatch, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", fail)


@pytest.mark.parametrize(
    ("number", "may_move", "stays"),
    [(errno.EPERM, False, True), (errno.EXDEV, False, True), (errno.EPERM, True, False), (errno.EXDEV, True, True)],
)
def test_where_there_are_no_links_a_finished_file_is_copied_or_moved_on_its_disk_if_it_may_be(
    tmp_path, monkeypatch, number, may_move, stays
):
    source, path = tmp_path / "source", tmp_path / "folder" / "file"
    source.write_bytes(b"finished")
    inode = source.stat().st_ino
    refuse_links(monkeypatch, number)
    write_together({path: source, path.with_name("last"): b"last"}, may_move=may_move)
    assert path.read_bytes() == b"finished" and source.exists() == stays
    assert (path.stat().st_ino == inode) != stays
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["file", "last"]


@pytest.mark.parametrize("may_move", [False, True])
def test_a_finished_file_stays_where_it_was_if_the_files_after_it_cannot_be_written(tmp_path, monkeypatch, may_move):
    source, path = tmp_path / "source", tmp_path / "folder" / "file"
    source.write_bytes(b"finished")
    refuse_links(monkeypatch, errno.EPERM)

    def full():
        yield b"header"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match="No space left"):
        write_together({path: source, path.with_name("last"): full()}, may_move=may_move)
    assert source.read_bytes() == b"finished" and list(path.parent.iterdir()) == []


def test_of_several_finished_files_those_already_moved_are_put_back(tmp_path, monkeypatch):
    sources = [tmp_path / name for name in ("one", "two")]
    for source in sources:
        source.write_bytes(source.name.encode())
    refuse_links(monkeypatch, errno.EPERM)
    real = os.replace

    def replace(source, path, **options):
        if Path(source).name == "two":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, path, **options)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StorageError, match=r"cannot write .*folder/two: Input/output error"):
        write_together({tmp_path / "folder" / source.name: source for source in sources}, may_move=True)
    assert [source.read_bytes() for source in sources] == [b"one", b"two"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_leftovers_of_killed_writers_are_removed_and_only_those(tmp_path):
    for name in ("file", ".file.0123.tmp", ".file.abcd.tmp", ".other.0123.tmp", ".file.keep"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path / "file")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".file.keep", ".other.0123.tmp", "file"]
    remove_leftovers(tmp_path / "nowhere" / "file")
    remove_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".file.keep", "file"]


def test_json_is_canonical_on_disk_and_comes_back(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"b": [1, 2.5, None, True], "a": "é"})
    text = path.read_text()
    assert text.index('"a"') < text.index('"b"') and text.endswith("}\n") and '\n  "a"' in text
    assert read_json(path) == {"b": [1, 2.5, None, True], "a": "é"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_numbers_that_are_not_finite(tmp_path, value):
    path = tmp_path / "file.json"
    with pytest.raises(ValueError):
        write_json(path, {"loss": value})
    assert not path.exists()
    path.write_text(json.dumps({"loss": value}))
    with pytest.raises(DataError, match="not valid JSON"):
        read_json(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a": 1} x', b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000],
    ids=lambda data: data[:8],
)
def test_invalid_json_is_refused_in_one_line_that_names_the_file(tmp_path, data):
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_reading_what_is_missing_is_a_storage_error_that_names_it(tmp_path):
    for read in (read_bytes, read_json, sha256_file):
        with pytest.raises(StorageError, match="absent"):
            read(tmp_path / "absent")
        with pytest.raises(StorageError, match="directory"):
            read(tmp_path)


def test_a_digest_of_a_file_is_the_digest_of_its_bytes(tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_second_holder_is_refused_by_the_first_ones_pid_and_the_first_is_unharmed(tmp_path):
    path = tmp_path / "run" / "lock"
    with lock(path):
        for _ in range(2):
            with pytest.raises(StorageError) as caught, lock(path):
                pytest.fail("two holders")
            assert str(path) in str(caught.value) and f"pid {os.getpid()} " in str(caught.value)
    with lock(path):
        assert path.read_text().startswith(f"pid {os.getpid()} on ")


def test_a_lock_holds_between_processes_and_dies_with_its_holder(tmp_path):
    path = tmp_path / "lock"
    holder = start_holder(path)
    with pytest.raises(StorageError, match=f"pid {holder.pid} "), lock(path):
        pytest.fail("two holders")
    os.kill(holder.pid, signal.SIGKILL)
    end_holder(holder)
    with lock(path):
        assert f"pid {os.getpid()} " in path.read_text()


def test_asking_for_a_lock_tells_whether_it_is_held_and_takes_none(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path) and not path.exists()
    with lock(path):
        assert is_locked(path)
    assert not is_locked(path)
    holder = start_holder(path)
    assert is_locked(path)
    os.kill(holder.pid, signal.SIGKILL)
    end_holder(holder)
    assert not is_locked(path)
    with pytest.raises(StorageError, match="cannot read"):
        is_locked(path / "lock")


def test_whoever_asks_for_a_lock_at_that_moment_does_not_keep_a_run_from_it(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.touch()
    asking = os.open(path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(asking, fcntl.LOCK_UN))
    with lock(path):
        assert is_locked(path)
    os.close(asking)


def test_a_lock_is_released_when_its_block_fails(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(RuntimeError), lock(path):
        raise RuntimeError
    assert path.read_text() == ""
    end_holder(start_holder(path))


def test_a_lock_is_released_although_a_forked_child_would_still_share_the_open_file(tmp_path, monkeypatch):
    real, shared = os.open, []

    def share(*args, **kwargs):
        descriptor = real(*args, **kwargs)
        shared.append(os.dup(descriptor))
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", share)
        with lock(tmp_path / "lock"):
            pass
    with lock(tmp_path / "lock"):
        pass
    for descriptor in shared:
        os.close(descriptor)


def test_a_lock_that_cannot_be_made_is_a_storage_error_that_names_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "lock", tmp_path):
        with pytest.raises(StorageError, match="cannot lock"), lock(path):
            pytest.fail("locked")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_where_files_cannot_be_locked_one_line_names_the_way_out_and_that_works(tmp_path, monkeypatch, number):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    module = None if number is None else types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_SH=1, LOCK_NB=4, LOCK_UN=8)
    monkeypatch.setattr(storage, "fcntl", module)
    (tmp_path / "run.lock").touch()
    for ask in (
        lambda: storage.is_locked(tmp_path / "run.lock"),
        lambda: storage.lock(tmp_path / "run.lock").__enter__(),
    ):
        with pytest.raises(StorageError, match=r"cannot lock .*run.lock: .*set TITN_NO_LOCKS=1 and never run two"):
            ask()
    monkeypatch.setenv(storage.NO_LOCKS_VARIABLE, "1")
    with storage.lock(tmp_path / "new" / "run.lock"):
        assert not storage.is_locked(tmp_path / "run.lock")
    monkeypatch.setenv(storage.NO_LOCKS_VARIABLE, "yes")
    with pytest.raises(UsageError, match="TITN_NO_LOCKS=yes: write 1"):
        storage.uses_locks()
