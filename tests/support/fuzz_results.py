"""What runs have written, damaged: a report names the file, or has no use for what was damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.fuzz_checkpoints import TEXTS, VALUES
from tests.support.fuzz_cli import Case, judge
from tests.support.project import Project
from tests.support.report_project import RECIPE
from tests.support.tally import Tally

RIGHT = frozenset({0, 3})
REPORT = ("report", "--recipe", RECIPE, "--out", "made-up")
CELLS = ("", "nan", "x", "-5", "1e999", '"', "é", "9" * 50, "a\nb", "\x1b[31m")
PATTERNS = ("selection.json", "*/*/metrics.json", "*/*/run.json", "*/*/best.json", "*/*/curve.csv")


def fuzz_results(project: Project, count: int, rng: random.Random) -> Tally:
    """Damage a file of a run. The report is then refused in one line that names a file, or written.

    Args:
        project: As tests.support.report_project makes it; it is the same afterwards.
        count: Files to damage.
        rng: Chooses them, and what becomes of them.
    """
    tally, root = Tally(), project.path / "data" / RECIPE
    files = sorted(path for pattern in PATTERNS for path in root.glob(pattern))
    answers = sorted(root.glob("*/*/predictions.csv"))
    for number in range(count):
        is_answers = number % 8 == 7  # which only pictures need, and these take seconds
        path = rng.choice(answers if is_answers else files)
        whole = path.read_bytes()
        path.write_bytes(_damaged(whole, path, rng))
        arguments = REPORT if path.suffix == ".csv" and is_answers else (*REPORT, "--no-figures")
        code, _, wrong = judge(project.path, Case(arguments, RIGHT))
        path.write_bytes(whole)
        tally.counts["cases"] += 1
        tally.counts["accepted" if code == 0 else "refused"] += 1
        tally.counts[path.name] += 1
        tally.note(f"case {number}, {path.relative_to(root)}", wrong)
    return tally


def _damaged(data: bytes, path: Path, rng: random.Random) -> bytes:
    """Exchange a value, or flip a bit, cut, or replace everything."""
    if rng.random() < 0.7:
        return _exchanged(data, rng) if path.suffix == ".json" else _with_cell(data, rng)
    at = rng.randrange(len(data))
    return rng.choice([data[:at], data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], *TEXTS[:9]])


def _exchanged(data: bytes, rng: random.Random) -> bytes:
    """Remove a value at any depth, or put another in its place."""
    tree = json.loads(data)
    holder, key = rng.choice(list(_places(tree)))
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice(VALUES)
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every holder of a value, with the key or index."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _with_cell(data: bytes, rng: random.Random) -> bytes:
    """Exchange a cell of a CSV file, or remove it."""
    lines = data.decode().splitlines()
    at = rng.choice([0, rng.randrange(len(lines))])
    cells = lines[at].split(",")
    cell = rng.randrange(len(cells))
    cells[cell : cell + 1] = [] if rng.random() < 0.2 else [rng.choice(CELLS)]
    lines[at] = ",".join(cells)
    return "\n".join([*lines, ""]).encode()
