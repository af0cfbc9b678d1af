"""Comparisons of finished runs, paired by seed.

Two questions are asked about every student, each at an equal budget: does the teacher's label help, and how does the
number of views matter? Two more tables compare a recipe's students that are variants of one another, and all other
runs of data/runs with the recipe's.
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
"""The setting in which the runs of a question differ."""
LABELS = ("none", "cached", "online")
NEED_A_TEACHER = ("soft", "confidence")
"""Settings that have no effect without a teacher."""
TOP1 = {"last": "last epoch", "best": "best epoch", "test": "best epoch, on test"}
"""Parts of metrics.json whose top-1 is compared, and their names for people."""
SCORES = {
    **{score: f"top-1 %, {name}" for score, name in TOP1.items()},
    "last_train_loss": "train loss, last epoch",
    "agreement": "agreement on test %",
}
MAX_MARKED_SEEDS = 7  # of more no single seed is drawn
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
            return {seed: run.metrics["test"]["agreement"] for seed, run in self.runs.items()}
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
        settings: The settings in which all runs differ from the recipe.
        arms: The reference first: that without labels, or that with the fewest views.
        left_out: Runs of the same settings with another budget or teacher, or with a seed that was counted already.
    """

    question: str
    settings: Mapping[str, str]
    arms: Sequence[Arm]
    left_out: int

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
        return ", ".join([self.runs[0].name, *(f"{key} {value}" for key, value in self.settings.items())])

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

    def name(self, arm: Arm) -> str:
        """Return an arm's name among the others."""
        if self.question == "labels":
            return arm.labels
        is_the_recipes = all("num_views" not in run.differs for run in arm.runs.values())
        name = f"{arm.views} (the recipe's)" if is_the_recipes else str(arm.views)
        return f"{name}, no teacher" if arm in self.controls else name


# Which runs are compared


def find_comparisons(runs: FinishedRuns) -> list[Comparison]:
    """Return what a recipe's students answer: first about labels, then about views."""
    students = [run for run in (*runs.students.values(), *runs.others.values()) if run.kind == "student"]
    students = [run for run in students if run.labels in LABELS]
    names = dict.fromkeys([*runs.recipe.students, *(run.name for run in students)])
    by_name = [[run for run in students if run.name == name] for name in names]
    return [answer for question in QUESTIONS for group in by_name for answer in _answers(question, group)]


def _answers(question: str, runs: Sequence[FinishedRun]) -> list[Comparison]:
    """Compare one student's runs, once for each set of settings that they share.

    Runs without a teacher are controls of those with one; those that are not have their numbers of views compared too.
    """
    untaught = [run for run in runs if run.labels == "none"]
    if question == "labels":
        return _compare(question, [run for run in runs if run.metrics["distilled"]], untaught)
    answers = _compare(question, [run for run in runs if run.labels != "none"], untaught)
    shown = {id(run) for answer in answers for run in answer.runs}
    return answers + _compare(question, [run for run in untaught if id(run) not in shown], [])


def _compare(question: str, runs: Sequence[FinishedRun], untaught: Sequence[FinishedRun]) -> list[Comparison]:
    """Compare runs that differ in the question's setting alone, at the budget that most arms and runs have."""
    varied = VARIED[question]
    ignored = ("labels", varied, *NEED_A_TEACHER)

    def budget(run: FinishedRun) -> tuple[Any, ...]:
        return (*run.budget, run.views if question == "labels" else None)

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


def _known(values: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if value is not None}


def _without(settings: Mapping[str, str], *names: str) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key not in names}


def _grouped(runs: Iterable[FinishedRun], key: Callable[[FinishedRun], Any]) -> list[list[FinishedRun]]:
    """Group runs by a key, a JSON value, in the order in which the keys first appear."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(key(run), sort_keys=True), []).append(run)
    return list(groups.values())


def _arms(runs: Iterable[FinishedRun]) -> list[Arm]:
    """Group runs into arms, sorted by labels, then by views."""
    arms = [Arm.of(group) for group in _grouped(runs, lambda run: (run.labels, run.views))]
    return sorted(arms, key=lambda arm: (LABELS.index(arm.labels), arm.views or 0))


def _num_runs(arms: Sequence[Arm]) -> int:
    return sum(len(arm.runs) for arm in arms)


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
            "settings": dict(comparison.settings),
            "budget": {key: first.metrics[key] for key in BUDGET},
            "teacher": comparison.taught[0].first.metrics["teacher"],
            "left_out": comparison.left_out,
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
        [comparison.name(arm), SCORES[score], " ".join(map(str, arm.runs)), *_cells(arm, reference, score)]
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
    data = Table(title, ["views", "labels", "seed", *(SCORES[score] for score in shown)], rows)
    name = "-".join([comparison.question, student, *(f"{key}-{value}" for key, value in comparison.settings.items())])
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
    """Return the note below the table: differences, intervals, what was left out, conditions."""
    controls = comparison.controls
    if comparison.question == "labels":
        parts = [_change(comparison, arm, f"{arm.labels.capitalize()} minus none") for arm in comparison.taught]
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
    metrics = comparison.runs[0].metrics
    parts.append(
        f"Equal budget: the same epochs, batch, images and parameters, {metrics['optimizer']} at {metrics['lr']:g}."
    )
    if comparison.left_out:
        runs = "1 run is" if comparison.left_out == 1 else f"{comparison.left_out} runs are"
        parts.append(f"{runs} left out: another budget or teacher, or a seed that is counted already.")
    return " ".join([*parts, conditions(comparison.runs)])


def _change(comparison: Comparison, arm: Arm, what: str) -> str:
    """Say whether an arm's top-1 differs from the reference's by more than the seeds scatter."""
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
    """Return by student its variants, the recipe's later students of the same model, with what differs in each."""
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
    """Return the runs of data/runs that differ from the recipe, one row for all seeds of a setting; None without any.

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
