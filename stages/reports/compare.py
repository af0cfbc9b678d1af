"""Comparisons of finished runs, paired by seed.

Two questions are asked about every student: does the teacher's label help, and how does the number of views matter? The
runs that answer one are equal in everything that decides a result, but for the seed and what is asked about; see
stages.shared.runs.describe_finished. Two more tables compare a recipe's students that are variants of one another, and
all other runs of data/runs with the recipe's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.config.recipes import Recipe
from pipeline.report.figures import DotRow, Panel, Repeats, dots, over_counts
from pipeline.report.intervals import Estimate, estimate, paired_difference
from pipeline.report.page import Item, Missing
from pipeline.report.tables import Figure, Table, difference, number, spread
from stages.reports.conditions import (
    LEFT_OUT,
    NOT_DESCRIBED,
    NOT_RUN,
    evaluated_on,
    is_held_out,
    left_out,
    missing,
    why_apart,
)
from stages.reports.pairs import Pair, interval_text
from stages.reports.runs import FinishedRun, FinishedRuns, one_for_each_seed, pools
from stages.shared.runs import LESSON, changes

QUESTIONS = {"labels": "Does the teacher's label help?", "views": "How does the number of views matter?"}
VARIED = {"labels": ("inputs.labels", "inputs.topk"), "views": ("inputs.views.count",)}
"""The places in a description in which the runs of a question differ."""
TAUGHT = (*(f"inputs.{key}" for key in LESSON), "training.soft")
"""The places that mean nothing without a teacher: a run without one is the control of all with an equal rest."""
LABELS = ("none", "cached", "online")
BUDGET = ("epochs", "batch_size", "optimizer", "lr", "num_train", "num_test", "parameters")
"""Fields of metrics.json that report.json gives with a comparison."""
TOP1 = {"last": "last epoch", "best": "best epoch", "test": "best epoch"}
"""Parts of metrics.json whose top-1 is compared, and their names for people."""
SCORES = {
    **{score: f"top-1 %, {name}" for score, name in TOP1.items()},
    "last_train_loss": "train loss, last epoch",
    "agreement": "agreement on test %",
}
MAX_MARKED_SEEDS = 7  # of more no single seed is drawn
DRAWN = "Filled: the mean over seeds, with its 95 % interval where there are several; hollow: the single seeds."


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ by their seeds alone.

    Attributes:
        runs: By seed, ascending, at least one.
    """

    runs: Mapping[int, FinishedRun]

    @classmethod
    def of(cls, runs: Iterable[FinishedRun]) -> Arm:
        """Gather runs of one pool; of two runs with the same seed the first counts."""
        return cls({run.seed: run for run in one_for_each_seed(runs)})

    @property
    def first(self) -> FinishedRun:
        """The run of the lowest seed, whose settings are those of all."""
        return next(iter(self.runs.values()))

    @property
    def labels(self) -> str:
        """`none`, `cached` or `online`."""
        return self.first.labels

    @property
    def views(self) -> int | None:
        """How many views the epochs cycle through; None without any."""
        return self.first.views

    def scores(self, score: str) -> dict[int, float | None]:
        """Return one of SCORES by seed; None where a run has none.

        Raises:
            DataError: A curve is damaged.
        """
        if score == "last_train_loss":
            return {seed: run.curve()[-1].get("train_loss") for seed, run in self.runs.items()}
        if score == "agreement":
            teachers = {(run.metrics["teacher"] or {}).get("sha256") for run in self.runs.values()}
            is_one = len(teachers) == 1
            return {seed: run.metrics["test"]["agreement"] if is_one else None for seed, run in self.runs.items()}
        return {seed: float(run.metrics[score]["top1"]) for seed, run in self.runs.items()}

    def mean(self, score: str) -> Estimate | None:
        """Estimate the mean of a score over all seeds; None where a run has none."""
        values = _known(self.scores(score))
        return estimate(list(values.values())) if len(values) == len(self.runs) else None

    def minus(self, reference: Arm, score: str) -> Estimate | None:
        """Estimate the difference to another arm, paired by seed.

        None to itself, where they share no seed, and of training losses against different targets.
        """
        if self is reference or (score == "last_train_loss" and self.labels != reference.labels):
            return None
        return paired_difference(_known(self.scores(score)), _known(reference.scores(score)))


@dataclass(frozen=True, eq=False)
class Comparison:
    """A question about a student, and the runs that answer it.

    Attributes:
        question: `labels` or `views`.
        settings: The settings in which all runs differ from the recipe's run, as that was trained.
        arms: The reference first: that without labels, or that with the fewest views.
        recipes: The key of the recipe's run; None without one.
        left_out: A line on the student's runs that answer nothing; empty where there are none.
    """

    question: str
    settings: Sequence[str]
    arms: Sequence[Arm]
    recipes: str | None = None
    left_out: str = ""

    @property
    def taught(self) -> list[Arm]:
        """The arms that learn from the teacher; all where none does."""
        return [arm for arm in self.arms if arm.labels != "none"] or list(self.arms)

    @property
    def controls(self) -> list[Arm]:
        """The arms without a teacher beside others with one."""
        return [arm for arm in self.arms if arm not in self.taught]

    @property
    def runs(self) -> list[FinishedRun]:
        """All runs that are compared, the controls first."""
        return [run for arm in (*self.controls, *self.taught) for run in arm.runs.values()]

    @property
    def title(self) -> str:
        """The student and the settings in which all its runs differ from the recipe."""
        return ", ".join([self.runs[0].name, *self.settings])

    @property
    def figure_title(self) -> str:
        """What the figure shows."""
        return f"Top-1 by {'labels' if self.question == 'labels' else 'number of views'}, {self.title}"

    @property
    def top1(self) -> list[str]:
        """The keys of TOP1 that differ: the test's does where another split decides the best epoch."""
        return ["last", "best", *(["test"] if is_held_out(self.runs) else [])]

    @property
    def scores(self) -> list[str]:
        """The keys of SCORES that mean the same in all runs."""
        teachers = {(run.metrics["teacher"] or {}).get("sha256") for run in self.runs}
        loss = ["last_train_loss"] if self.question == "views" else []
        return [*self.top1, *loss, *(["agreement"] if len(teachers) == 1 else [])]

    def pair(self, arm: Arm) -> Pair | None:
        """Compare an arm with the reference on the same test images; None where predictions are missing.

        Raises:
            DataError: Predictions are damaged.
        """
        return None if arm is self.arms[0] else Pair.of(list(arm.runs.values()), list(self.arms[0].runs.values()))

    def of(self, score: str, names: Mapping[str, str] = TOP1) -> str:
        """Return a score's name for people, of top-1 with the split that it is on."""
        split = "test" if score == "test" else evaluated_on(self.runs)
        return f"{names[score]}, on {split}" if score in TOP1 else names[score]

    def name(self, arm: Arm) -> str:
        """Return an arm's name among the others."""
        if self.question == "labels":
            topk = arm.first.settings()["inputs"].get("topk")
            return f"{arm.labels}, top {topk}" if topk else arm.labels
        is_the_recipes = arm.first.key(*TAUGHT) == self.recipes
        name = f"{arm.views} (the recipe's)" if is_the_recipes else str(arm.views)
        return f"{name}, no teacher" if arm in self.controls else name


# Which runs are compared


def find_comparisons(runs: FinishedRuns) -> list[Comparison]:
    """Return what a recipe's students answer: first about labels, then about views."""
    students = [run for run in (*runs.students.values(), *runs.others.values()) if run.kind == "student"]
    names = dict.fromkeys([*runs.recipe.students, *(run.name for run in students)])
    by_name = {name: [run for run in students if run.name == name] for name in names}
    return [
        answer
        for question in QUESTIONS
        for name, group in by_name.items()
        for answer in _answers(question, runs.reference("student", name), group)
    ]


def _answers(question: str, reference: FinishedRun | None, runs: Sequence[FinishedRun]) -> list[Comparison]:
    """Compare one student's runs, once for each set of settings that they share; the first says what was left out.

    Runs without a teacher are controls of those with one; those that are not have their numbers of views compared too.
    """
    known = [run for run in runs if run.description is not None and run.labels in LABELS]
    if not known:
        return []
    base = reference if reference in known else known[0]
    untaught = [run for run in known if run.labels == "none"]
    answers = _compare(question, base, [run for run in known if run not in untaught], untaught)
    if question == "views":
        shown = [run for answer in answers for run in answer.runs]
        answers += _compare(question, base, [run for run in untaught if run not in shown], [])
    if answers:
        shown = [run for answer in answers for run in answer.runs]
        line = left_out(base, [run for run in runs if run not in shown])
        answers[0] = dataclasses.replace(answers[0], left_out=line)
    return answers


def _compare(
    question: str, base: FinishedRun, runs: Sequence[FinishedRun], untaught: Sequence[FinishedRun]
) -> list[Comparison]:
    """Compare runs that differ in what is asked about and in the seed alone, beside their controls."""
    varied = VARIED[question]
    asked = "labels" if question == "labels" else "num_views"
    given = [f"{key} {value}" for key, value in base.differs.items() if key != asked]
    recipes = None if base.differs else base.key(*TAUGHT)
    comparisons = []
    for group in pools(runs, *varied):
        alike = group[0].key(*TAUGHT, *varied)
        arms, controls = _arms(group), _arms(run for run in untaught if run.key(*TAUGHT, *varied) == alike)
        if controls if question == "labels" else len(arms) > 1:
            settings = [*given, *changes(base.settings(*varied), group[0].settings(*varied))]
            shown = [*controls, *arms] if question == "labels" else [*arms, *controls]
            comparisons.append(Comparison(question, settings, shown, recipes))
    return comparisons


def _arms(runs: Iterable[FinishedRun]) -> list[Arm]:
    """Group runs into arms, sorted by labels, then by views; of runs that differ in their labels alone the first."""
    groups: dict[str, Sequence[FinishedRun]] = {}
    for group in pools(runs):
        groups.setdefault(group[0].key(), group)  # another arm would have the same name
    arms = [Arm.of(group) for group in groups.values()]
    return sorted(arms, key=lambda arm: (LABELS.index(arm.labels), arm.views or 0))


def _known(values: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if value is not None}


# What is shown of them


def as_json(comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Return the values of comparisons by question, unrounded.

    Raises:
        DataError: A curve is damaged.
    """
    values: dict[str, Any] = {question: [] for question in QUESTIONS}
    for comparison in comparisons:
        first, reference = comparison.runs[0], comparison.arms[0]
        values[comparison.question].append({
            "student": first.name,
            "settings": list(comparison.settings),
            "budget": {key: first.metrics[key] for key in BUDGET},
            "teacher": comparison.taught[0].first.metrics["teacher"],
            "left_out": comparison.left_out.strip(),
            "reference": {"labels": reference.labels, "views": reference.views},
            "ways": [_arm_as_json(arm, comparison) for arm in (*comparison.controls, *comparison.taught)],
        })  # fmt: skip
    return values


def _arm_as_json(arm: Arm, comparison: Comparison) -> dict[str, Any]:
    figures: dict[str, Any] = {"labels": arm.labels, "views": arm.views, "seeds": list(arm.runs)}
    for score in comparison.top1:
        values = list(_known(arm.scores(score)).values())
        figures[score] = {"values": values, **dataclasses.asdict(estimate(values))}
        if arm is not comparison.arms[0]:
            minus = arm.minus(comparison.arms[0], score)
            figures[score]["difference"] = minus and dataclasses.asdict(minus)
    pair = comparison.pair(arm)
    figures["over_images"] = None if pair is None else list(pair.over_images)
    return figures | {score: list(arm.scores(score).values()) for score in ("last_train_loss", "agreement")}


def comparison_items(comparisons: Iterable[Comparison], *, with_figures: bool = True) -> list[Item]:
    """Return a figure and a table of each comparison; without figures, what says so in their place.

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
        [
            comparison.name(arm),
            comparison.of(score, SCORES),
            " ".join(map(str, arm.runs)),
            *_cells(arm, reference, score),
        ]
        for score in comparison.scores
        for arm in comparison.arms
    ]
    title = f"{QUESTIONS[comparison.question]} {comparison.title}"
    return Table(title, columns, rows, _note(comparison), ("seeds", "95 % interval"))


def _cells(arm: Arm, reference: Arm, score: str) -> list[str]:
    """Return a score's mean and its difference to the reference, each followed by its interval."""
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
    data = Table(title, ["views", "labels", "seed", *(comparison.of(score, SCORES) for score in shown)], rows)
    name = "-".join([comparison.question, student, *comparison.settings])
    return Figure(name, title, png, alt, DRAWN, data)


def _draw_labels(comparison: Comparison) -> bytes:
    """Draw each arm's mean with its interval, and its seeds."""
    seeds = sorted({run.seed for run in comparison.runs})
    shown = seeds if len(seeds) <= MAX_MARKED_SEEDS else []
    rows = []
    for score in comparison.top1:
        for arm in comparison.arms:
            values, mean = arm.scores(score), arm.mean(score)
            assert mean is not None, "every run has a top-1"
            marks = [mean.mean, *(values.get(seed) for seed in shown)]
            rows.append(DotRow(f"labels {comparison.name(arm)}", marks, [mean.interval], comparison.of(score)))
    return dots(rows, ["mean, 95 % interval", *(f"seed {seed}" for seed in shown)], x_label="top-1, %")


def _draw_views(comparison: Comparison) -> bytes:
    """Draw top-1 over the number of views, each score in its panel."""
    taught, controls = comparison.taught, comparison.controls
    parts = [("learns from the teacher" if taught[0].first.metrics["distilled"] else taught[0].first.name, taught)]
    if controls:
        parts.append((f"no teacher, {_views(controls[0])}" if len(controls) == 1 else "no teacher", controls))

    def series(name: str, arms: Sequence[Arm], score: str) -> Repeats:
        return Repeats(name, {arm.views or 0: list(_known(arm.scores(score)).values()) for arm in arms})

    panels = [
        Panel(comparison.of(score), [series(name, arms, score) for name, arms in parts]) for score in comparison.top1
    ]
    return over_counts(panels, x_label="number of views", y_label="top-1, %")


def _views(arm: Arm) -> str:
    return f"{arm.views} view{'' if arm.views == 1 else 's'}"


def _note(comparison: Comparison) -> str:
    """Return the note below the table: differences, intervals, what was left out."""
    controls = comparison.controls
    if comparison.question == "labels":
        parts = [
            _change(comparison, arm, f"{comparison.name(arm).capitalize()} minus none") for arm in comparison.taught
        ]
    else:
        most = comparison.taught[-1]
        parts = [_change(comparison, most, f"{_views(most)} minus {comparison.arms[0].views}")]
        parts.append("Training loss in nats" + ("; without a teacher it is of other targets." if controls else "."))
    counts = sorted({len(arm.runs) for arm in comparison.arms})
    if several := " or ".join(str(count) for count in counts if count > 1):
        parts.append(
            f"Intervals: Student's t over {several} seeds, which change initialisation and order, not the data. "
            "Differences are paired by seed."
        )
    parts += ["A single seed has no interval."] if counts[0] == 1 else []
    asked = "labels" if comparison.question == "labels" else "number of views"
    parts.append(f"All runs are equal but for the {asked} and the seed: data, settings, views and precision.")
    return " ".join(parts) + comparison.left_out


def _change(comparison: Comparison, arm: Arm, what: str) -> str:
    """Say whether an arm's top-1 differs from the reference's by more than the seeds and the test images scatter."""
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
        parts.append(f"{comparison.of(score)} {minus.mean:+.2f} points ({verdict})")
    pair = comparison.pair(arm)
    over = f" Over the test images, best epoch: {interval_text(pair.over_images)} (95 % interval)." if pair else ""
    return f"{what}: {'; '.join(parts)}.{over}"


# The recipe's variants, and all other runs


def variants(recipe: Recipe) -> dict[str, list[str]]:
    """Return by student its variants: the recipe's later students of the same model."""
    by_base: dict[str, list[str]] = {}
    bases: dict[str, str] = {}
    for name, student in recipe.students.items():
        base = bases.setdefault(student.model, name)
        if base != name:
            by_base.setdefault(base, []).append(name)
    return by_base


def variants_tables(runs: FinishedRuns) -> list[Table]:
    """Return a table for each student that has been run together with a variant of it."""
    tables = []
    for base, others in variants(runs.recipe).items():
        arms = {name: Arm.of(of_seeds) for name in (base, *others) if (of_seeds := runs.seeds("student", name))}
        if base not in arms or len(arms) == 1:
            continue
        first = arms[base].first
        columns = ["student", "differs in"]
        rows = [[name, "-" if name == base else why_apart(first, arm.first)] for name, arm in arms.items()]
        split = evaluated_on(arm.first for arm in arms.values())
        for score, heading in {"best": f"best {split}", **({"test": "test"} if split != "test" else {})}.items():
            columns += [f"{heading} top-1 %", f"{heading} top-1 %: difference to {base}", "95 % interval"]
            for row in rows:
                cells = _cells(arms[row[0]], arms[base], score)
                row += [cells[0], *(cells[2:] if first.is_comparable(arms[row[0]].first) else ["-", "-"])]
        note = f"A variant differs from {base} in what is named, as both were trained; differences are paired by seed."
        if any(len(arm.runs) == 1 for arm in arms.values()):
            note += " A single seed has no interval: the difference may be chance."
        note += missing([name for name in others if name not in arms], _distill(runs))
        tables.append(Table(f"Variants of {base}", columns, rows, note))
    return tables


def _distill(runs: FinishedRuns) -> str:
    return f"pipeline distill --student {{}} --recipe {runs.recipe.name}"


def others_table(runs: FinishedRuns) -> Table | None:
    """Return the runs of data/runs that differ from the recipe's, one row for all seeds of a setting; None without any.

    Each row is compared with the recipe's runs of the same model, by test accuracy at the best epoch.
    """
    models = {(run.kind, run.name) for run in runs.others.values()}
    rows, recipes = [], {model: runs.seeds(*model) for model in models}
    equal = [run for model in models for run in runs.equal(*model)]
    shown = [run for run in runs.others.values() if run not in equal]
    for group in map(one_for_each_seed, pools(sorted(shown, key=lambda run: run.seed))):
        run, of_recipe = group[0], recipes[group[0].kind, group[0].name]
        reference = of_recipe[0] if of_recipe else None
        best, last, test = ([one.metrics[key]["top1"] for one in group] for key in ("best", "last", "test"))
        usual = [one.metrics["test"]["top1"] for one in of_recipe]
        change = fmean(test) - fmean(usual) if reference and reference.is_comparable(run) else None
        rows.append([
            run.name,
            _differs(reference, run),
            " ".join(str(one.seed) for one in group),
            str(run.metrics["epochs"]),
            *map(spread, (best, last, test)),
            spread(usual) if usual else NOT_RUN,
            "-" if change is None else difference(change, 0.0),
        ])  # fmt: skip
    if not rows:
        return None
    split = evaluated_on(shown)
    deciding = [f"best {split} top-1 %", f"last {split} top-1 %"]
    columns = ["model", "differs in", "seeds", "epochs", *deciding, "test top-1 %"]
    columns += ["the recipe's test top-1 %", "difference"]
    note = "Seeds share a row where all else is equal. Compared by test accuracy at the best epoch."
    return Table(f"Other runs on {runs.recipe.name}", columns, rows, note, ("epochs", *reversed(deciding)))


def _differs(reference: FinishedRun | None, run: FinishedRun) -> str:
    """Say in what a run differs from the recipe's, as both were trained; else what its command gave."""
    if reference and reference.description and run.description:
        return why_apart(reference, run)
    given = ", ".join(f"{key} {value}" for key, value in run.differs.items())
    return given if run.description else f"{given or 'unknown'} ({NOT_DESCRIBED})"
