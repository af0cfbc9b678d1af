"""Runs of a student at an equal budget that differ in one thing: its teacher's labels, or the number of views."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.intervals import Estimate, estimate, paired_difference
from stages.reports.conditions import is_held_out
from stages.reports.runs import FinishedRun, FinishedRuns

MEASURES = {"last": "last epoch", "best": "best epoch", "test": "best epoch, on test"}
"""Scores of metrics.json, and how they are called."""
LABELS = ("none", "cached", "online")
OF_THE_TEACHER = ("soft", "confidence")
"""Settings that change nothing without a teacher."""


@dataclass(frozen=True, eq=False)
class Way:
    """Runs that differ by their seeds alone.

    Attributes:
        labels: `none`, `cached` or `online`.
        views: That the epochs cycle through.
        runs: By seed, at least one.
    """

    labels: str
    views: int | None
    runs: Mapping[int, FinishedRun]

    @property
    def is_the_recipes(self) -> bool:
        """Whether the recipe itself asks for as many views."""
        return all("num_views" not in run.differs for run in self.runs.values())

    def top1(self, measure: str) -> dict[int, float]:
        """Return top-1 by seed, percent; the measure is one of MEASURES."""
        return {seed: float(run.metrics[measure]["top1"]) for seed, run in self.runs.items()}

    @functools.cached_property
    def train_losses(self) -> list[float | None]:
        """The last epoch's training loss of each run, nats.

        Raises:
            DataError: A curve is damaged.
        """
        return [run.curve()[-1].get("train_loss") for run in self.runs.values()]

    @property
    def agreements(self) -> list[float | None]:
        """How often each run says on test what its teacher says, percent, at the best epoch."""
        return [run.metrics["test"]["agreement"] for run in self.runs.values()]


@dataclass(frozen=True, eq=False)
class Comparison:
    """One question about a student, and the runs that answer it.

    Attributes:
        student: Its name in the recipe.
        settings: In what all runs differ from the recipe.
        ways: What is compared: by labels, or ascending by views; at least one.
        controls: The same without the teacher's labels; of a comparison of labels exactly one.
        left_out: How many runs of the same question had another budget or teacher, or a seed a second time.
    """

    student: str
    settings: Mapping[str, str]
    ways: Sequence[Way]
    controls: Sequence[Way]
    left_out: int

    @property
    def title(self) -> str:
        """The student, and in what all its runs differ from the recipe."""
        return ", ".join([self.student, *(f"{key} {value}" for key, value in self.settings.items())])

    @property
    def slug(self) -> str:
        """The same as part of a file's name."""
        return "-".join([self.student, *(f"{key}-{value}" for key, value in self.settings.items())])

    @property
    def runs(self) -> list[FinishedRun]:
        """All that are compared."""
        return [run for way in (*self.controls, *self.ways) for run in way.runs.values()]

    @property
    def measures(self) -> dict[str, str]:
        """MEASURES without what would say the same twice."""
        return {key: name for key, name in MEASURES.items() if key != "test" or is_held_out(self.runs)}

    @property
    def has_one_teacher(self) -> bool:
        """Whether agreement means the same in all runs."""
        teachers = {(run.metrics["teacher"] or {}).get("sha256") for run in self.runs}
        return len(teachers) == 1


@dataclass(frozen=True)
class Comparisons:
    """What the finished runs answer.

    Attributes:
        labels: Does the teacher's label help?
        views: How does the number of views change the student?
    """

    labels: Sequence[Comparison]
    views: Sequence[Comparison]

    @classmethod
    def find(cls, runs: FinishedRuns) -> Comparisons:
        """Look through a recipe's students."""
        found = [*runs.students.values(), *runs.others.values()]
        students = [run for run in found if run.kind == "student" and _labels(run) in LABELS]
        names = list(dict.fromkeys([*runs.recipe.students, *(run.name for run in students)]))
        by_name = [[run for run in students if run.name == name] for name in names]
        labels = [each for own in by_name for each in compare_labels(own)]
        return cls(labels, [each for own in by_name for each in compare_views(own)])

    def as_json(self) -> dict[str, Any]:
        """Return all figures, unrounded.

        Raises:
            DataError: A curve is damaged.
        """
        labels = [_as_json(each, each.controls[0]) for each in self.labels]
        return {"labels": labels, "views": [_as_json(each, each.ways[0]) for each in self.views]}


def compare_labels(runs: Sequence[FinishedRun]) -> list[Comparison]:
    """Compare a student's runs with the teacher's labels, cached or asked for, with those without.

    Args:
        runs: Of one student; those of seed 0 that differ in nothing come first.

    Returns:
        One for each set of other settings that there are runs with and without labels of.
    """
    untaught = [run for run in runs if _labels(run) == "none"]
    taught = [run for run in runs if run.metrics["distilled"]]
    found = []
    for settings, group in _groups(taught, "labels"):
        controls = _matching(untaught, settings, "labels")

        def alike(run: FinishedRun) -> tuple[Any, ...]:
            return (*run.budget, run.metrics["views"])

        comparison = _largest(settings, group, controls, alike, needs_controls=True)
        if comparison is not None:
            found.append(comparison)
    return found


def compare_views(runs: Sequence[FinishedRun]) -> list[Comparison]:
    """Compare a student's runs by their number of views.

    Args:
        runs: As of `compare_labels`.

    Returns:
        One for each set of other settings that there are runs with several numbers of views of. Runs without a
        teacher are the controls of those with one, and compared by themselves where these are not.
    """
    untaught = [run for run in runs if _labels(run) == "none"]
    found: list[Comparison] = []
    for settings, group in _groups([run for run in runs if _labels(run) != "none"], "num_views"):
        controls = _matching(untaught, settings, "labels", "num_views") if group[0].metrics["distilled"] else []
        comparison = _largest(settings, group, controls, lambda run: run.budget)
        if comparison is not None and len(comparison.ways) > 1:
            found.append(comparison)
    shown = {id(run) for comparison in found for run in comparison.runs}
    for settings, group in _groups([run for run in untaught if id(run) not in shown], "num_views"):
        comparison = _largest(settings, group, [], lambda run: run.budget)
        if comparison is not None and len(comparison.ways) > 1:
            found.append(comparison)
    return found


def _labels(run: FinishedRun) -> str:
    return str(run.differs.get("labels", LABELS[1]))


def _without(settings: Mapping[str, str], *names: str) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key not in names}


def _groups(runs: Iterable[FinishedRun], varied: str) -> list[tuple[dict[str, str], list[FinishedRun]]]:
    """Return runs that differ from the recipe in the same but for one setting, with what they differ in."""
    found: list[tuple[dict[str, str], list[FinishedRun]]] = []
    for run in runs:
        settings = _without(run.differs, varied)
        group = next((group for others, group in found if others == settings), None)
        if group is None:
            found.append((settings, [run]))
        else:
            group.append(run)
    return found


def _matching(untaught: Iterable[FinishedRun], settings: Mapping[str, str], *varied: str) -> list[FinishedRun]:
    """Return the runs without a teacher that differ in nothing else from those with some settings."""
    names = (*varied, *OF_THE_TEACHER)
    return [run for run in untaught if _without(run.differs, *names) == _without(settings, *names)]


def _largest(
    settings: Mapping[str, str],
    group: Sequence[FinishedRun],
    controls: Sequence[FinishedRun],
    alike: Callable[[FinishedRun], tuple[Any, ...]],
    *,
    needs_controls: bool = False,
) -> Comparison | None:
    """Return the comparison at that budget, and with that teacher, of which most ways and runs are there.

    Args:
        settings: In what all runs differ from the recipe.
        group: The runs, at least one.
        controls: Runs without a teacher that may stand beside them.
        alike: What is the same in all runs of a comparison.
        needs_controls: Whether there is nothing to compare without a control.
    """
    candidates = []
    for first in group:
        same = [run for run in group if (alike(run), run.lesson) == (alike(first), first.lesson)]
        beside = _ways(run for run in controls if alike(run) == alike(first))
        candidates.append((_ways(same), beside))
    if needs_controls:
        candidates = [each for each in candidates if each[1]]
    if not candidates:
        return None
    ways, beside = max(candidates, key=lambda each: (len(each[0]), _count(each[0]), _count(each[1])))
    left_out = len(group) + len(controls) - _count(ways) - _count(beside)
    return Comparison(group[0].name, settings, ways, beside, left_out)


def _count(ways: Sequence[Way]) -> int:
    return sum(len(way.runs) for way in ways)


def _ways(runs: Iterable[FinishedRun]) -> list[Way]:
    """Sort runs by labels and views; of a seed that is there twice the first counts."""
    found: dict[tuple[str, int | None], dict[int, FinishedRun]] = {}
    for run in runs:
        found.setdefault((_labels(run), run.metrics["views"]), {}).setdefault(run.seed, run)
    ordered = sorted(found.items(), key=lambda item: (LABELS.index(item[0][0]), item[0][1] or 0))
    return [Way(labels, views, dict(sorted(seeds.items()))) for (labels, views), seeds in ordered]


def _as_json(comparison: Comparison, reference: Way) -> dict[str, Any]:
    """Return a comparison's figures, and of each way its difference to the reference, paired by seed."""
    first = comparison.runs[0].metrics
    keys = ("epochs", "batch_size", "optimizer", "lr", "num_train", "num_test", "parameters")
    return {
        "student": comparison.student,
        "settings": dict(comparison.settings),
        "budget": {key: first[key] for key in keys},
        "teacher": comparison.ways[0].runs[min(comparison.ways[0].runs)].metrics["teacher"],
        "left_out": comparison.left_out,
        "reference": {"labels": reference.labels, "views": reference.views},
        "ways": [_way_as_json(way, reference, comparison) for way in (*comparison.controls, *comparison.ways)],
    }


def _way_as_json(way: Way, reference: Way, comparison: Comparison) -> dict[str, Any]:
    figures: dict[str, Any] = {"labels": way.labels, "views": way.views, "seeds": list(way.runs)}
    for measure in comparison.measures:
        values = way.top1(measure)
        figures[measure] = {"values": list(values.values()), **_estimate_as_json(estimate(list(values.values())))}
        if way is not reference:
            less = paired_difference(values, reference.top1(measure))
            figures[measure]["difference"] = None if less is None else _estimate_as_json(less)
    return {**figures, "last_train_loss": way.train_losses, "agreement": way.agreements}


def _estimate_as_json(found: Estimate) -> dict[str, Any]:
    return {
        "count": found.count,
        "mean": found.mean,
        "sd": found.deviation,
        "interval": None if found.interval is None else list(found.interval),
    }
