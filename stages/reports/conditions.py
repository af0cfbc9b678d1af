"""What is said of runs: their conditions, what is missing, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.report import paper
from pipeline.system.storage import read_json
from stages.reports.runs import FinishedRun, FinishedRuns, misfit
from stages.shared.paths import Paths
from stages.shared.runs import differences

NOT_RUN = "not run"
LEFT_OUT = "left out by --no-figures"
MIXINGS = {"none": "no mixing", "cutmix": "CutMix", "mixup": "MixUp", "both": "CutMix or MixUp"}
MAX_REASONS = 6
NOT_DESCRIBED = "its checkpoint does not say how it was trained"


def conditions(runs: Sequence[FinishedRun]) -> str:
    """Return in one line which epoch counts, device, precision, epochs, batch, views, seeds, teacher and images.

    Args:
        runs: At least one.
    """
    metrics = [run.metrics for run in runs]
    where = [run.environment for run in runs]
    teachers = {_teacher(run, runs) for run in runs if run.metrics["teacher"]}
    began = [run.initial_weights for run in runs if run.kind == "teacher"]
    views = {values["views"] for values in metrics if values["views"]}
    parts = [
        "Best epoch by "
        + _all(f"{values['evaluated_on']} accuracy" for values in metrics)
        + ("; all but best and last top-1 are on test" if is_held_out(runs) else ", on the images that are scored"),
        "device " + _all(map(device_of, where)),
        "precision " + _all(values["precision"] for values in metrics),
        "epochs " + _by_kind(runs, "epochs"),
        "effective batch " + _by_kind(runs, "batch_size"),
        *(["views " + _all(sorted(views))] if views else []),
        _seeds(runs),
        *(["teachers trained from " + _all(filter(None, began))] if any(began) else []),
        *(["learned from " + _all(sorted(teachers))] if teachers else []),
        f"{_all(values['num_train'] for values in metrics)} training and "
        f"{_all(values['num_test'] for values in metrics)} test images",
        f"{sum(values['seconds'] for values in where):.0f} s of training in all",
        "torch " + _all(values["versions"]["torch"] for values in where),
        "commit " + _all(values["commit"] or "unknown" for values in where),
        _all(values["date"][:10] for values in where),
    ]
    counts = Counter((run.kind, run.name) for run in runs)
    labels = [f"{run.name}, seed {run.seed}" if counts[run.kind, run.name] > 1 else run.name for run in runs]
    warnings = [f"{label}: {text}" for label, run in zip(labels, runs, strict=True) for text in run.metrics["warnings"]]
    return "; ".join(parts) + "." + "".join(f" Warning: {warning}." for warning in warnings)


def evaluated_on(runs: Iterable[FinishedRun]) -> str:
    """Return the split on which the best and the last epoch's scores are, or the splits; `test` without any run."""
    return _all(run.metrics["evaluated_on"] for run in runs) or "test"


def copies(paths: Paths) -> str:
    """Warn of copies among the prepared images, as `prepare` has counted them.

    Raises:
        DataError: summary.json is damaged.
    """
    summary: Any = read_json(paths.prepared / "summary.json") if paths.is_prepared else None
    if misfit(summary, {"copies": {"in_train": dict}}) is not None:
        return ""  # nothing is prepared, or by a former version
    counts = summary["copies"]
    texts = {
        f"{split} images are copies of training images; scores on them are too high": count
        for split, count in counts["in_train"].items()
    }
    texts["images are under two classes"] = counts.get("in_two_classes")
    texts["images repeat another of their split"] = counts.get("repeated")
    return "".join(f" Warning: {count} {text}." for text, count in texts.items() if isinstance(count, int) and count)


def is_held_out(runs: Iterable[FinishedRun]) -> bool:
    """Whether another split than test decided the best epoch of any run, so that its test scores stand apart."""
    return any(run.metrics["evaluated_on"] != "test" for run in runs)


def outdated(runs: FinishedRuns, models: Iterable[FinishedRun]) -> str:
    """Name those of the recipe's runs that were trained under other settings than params.yaml now has."""
    changed = [(run.name, runs.outdated(run)) for run in models]
    return "".join(f" {name} was trained before params.yaml changed: {', '.join(why)}." for name, why in changed if why)


def left_out(base: FinishedRun | None, runs: Iterable[FinishedRun]) -> str:
    """Say in one line which runs of a model were left out, and in what they differ from those that were not.

    Args:
        base: One that was not left out.
        runs: Those that were.
    """
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(f"{why_apart(base, run)}", []).append(run.seed)
        name = run.name
    if not seeds:
        return ""
    parts = [f"{_numbered('seed', sorted(set(of_reason)))} ({why})" for why, of_reason in seeds.items()]
    more = [f"{len(parts) - MAX_REASONS} more"] if len(parts) > MAX_REASONS else []
    return f" Left out, {name}: {', '.join([*parts[:MAX_REASONS], *more])}."


def why_apart(base: FinishedRun | None, run: FinishedRun) -> str:
    """Say in what two runs of a model differ but for the seed."""
    if run.description is None or base is None or base.description is None:
        return NOT_DESCRIBED if run.description is None else "the recipe's run does not say how it was trained"
    if named := differences(base.settings(), run.settings()):
        return ", ".join(named)
    labels = {digest for digest in (base.labels_sha256, run.labels_sha256) if digest is not None}
    return "other labels" if len(labels) > 1 else "the same run again"


def _numbered(what: str, numbers: Sequence[int]) -> str:
    """Return `seed 0`, or `seeds 0 1`."""
    return f"{what}{'' if len(numbers) == 1 else 's'} {' '.join(map(str, numbers))}"


def missing(names: Sequence[str], command: str) -> str:
    """Name the models that have not been run, and the command that runs the first, with `{}` in place of its name."""
    return f" Not run: {', '.join(names)}. To run: {command.format(names[0])}" if names else ""


def protocol(source: str) -> str:
    """Say how the paper's figures for a data set were reached; nothing where it has none."""
    return f" The paper: {paper.PROTOCOL[source]}." if source in paper.PROTOCOL else ""


def _by_kind(runs: Sequence[FinishedRun], key: str) -> str:
    """Return the values of metrics.json, those of teachers and of students apart where they are not the same."""
    kinds = [_all(run.metrics[key] for run in runs if run.kind == kind) for kind in ("teacher", "student")]
    if all(kinds) and kinds[0] != kinds[1]:
        return f"{kinds[0]} of the teachers and {kinds[1]} of the students"
    return kinds[0] or kinds[1]


def _seeds(runs: Sequence[FinishedRun]) -> str:
    """Return `seed 0`, or each model's seeds where one has several."""
    seeds: dict[tuple[str, str], dict[int, None]] = {}
    for run in runs:
        seeds.setdefault((run.kind, run.name), {})[run.seed] = None
    if all(len(of_model) == 1 for of_model in seeds.values()):
        return "seed " + _all(run.seed for run in runs)
    models = ", ".join(f"{name} {' '.join(map(str, of_model))}" for (_, name), of_model in seeds.items())
    return f"seeds {models}: mean ± sample standard deviation (number of seeds)"


def _teacher(run: FinishedRun, runs: Iterable[FinishedRun]) -> str:
    """Return the teacher of a run, with its top-1; with its initial weights where it is among the runs."""
    teacher = run.metrics["teacher"]
    at = "" if run.teacher_top1 is None else " at {:.2f} % on {}".format(*run.teacher_top1)
    began = next((other.initial_weights for other in runs if other.sha256 == teacher["sha256"]), None)
    return f"{run.taught_by}{at}" + (f" (trained from {began})" if began else "")


def device_of(environment: Mapping[str, Any]) -> str:
    """Return a run's device, with the number of ranks if there were several."""
    ranks = environment.get("ranks", 1)  # not in the run.json of former versions
    return str(environment["device"]) if ranks == 1 else f"{ranks} x {environment['device']}"


def _all(values: Iterable[Any]) -> str:
    """Return the distinct values, in the order in which they first appear."""
    return ", ".join(dict.fromkeys(str(value) for value in values))
