"""The paper's tables, and Figure 5 as a table: the paper's value beside each of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

from pipeline.config.recipes import Recipe
from pipeline.report import paper
from pipeline.report.tables import Table, difference, number, spread
from stages.distill import student_recipe
from stages.reports.conditions import (
    MIXINGS,
    NOT_RUN,
    conditions,
    device_of,
    evaluated_on,
    is_held_out,
    left_out,
    missing,
    outdated,
    protocol,
)  # fmt: skip
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
        epochs = self.runs[0].metrics["epochs"]
        return [f"{self.name}{self.mark}", *cells, f"{best} of {epochs}" if epochs else "not trained"]


def _score_table(title: str, heading: str, models: Sequence[Model], columns: Sequence[Column], note: str) -> Table:
    """Return a table with a row for each model, whether it has been run or not."""
    optional = [heading for column in reversed(columns) if column.optional for heading in reversed(column.headings)]
    headings = [heading, *(heading for column in columns for heading in column.headings), "best epoch"]
    return Table(title, headings, [model.cells(columns) for model in models], note, optional)


def settings_table(recipe: Recipe, num_classes: int | None) -> Table:
    """Return Table 1 of a recipe's students, with their parameters.

    Args:
        recipe: The recipe.
        num_classes: Of its data; None where it is not known. Beside the paper's figures its 100 classes count.
    """
    is_papers = recipe.dataset.source in paper.TABLES
    classes = NUM_CLASSES if is_papers else num_classes
    columns = ["student", "image size", "patch dimension", "pixel dimension", "patch size", "pixel size", "depth"]
    columns += ["parameters, M"]
    note = f"Sizes in pixels. Parameters at {classes} classes." if classes else "Sizes in pixels."
    title = "Settings and parameters of the students"
    if is_papers:
        columns += ["paper: Table 1", "Table 1: difference", "paper: Table 3", "Table 3: difference"]
        title = f"Table 1. {title}"
        note = f"Sizes in pixels; where the paper's setting differs, it follows in brackets. Parameters at {classes} "
        note += "classes, as the paper counts them. Its Tables 1 and 3 disagree on ViT and DeiT; ours follow Table 3."
    rows = [_settings_row(recipe, name, classes, is_papers=is_papers) for name in recipe.students]
    optional = ("image size", "depth", "Table 1: difference", "paper: Table 1", "pixel size", "pixel dimension")
    return Table(title, columns, rows, note, optional)


def _settings_row(recipe: Recipe, name: str, num_classes: int | None, *, is_papers: bool) -> list[str]:
    from pipeline.inference.loading import build_unfilled
    from pipeline.models.counting import num_parameters
    from pipeline.models.students import STUDENTS, is_foreign

    student, image_size = student_recipe(recipe, name, {}), recipe.dataset.image_size
    reported = paper.SETTINGS.get(name) if is_papers else None
    cells = [name]
    for key in SETTINGS:
        ours, theirs = image_size if key == "image_size" else getattr(student, key), getattr(reported, key, None)
        has_none = is_foreign(student.model) or ("pixel" in key and not STUDENTS[student.model].has_pixels)
        if key != "image_size" and has_none:
            cells.append("-")
        else:
            cells.append(str(ours) if theirs in (None, ours) else f"{ours} ({theirs})")
    if num_classes is None:
        return [*cells, "-"]
    arguments = student_arguments(student, num_classes=num_classes, image_size=image_size)
    count = num_parameters(build_unfilled("student", student.model, arguments, own_code=(student.model,))) / 1e6
    if not is_papers:
        return [*cells, number(count)]
    table1 = reported.parameters if reported else None
    table3 = paper.COSTS[name].parameters if name in paper.COSTS else None
    counts = [cell for value in (table1, table3) for cell in (number(value), difference(count, value))]
    return [*cells, number(count), *counts]


def runs_table(runs: Sequence[FinishedRun]) -> Table:
    """Return how each run was trained: what `conditions` says of all of them, run by run."""
    columns = ["run", "seed", "epochs", "batch", "optimiser", "lr", "views", "teacher", "precision", "rules", "seconds"]
    columns += ["device", "commit", "date"]
    rows = []
    for run in runs:
        metrics, where = run.metrics, run.environment
        trained = [str(metrics[key]) for key in ("seed", "epochs", "batch_size", "optimizer")]
        learned = (run.taught_by if metrics["distilled"] else None) or "-"
        rows.append([
            ", ".join([run.name, *(f"{key} {value}" for key, value in run.differs.items())]),
            *trained,
            f"{metrics['lr']:g}",
            "-" if metrics["views"] is None else str(metrics["views"]),
            learned,
            metrics["precision"],
            str(metrics.get("rules", 1)),
            f"{where['seconds']:.0f}",
            device_of(where),
            where["commit"] or "unknown",
            where["date"][:10],
        ])  # fmt: skip
    optional = ("commit", "date", "device", "rules", "views", "optimiser")
    return Table("The runs as they were trained", columns, rows, optional=optional)


def teachers_table(recipe: Recipe, teachers: Mapping[str, Sequence[FinishedRun]], winner: str | None) -> Table:
    """Return Table 2: the candidates.

    Args:
        recipe: The recipe.
        teachers: By name a teacher's runs, one for each seed.
        winner: The selected teacher; None before `select`.
    """
    trained = [run for runs in teachers.values() for run in runs]
    source = recipe.dataset.source
    reported = paper.TEACHERS.get(source, {})
    columns = [*_accuracy(trained, reported), *_averages({}), *_costs(source)]
    models = []
    for name, runs in teachers.items():
        at_chance = any(run.metrics["at_chance"] for run in runs)
        models.append(Model(name, runs, " (selected)" if name == winner else " (at chance)" if at_chance else ""))
    note = protocol(source) if trained else "No teacher has been run."
    absent = [name for name, runs in teachers.items() if not runs]
    note += missing(absent, f"pipeline teacher {{}} --recipe {recipe.name}")
    title = numbered("Table 2", f"Teachers on {recipe.name}", source)
    return _score_table(title, "teacher", models, columns, note.strip())


def candidates_table(context: Context, comparison: Mapping[str, Any], outs: Mapping[str, Path] | None = None) -> Table:
    """Return Table 2 of the candidates that `select` has compared; `outs` is as there."""
    names = [candidate["name"] for candidate in comparison["candidates"]]
    runs = {name: FinishedRun.read((outs or {}).get(name, context.paths.teacher(name))) for name in names}
    by_name = {name: [run] if run else [] for name, run in runs.items()}
    return with_conditions(
        teachers_table(context.recipe, by_name, comparison["winner"]), [run for run in runs.values() if run]
    )


def with_conditions(table: Table, runs: Sequence[FinishedRun]) -> Table:
    """Return a table that stands alone, with the conditions of its runs in its note; a report has these once."""
    return replace(table, note=f"{table.note} {conditions(runs)}".strip()) if runs else table


def numbered(number_: str, title: str, source: str) -> str:
    """Put the paper's number before a title, where the paper has these data."""
    return f"{number_}. {title}" if source in paper.TABLES else title


def all_teachers(runs: FinishedRuns) -> Table:
    """Return Table 2 of every teacher that the recipe has."""
    table = teachers_table(
        runs.recipe, {name: runs.seeds("teacher", name) for name in runs.recipe.teachers}, runs.winner
    )
    note = table.note + outdated(runs, runs.teachers.values()) + _apart(runs, "teacher", runs.recipe.teachers)
    return replace(table, note=note.strip())


def _apart(runs: FinishedRuns, kind: str, names: Iterable[str]) -> str:
    """Say which seeds of the recipe's models are not counted with the others, and why."""
    return "".join(left_out(runs.reference(kind, name), runs.apart(kind, name)) for name in names)


def students_tables(runs: FinishedRuns) -> list[Table]:
    """Return Table 3, 4 or 5 in two: scores of teacher and students, then their heads, agreement and costs."""
    recipe, source = runs.recipe, runs.recipe.dataset.source
    models = _with_teachers(runs)
    trained = [run for model in models for run in model.runs]
    reported = {**paper.TEACHERS.get(source, {}), **paper.STUDENTS.get(source, {})}
    absent = [name for name in recipe.students if not runs.seeds("student", name)]
    note = protocol(source) if trained else "Nothing has been run."
    note += outdated(runs, [model.runs[0] for model in models if model.runs])
    note += _apart(runs, "student", recipe.students)
    note += missing(absent, f"pipeline distill --student {{}} --recipe {recipe.name}")
    table = paper.TABLES.get(source, "")
    scores = [*_accuracy(trained, reported), *_averages(reported)]
    heads = [
        Column("class head %", _score("class_top1")),
        Column("distillation head %", _score("distillation_top1")),
        Column("agreement with the teacher %", _score("agreement")),
    ]
    costs = _costs(source, paper.COSTS if source == "cifar100" else {})
    more = "Heads and agreement on test, at the best epoch."
    more += (f" {GMACS}" if table else "") + (IMAGENETS_HEAD if source == "cifar100" else "")
    titles = [
        numbered(table, f"Teacher and students on {recipe.name}", source),
        numbered(f"{table}, continued", f"Heads, agreement and costs on {recipe.name}", source),
    ]
    return [
        _score_table(titles[0], "model", models, scores, note.strip()),
        _score_table(titles[1], "model", models, [*heads, *costs], more),
    ]


def _with_teachers(runs: FinishedRuns) -> list[Model]:
    """Return the selected teacher, the paper's where it is another, and the students."""
    names = [runs.winner] if runs.winner else []
    if runs.recipe.dataset.source in paper.TEACHERS and paper.TEACHER != runs.winner:
        names.append(paper.TEACHER)
    marks = {paper.TEACHER: " (the paper's teacher)"} | {runs.winner or "": " (teacher)"}
    teachers = [Model(name, runs.seeds("teacher", name), marks[name]) for name in names]
    return teachers + [Model(name, runs.seeds("student", name)) for name in runs.recipe.students]


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


def _costs(source: str, given: Mapping[str, paper.Costs] = MappingProxyType({})) -> list[Column]:
    """Return parameters and FLOPs, on the paper's data also its GMACs; it gives its own for 100 classes alone."""
    gmacs = {name: costs.gmacs_1024 for name, costs in given.items()}
    parameters = {name: costs.parameters for name, costs in given.items()}
    papers = Column("paper GMACs, batch 1024", lambda run: run["paper_gmacs_1024"], gmacs, optional=True, varies=False)
    return [
        Column("parameters, M", lambda run: run["parameters"] / 1e6, parameters, optional=True, varies=False),
        *([papers] if source in paper.TABLES else []),
        Column("GFLOPs of one image", lambda run: run["flops_per_image"] / 1e9, None, 3, optional=True, varies=False),
    ]


def _reported(rows: Mapping[str, paper.Reported], key: str) -> dict[str, float]:
    """Return the paper's values of a column by model."""
    values = {name: getattr(row, key) for name, row in rows.items()}
    return {name: value for name, value in values.items() if value is not None}


def drops_table(runs: FinishedRuns) -> Table:
    """Return accuracy lost from teacher to student; on the paper's data its Table 6: ours, then the paper's."""
    from pipeline.models.students import STUDENTS

    recipe, source = runs.recipe, runs.recipe.dataset.source
    is_papers = source in paper.TABLES

    def is_distilled(name: str) -> bool:
        model = student_recipe(recipe, name, {}).model
        if model in STUDENTS:
            return STUDENTS[model].has_distillation_head
        return any(
            run.metrics["distilled"] for run in runs.seeds("student", name)
        )  # a model that is not ours need not be tried

    distilled = [name for name in recipe.students if is_distilled(name)]
    columns = ["teacher", "student", "approach", "teacher top-1 %", "student top-1 %", "change"]
    columns += ["paper: change", "change: difference"] if is_papers else []
    columns += ["teacher's FLOPs, G", "teacher's parameters, M", "student's parameters, M"]
    rows = [_drop(runs, name, is_papers=is_papers) for name in distilled]
    note = f"{'Our rows: ' if is_papers else ''}{recipe.name}, test accuracy at the best epoch"
    if is_papers:
        rows += [_published_drop(transfer) for transfer in reversed(paper.TRANSFERS)]
        note += "; the teacher's FLOPs as the paper counts its: 10^9 multiply-accumulates of a batch of 1024. "
        note += "The paper's change is computed from its Tables 3 to 5 in our rows, and as printed in its rows, where "
        note += "those of ResNet56 and DeiT are not the differences of the printed accuracies. Table 4 gives the "
        note += "paper's TITN 92.03 %, Table 6 92.05 %."
    else:
        note += "; the teacher's FLOPs are of one image."
    if not any(run.metrics["distilled"] for name in distilled for run in runs.seeds("student", name)):
        note += " No distilled student has been run."
    optional = ("teacher's FLOPs, G", "student's parameters, M", "teacher's parameters, M", "approach")
    title = numbered("Table 6", f"Accuracy lost from teacher to student, {recipe.name}", source)
    return Table(title, columns, rows, note, optional)


def _drop(runs: FinishedRuns, name: str, *, is_papers: bool) -> list[str]:
    """Return the row of one of our students."""
    source = runs.recipe.dataset.source
    seeds = [run for run in runs.seeds("student", name) if run.metrics["distilled"]]
    teachers, students = paper.TEACHERS.get(source, {}), paper.STUDENTS.get(source, {})
    reported = students[name].top1 - teachers[paper.TEACHER].top1 if name in students else None
    if not seeds:
        papers = [number(reported), "-"] if is_papers else []
        return [runs.winner or "-", name, "-", NOT_RUN, NOT_RUN, NOT_RUN, *papers, "-", "-", "-"]
    known = seeds[0].teacher_top1
    teacher = {**seeds[0].metrics["teacher"], "top1": known[0] if known and known[1] == "test" else None}
    if found := runs.teacher_of(seeds[0]):  # else its costs and its accuracy on test are unknown
        teacher = {**found.metrics, "top1": found.metrics["test"]["top1"]}
    top1 = [run.metrics["test"]["top1"] for run in seeds]
    is_comparable = teacher["top1"] is not None and (found is None or found.is_comparable(seeds[0]))
    change = fmean(top1) - teacher["top1"] if is_comparable else None
    flops = teacher["flops_per_image"] / 1e9 if "flops_per_image" in teacher else None
    return [
        teacher["name"],
        name,
        _approach(seeds[0]),
        number(teacher["top1"]),
        spread(top1),
        "-" if change is None else f"{change:+.2f}",
        *([number(reported), "-" if change is None else difference(change, reported)] if is_papers else []),
        number(teacher.get("paper_gmacs_1024")) if is_papers else number(flops, 3),
        number(teacher["parameters"] / 1e6) if "parameters" in teacher else "-",
        number(seeds[0].metrics["parameters"] / 1e6),
    ]


def _approach(run: FinishedRun) -> str:
    """Say where the labels of a run came from, and how its images were mixed."""
    views = run.settings().get("inputs", {}).get("views")
    mixing = views.get("mixing") if isinstance(views, Mapping) else None
    return f"{run.labels} labels, {MIXINGS.get(str(mixing), mixing)}" if mixing else "-"


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
    columns = ["optimiser", "lr", "weight decay", f"best {split} top-1 %", "test top-1 %"]
    columns += ["paper: top-1 %", "difference"] if reported else []
    columns += [f"last {split} top-1 %", "top-5 %", "best epoch"]
    rows = []
    for optimizer, outcome in outcomes.items():
        value = reported.get(optimizer)
        if isinstance(outcome, str):
            cells = [f"{rates[optimizer]:g}" if optimizer in rates else "-", "-", outcome, "-"]
            papers, rest = [number(value), "-"], ["-", "-", "-"]
        else:
            best, last, test = (outcome.metrics[key] for key in ("best", "last", "test"))
            decay = "-" if outcome.weight_decay is None else f"{outcome.weight_decay:g}"
            cells = [f"{outcome.metrics['lr']:g}", decay, number(best["top1"]), number(test["top1"])]
            papers = [number(value), difference(test["top1"], value)]
            rest = [number(last["top1"]), number(test["top5"]), f"{best['epoch']} of {outcome.metrics['epochs']}"]
        rows.append([optimizer, *cells, *(papers if reported else []), *rest])
    note = "The paper's teacher is VGG16_bn; it gives no figure for Adam." if reported else ""
    title = numbered("Figure 5 in figures", f"{winner} by optimiser, {recipe.name}", recipe.dataset.source)
    return Table(title, columns, rows, note, ("top-5 %",))


def optimizer_runs(runs: FinishedRuns) -> dict[str, FinishedRun | str]:
    """Return the selected teacher's runs by optimiser, the paper's optimisers whether they were run or not.

    Of an optimiser's several rates the one with the best epoch counts, and of its seeds that of the selected teacher.
    """
    outcomes: dict[str, FinishedRun | str] = {name: NOT_RUN for name in paper.OPTIMIZERS}
    selected = runs.teachers.get(runs.winner or "")
    if selected is None:
        return outcomes
    for run in (run for rate in runs.sweep() for run in rate if run.seed == selected.seed):
        former = outcomes.get(run.metrics["optimizer"])
        if not isinstance(former, FinishedRun) or former.metrics["best"]["top1"] < run.metrics["best"]["top1"]:
            outcomes[run.metrics["optimizer"]] = run
    return outcomes | {selected.metrics["optimizer"]: selected}
