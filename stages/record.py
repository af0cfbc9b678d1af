"""`pipeline record`: a JSON line for each finished run in results/runs.jsonl, and its curve beside it.

git keeps these results, not the data. A line is a complete record: those of several machines can go into one file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.errors import DataError, printable
from pipeline.system.storage import lock, read_if_exists, remove_leftovers, write_atomic
from pipeline.training.checkpoints import read_meta
from pipeline.training.manifest import read_checked
from stages.reports.runs import FinishedRun
from stages.shared.options import EXISTING, records_option
from stages.shared.paths import RECORDS, Paths
from stages.shared.trained import require_same_data

ID_DIGITS = 12
LOCK_ATTEMPTS = 200
SCORES = ("epoch", "top1", "top5", "precision", "recall", "f1")
METRICS = (
    "recipe", "kind", "name", "precision", "seed", "epochs", "views", "evaluated_on", "num_train", "num_test",
)  # fmt: skip
ENVIRONMENT = ("commit", "device", "seconds", "date", "versions")


@click.command("record")
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=EXISTING)
@records_option
def command(directories: tuple[Path, ...], out: Path) -> None:
    """Keep finished runs as lines of results/runs.jsonl.

    DIR is what `teacher` or `distill` wrote, as data/cifar100/students/titn. A run that is there already is left as it
    is.
    """
    records, wrong = Records(out), []
    records.read()
    for directory in directories:
        try:
            record_of(directory)
        except DataError as error:
            wrong.append(str(error))
            continue
        added = records.add(directory)
        text = f"recorded as {added} in {out}" if added else f"is in {out} already"
        click.echo(printable(f"{directory}: {text}"))
    if wrong:  # the others are recorded
        raise DataError("; ".join(wrong))


class Records:
    """The file of records.

    Args:
        path: The file; the curves go to `curves/` beside it.
    """

    def __init__(self, path: Path = RECORDS) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return the records, in the file's order; a last line that was cut short does not count.

        Raises:
            DataError: Another line is no record.
            StorageError: The file cannot be read.
        """
        return [record for _, record in self._lines()]

    def add(self, directory: Path) -> str | None:
        """Append a finished run unless it is there, and keep its curve.

        Args:
            directory: Of the run.

        Returns:
            The id of a record that was appended; None where it was there already.

        Raises:
            DataError: The directory is no finished run or a damaged one, or the file holds what is no record.
            StorageError: The file cannot be written, or another process keeps it locked.
        """
        record = record_of(directory)
        with lock(self.path.with_name(f".{self.path.name}.lock"), attempts=LOCK_ATTEMPTS):
            for place in (self.path, self.path.parent / "curves"):
                remove_leftovers(place)
            lines = self._lines()
            curve, data = self.curve(record["id"]), read_checked(directory / "curve.csv")
            if read_if_exists(curve) != data:
                write_atomic(curve, data)
            is_new = all(former["id"] != record["id"] for _, former in lines)
            added = [json.dumps(record, sort_keys=True, allow_nan=False).encode()] if is_new else []
            content = b"".join(line + b"\n" for line in [*(line for line, _ in lines), *added])
            if read_if_exists(self.path) != content:  # or its last line was cut short
                write_atomic(self.path, content)
        return str(record["id"]) if is_new else None

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Return the lines as they stand, each with its record."""
        data = read_if_exists(self.path) or b""
        lines, records = data.splitlines(), []
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            is_torn = number == len(lines) and not data.endswith(b"\n")
            if record is not None:
                records.append((line, record))
            elif not is_torn:
                raise DataError(f"{self.path}: line {number} is no record; delete it, and record its run again")
        return records

    def curve(self, identifier: str) -> Path:
        """Return the file of a run's curve."""
        return self.path.parent / "curves" / f"{identifier}.csv"


def record_of(directory: Path) -> dict[str, Any]:
    """Return the record of a finished run.

    Its `id` is a digest of the run's fingerprint and of its weights: the same run has the same id whoever records it,
    and a run that was trained again has another. Its `description` is everything that decided the result, see
    stages.shared.runs.describe_finished: records with equal ones but for the seed may be averaged. Records of former
    versions have none, and stand alone.

    Raises:
        DataError: The directory is no finished run, one of its files is damaged, or other data are prepared now than
            it was trained on.
    """
    run, meta = FinishedRun.read(directory), read_meta(directory)
    if run is None or meta is None or not isinstance(meta.get("fingerprint"), str):
        raise DataError(f"{directory}: no finished run; name a directory that `teacher` or `distill` wrote")
    require_same_data(
        meta, directory, _paths_of(directory, str(run.metrics["recipe"])), "train it again, or prepare its data again"
    )
    run.curve()
    metrics, taught, (top1, split) = run.metrics, run.metrics["teacher"], run.teacher_top1 or (None, None)
    named = {"labels": taught["labels"]} if taught and "labels" in taught else {}
    decided = f"{meta['fingerprint']} {meta['sha256']}"
    training = meta.get("training")
    weights = training.get("weights") if isinstance(training, Mapping) else None
    return {
        "id": hashlib.sha256(decided.encode()).hexdigest()[:ID_DIGITS],
        **{key: metrics.get(key) for key in METRICS},
        "overrides": run.differs,
        "description": run.description,
        "teacher": taught and {"name": taught["name"], "top1": top1, "split": split, **named},
        "weights": weights if run.kind == "teacher" else "random",
        **{epoch: {key: metrics[epoch][key] for key in SCORES} for epoch in ("best", "last", "test")},
        **{key: run.environment[key] for key in ENVIRONMENT},
    }


def _paths_of(directory: Path, recipe: str) -> Paths:
    """Return the files of a run's recipe: those of the project that it lies in, else of the one in this folder."""
    place, here = directory.resolve(), Paths(recipe)
    project = next(iter(place.parents[3:4]), None)  # above data/<recipe>/students/<name> and data/runs/<recipe>/<name>
    if project is None or project == here.project.resolve():
        return here
    there = Paths(recipe, project)
    return there if place in {of(place.name) for of in (there.teacher, there.student, there.run)} else here


def _parse(line: bytes) -> dict[str, Any] | None:
    """Read a line; None where it is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None
