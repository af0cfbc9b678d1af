"""What differs between finished runs: which of them may be compared, and their differences, paired by seed.

Two questions are asked about every student, each at an equal budget: does the teacher's label help, and how does the
number of views matter? Two more tables compare the students that a recipe has as variants of one another, and
everything else in data/runs with the recipe's runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.config.recipes import Recipe
from pipeline.report.figures import DotRow, Panel, Repeats, dots, over_counts
from pipeline.report.intervals import Estimate, estimate, paired_difference
from pipeline.report.page import Item, Missing
from pipeline.report.tables import Figure, Table, difference, number, spread
from stages.reports.conditions import LEFT_OUT, NOT_RUN, conditions, is_held_out
from stages.reports.runs import BUDGET, FinishedRun, FinishedRuns
from stages.shared.runs import differences

QUESTIONS = {"labels": "Does the teacher's label help?", "views": "How does the number of views matter?"}
VARIED = {"labels": "labels", "views": "num_views"}
"""Question, then the setting that its runs differ in."""
LABELS = ("none", "cached", "online")
NEED_A_TEACHER = ("soft", "confidence")
"""Settings that change nothing without a teacher."""
TOP1 = {"last": "last epoch", "best": "best epoch", "test": "best epoch, on test"}
"""Scores of metrics.json of which top-1 is compared, and how they are called."""
SCORES = {
    **{score: f"top-1 %, {name}" for score, name in TOP1.items()},
    "last_train_loss": "train loss, last epoch",
    "agreement": "agreement on test %",
}
MOST_SEEDS = 7  # that each get a marker
DRAWN = (
    "Filled: the mean over seeds, with its 95 % interval where there are several; hollow: the single seeds. Under the "
    "conditions of the table below."
)


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ by their seeds alone.

    Attributes:
        runs: By seed, ascending, at least one.
    """

    runs: Mapping[int, FinishedRun]

    @classmethod
    def of(cls, runs: Iterable[FinishedRun]) -> Arm:
        """Gather runs; of two runs with the same seed the first counts."""
        by_seed: dict[int, FinishedRun] = {}
        for run in runs:
            by_seed.setdefault(run.seed, run)
        return cls(dict(sorted(by_seed.items())))

    @property
    def first(self) -> FinishedRun:
        """The run of the lowest seed, whose settings are those of all."""
        return next(iter(self.runs.values()))

    @property
    def labels(self) -> str:
        """`none`, `cached` or `online`."""
        return _labels(self.first)

    @property
    def views(self) -> int | None:
        """How many views the epochs cycle through."""
        views: int | None = self.first.metrics["views"]
        return views

    def scores(self, score: str) -> dict[int, float | None]:
        """Return one of SCORES by seed; None where a run has none.

        Raises:
            DataError: A curve is damaged.
        """
        if score == "last_train_loss":
            return {seed: run.curve()[-1].get("train_loss") for seed, run in self.runs.items()}
        if score == "agreement":
            return {seed: run.metrics["test"]["agreement"] for seed, run in self.runs.items()}
        return {seed: float(run.metrics[score]["top1"]) for seed, run in self.runs.items()}

    def mean(self, score: str) -> Estimate | None:
        """Estimate the mean of a score over all seeds; None where a run has none."""
        values = _known(self.scores(score))
        return estimate(list(values.values())) if len(values) == len(self.runs) else None

    def minus(self, reference: Arm, score: str) -> Estimate | None:
        """Estimate the difference to another arm, paired by seed.

        None where they share no seed, to itself, and of training losses that are measured against other targets.
        """
        if self is reference or (score == "last_train_loss" and self.labels != reference.labels):
            return None
        return paired_difference(_known(self.scores(score)), _known(reference.scores(score)))


@dataclass(frozen=True, eq=False)
class Comparison:
    """A question about a student, and the runs that answer it.

    Attributes:
        question: `labels` or `views`.
        settings: In what all runs differ from the recipe.
        arms: The first is the reference of the others: that without labels, or that with the fewest views.
        left_out: How many runs of the same settings had another budget or teacher, or a seed a second time.
    """

    question: str
    settings: Mapping[str, str]
    arms: Sequence[Arm]
    left_out: int

    @property
    def taught(self) -> list[Arm]:
        """The arms that learn from the teacher, or all where none does."""
        return [arm for arm in self.arms if arm.labels != "none"] or list(self.arms)

    @property
    def controls(self) -> list[Arm]:
        """The arms without a teacher that stand beside others with one."""
        return [arm for arm in self.arms if arm not in self.taught]

    @property
    def runs(self) -> list[FinishedRun]:
        """All runs that are compared, the controls first."""
        return [run for arm in (*self.controls, *self.taught) for run in arm.runs.values()]

    @property
    def title(self) -> str:
        """The student, and in what all its runs differ from the recipe."""
        return ", ".join([self.runs[0].name, *(f"{key} {value}" for key, value in self.settings.items())])

    @property
    def figure_title(self) -> str:
        """What the figure shows."""
        return f"Top-1 by {'labels' if self.question == 'labels' else 'number of views'}, {self.title}"

    @property
    def top1(self) -> list[str]:
        """Which of TOP1 differ from each other: test's does where another split decides which epoch is the best."""
        return ["last", "best", *(["test"] if is_held_out(self.runs) else [])]

    @property
    def scores(self) -> list[str]:
        """Which of SCORES mean the same in all runs."""
        teachers = {(run.metrics["teacher"] or {}).get("sha256") for run in self.runs}
        loss = ["last_train_loss"] if self.question == "views" else []
        return [*self.top1, *loss, *(["agreement"] if len(teachers) == 1 else [])]

    def name(self, arm: Arm) -> str:
        """Return what tells an arm from the others."""
        if self.question == "labels":
            return arm.labels
        is_the_recipes = all("num_views" not in run.differs for run in arm.runs.values())
        name = f"{arm.views} (the recipe's)" if is_the_recipes else str(arm.views)
        return f"{name}, no teacher" if arm in self.controls else name


# Which runs are compared


def find_comparisons(runs: FinishedRuns) -> list[Comparison]:
    """Return what a recipe's students answer: first about labels, then about views."""
    students = [run for run in (*runs.students.values(), *runs.others.values()) if run.kind == "student"]
    students = [run for run in students if _labels(run) in LABELS]
    names = dict.fromkeys([*runs.recipe.students, *(run.name for run in students)])
    by_name = [[run for run in students if run.name == name] for name in names]
    return [answer for question in QUESTIONS for group in by_name for answer in _answers(question, group)]


def _answers(question: str, runs: Sequence[FinishedRun]) -> list[Comparison]:
    """Return a question's answers by one student's runs, one for each set of settings that they have in common.

    Runs without a teacher are controls of those with one. Where they are none, their numbers of views are compared too.
    """
    untaught = [run for run in runs if _labels(run) == "none"]
    if question == "labels":
        return _compare(question, [run for run in runs if run.metrics["distilled"]], untaught)
    answers = _compare(question, [run for run in runs if _labels(run) != "none"], untaught)
    shown = {id(run) for answer in answers for run in answer.runs}
    return answers + _compare(question, [run for run in untaught if id(run) not in shown], [])


def _compare(question: str, runs: Sequence[FinishedRun], untaught: Sequence[FinishedRun]) -> list[Comparison]:
    """Compare runs whose settings differ in the question's alone, at the budget that most arms and runs have."""
    varied = VARIED[question]
    ignored = ("labels", varied, *NEED_A_TEACHER)

    def budget(run: FinishedRun) -> tuple[Any, ...]:
        return (*run.budget, run.metrics["views"] if question == "labels" else None)

    comparisons = []
    for group in _grouped(runs, lambda run: _without(run.differs, varied)):
        settings = _without(group[0].differs, varied)
        alike = [
            run
            for run in untaught
            if group[0].metrics["distilled"] and _without(run.differs, *ignored) == _without(settings, *ignored)
        ]
        candidates = []
        for members in _grouped(group, lambda run: (budget(run), run.lesson)):
            arms, controls = _arms(members), _arms(run for run in alike if budget(run) == budget(members[0]))
            if controls if question == "labels" else len(arms) > 1:
                candidates.append((arms, controls))
        if candidates:
            arms, controls = max(candidates, key=lambda pair: (len(pair[0]), *map(_num_runs, pair)))
            left_out = len(group) + len(alike) - _num_runs([*arms, *controls])
            shown = [*controls, *arms] if question == "labels" else [*arms, *controls]
            comparisons.append(Comparison(question, settings, shown, left_out))
    return comparisons


def _labels(run: FinishedRun) -> str:
    return str(run.differs.get("labels", "cached"))


def _known(values: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if value is not None}


def _without(settings: Mapping[str, str], *names: str) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key not in names}


def _grouped(runs: Iterable[FinishedRun], key: Callable[[FinishedRun], Any]) -> list[list[FinishedRun]]:
    """Gather the runs that have equal keys, which are JSON values, in the order in which the keys first appear."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(key(run), sort_keys=True), []).append(run)
    return list(groups.values())


def _arms(runs: Iterable[FinishedRun]) -> list[Arm]:
    """Sort runs into arms, by labels, then ascending by views."""
    arms = [Arm.of(group) for group in _grouped(runs, lambda run: (_labels(run), run.metrics["views"]))]
    return sorted(arms, key=lambda arm: (LABELS.index(arm.labels), arm.views or 0))


def _num_runs(arms: Sequence[Arm]) -> int:
    return sum(len(arm.runs) for arm in arms)


# What is shown of them


def as_json(comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Return all figures of comparisons by question, unrounded.

    Raises:
        DataError: A curve is damaged.
    """
    figures: dict[str, Any] = {question: [] for question in QUESTIONS}
    for comparison in comparisons:
        first, reference = comparison.runs[0], comparison.arms[0]
        figures[comparison.question].append({
            "student": first.name,
            "settings": dict(comparison.settings),
            "budget": {key: first.metrics[key] for key in BUDGET},
            "teacher": comparison.taught[0].first.metrics["teacher"],
            "left_out": comparison.left_out,
            "reference": {"labels": reference.labels, "views": reference.views},
            "ways": [_arm_as_json(arm, comparison) for arm in (*comparison.controls, *comparison.taught)],
        })  # fmt: skip
    return figures


def _arm_as_json(arm: Arm, comparison: Comparison) -> dict[str, Any]:
    figures: dict[str, Any] = {"labels": arm.labels, "views": arm.views, "seeds": list(arm.runs)}
    for score in comparison.top1:
        values = list(_known(arm.scores(score)).values())
        figures[score] = {"values": values, **dataclasses.asdict(estimate(values))}
        if arm is not comparison.arms[0]:
            minus = arm.minus(comparison.arms[0], score)
            figures[score]["difference"] = minus and dataclasses.asdict(minus)
    return figures | {score: list(arm.scores(score).values()) for score in ("last_train_loss", "agreement")}


def comparison_items(comparisons: Iterable[Comparison], *, with_figures: bool = True) -> list[Item]:
    """Show comparisons, each as a figure and its table.

    Args:
        comparisons: What is shown.
        with_figures: Whether to draw.

    Raises:
        DataError: A curve is damaged.
    """
    items: list[Item] = []
    for comparison in comparisons:
        items.append(_figure(comparison) if with_figures else Missing(comparison.figure_title, LEFT_OUT))
        items.append(_table(comparison))
    return items


def _table(comparison: Comparison) -> Table:
    """Return each score's mean by arm, and its difference to the reference."""
    reference = comparison.arms[0]
    minus = f"difference to {'none' if comparison.question == 'labels' else _views(reference)}"
    columns = [comparison.question, "score", "seeds", "mean", "95 % interval", minus, f"{minus}: 95 % interval"]
    rows = [
        [comparison.name(arm), SCORES[score], " ".join(map(str, arm.runs)), *_cells(arm, reference, score)]
        for score in comparison.scores
        for arm in comparison.arms
    ]
    title = f"{QUESTIONS[comparison.question]} {comparison.title}"
    return Table(title, columns, rows, _note(comparison), ("seeds", "95 % interval"))


def _cells(arm: Arm, reference: Arm, score: str) -> list[str]:
    """Return a score's mean and its difference to the reference, each with deviation and number, then its interval."""
    digits = 3 if score == "last_train_loss" else 2
    cells = []
    for value, form in ((arm.mean(score), f".{digits}f"), (arm.minus(reference, score), f"+.{digits}f")):
        if value is None:
            cells += ["-", "-"]
            continue
        scatter = "" if value.sd is None else f" ± {value.sd:.{digits}f} ({value.count})"
        interval = "-" if value.interval is None else " to ".join(f"{end:{form}}" for end in value.interval)
        cells += [f"{value.mean:{form}}{scatter}", interval]
    return cells


def _figure(comparison: Comparison) -> Figure:
    """Draw top-1 by labels as dots, or over the number of views."""
    title, student = comparison.figure_title, comparison.runs[0].name
    if comparison.question == "labels":
        png = _draw_labels(comparison)
        alt = "Dots: top-1 of each seed, without the teacher's labels and with them; lines: the mean's 95 % interval."
    else:
        png = _draw_views(comparison)
        alt = "Lines: mean top-1 over the number of views, with 95 % intervals; a dot for each seed."
    shown = [*comparison.top1, "last_train_loss", "agreement"]
    rows = [
        [str(arm.views), arm.labels, str(seed), *(number(arm.scores(score)[seed], 6) for score in shown)]
        for arm in comparison.arms
        for seed in arm.runs
    ]
    data = Table(title, ["views", "labels", "seed", *(SCORES[score] for score in shown)], rows)
    name = "-".join([comparison.question, student, *(f"{key}-{value}" for key, value in comparison.settings.items())])
    return Figure(name, title, png, alt, DRAWN, data)


def _draw_labels(comparison: Comparison) -> bytes:
    """Draw each arm's mean with its interval, and its seeds."""
    seeds = sorted({run.seed for run in comparison.runs})
    shown = seeds if len(seeds) <= MOST_SEEDS else []
    rows = []
    for score in comparison.top1:
        for arm in comparison.arms:
            values, mean = arm.scores(score), arm.mean(score)
            assert mean is not None, "every run has a top-1"
            marks = [mean.mean, *(values.get(seed) for seed in shown)]
            rows.append(DotRow(f"labels {arm.labels}", marks, [mean.interval], TOP1[score]))
    return dots(rows, ["mean, 95 % interval", *(f"seed {seed}" for seed in shown)], x_label="top-1, %")


def _draw_views(comparison: Comparison) -> bytes:
    """Draw top-1 over the number of views, each score in its panel."""
    taught, controls = comparison.taught, comparison.controls
    parts = [("learns from the teacher" if taught[0].first.metrics["distilled"] else taught[0].first.name, taught)]
    if controls:
        parts.append((f"no teacher, {_views(controls[0])}" if len(controls) == 1 else "no teacher", controls))

    def series(name: str, arms: Sequence[Arm], score: str) -> Repeats:
        return Repeats(name, {arm.views or 0: list(_known(arm.scores(score)).values()) for arm in arms})

    panels = [Panel(TOP1[score], [series(name, arms, score) for name, arms in parts]) for score in comparison.top1]
    return over_counts(panels, x_label="number of views", y_label="top-1, %")


def _views(arm: Arm) -> str:
    return f"{arm.views} view{'' if arm.views == 1 else 's'}"


def _note(comparison: Comparison) -> str:
    """Say what has changed, what an interval is of, what was left out, and under what conditions all was run."""
    controls = comparison.controls
    if comparison.question == "labels":
        parts = [_change(comparison, arm, f"{arm.labels.capitalize()} minus none") for arm in comparison.taught]
    else:
        most = comparison.taught[-1]
        parts = [_change(comparison, most, f"{_views(most)} minus {comparison.arms[0].views}")]
        parts.append("Training loss in nats" + ("; without a teacher it is of other targets." if controls else "."))
    counts = sorted({len(arm.runs) for arm in comparison.arms})
    several = " or ".join(str(count) for count in counts if count > 1)
    if several:
        parts.append(
            f"Intervals: Student's t over {several} seeds, which change initialisation and order, not the data. "
            "Differences are paired by seed."
        )
    parts += ["A single seed has no interval."] if counts[0] == 1 else []
    metrics = comparison.runs[0].metrics
    parts.append(
        f"Equal budget: the same epochs, batch, images and parameters, {metrics['optimizer']} at {metrics['lr']:g}."
    )
    if comparison.left_out:
        runs = "1 run is" if comparison.left_out == 1 else f"{comparison.left_out} runs are"
        parts.append(f"{runs} left out: another budget or teacher, or a seed that is counted already.")
    return " ".join([*parts, conditions(comparison.runs)])


def _change(comparison: Comparison, arm: Arm, what: str) -> str:
    """Say in a sentence whether an arm's top-1 differs from the reference's by more than the seeds scatter."""
    parts = []
    for score in comparison.top1:
        minus = arm.minus(comparison.arms[0], score)
        if minus is None:
            return f"{what}: no seed in common, no difference."
        verdict = {
            None: "one pair of seeds, no interval",
            True: "more than the seeds scatter: the interval excludes 0",
            False: "no more than the seeds scatter: the interval includes 0",
        }[minus.excludes_zero]
        parts.append(f"{TOP1[score]} {minus.mean:+.2f} points ({verdict})")
    return f"{what}: {'; '.join(parts)}."


# The recipe's variants, and all other runs


def variants(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return each student that has variants in the recipe: later students of the same model.

    Returns:
        Its name, then each variant's name and in what it differs, as `soft 2 -> 0`.
    """
    by_base: dict[str, dict[str, str]] = {}
    bases: dict[str, str] = {}
    for name, student in recipe.students.items():
        base = bases.setdefault(student.model, name)
        if base != name:
            former = {"student": dataclasses.asdict(recipe.students[base])}
            changed = differences(former, {"student": dataclasses.asdict(student)})
            by_base.setdefault(base, {})[name] = ", ".join(changed)
    return by_base


def variants_tables(runs: FinishedRuns) -> list[Table]:
    """Return a table for each student that has been run together with a variant of it."""
    tables = []
    for base, changes in variants(runs.recipe).items():
        seeds = {name: runs.seeds(name) for name in (base, *changes)}
        arms = {name: Arm.of(of_seeds) for name, of_seeds in seeds.items() if of_seeds}
        if base not in arms or len(arms) == 1:
            continue
        trained = [run for arm in arms.values() for run in arm.runs.values()]
        columns, rows = ["student", "differs in"], [[name, changes.get(name, "-")] for name in seeds]
        for score in ("best", "test") if is_held_out(trained) else ("best",):
            columns += [f"{score} top-1 %", f"{score} top-1 %: difference to {base}", "95 % interval"]
            for row in rows:
                cells = _cells(arms[row[0]], arms[base], score) if row[0] in arms else [NOT_RUN, "-", "-", "-"]
                row += [cells[0], *cells[2:]]
        note = f"A variant changes what is named, and nothing else of {base}; differences are paired by seed. "
        if any(len(arm.runs) == 1 for arm in arms.values()):
            note += "A single seed has no interval: the difference may be chance. "
        tables.append(Table(f"Variants of {base}", columns, rows, note + conditions(trained)))
    return tables


def others_table(runs: FinishedRuns) -> Table | None:
    """Return the runs of data/runs that differ by more than their seed, those alike in one row; None without any.

    Each row is compared with the recipe's runs of the same model, by test accuracy at the best epoch.
    """
    shown = [run for run in runs.others.values() if run not in runs.seeds(run.name)]
    if not shown:
        return None
    columns = ["model", "differs in", "seeds", "epochs", "best top-1 %", "last top-1 %", "test top-1 %"]
    columns += ["the recipe's test top-1 %", "difference"]
    rows = []
    for group in _grouped(sorted(shown, key=lambda run: run.seed), lambda run: (run.name, run.differs, run.basis)):
        best, last, test = ([run.metrics[key]["top1"] for run in group] for key in ("best", "last", "test"))
        reference = [run.metrics["test"]["top1"] for run in runs.seeds(group[0].name)]
        differs = ", ".join(f"{key} {value}" for key, value in group[0].differs.items())
        rows.append([
            group[0].name,
            differs or "settings that the recipe has changed since",
            " ".join(str(run.seed) for run in group),
            str(group[0].metrics["epochs"]),
            *map(spread, (best, last, test)),
            spread(reference) if reference else NOT_RUN,
            difference(fmean(test), fmean(reference)) if reference else "-",
        ])  # fmt: skip
    note = "Compared by test accuracy at the best epoch. " + conditions(shown)
    return Table(f"Other runs on {runs.recipe.name}", columns, rows, note, ("epochs", "last top-1 %", "best top-1 %"))
