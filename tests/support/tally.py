"""What a campaign did and what went wrong, counted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass
class Tally:
    """What was done, and what went wrong.

    Attributes:
        counts: What was done, by name.
        wrong: What went wrong, each in a line that begins with its kind.
    """

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def note(self, what: str, wrong: Iterable[str]) -> None:
        self.wrong += [f"{problem} ({what})" for problem in wrong]

    def summary(self) -> dict[str, Any]:
        """Return plain JSON values."""
        kinds = Counter(problem.partition(":")[0].split(" ")[0] for problem in self.wrong)
        return {**self.counts, "wrong": dict(kinds), "examples": self.wrong[:5]}
