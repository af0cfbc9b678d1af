"""What the doctor says: one line each, with a mark and, where something is wrong, the way out."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import DataError, NumericalError, StorageError, UsageError

# What becomes a finding; a signal ends the doctor like any command.
FAULTS = (UsageError, DataError, StorageError, NumericalError)
OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        topic: What it is about: `software`, `device`, `project`, `data`, `space` or `time`.
        mark: OK; WARNING: a run works, though perhaps not as it might; PROBLEM: a full run cannot work.
        text: What was found.
        remedy: The way out.
    """

    topic: str
    mark: str
    text: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """Text and way out."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


def size_text(num_bytes: float) -> str:
    """Write a size in decimal units, as 4.41 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def time_text(seconds: float) -> str:
    """Write a duration in the unit that fits, as 12.6 min."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"
