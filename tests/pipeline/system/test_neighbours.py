"""How threads wait beside other processes, and what those take of the machine."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline.system import neighbours
from pipeline.system.neighbours import Neighbours, limit_spinning, load_average, usable_cores
from pipeline.training.execution import Execution
from tests.support.project import environment

LIBGOMP = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
needs_libgomp = pytest.mark.skipif(LIBGOMP is None, reason="PyTorch has another OpenMP runtime here")


def run_fresh(program: str, *arguments: object, **given: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in environment().items() if key not in neighbours.CHOSEN_BY} | given
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=100)


@needs_libgomp
@pytest.mark.parametrize(
    ("package", "given", "spins"),
    [
        ("pipeline", {}, neighbours.SPINS),
        ("titn", {}, neighbours.SPINS),
        ("stages", {}, neighbours.SPINS),
        ("titn", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("pipeline", {"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
def test_pytorchs_runtime_reads_the_limit_unless_the_user_chose(
    package: str, given: dict[str, str], spins: str
) -> None:
    program = f"import sys, ctypes, {package}; assert 'torch' not in sys.modules; ctypes.CDLL(sys.argv[1])"
    told = run_fresh(program, LIBGOMP, OMP_DISPLAY_ENV="verbose", **given).stderr
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", told) == [spins]


# A stand-in for PyTorch, which takes seconds, with its true runtime.
PYTORCH_FIRST = """
import ctypes, os, sys, time, types
sys.modules["torch"] = types.SimpleNamespace(get_num_threads=lambda: 2)
runtime = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
threads = lambda: len(os.listdir("/proc/self/task"))
import titn
until = time.monotonic() + 60
while threads() < 3 and time.monotonic() < until: time.sleep(0.01)
assert threads() == 3, "the main one and the team's two"
nothing = ctypes.cast(ctypes.pythonapi.PyMem_RawFree, ctypes.c_void_p)
child = os.fork()  # as a DataLoader's worker, which has a team of its own
runtime.GOMP_parallel(nothing, None, 2, 0)
assert threads() == (4 if child else 2)
if child: assert os.waitpid(child, 0)[1] == 0
else: os._exit(0)
"""


@needs_libgomp
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_where_pytorch_is_loaded_already_an_idle_team_of_threads_is_kept() -> None:
    run_fresh(PYTORCH_FIRST, LIBGOMP)
    ours, pytorchs = (ctypes.CDLL(path).GOMP_parallel for path in (None, str(LIBGOMP)))
    assert ctypes.cast(ours, ctypes.c_void_p).value == ctypes.cast(pytorchs, ctypes.c_void_p).value


@pytest.mark.parametrize("name", neighbours.CHOSEN_BY)
def test_no_thread_is_started_where_the_user_chose(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in neighbours.CHOSEN_BY:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "active")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    before = threading.active_count()
    limit_spinning()
    assert threading.active_count() == before
    assert [os.environ.get(other) for other in neighbours.CHOSEN_BY if other != name] == [None]


class Machine:
    """A made-up machine of four cores, of which the process may use the first two."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.clock = root, 0.0
        (root / "proc").mkdir()
        monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
        monkeypatch.setattr("os.sysconf", lambda name: 100, raising=False)
        monkeypatch.setattr("os.times", lambda: (self.ours, 0.0, 0.0, 0.0, self.clock))
        monkeypatch.setattr("time.monotonic", lambda: self.clock)
        self.passed(0, ours=0, cores=(0, 0, 0, 0))

    def passed(self, clock: float, *, ours: float, cores: Sequence[int]) -> None:
        """Seconds by the clock, of this process, and of all on each core."""
        self.clock, self.ours = float(clock), float(ours)
        # user nice system idle iowait irq softirq steal guest guest_nice; a guest's time is in user's already
        lines = [
            f"cpu{core} {60 * busy} {10 * busy} {10 * busy} 7777 8888 {5 * busy} {5 * busy} {10 * busy} {60 * busy} 0"
            for core, busy in enumerate(cores)
        ]
        (self.root / "proc/stat").write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *lines, "intr 5", ""]))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_what_others_take_is_what_all_take_of_our_cores_but_ours(machine: Machine) -> None:
    seen = Neighbours(machine.root)
    machine.passed(10, ours=6, cores=(9, 7, 10, 10))  # 16 of 20 core seconds, 10 of them others'
    assert seen.taken() == pytest.approx(1.0)
    machine.passed(20, ours=16, cores=(14, 12, 10, 10))  # 10, all ours
    assert seen.taken() == 0.0
    machine.passed(20.1, ours=16, cores=(15, 13, 10, 10))
    assert seen.taken() is None, "too short to tell"
    machine.passed(30, ours=16, cores=(19, 17, 10, 10))  # since the last answer
    assert seen.taken() == pytest.approx(1.0)


@pytest.mark.parametrize(("threads", "cores", "told"), [(2, (9, 7), "1.0"), (1, (9, 7), None), (1, (10, 10), "1.4")])
def test_a_run_says_in_its_first_line_that_too_little_is_left(
    machine: Machine, threads: int, cores: tuple[int, int], told: str | None
) -> None:
    seen = Neighbours(machine.root)
    machine.passed(10, ours=6, cores=(*cores, 0, 0))
    busy = seen.busy(threads)
    assert busy == (told and f"machine busy: about {told} of 2 cores taken by others")
    line = Execution().describe(torch.device("cpu"), 8, busy=busy)
    assert re.fullmatch(rf".* threads; {f'{busy}; ' if busy else ''}fp32; batch 8", line)


def test_nothing_is_said_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = Neighbours(tmp_path)
    assert without.taken() is without.busy(2) is None
    for name in ("getloadavg", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    assert Neighbours().busy(2) is load_average() is None
    assert usable_cores() == os.cpu_count()
