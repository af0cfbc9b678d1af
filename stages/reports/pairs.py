"""Pairs of models on the same test images: is one of them better by more than the choice of these images explains?

A run is asked for its predictions at the best epoch. With a single seed they are all that says how sure a difference
is; over several seeds, the seeds' own scatter stands beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.report import paper
from pipeline.report.figures import DotRow, dots
from pipeline.report.intervals import Estimate, matched_difference, paired_difference
from pipeline.report.page import Item, Missing
from pipeline.report.tables import Figure, Table, difference, number
from stages.reports.conditions import LEFT_OUT
from stages.reports.runs import FinishedRun, FinishedRuns

TITLE = "Do the students differ?"
FIGURE = "Differences between students"


@dataclass(frozen=True, eq=False)
class Pair:
    """Two models and what tells them apart on the test images, at their best epochs.

    Attributes:
        first: The name of one.
        second: The name of the other.
        num_images: How many test images there are.
        only_first: Images that only the first gets right, the mean over the seeds.
        only_second: Images that only the second gets right, likewise.
        over_images: Low and high end of the 95 % interval over the choice of test images, points of top-1.
        over_seeds: The difference first - second, points of top-1, with its interval over the seeds that both have.
    """

    first: str
    second: str
    num_images: int
    only_first: float
    only_second: float
    over_images: tuple[float, float]
    over_seeds: Estimate

    @classmethod
    def of(cls, first: Sequence[FinishedRun], second: Sequence[FinishedRun]) -> Pair | None:
        """Compare the runs of two models, paired by seed.

        Args:
            first: One's runs, at most one for each seed.
            second: The other's.

        Returns:
            None where no two share a seed, where scores are not of the same images by the same rules, or where
            predictions are missing.

        Raises:
            DataError: Predictions are damaged.
        """
        others = {run.seed: run for run in second}
        pairs = [(run, others[run.seed]) for run in first if run.seed in others]
        if not pairs or not all(one.is_comparable(other) for one, other in pairs):
            return None
        differences = [_difference(one, other) for one, other in pairs]
        known = [images for images in differences if images is not None]
        if len(known) < len(pairs):
            return None
        by_seed = np.stack(known)
        low, high = matched_difference(by_seed.mean(axis=0))
        top1 = [{run.seed: float(run.metrics["test"]["top1"]) for run in side} for side in zip(*pairs, strict=True)]
        over_seeds = paired_difference(*top1)
        assert over_seeds is not None, "they share a seed"
        only_first, only_second = (float((by_seed == sign).sum(axis=1).mean()) for sign in (1, -1))
        names = pairs[0][0].name, pairs[0][1].name
        return cls(*names, by_seed.shape[1], only_first, only_second, (100 * low, 100 * high), over_seeds)

    @property
    def differs(self) -> bool:
        """Whether the difference is larger than test images and seeds, where there are several, explain."""
        low, high = self.over_images
        return not low <= 0.0 <= high and self.over_seeds.excludes_zero is not False

    def as_json(self) -> dict[str, Any]:
        """Return the values, unrounded."""
        return {
            "first": self.first,
            "second": self.second,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "difference": self.over_seeds.mean,
            "over_images": list(self.over_images),
            "seeds": self.over_seeds.count,
            "over_seeds": None if self.over_seeds.interval is None else list(self.over_seeds.interval),
            "differs": self.differs,
        }


def _difference(first: FinishedRun, second: FinishedRun) -> NDArray[np.float64] | None:
    """Return `(N,)`: 1 where only the first names a test image rightly, -1 where only the second does, else 0.

    None where one has no predictions.
    """
    from stages.reports.classes import Answers  # imports PyTorch, for which --help does not wait

    answers = [Answers.read(run) for run in (first, second)]
    rights = [one.predictions == one.targets for one in answers if one is not None]
    if len(rights) < 2:
        return None
    if len(rights[0]) != len(rights[1]):
        raise DataError(
            f"{second.directory / 'predictions.csv'}: not as many images as in {first.directory}; train again"
        )
    images: NDArray[np.float64] = rights[0].astype(np.float64) - rights[1].astype(np.float64)
    return images


def students_in_pairs(runs: FinishedRuns) -> list[Pair]:
    """Return each pair of the recipe's students that can be compared, the better one first, the best ones on top.

    Raises:
        DataError: Predictions are damaged.
    """
    seeds: Mapping[str, Sequence[FinishedRun]] = {name: runs.seeds("student", name) for name in runs.recipe.students}
    top1 = {name: np.mean([run.metrics["test"]["top1"] for run in group]) for name, group in seeds.items() if group}
    ranked = sorted(top1, key=lambda name: -top1[name])
    pairs = (Pair.of(seeds[first], seeds[second]) for first, second in combinations(ranked, 2))
    return [pair for pair in pairs if pair is not None]


def pair_items(runs: FinishedRuns, pairs: Sequence[Pair], *, with_figures: bool = True) -> list[Item]:
    """Return a figure and a table of pairs; without figures, what says so in the figure's place; nothing of no pair."""
    if not pairs:
        return []
    return [_figure(pairs) if with_figures else Missing(FIGURE, LEFT_OUT), _table(runs, pairs)]


def interval_text(interval: tuple[float, float] | None) -> str:
    """Return an interval of points as `+0.21 to +1.92`; a dash of none."""
    return "-" if interval is None else " to ".join(f"{end:+.2f}" for end in interval)


def _table(runs: FinishedRuns, pairs: Sequence[Pair]) -> Table:
    """Return a row for each pair."""
    reported = paper.STUDENTS.get(runs.recipe.dataset.source, {})
    columns = ["students", "only the first right", "only the second right", "difference, points"]
    columns += ["95 % interval over images", "seeds", "95 % interval over seeds", "differ"]
    rows = []
    for pair in pairs:
        row = [f"{pair.first} - {pair.second}", number(pair.only_first, 0), number(pair.only_second, 0)]
        row += [f"{pair.over_seeds.mean:+.2f}", interval_text(pair.over_images), str(pair.over_seeds.count)]
        row += [interval_text(pair.over_seeds.interval), "yes" if pair.differs else "not shown"]
        if reported:
            known = pair.first in reported and pair.second in reported
            row.append(difference(reported[pair.first].top1, reported[pair.second].top1) if known else "-")
        rows.append(row)
    note = (
        f"Top-1 on {pairs[0].num_images} test images, of the best epochs. The interval over images says what other "
        "images could have given (Agresti and Min, 2005); that over seeds, what other initialisations and orders could "
        "(Student's t). Two students differ where no interval that is known includes 0."
    )
    if any(pair.over_seeds.interval is None for pair in pairs):
        note += " A single seed does not say how much another one would change."
    return Table(TITLE, [*columns, *(["the paper's difference"] if reported else [])], rows, note)


def _figure(pairs: Sequence[Pair]) -> Figure:
    """Draw each pair's difference with its interval over images."""
    rows = [
        DotRow(
            f"{pair.first} - {pair.second}",
            [pair.over_seeds.mean],
            [pair.over_images],
            remark=interval_text(pair.over_images),
        )
        for pair in pairs
    ]
    png = dots(
        rows, ["difference"], x_label="difference of top-1, points", origin="no difference", remarks="95 % interval"
    )
    alt = (
        "Dots: difference of top-1 of each two students, the better one first; lines: 95 % intervals over test images."
    )
    data = Table(
        FIGURE,
        ["first", "second", "difference", "low", "high"],
        [
            [pair.first, pair.second, *(number(value, 6) for value in (pair.over_seeds.mean, *pair.over_images))]
            for pair in pairs
        ],
    )
    note = "Lines are 95 % intervals over the choice of test images."
    return Figure("students-in-pairs", FIGURE, png, alt, note, data)
