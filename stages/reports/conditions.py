"""The notes below tables and figures: the conditions of the runs, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.report import paper
from pipeline.system.storage import read_json
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.shared.paths import Paths

NOT_RUN = "not run"
LEFT_OUT = "left out by --no-figures"


def conditions(runs: Sequence[FinishedRun]) -> str:
    """Return in one line which epoch counts, device, precision, epochs, batch, views, seeds, teacher and images.

    Args:
        runs: At least one; those of the same model differ by their seeds alone.
    """
    metrics = [run.metrics for run in runs]
    where = [run.environment for run in runs]
    teachers = {_teacher(run) for run in runs if run.metrics["teacher"]}
    began = [run.initial_weights for run in runs if run.kind == "teacher"]
    views = {values["views"] for values in metrics if values["views"]}
    parts = [
        "Best epoch by "
        + _all(f"{values['evaluated_on']} accuracy" for values in metrics)
        + ("; all but best and last top-1 are on test" if is_held_out(runs) else ", as in the paper"),
        "device " + _all(map(_device, where)),
        "precision " + _all(values["precision"] for values in metrics),
        "epochs " + _all(values["epochs"] for values in metrics),
        "effective batch " + _all(values["batch_size"] for values in metrics),
        *(["views " + _all(sorted(views))] if views else []),
        _seeds(runs),
        *(["teachers trained from " + _all(filter(None, began))] if any(began) else []),
        *(["learned from " + _all(sorted(teachers))] if teachers else []),
        f"{_all(values['num_train'] for values in metrics)} training and "
        f"{_all(values['num_test'] for values in metrics)} test images",
        *_copies(str(metrics[0]["recipe"])),
        f"{sum(values['seconds'] for values in where):.0f} s of training in all",
        "torch " + _all(values["versions"]["torch"] for values in where),
        "commit " + _all(values["commit"] or "unknown" for values in where),
        _all(values["date"][:10] for values in where),
    ]
    counts = Counter(run.name for run in runs)
    labels = [f"{run.name}, seed {run.seed}" if counts[run.name] > 1 else run.name for run in runs]
    warnings = [f"{label}: {text}" for label, run in zip(labels, runs, strict=True) for text in run.metrics["warnings"]]
    return "; ".join(parts) + "." + "".join(f" Warning: {warning}." for warning in warnings)


def _copies(recipe: str) -> list[str]:
    """Say how many of a recipe's prepared images are copies of others; nothing if there are none or it is unknown."""
    file = Paths(recipe).prepared / "summary.json"
    summary = read_json(file) if file.is_file() else None
    copies = summary.get("copies") if isinstance(summary, dict) else None
    if not isinstance(copies, dict):
        return []
    counts = {f"{name} images that are in train too": count for name, count in copies.get("in_train", {}).items()}
    counts |= {"images under two classes": copies.get("in_two_classes")}
    counts |= {"images that repeat one of their split": copies.get("repeated")}
    return [f"{count} {what}" for what, count in counts.items() if count]


def evaluated_on(runs: Iterable[FinishedRun]) -> str:
    """Return the split on which the best and the last epoch's scores are, or the splits; `test` without any run."""
    return _all(run.metrics["evaluated_on"] for run in runs) or "test"


def is_held_out(runs: Iterable[FinishedRun]) -> bool:
    """Whether another split than test decided the best epoch of any run, so that its test scores stand apart."""
    return any(run.metrics["evaluated_on"] != "test" for run in runs)


def outdated(runs: FinishedRuns, names: Iterable[str]) -> str:
    """Name the models of the recipe that were trained under other settings than params.yaml now has."""
    trained = {**runs.teachers, **runs.students}
    changed = {name: runs.outdated(trained[name]) for name in names if name in trained}
    return "".join(
        f" {name} was trained before params.yaml changed: {', '.join(why)}." for name, why in changed.items() if why
    )


def missing(names: Sequence[str], command: str) -> str:
    """Name the models that have not been run, and the command that runs the first, with `{}` in place of its name."""
    return f" Not run: {', '.join(names)}. To run: {command.format(names[0])}" if names else ""


def protocol(source: str) -> str:
    """Say how the paper's figures for a data set were reached, or that it has none."""
    if source in paper.PROTOCOL:
        return f" The paper: {paper.PROTOCOL[source]}."
    return " The paper has no figures for these data."


def _seeds(runs: Sequence[FinishedRun]) -> str:
    """Return `seed 0`, or each model's seeds where one has several."""
    seeds: dict[str, dict[int, None]] = {}
    for run in runs:
        seeds.setdefault(run.name, {})[run.seed] = None
    if all(len(of_model) == 1 for of_model in seeds.values()):
        return "seed " + _all(run.seed for run in runs)
    models = ", ".join(f"{name} {' '.join(map(str, of_model))}" for name, of_model in seeds.items())
    return f"seeds {models}: mean ± sample standard deviation (number of seeds)"


def _teacher(run: FinishedRun) -> str:
    """Return the teacher of a run, with its top-1 and initial weights."""
    assert run.teacher_top1 is not None, "it has a teacher"
    name, (top1, split), began = run.metrics["teacher"]["name"], run.teacher_top1, run.teacher_weights
    return f"{name} at {top1:.2f} % on {split}" + (f" (trained from {began})" if began else "")


def _device(environment: Any) -> str:
    """Return a run's device, with the number of ranks if there were several."""
    ranks = environment.get("ranks", 1)  # not in the run.json of former versions
    return str(environment["device"]) if ranks == 1 else f"{ranks} x {environment['device']}"


def _all(values: Iterable[Any]) -> str:
    """Return the distinct values, in the order in which they first appear."""
    return ", ".join(dict.fromkeys(str(value) for value in values))
