"""The control groups of Linux that hold this process, in version 1 and 2: what a container or a job may use."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups, and of those above them as far as they are mounted.

    Args:
        root: Where `proc` lies.
        controller: What is limited, `memory` or `cpu`.
    """
    mounts = {}
    for line in lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(" "), "", ""][:3]
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            mounts[kind] = before.split(" ")[3:5]
    for line in lines(root / "proc/self/cgroup"):
        number, controllers, group = line.split(":", 2)
        kind = "cgroup2" if number == "0" else "cgroup" if controller in controllers.split(",") else ""
        if kind in mounts:
            top, point = mounts[kind]
            path = PurePosixPath(group)
            # In a container of its own name space the path may be one that is not visible; the mount is its group then.
            is_visible = path.is_relative_to(top) and ".." not in path.parts
            inside = path.relative_to(top) if is_visible else PurePosixPath()
            yield from (root / point.lstrip("/") / part for part in dict.fromkeys((inside, *inside.parents)))


def cores_paid_for(root: Path = ROOT) -> int | None:
    """Return how many cores the CPU time of the groups keeps busy, rounded up, as `docker run --cpus 2` limits it.

    Args:
        root: Where `proc` lies.

    Returns:
        At least 1; None where there is no limit.
    """
    shares = []
    for group in groups(root, "cpu"):
        words = [*lines(group / "cpu.max"), ""][0].split()  # version 2: microseconds in a period, and the period
        words = words or [*lines(group / "cpu.cfs_quota_us"), *lines(group / "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):  # no limit is `max`, or -1
            shares.append(int(words[0]) / int(words[1]))
    return math.ceil(min(shares)) if shares else None


def lines(file: Path) -> list[str]:
    """Return a file's lines; none where it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8").splitlines()
    return []
