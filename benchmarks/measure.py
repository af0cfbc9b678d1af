"""What every benchmark shares: interleaved timing, rows, the JSON report, the table and the options.

The contract is in README.md: contenders take turns, so that whatever else the machine does hits all of them; figures
are medians with quartiles beside them; a ratio above 1 means that ours is better.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.errors import UsageError
from pipeline.inference.speed import quartiles
from pipeline.models.students import STUDENTS
from pipeline.system.neighbours import load_average, usable_cores
from pipeline.system.runtime import environment, resolve_device
from pipeline.system.storage import write_json

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        what: What was measured.
        ours: Our median.
        peer: The peer's median; None where ours stands alone.
        peer_name: Whose.
        unit: Of both.
        ratio: How many times better ours is; None without a peer.
        goal: The ratio that we want to reach, or None.
        spread: First and third quartile over the rounds, of `ours` and `peer`, and of the `ratio` within each round.
        details: Whatever else belongs to the row, as plain JSON values.
    """

    what: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    ratio: float | None
    goal: float | None = None
    spread: Mapping[str, Sequence[float]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def compare(
    what: str,
    ours: NDArray[np.float64],
    peer: NDArray[np.float64],
    peer_name: str,
    *,
    unit: str,
    higher_is_better: bool,
    goal: float | None = None,
    **details: Any,
) -> Row:
    """Compare figures of the same rounds.

    Args:
        what: What was measured.
        ours: `(rounds,)` float64, above 0.
        peer: As `ours`.
        peer_name: Whose.
        unit: Of both.
        higher_is_better: True for rates, False for times.
        goal: The ratio that we want to reach.
        details: See Row.
    """
    better, worse = (ours, peer) if higher_is_better else (peer, ours)
    return Row(
        what=what,
        ours=float(np.median(ours)),
        peer=float(np.median(peer)),
        peer_name=peer_name,
        unit=unit,
        ratio=float(np.median(better) / np.median(worse)),
        goal=goal,
        spread={"ours": quartiles(ours), "peer": quartiles(peer), "ratio": quartiles(better / worse)},
        details=details,
    )


def alone(what: str, ours: Sequence[float] | NDArray[np.float64], unit: str, **details: Any) -> Row:
    """Return a row without a peer; the arguments are those of `compare`."""
    values = np.asarray(ours, dtype=np.float64)
    median, spread = float(np.median(values)), {"ours": quartiles(values)}
    return Row(what=what, ours=median, peer=None, peer_name="-", unit=unit, ratio=None, spread=spread, details=details)


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        title: Of the table.
        environment: Where and how it ran.
        rows: The comparisons.
        missing: Peers that are not installed.
        extra: Whatever else goes to the JSON, and the tables shown for it.
    """

    title: str
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)

    def has(self, package: str) -> bool:
        """Whether a peer is installed. The report names a missing one."""
        if importlib.util.find_spec(package) is None:
            if package not in self.missing:
                self.missing.append(package)
            return False
        self.environment["versions"][package] = importlib.metadata.version(package)
        return True

    def finish(self, console: Console, path: Path | None) -> None:
        """Show the tables, name what is missing, and write the JSON where a path is given."""
        for table in [_table(self.title, self.rows, self.environment), *self.tables]:
            console.print(table)
        if self.missing:
            names = ", ".join(self.missing)
            console.print(f"missing, so not compared: {names}; pip install -e '.[bench]'", style="yellow", markup=False)
        if path is not None:
            self.write(path)
            console.print(f"{path}", soft_wrap=True, markup=False)

    def write(self, path: Path | None) -> None:
        """Write the JSON where a path is given: a benchmark that is cut leaves what it found until then."""
        if path is None:
            return
        rows = [{**dataclasses.asdict(row), **row.details} for row in self.rows]
        for row in rows:
            del row["details"]
        write_json(path, {"environment": self.environment, "missing": self.missing, "rows": rows, **self.extra})


def option_parser(description: str | None, *, threads: int | None = None) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has.

    Args:
        description: What it measures.
        threads: Default of --threads; None leaves PyTorch's choice.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", type=_file, metavar="PATH", help="write the report there too")
    parser.add_argument(
        "--device", type=_device, default=resolve_device(), help="cpu, cuda, ...; default: a GPU where there is one"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=threads,
        help=f"CPU threads of PyTorch; default: {threads or 'as PyTorch chooses'}",
    )
    parser.add_argument("--rounds", type=positive, help="timed turns of each contender; default: 7, fewer with --quick")
    return parser


def add_students(parser: argparse.ArgumentParser, default: Sequence[str] = tuple(STUDENTS)) -> None:
    """Add the options that choose students, and how deep they are."""
    names = ",".join(default)
    parser.add_argument("--students", type=_students, default=names, help=f"separated by commas; default: {names}")
    parser.add_argument("--depth", type=positive, help="blocks of the students; default: the recipe's")


def _students(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in STUDENTS:
            raise argparse.ArgumentTypeError(f"{name}: is no student; choose from {', '.join(STUDENTS)}")
    return names


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def begin(title: str, options: argparse.Namespace, **sizes: tuple[int, int, int]) -> Report:
    """Fill in sizes that were not given, set the threads, and describe where the benchmark runs.

    The commit is read now: a file saved while the benchmark runs is not what it ran.

    Args:
        title: Of the table.
        options: Of `option_parser`; changed in place.
        sizes: Option to its default with --quick, on a CPU, and on any other device.
    """
    for name, defaults in {"rounds": (3, 7, 7), **sizes}.items():
        if getattr(options, name) is None:
            setattr(options, name, defaults[0 if options.quick else 1 if options.device.type == "cpu" else 2])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where = environment(options.device)
    where |= {
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "load_average": load_average(),
        "options": {
            name: value if isinstance(value, int | None) else _text(value)
            for name, value in vars(options).items()
            if name != "json"
        },
    }
    return Report(title, where)


def positive(text: str) -> int:
    """Read a whole number above 0 from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _file(text: str) -> Path:
    """Read the path of the report. A path that can't be written is refused before minutes of measuring."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing folder")
    return path


def _device(text: str) -> torch.device:
    try:
        return resolve_device(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _table(title: str, rows: Sequence[Row], where: Mapping[str, Any]) -> Table:
    """Return the table of rows, under the conditions they were measured in."""
    note = (
        f"Medians; a ratio above 1 means that ours is better. {where['device']}, "
        f"load {figure(where['load_average'])} at the start, commit {where['commit']}, {where['date']} UTC."
    )
    columns = ("what", "beside", "ours", "peer", "unit", "ratio", "goal")
    cells: list[tuple[str, ...]] = []
    for before, row in zip([None, *rows], rows, strict=False):
        what = row.what if before is None or before.what != row.what else ""
        figures = [figure(value) for value in (row.ours, row.peer, row.ratio, row.goal)]
        cells.append((what, row.peer_name, *figures[:2], row.unit, *figures[2:]))
    return text_table(title, columns, cells, note)


def text_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> Table:
    """Return a table whose first two columns hold text and may wrap, the others figures."""
    table = Table(
        title=title,
        caption=note,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for number, column in enumerate(columns):
        if number < 2:
            table.add_column(column)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def figure(value: float | None) -> str:
    """Return a figure to three digits, or a dash where there is none."""
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
