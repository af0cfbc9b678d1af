"""RAM that this process may use: the machine's, and what its control groups and those above them leave of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.system.control_groups import ROOT, groups, lines

LIMITS = ("memory.max", "memory.limit_in_bytes")
"""A group's limit in bytes, in version 2 and version 1 of control groups."""
USED = ("memory.current", "memory.usage_in_bytes")
RECLAIMABLE = ("inactive_file", "total_inactive_file")
WITHOUT_A_WORD = 2**32  # of a system that does not say how much there is, as Windows


def ram(root: Path = ROOT) -> int:
    """Return the bytes of RAM that this process may use: the smallest limit of its control groups, or the machine's.

    Args:
        root: Where `proc` lies.
    """
    return min([_machine(), *(limit for group in groups(root, "memory") for limit in _numbers(group, LIMITS))])


def available_ram(root: Path = ROOT) -> int | None:
    """Return the bytes of RAM that are free or can be freed; None where the system does not say."""
    free = _fields(root / "proc/meminfo").get("MemAvailable:")
    if free is None:
        return None
    left = [free * 1024]
    for group in groups(root, "memory"):
        for limit, used in zip(_numbers(group, LIMITS), _numbers(group, USED), strict=False):
            fields = _fields(group / "memory.stat")
            left.append(limit - used + next((fields[name] for name in reversed(RECLAIMABLE) if name in fields), 0))
    return max(min(left), 0)


def _machine() -> int:
    if not hasattr(os, "sysconf"):
        return WITHOUT_A_WORD
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _numbers(folder: Path, names: tuple[str, ...]) -> Iterator[int]:
    """Yield the number that each file holds, where there is one: no limit is the word `max` in version 2."""
    for name in names:
        yield from (int(line) for line in lines(folder / name) if line.isdecimal())


def _fields(file: Path) -> dict[str, int]:
    """Return the numbers behind the first word of each line."""
    words = (line.split() for line in lines(file))
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}
