"""The paper's Tables 2 to 6 from what has been run, its figure beside each of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.config.recipes import Recipe
from pipeline.report import paper
from pipeline.report.tables import Table, difference, number, spread
from stages.reports.conditions import conditions, is_held_out, missing, outdated, protocol
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.reports.scores import NOT_RUN, Column, Model, score_table
from stages.shared.context import Context

PAPERS_TEACHER, PAPERS_TRANSFER = "vgg16_bn", paper.TRANSFERS[-1]
GMACS = "Paper GMACs: 10^9 multiply-accumulates of a batch of 1024 by the paper's convention, its column GFLOPs."
IMAGENETS_HEAD = " The paper counts VGG16_bn with ImageNet's head for 1000 classes; ours has one for the classes here."


def teachers_table(recipe: Recipe, teachers: Mapping[str, Sequence[FinishedRun]], winner: str | None) -> Table:
    """Return Table 2: the candidates.

    Args:
        recipe: Theirs.
        teachers: Name, then its runs by seed; none where it has not been run.
        winner: The selected one; None before `select`.
    """
    trained = [run for runs in teachers.values() for run in runs]
    reported = paper.TEACHERS.get(recipe.dataset.source, {})
    columns = [*_accuracy(trained, reported), *_averages({}), *_costs({})]  # Table 3 has the paper's
    models = [Model(name, runs, _mark(runs, selected=name == winner)) for name, runs in teachers.items()]
    note = conditions(trained) + protocol(recipe.dataset.source) if trained else "No teacher has been run."
    note += missing(
        [name for name, runs in teachers.items() if not runs], f"pipeline teacher {{}} --recipe {recipe.name}"
    )
    return score_table(f"Table 2. Teachers on {recipe.name}", "teacher", models, columns, note)


def candidates_table(context: Context, comparison: Mapping[str, Any]) -> Table:
    """Return Table 2 of the candidates that `select` has compared."""
    paths, names = context.paths, [candidate["name"] for candidate in comparison["candidates"]]
    found = {name: FinishedRun.read(paths.teacher(name)) for name in names}
    return teachers_table(
        context.recipe, {name: [run] if run else [] for name, run in found.items()}, comparison["winner"]
    )


def _mark(runs: Sequence[FinishedRun], *, selected: bool) -> str:
    at_chance = any(run.metrics["at_chance"] for run in runs)
    return " (selected)" if selected else " (at chance)" if at_chance else ""


def all_teachers(runs: FinishedRuns) -> Table:
    """Return Table 2 of every teacher that the recipe has."""
    table = teachers_table(runs.recipe, {name: runs.seeds(name) for name in runs.recipe.teachers}, runs.winner)
    return _noted(table, outdated(runs, runs.teachers))


def students_title(recipe: Recipe) -> str:
    """Return Table 3, 4 or 5 by the data set; data that the paper has not get Table 3's form."""
    return paper.TABLES.get(recipe.dataset.source, "Table 3")


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
    title = students_title(recipe)
    scores = [*_accuracy(trained, reported), *_averages(reported)]
    heads = [
        Column("class head %", _score("class_top1")),
        Column("distillation head %", _score("distillation_top1")),
        Column("agreement with the teacher %", _score("agreement")),
    ]
    return [
        score_table(f"{title}. Teacher and students on {recipe.name}", "model", models, scores, note),
        score_table(
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
    if runs.recipe.dataset.source in paper.TEACHERS and PAPERS_TEACHER != runs.winner:
        names.append(PAPERS_TEACHER)
    marks = {PAPERS_TEACHER: " (the paper's teacher)"} | {runs.winner or "": " (teacher)"}
    teachers = [Model(name, runs.seeds(name), marks[name]) for name in names]
    return teachers + [Model(name, runs.seeds(name)) for name in runs.recipe.students]


def _accuracy(runs: Iterable[FinishedRun], reported: Mapping[str, paper.Reported]) -> list[Column]:
    """Return top-1 of the best and the last epoch and top-5; the paper's stands beside the best epoch's on test."""
    top1, top5 = _reported(reported, lambda row: row.top1), _reported(reported, lambda row: row.top5)
    last = Column("last top-1 %", _score("top1", "last"))
    test5 = Column("top-5 %", _score("top5"), top5, optional=True)
    if not is_held_out(runs):
        return [Column("best top-1 %", _score("top1", "best"), top1), last, test5]
    best = Column("best top-1 %", _score("top1", "best"))
    return [best, Column("test top-1 %", _score("top1"), top1), last, test5]


def _averages(reported: Mapping[str, paper.Reported]) -> list[Column]:
    """Return macro precision, recall and F1 on test."""
    return [
        Column("precision", _score("precision"), _reported(reported, lambda row: row.precision), 3, optional=True),
        Column("recall", _score("recall"), _reported(reported, lambda row: row.recall), 3, optional=True),
        Column("F1", _score("f1"), _reported(reported, lambda row: row.f1), 3, optional=True),
    ]


def _score(key: str, epoch: str = "test") -> Callable[[Mapping[str, Any]], float | None]:
    """Return what reads a score of the `best` or `last` epoch, or of the best one on `test`, in metrics.json."""

    def score(metrics: Mapping[str, Any]) -> float | None:
        value: float | None = metrics[epoch][key]
        return value

    return score


def _costs(given: Mapping[str, paper.Costs]) -> list[Column]:
    """Return the parameters, the paper's GMACs and true FLOPs; the paper gives its own for 100 classes alone."""
    gmacs = {name: costs.gmacs_1024 for name, costs in given.items()}
    parameters = {name: costs.parameters for name, costs in given.items()}
    return [
        Column("parameters, M", lambda run: run["parameters"] / 1e6, parameters, optional=True, varies=False),
        Column("paper GMACs, batch 1024", lambda run: run["paper_gmacs_1024"], gmacs, optional=True, varies=False),
        Column("GFLOPs of one image", lambda run: run["flops_per_image"] / 1e9, None, 3, optional=True, varies=False),
    ]


def _reported(
    rows: Mapping[str, paper.Reported], figure: Callable[[paper.Reported], float | None]
) -> Mapping[str, float]:
    found = {name: figure(row) for name, row in rows.items()}
    return {name: value for name, value in found.items() if value is not None}


def _noted(table: Table, more: str) -> Table:
    return Table(table.title, table.columns, table.rows, table.note + more, table.optional)


def drops_table(runs: FinishedRuns, distilled: Sequence[str]) -> Table:
    """Return Table 6: accuracy lost from teacher to student, ours before the paper's and the eight published pairs.

    Args:
        runs: What has been run.
        distilled: The recipe's students that have a distillation head.
    """
    recipe = runs.recipe
    rows = [_own_drop(runs, name) for name in distilled]
    rows += [_published_drop(transfer) for transfer in reversed(paper.TRANSFERS)]
    columns = ["teacher", "student", "approach", "teacher top-1 %", "student top-1 %", "change", "paper: change"]
    columns += ["change: difference", "teacher's FLOPs, G", "teacher's parameters, M", "student's parameters, M"]
    own = [run for name in distilled for run in runs.seeds(name)]
    note = f"Ours on {recipe.name}, test accuracy at the best epoch, teacher's FLOPs as the paper counts its own: "
    note += "10^9 multiply-accumulates of a batch of 1024. "
    note += conditions(own) if own else "No distilled student has been run."
    note += " The paper's change beside ours follows from its Tables 3 to 5; in its own rows it is the printed one, "
    note += "which for ResNet56 and DeiT is not the difference of the printed accuracies. Table 4 gives the paper's "
    note += "TITN 92.03 %, Table 6 92.05 %."
    return Table(
        f"Table 6. Accuracy lost from teacher to student, {recipe.name}",
        columns,
        rows,
        note,
        ("teacher's FLOPs, G", "student's parameters, M", "teacher's parameters, M", "approach"),
    )


def _own_drop(runs: FinishedRuns, name: str) -> list[str]:
    """Return a row of ours."""
    source, seeds = runs.recipe.dataset.source, [run for run in runs.seeds(name) if run.metrics["distilled"]]
    teachers, students = paper.TEACHERS.get(source, {}), paper.STUDENTS.get(source, {})
    reported = students[name].top1 - teachers[PAPERS_TEACHER].top1 if name in students else None
    approach = f"cached labels, {runs.recipe.views[runs.recipe.students[name].views].mixing}"
    if not seeds:
        return [runs.winner or "-", name, approach, NOT_RUN, NOT_RUN, NOT_RUN, number(reported), "-", "-", "-", "-"]
    teacher = _teacher_of(runs, seeds[0])
    drops = [run.metrics["test"]["top1"] - teacher["top1"] for run in seeds]
    mean = sum(drops) / len(drops)
    return [
        teacher["name"],
        name,
        approach,
        number(teacher["top1"]),
        spread([run.metrics["test"]["top1"] for run in seeds]),
        f"{mean:+.2f}",
        number(reported),
        difference(mean, reported),
        number(teacher.get("paper_gmacs_1024")),
        number(teacher["parameters"] / 1e6) if "parameters" in teacher else "-",
        number(seeds[0].metrics["parameters"] / 1e6),
    ]


def _teacher_of(runs: FinishedRuns, student: FinishedRun) -> dict[str, Any]:
    """Return name, test top-1 and, where it was trained here, the costs of the teacher that a student learned from."""
    named: dict[str, Any] = dict(student.metrics["teacher"])
    own = runs.teachers.get(named["name"])
    if own is None:
        return named
    return {**own.metrics, "top1": own.metrics["test"]["top1"]}


def _published_drop(row: paper.Transfer) -> list[str]:
    change = f"{row.after - row.before:+.2f}"
    costs = (f"{row.flops:g}", f"{row.teacher_parameters:g}", f"{row.student_parameters:g}")
    accuracies = (number(row.before), number(row.after), change, f"{row.change:+.2f}", "-")
    return [row.teacher, row.student, row.approach, *accuracies, *costs]
