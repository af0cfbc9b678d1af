"""Peak memory of one training step, each in a process of its own on a CPU, or by the allocator's count on a GPU."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import ROOT
from benchmarks.steps import synthetic_batch
from benchmarks.student_contenders import EAGER, TRAINING, Contender, turn
from benchmarks.student_peers import PEERS
from pipeline.system.runtime import keep_freed_memory

NUM_STEPS = 2


def measure(contender: Contender, device: torch.device, *, student: str, batch_size: int, depth: int | None) -> int:
    """Return the peak of a training step, bytes: batch, weights, gradients, momentum, activations, workspaces.

    On a GPU the allocator's peak above what it held before; on a CPU the rise of a fresh process's peak resident memory
    (VmHWM) from after all imports to after two steps, with whatever libraries load late.

    Args:
        contender: Who. On a CPU it must be eager: a compiler's own memory would count.
        device: Where it runs.
        student: Our student whose geometry a peer takes.
        batch_size: B.
        depth: Blocks; None takes the recipe's.

    Raises:
        MemoryError: There is not enough.
    """
    if device.type == "cuda":
        return _on_gpu(contender, device, student, batch_size, depth)
    assert contender.run_as == EAGER
    task = {
        "contender": dataclasses.asdict(contender),
        "student": student,
        "batch_size": batch_size,
        "depth": depth,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "benchmarks.peak_memory", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode < 0:
        raise MemoryError(f"{contender.name}: its process was ended by signal {-done.returncode}")
    if done.returncode > 0:
        raise RuntimeError(f"{contender.name}: {done.stderr}")
    return int(done.stdout)


def available(device: torch.device) -> int:
    """Return the free memory of a device, bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def main(arguments: Sequence[str]) -> None:
    """Measure this process's one task, given as JSON, and print the bytes."""
    task = json.loads(arguments[0])
    torch.set_num_threads(task["threads"])
    keep_freed_memory()
    contender = Contender(**task["contender"])
    sizes = {"student": task["student"], "depth": task["depth"]}
    if not contender.is_ours:
        __import__(PEERS[contender.model].package)
    turn(contender, synthetic_batch(1, torch.device("cpu")), TRAINING, student=task["student"], depth=1)
    gc.collect()
    before = _peak()
    step = turn(contender, synthetic_batch(task["batch_size"], torch.device("cpu")), TRAINING, **sizes)
    for _ in range(NUM_STEPS):
        step()
    print(_peak() - before)


def _on_gpu(contender: Contender, device: torch.device, student: str, batch_size: int, depth: int | None) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        step = turn(contender, synthetic_batch(batch_size, device), TRAINING, student=student, depth=depth)
        for _ in range(NUM_STEPS):
            step()
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{contender.name}: {error}") from None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak() -> int:
    return _kibibytes(Path("/proc/self/status"), "VmHWM")


def _kibibytes(file: Path, key: str) -> int:
    """Return a figure of /proc, bytes."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{file} has no {key}; peak memory on a CPU is measured on Linux only")


if __name__ == "__main__":
    main(sys.argv[1:])
