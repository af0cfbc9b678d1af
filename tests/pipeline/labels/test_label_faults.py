"""Labelling survives kills at any moment and disks that fail at any call: nothing is lost, torn or labelled twice."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.labels.parts import seal
from tests.support import label_campaign
from tests.support.commands import Ended
from tests.support.label_samples import flip, parts_in, row_of
from tests.support.labelling_runs import (
    LABEL,
    Labelling,
    damage_under_way,
    fail_at_calls,
    failures,
    kill_at_calls,
    kill_at_random,
    limit_files,
    moments,
)
from tests.support.project import Project, environment


class Started:
    """The real command, in its own interpreter."""

    def __init__(self, project: Project) -> None:
        self._process = project.start(*LABEL)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def finish(self) -> Ended:
        out, err = self._process.communicate(timeout=300)
        return Ended(self._process.returncode, out, err)


@pytest.fixture(scope="module")
def project(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    path = tmp_path_factory.mktemp("faults") / "project"
    shutil.copytree(taught.path, path)
    return Project(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", label_campaign.LABELLING)
def test_nothing_that_happens_to_labelling_costs_a_label(project: Project, name: str) -> None:
    assert label_campaign.LABELLING[name](project).wrong == []


@pytest.mark.slow
def test_the_real_command_survives_kills_at_random_moments(project: Project) -> None:
    tally = kill_at_random(Labelling(project, 8), 2, random.Random(0), lambda: Started(project))
    assert tally.wrong == [] and tally.counts["kills"] == 2


@pytest.mark.slow
def test_a_kill_at_a_system_call_costs_no_finished_view(project: Project) -> None:
    labelling = Labelling(project, 2)
    tally = kill_at_calls(labelling, None, moments(labelling.calls)[::36])
    assert tally.wrong == [] and tally.counts["kills"] >= 2


@pytest.mark.slow
def test_a_kill_while_extending_leaves_the_former_file_or_the_new_one(project: Project) -> None:
    labelling, former = label_campaign.extending(project)
    tally = kill_at_calls(labelling, former, moments(labelling.run().calls)[5::28])
    assert tally.wrong == [] and tally.counts["kills"] >= 2


@pytest.mark.slow
def test_a_failing_system_call_is_one_line_and_exit_4_and_the_next_run_finishes(project: Project) -> None:
    labelling = Labelling(project, 2)
    tally = fail_at_calls(labelling, None, failures(labelling.calls)[::52])
    assert tally.wrong == [] and tally.counts["faults"] >= 2


@pytest.mark.slow
def test_a_failure_while_extending_leaves_the_former_file_or_the_new_one(project: Project) -> None:
    labelling, former = label_campaign.extending(project)
    tally = fail_at_calls(labelling, former, failures(labelling.run().calls)[4::40])
    assert tally.wrong == [] and tally.counts["faults"] >= 2


@pytest.mark.slow
def test_files_that_may_not_grow_are_one_line_and_exit_4(project: Project) -> None:
    assert limit_files(Labelling(project, 2), label_campaign.LIMITS[::6]).wrong == []


@pytest.mark.slow
def test_only_views_whose_parts_are_damaged_or_belong_to_others_are_labelled_again(project: Project) -> None:
    tally = damage_under_way(Labelling(project, 4), 2, random.Random(0))
    assert tally.wrong == [] and tally.counts["found"] == tally.counts["parts"]


@pytest.mark.slow
def test_every_call_that_writes_is_among_those_that_are_struck(project: Project) -> None:
    """The interpreter's audit sees every file opened for writing, renamed and so on, whoever asks for it."""
    labelling = Labelling(project, 2)
    for former in (None, labelling.whole):
        labelling.reset(former)
        ended = labelling.run(*(() if former is None else ("--fresh",)))
        assert ended.code == 0
        named = {"open", "ftruncate", "link", "replace", "unlink", "mkdir", "rmdir"}
        struck = [(name, path) for name, path in ended.calls if name in named]
        assert list(ended.audited) == struck and len(struck) > 10
        assert all(path.startswith(("work/smoke/labels", "smoke/labels", "work/kept")) for _, path in struck)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_kernel_sees_no_other_write_than_those_that_are_struck(project: Project, tmp_path: Path) -> None:
    """Compiled code, such as HDF5's, could write past Python."""
    labelling = Labelling(project, 2)
    labelling.reset()
    trace = tmp_path / "trace"
    # A file for each thread: in one, another thread's call may cut a line in two.
    command = ["strace", "-ff", "-ttt", "-y", "-s", "0", "-e", "trace=%file,%desc", "-o", str(trace)]
    program = [sys.executable, "-m", "stages.cli", *LABEL]
    subprocess.run([*command, *program], cwd=project.path, env=environment(), check=True, capture_output=True)
    assert labelling.file.read_bytes() == labelling.whole
    lines = sorted(line for file in tmp_path.glob("trace.*") for line in file.read_text().splitlines())
    seen = list(traced(lines, str(project.path / "data")))
    assert seen == [(name, unnamed(path)) for name, path in labelling.calls if name not in ("opendir", "close")]


def traced(lines: Iterable[str], folder: str) -> Iterator[tuple[str, str]]:
    """What strace saw change below a folder, under the names of `os`."""
    python = {"openat": "open", "pwrite64": "pwrite", "rename": "replace"}
    reading = {"read", "pread64", "lseek", "close", "fcntl", "flock", "ioctl", "getdents64", "poll", "fadvise64"}
    changing = {"openat": r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", "mmap": r"PROT_WRITE.*MAP_SHARED"}
    for line in lines:
        call = re.match(r"[\d.]+ +(\w+)\((.*)\) += ", line)
        if call is None or call[1] in reading or re.search("stat|access|readlink", call[1]):
            continue
        path = re.search(rf"[<\"](?:{re.escape(folder)}|data)/([^>\"]*)", call[2])
        if path is not None and re.search(changing.get(call[1], ""), call[2]):
            yield python.get(call[1], call[1]), unnamed(path[1])


def unnamed(path: str) -> str:
    """A path without the random names of a file being written and of a folder in data/work/kept."""
    return re.sub(r"/[0-9a-f]{8}(?=/|$)", "/...", re.sub(r"\.[0-9a-f]{16}\.tmp", ".tmp", path))


def test_a_file_that_reads_back_differently_is_refused_and_the_parts_remain(tmp_path, monkeypatch):
    parts = parts_in(tmp_path / "parts")
    parts.write(0, row_of(0))

    def misread(path):
        data = path.read_bytes() if path.exists() else None
        return flip(data, len(data) - 1, 0) if data and path.suffix == ".h5" else data

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.labels.parts.read_if_exists", misread)
        with pytest.raises(StorageError, match="does not read back"):
            seal(tmp_path / "labels.h5", parts=parts, count=1, clean={})
    assert parts.missing(1) == []
