"""The paper's tables, and Figure 5 as a table: the paper's value beside each of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.config.recipes import Recipe, StudentRecipe
from pipeline.report import paper
from pipeline.report.tables import Table, difference, number, spread
from stages.distill import student_recipe
from stages.reports.conditions import NOT_RUN, conditions, evaluated_on, is_held_out, missing, outdated, protocol
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.shared.context import Context
from stages.shared.runs import student_arguments

SETTINGS = ("image_size", "width", "pixel_width", "patch_size", "pixel_size", "depth")  # Table 1's order
NUM_CLASSES = 100  # of the data set that the paper counts parameters on
GMACS = "Paper GMACs: 10^9 multiply-accumulates of a batch of 1024 by the paper's convention, its column GFLOPs."
IMAGENETS_HEAD = " The paper counts VGG16_bn with ImageNet's head for 1000 classes; ours has one for the classes here."


@dataclass(frozen=True)
class Column:
    """A column of values, one of every model.

    Attributes:
        heading: The heading, with the unit.
        value: Reads the value from a run's metrics.json; None where the run has none.
        reported: The paper's values by model; without any there are no columns of the paper's.
        digits: Digits after the point.
        optional: Whether a narrow terminal leaves the column out; the last such column goes first.
        varies: Whether the value depends on the seed.
    """

    heading: str
    value: Callable[[Mapping[str, Any]], float | None]
    reported: Mapping[str, float] | None = None
    digits: int = 2
    optional: bool = False
    varies: bool = True

    @property
    def headings(self) -> list[str]:
        """The headings of our value, the paper's and the difference."""
        return [self.heading, *([f"paper: {self.heading}", f"{self.heading}: difference"] if self.reported else [])]

    def cells(self, name: str, runs: Sequence[FinishedRun]) -> list[str]:
        """Return a model's cells; dashes where it has not been run."""
        values = [self.value(run.metrics) for run in runs]
        cells = [spread(values if self.varies else values[:1], self.digits)]
        if self.reported:
            known = [value for value in values if value is not None]
            reported = self.reported.get(name)
            cells += [number(reported), difference(fmean(known), reported) if known else "-"]
        return cells


@dataclass(frozen=True)
class Model:
    """A row of a table.

    Attributes:
        name: In the recipe.
        runs: Its runs, one for each seed; none where it has not been run.
        mark: Text behind the name.
    """

    name: str
    runs: Sequence[FinishedRun]
    mark: str = ""

    def cells(self, columns: Sequence[Column]) -> list[str]:
        """Return the row: name, values, best epoch."""
        cells = [cell for column in columns for cell in column.cells(self.name, self.runs)]
        if not self.runs:
            return [f"{self.name}{self.mark}", NOT_RUN, *cells[1:], "-"]
        best = ", ".join(str(run.metrics["best"]["epoch"]) for run in self.runs)
        return [f"{self.name}{self.mark}", *cells, f"{best} of {self.runs[0].metrics['epochs']}"]


def _score_table(title: str, heading: str, models: Sequence[Model], columns: Sequence[Column], note: str) -> Table:
    """Return a table with a row for each model, whether it has been run or not."""
    optional = [heading for column in reversed(columns) if column.optional for heading in reversed(column.headings)]
    headings = [heading, *(heading for column in columns for heading in column.headings), "best epoch"]
    return Table(title, headings, [model.cells(columns) for model in models], note, optional)


def settings_table(recipe: Recipe) -> Table:
    """Return Table 1 of a recipe's students, with their parameters at the paper's 100 classes."""
    columns = ["student", "image size", "patch dimension", "pixel dimension", "patch size", "pixel size", "depth"]
    columns += ["parameters, M", "paper: Table 1", "Table 1: difference", "paper: Table 3", "Table 3: difference"]
    rows = [_settings_row(recipe, name, student_recipe(recipe, name, {})) for name in recipe.students]
    note = f"Sizes in pixels; where the paper's setting differs, it follows in brackets. Parameters at {NUM_CLASSES} "
    note += "classes, as the paper counts them. Its Tables 1 and 3 disagree on ViT and DeiT; ours follow Table 3."
    optional = ("image size", "depth", "Table 1: difference", "paper: Table 1", "pixel size", "pixel dimension")
    return Table("Table 1. Settings and parameters of the students", columns, rows, note, optional)


def _settings_row(recipe: Recipe, name: str, student: StudentRecipe) -> list[str]:
    import torch

    from pipeline.models.counting import num_parameters
    from pipeline.models.students import STUDENTS, build_student

    image_size = recipe.dataset.image_size
    arguments = student_arguments(student, num_classes=NUM_CLASSES, image_size=image_size)
    with torch.device("meta"):
        count = num_parameters(build_student(student.model, **arguments)) / 1e6
    reported = paper.SETTINGS.get(name)
    cells = [name]
    for key in SETTINGS:
        ours, theirs = image_size if key == "image_size" else getattr(student, key), getattr(reported, key, None)
        if key in ("pixel_width", "pixel_size") and not STUDENTS[student.model].has_pixels:
            cells.append("-")
        else:
            cells.append(str(ours) if theirs in (None, ours) else f"{ours} ({theirs})")
    table1 = reported.parameters if reported else None
    table3 = paper.COSTS[name].parameters if name in paper.COSTS else None
    counts = [cell for value in (table1, table3) for cell in (number(value), difference(count, value))]
    return [*cells, number(count), *counts]


def teachers_table(recipe: Recipe, teachers: Mapping[str, Sequence[FinishedRun]], winner: str | None) -> Table:
    """Return Table 2: the candidates.

    Args:
        recipe: The recipe.
        teachers: By name a teacher's runs, one for each seed.
        winner: The selected teacher; None before `select`.
    """
    trained = [run for runs in teachers.values() for run in runs]
    reported = paper.TEACHERS.get(recipe.dataset.source, {})
    columns = [*_accuracy(trained, reported), *_averages({}), *_costs({})]  # Table 3 has the paper's
    models = []
    for name, runs in teachers.items():
        at_chance = any(run.metrics["at_chance"] for run in runs)
        models.append(Model(name, runs, " (selected)" if name == winner else " (at chance)" if at_chance else ""))
    note = conditions(trained) + protocol(recipe.dataset.source) if trained else "No teacher has been run."
    absent = [name for name, runs in teachers.items() if not runs]
    note += missing(absent, f"pipeline teacher {{}} --recipe {recipe.name}")
    return _score_table(f"Table 2. Teachers on {recipe.name}", "teacher", models, columns, note)


def candidates_table(context: Context, comparison: Mapping[str, Any], outs: Mapping[str, Path] | None = None) -> Table:
    """Return Table 2 of the candidates that `select` has compared; `outs` is as there."""
    names = [candidate["name"] for candidate in comparison["candidates"]]
    runs = {name: FinishedRun.read((outs or {}).get(name, context.paths.teacher(name))) for name in names}
    return teachers_table(
        context.recipe, {name: [run] if run else [] for name, run in runs.items()}, comparison["winner"]
    )


def all_teachers(runs: FinishedRuns) -> Table:
    """Return Table 2 of every teacher that the recipe has."""
    table = teachers_table(runs.recipe, {name: runs.seeds(name) for name in runs.recipe.teachers}, runs.winner)
    return replace(table, note=table.note + outdated(runs, runs.teachers))


def students_tables(runs: FinishedRuns) -> list[Table]:
    """Return Table 3, 4 or 5 in two: scores of teacher and students, then their heads, agreement and costs."""
    recipe, source = runs.recipe, runs.recipe.dataset.source
    models = _with_teachers(runs)
    trained = [run for model in models for run in model.runs]
    reported = {**paper.TEACHERS.get(source, {}), **paper.STUDENTS.get(source, {})}
    absent = [name for name in recipe.students if not runs.seeds(name)]
    note = conditions(trained) + protocol(source) if trained else "Nothing has been run."
    note += outdated(runs, [model.name for model in models])
    note += missing(absent, f"pipeline distill --student {{}} --recipe {recipe.name}")
    title = paper.TABLES.get(source, "Table 3")  # data that the paper lacks get the form of Table 3
    scores = [*_accuracy(trained, reported), *_averages(reported)]
    heads = [
        Column("class head %", _score("class_top1")),
        Column("distillation head %", _score("distillation_top1")),
        Column("agreement with the teacher %", _score("agreement")),
    ]
    return [
        _score_table(f"{title}. Teacher and students on {recipe.name}", "model", models, scores, note),
        _score_table(
            f"{title}, continued. Heads, agreement and costs on {recipe.name}",
            "model",
            models,
            [*heads, *_costs(paper.COSTS if source == "cifar100" else {})],
            f"Under the conditions of {title}; heads and agreement on test, at the best epoch. {GMACS}"
            + (IMAGENETS_HEAD if source == "cifar100" else ""),
        ),
    ]


def _with_teachers(runs: FinishedRuns) -> list[Model]:
    """Return the selected teacher, the paper's where it is another, and the students."""
    names = [runs.winner] if runs.winner else []
    if runs.recipe.dataset.source in paper.TEACHERS and paper.TEACHER != runs.winner:
        names.append(paper.TEACHER)
    marks = {paper.TEACHER: " (the paper's teacher)"} | {runs.winner or "": " (teacher)"}
    teachers = [Model(name, runs.seeds(name), marks[name]) for name in names]
    return teachers + [Model(name, runs.seeds(name)) for name in runs.recipe.students]


def _accuracy(runs: Sequence[FinishedRun], reported: Mapping[str, paper.Reported]) -> list[Column]:
    """Return top-1 of the best and the last epoch and top-5; the paper's stand beside the best epoch's on test."""
    top1, split = _reported(reported, "top1"), evaluated_on(runs)
    is_apart = is_held_out(runs)
    return [
        Column(f"best {split} top-1 %", _score("top1", "best"), None if is_apart else top1),
        *([Column("test top-1 %", _score("top1"), top1)] if is_apart else []),
        Column(f"last {split} top-1 %", _score("top1", "last")),
        Column("top-5 %", _score("top5"), _reported(reported, "top5"), optional=True),
    ]


def _averages(reported: Mapping[str, paper.Reported]) -> list[Column]:
    """Return macro precision, recall and F1 on test."""
    return [
        Column(heading, _score(key), _reported(reported, key), 3, optional=True)
        for key, heading in (("precision", "precision"), ("recall", "recall"), ("f1", "F1"))
    ]


def _score(key: str, epoch: str = "test") -> Callable[[Mapping[str, Any]], float | None]:
    """Return a reader of metrics.json: a score of the `best` or `last` epoch, or of the best one on `test`."""
    return lambda metrics: metrics[epoch][key]


def _costs(given: Mapping[str, paper.Costs]) -> list[Column]:
    """Return parameters, the paper's GMACs and true FLOPs; the paper gives its own for 100 classes alone."""
    gmacs = {name: costs.gmacs_1024 for name, costs in given.items()}
    parameters = {name: costs.parameters for name, costs in given.items()}
    return [
        Column("parameters, M", lambda run: run["parameters"] / 1e6, parameters, optional=True, varies=False),
        Column("paper GMACs, batch 1024", lambda run: run["paper_gmacs_1024"], gmacs, optional=True, varies=False),
        Column("GFLOPs of one image", lambda run: run["flops_per_image"] / 1e9, None, 3, optional=True, varies=False),
    ]


def _reported(rows: Mapping[str, paper.Reported], key: str) -> dict[str, float]:
    """Return the paper's values of a column by model."""
    values = {name: getattr(row, key) for name, row in rows.items()}
    return {name: value for name, value in values.items() if value is not None}


def drops_table(runs: FinishedRuns) -> Table:
    """Return Table 6, accuracy lost from teacher to student: ours with a distillation head, then the paper's."""
    from pipeline.models.students import STUDENTS

    recipe = runs.recipe
    models = {name: student_recipe(recipe, name, {}).model for name in recipe.students}
    distilled = [name for name, model in models.items() if STUDENTS[model].has_distillation_head]
    rows = [_drop(runs, name) for name in distilled]
    rows += [_published_drop(transfer) for transfer in reversed(paper.TRANSFERS)]
    columns = ["teacher", "student", "approach", "teacher top-1 %", "student top-1 %", "change", "paper: change"]
    columns += ["change: difference", "teacher's FLOPs, G", "teacher's parameters, M", "student's parameters, M"]
    trained = [run for name in distilled for run in runs.seeds(name)]
    note = f"Our rows: {recipe.name}, test accuracy at the best epoch; the teacher's FLOPs as the paper counts its: "
    note += "10^9 multiply-accumulates of a batch of 1024. "
    note += conditions(trained) if trained else "No distilled student has been run."
    note += " The paper's change is computed from its Tables 3 to 5 in our rows, and as printed in its rows, where "
    note += "those of ResNet56 and DeiT are not the differences of the printed accuracies. Table 4 gives the paper's "
    note += "TITN 92.03 %, Table 6 92.05 %."
    optional = ("teacher's FLOPs, G", "student's parameters, M", "teacher's parameters, M", "approach")
    return Table(f"Table 6. Accuracy lost from teacher to student, {recipe.name}", columns, rows, note, optional)


def _drop(runs: FinishedRuns, name: str) -> list[str]:
    """Return the row of one of our students."""
    source, seeds = runs.recipe.dataset.source, [run for run in runs.seeds(name) if run.metrics["distilled"]]
    teachers, students = paper.TEACHERS.get(source, {}), paper.STUDENTS.get(source, {})
    reported = students[name].top1 - teachers[paper.TEACHER].top1 if name in students else None
    approach = f"cached labels, {runs.recipe.views[runs.recipe.students[name].views].mixing}"
    if not seeds:
        return [runs.winner or "-", name, approach, NOT_RUN, NOT_RUN, NOT_RUN, number(reported), "-", "-", "-", "-"]
    teacher, known = dict(seeds[0].metrics["teacher"]), seeds[0].teacher_top1
    before = known[0] if known and known[1] == "test" else None  # else it was measured on val alone
    if teacher["name"] in runs.teachers:  # else its costs are unknown
        teacher = dict(runs.teachers[teacher["name"]].metrics)
        before = teacher["test"]["top1"]
    top1 = [run.metrics["test"]["top1"] for run in seeds]
    change = None if before is None else fmean(top1) - before
    return [
        teacher["name"],
        name,
        approach,
        number(before),
        spread(top1),
        "-" if change is None else f"{change:+.2f}",
        number(reported),
        "-" if change is None else difference(change, reported),
        number(teacher.get("paper_gmacs_1024")),
        number(teacher["parameters"] / 1e6) if "parameters" in teacher else "-",
        number(seeds[0].metrics["parameters"] / 1e6),
    ]


def _published_drop(row: paper.Transfer) -> list[str]:
    change = f"{row.after - row.before:+.2f}"
    costs = (f"{row.flops:g}", f"{row.teacher_parameters:g}", f"{row.student_parameters:g}")
    accuracies = (number(row.before), number(row.after), change, f"{row.change:+.2f}", "-")
    return [row.teacher, row.student, row.approach, *accuracies, *costs]


def optimizers_table(
    recipe: Recipe, winner: str, outcomes: Mapping[str, FinishedRun | str], rates: Mapping[str, float]
) -> Table:
    """Return Figure 5 as a table: the selected teacher by optimiser.

    Args:
        recipe: The recipe.
        winner: The selected teacher.
        outcomes: By optimiser its run, or a word that says why there is none.
        rates: By optimiser the learning rate, for those that have no run.
    """
    reported = paper.OPTIMIZERS if recipe.dataset.source == "cifar100" else {}
    trained = [outcome for outcome in outcomes.values() if isinstance(outcome, FinishedRun)]
    split = evaluated_on(trained)
    columns = ["optimiser", "lr", f"best {split} top-1 %", "test top-1 %"]
    columns += ["paper: top-1 %", "difference"] if reported else []
    columns += [f"last {split} top-1 %", "top-5 %", "best epoch"]
    rows = []
    for optimizer, outcome in outcomes.items():
        value = reported.get(optimizer)
        if isinstance(outcome, str):
            cells = [f"{rates[optimizer]:g}" if optimizer in rates else "-", outcome, "-"]
            papers, rest = [number(value), "-"], ["-", "-", "-"]
        else:
            best, last, test = (outcome.metrics[key] for key in ("best", "last", "test"))
            cells = [f"{outcome.metrics['lr']:g}", number(best["top1"]), number(test["top1"])]
            papers = [number(value), difference(test["top1"], value)]
            rest = [number(last["top1"]), number(test["top5"]), f"{best['epoch']} of {outcome.metrics['epochs']}"]
        rows.append([optimizer, *cells, *(papers if reported else []), *rest])
    note = f"{conditions(trained)} " if trained else ""
    note += "The paper's teacher is VGG16_bn; it gives no figure for Adam."
    return Table(f"Figure 5 in figures. {winner} by optimiser, {recipe.name}", columns, rows, note, ("top-5 %",))


def optimizer_runs(runs: FinishedRuns) -> dict[str, FinishedRun | str]:
    """Return the selected teacher's runs by optimiser, the paper's optimisers whether they were run or not.

    Of an optimiser's several rates the one with the best epoch counts.
    """
    selected = runs.teachers.get(runs.winner or "")
    outcomes: dict[str, FinishedRun | str] = {name: NOT_RUN for name in paper.OPTIMIZERS}
    if selected is None:
        return outcomes
    for run in runs.others.values():
        optimizer = run.differs.get("optimizer")
        is_sweep = run.name == selected.name and set(run.differs) <= {"optimizer", "lr"} and run.seed == selected.seed
        if optimizer and is_sweep:
            former = outcomes.get(optimizer)
            if not isinstance(former, FinishedRun) or former.metrics["best"]["top1"] < run.metrics["best"]["top1"]:
                outcomes[optimizer] = run
    return outcomes | {selected.metrics["optimizer"]: selected}
