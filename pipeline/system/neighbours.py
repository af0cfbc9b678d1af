"""Other processes on the same cores: how our threads wait beside them, and how much of the cores they take."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.system.control_groups import cores_paid_for

SPINS = "2000"
"""Turns of libgomp's waiting loop before a thread sleeps, some 0.05 ms; libgomp's own 300,000 are 5 to 15 ms."""
CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
ROOT = Path("/")
LEAST_SECONDS = 0.2  # the system counts in hundredths
LEAST_CORES = 0.5


def limit_spinning() -> None:
    """Let PyTorch's OpenMP threads spin only shortly while they wait for each other, unless the user has chosen.

    They wait after every operation. A thread that spins uses up its turn on the core for nothing; so beside one other
    busy process, each short operation would wait until the system gives that process's core back, which takes
    milliseconds. A thread that sleeps is woken at once.

    libgomp reads its setting when PyTorch loads it. Where that has happened already, one idle team of threads is kept:
    with more threads than cores libgomp lets all of them spin a hundred turns. Other OpenMP runtimes are left alone.
    """
    if any(name in os.environ for name in CHOSEN_BY):
        return
    os.environ["GOMP_SPINCOUNT"] = SPINS  # child processes have it, too
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads") and torch.get_num_threads() > 1:
        _keep_idle_team()


def _keep_idle_team() -> None:
    """Start a team of two threads of PyTorch's libgomp, which sleep until the process ends."""
    import ctypes

    try:
        parallel = ctypes.CDLL(None).GOMP_parallel  # PyTorch loads its libraries for all to see
    except (AttributeError, OSError, TypeError):  # another runtime, or Windows
        return
    nothing = ctypes.cast(ctypes.pythonapi.PyMem_RawFree, ctypes.c_void_p)  # of NULL, in both threads

    def keep() -> None:
        parallel(nothing, None, ctypes.c_uint(2), ctypes.c_uint(0))
        threading.Event().wait()

    threading.Thread(target=keep, name="idle OpenMP team", daemon=True).start()


def limit_threads() -> None:
    """Let PyTorch start no more threads than a container's CPU time keeps busy, unless the user has chosen.

    It counts the cores alone. With 64 threads and the time of two cores, all of them would stand still for most of
    each period. PyTorch reads the variable when it is loaded; where that has happened already, nothing is done.
    """
    if "OMP_NUM_THREADS" not in os.environ and "torch" not in sys.modules and usable_cores() < _cores():
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())


def usable_cores() -> int:
    """Return how many cores this process may use: those that it may run on, or as many as its CPU time keeps busy."""
    return min(_cores(), cores_paid_for() or _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_ranks_here() -> int:
    """Return how many processes torchrun has started on this machine, this one included; they share its cores and RAM.

    Raises:
        UsageError: torchrun's LOCAL_WORLD_SIZE is not a whole number above 0.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not (ranks.isascii() and ranks.isdecimal() and int(ranks) > 0):
        raise UsageError(f"LOCAL_WORLD_SIZE={ranks}: not a number of processes; unset it or start with torchrun")
    return int(ranks)


def load_average() -> float | None:
    """Return the machine's load of the last minute; None where the system does not say, as Windows."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class Neighbours:
    """What other processes take of the cores that this one may use, from now on.

    Args:
        root: Where `proc` lies.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._stat = root / "proc/stat"
        self._before = self._seconds()

    def busy(self, threads: int) -> str | None:
        """Say in a phrase that others have left too little since the last call; None where they have not.

        Args:
            threads: That this process computes with.
        """
        taken, cores = self.taken(), usable_cores()
        if taken is None or taken < LEAST_CORES or taken + threads <= cores:
            return None
        return f"machine busy: about {min(taken, cores):.1f} of {cores} cores taken by others"

    def taken(self) -> float | None:
        """Return how many cores others have kept busy on average since the last call.

        None where the system does not say, or the time was too short to tell.
        """
        before, now = self._before, self._seconds()
        if before is None or now is None or now[0] - before[0] < LEAST_SECONDS:
            return None
        self._before = now
        passed, of_all, of_ours = (after - former for after, former in zip(now, before, strict=True))
        return max(0.0, of_all - of_ours) / passed

    def _seconds(self) -> tuple[float, float, float] | None:
        """Return the clock, and the seconds of all processes on the usable cores, and of this one and its children."""
        if not (hasattr(os, "sched_getaffinity") and hasattr(os, "sysconf")):
            return None
        cores, ticks = {f"cpu{core}" for core in os.sched_getaffinity(0)}, 0
        try:
            for line in self._stat.read_text(encoding="ascii").splitlines():
                name, *fields = line.split()
                if name in cores:
                    user, nice, system, _idle, _waiting, *interrupts = map(int, fields[:8])
                    ticks += user + nice + system + sum(interrupts)
        except (OSError, ValueError):
            return None
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])
