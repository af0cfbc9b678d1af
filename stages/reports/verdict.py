"""What a report opens with: the best student beside its teacher, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from pipeline.report import paper
from pipeline.report.figures import Cell, sheet
from pipeline.report.page import Missing
from pipeline.report.tables import Figure, Table, difference, number, spread
from pipeline.system.neighbours import load_average
from stages.reports.compare import Comparison
from stages.reports.conditions import conditions, copies
from stages.reports.pairs import interval_text
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.shared.context import Context
from stages.shared.params import own_code

TITLE = "Teacher and student side by side"
NUM_MISTAKES = 12
NUM_COLUMNS = 4
BATCH = 64
MOST_FLOPS = 2e10  # of a timed batch on a CPU, about a second
ROUNDS = 3
KINDS = ("teacher", "student")
NOT_THE_RECIPES = "No student's run follows the recipe, and no teacher is selected; what has been run is below"


def verdict_table(runs: FinishedRuns, speeds: Mapping[str, float], why_not: str) -> Table | Missing:
    """Return the best student beside its teacher: how good, and what they cost.

    Args:
        runs: The recipe's.
        speeds: Images a second of `teacher` and `student`, see `speeds_here`.
        why_not: Why there are none.
    """
    student = runs.best_student
    teacher = runs.teacher_beside(student)
    if student is None and teacher is None:
        recipe, first = runs.recipe.name, next(iter(runs.recipe.students))
        commands = (
            f"pipeline teacher-select --recipe {recipe}; then pipeline distill --recipe {recipe} --student {first}"
        )
        return Missing(TITLE, NOT_THE_RECIPES if runs.all else "no student trained, no teacher selected", commands)
    models = [teacher, student]
    seeds = [[teacher] if teacher else [], runs.seeds("student", student.name) if student else []]

    def ratio(values: Sequence[float | None]) -> str:
        return f"{values[1] / values[0]:.2f} times" if values[0] and values[1] is not None else "-"

    def row(what: str, values: Sequence[float | None], digits: int, *, scale: float = 1.0) -> list[str]:
        known = [None if value is None else value / scale for value in values]
        return [what, *(number(value, digits) for value in known), ratio(known)]

    def of_metrics(key: str) -> list[float | None]:
        return [float(model.metrics[key]) if model else None for model in models]

    top1 = [[run.metrics["test"]["top1"] for run in of_model] for of_model in seeds]
    change = "-"
    if teacher and student and teacher.is_comparable(student):
        change = f"{difference(fmean(top1[1]), fmean(top1[0]))} points"
    agreement = spread([run.metrics["test"]["agreement"] for run in seeds[1]])
    seconds = [[float(run.environment["seconds"]) for run in of_model] for of_model in seeds]
    times = ratio([fmean(of_model) if of_model else None for of_model in seconds])
    rows = [
        ["test top-1, %", *map(spread, top1), change],
        ["agreement with the teacher on test, %", "-", agreement, "-"],
        row("parameters, M", of_metrics("parameters"), 2, scale=1e6),
        row("FLOPs of one image, M", of_metrics("flops_per_image"), 1, scale=1e6),
        row("file of weights, MB", [_file_bytes(model) for model in models], 1, scale=1e6),
        row("images/s here", [speeds.get(kind) for kind in KINDS], 0),
        ["training, s", *(spread(of_model, 0) for of_model in seconds), times],
    ]
    columns = ["", *(f"{kind} {model.name if model else '-'}" for kind, model in zip(KINDS, models, strict=True))]
    shown = [*runs.teachers.values(), *(run for name in runs.recipe.students for run in runs.seeds("student", name))]
    note = f"{why_not} Conditions of this report: {conditions(shown)}{copies(runs.paths)}"
    return Table(TITLE, [*columns, "the student's"], rows, note.strip())


def _file_bytes(run: FinishedRun | None) -> float | None:
    """Return the size of a run's best weights; None where they are not here."""
    file = run.directory / "best.safetensors" if run else None
    return float(file.stat().st_size) if file is not None and file.is_file() else None


def speeds_here(context: Context, runs: FinishedRuns) -> tuple[dict[str, float], str]:
    """Time the best student and its teacher in turns, for a few seconds, where both have their weights here.

    Returns:
        Images a second of `teacher` and `student`, and a sentence on how they were measured, or why not.

    Raises:
        DataError: A checkpoint is damaged.
    """
    from pipeline.inference.loading import load
    from pipeline.inference.speed import measure_speed
    from pipeline.system.runtime import device_name

    student = runs.best_student
    found = zip(KINDS, (runs.teacher_beside(student), student), strict=True)
    models = {kind: model for kind, model in found if model is not None and _file_bytes(model)}
    if len(models) < 2:
        return {}, "images/s are left out: the weights of both are not here."
    most = max(float(model.metrics["flops_per_image"]) for model in models.values())
    size = BATCH if context.device.type != "cpu" else int(max(1, min(BATCH, MOST_FLOPS // max(most, 1.0))))
    loaded = {
        kind: load(model.directory, device=context.device_name, own_code=own_code(context.params))
        for kind, model in models.items()
    }
    before = load_average()
    measured = measure_speed(loaded, [size], rounds=ROUNDS)
    how = f"images/s: batches of {size}, in turns on {device_name(context.device)}, "
    how += f"{', '.join(dict.fromkeys(one.precision for one in loaded.values()))}, load {number(before, 1)} before; "
    return {speed.name: speed.images_per_second for speed in measured}, f"{how}pipeline bench measures longer."


def lead(runs: FinishedRuns, comparisons: Sequence[Comparison], *, tracked_only: bool) -> str:
    """Return the report's first paragraph: the verdict in words."""
    recipe, student = runs.recipe, runs.best_student
    teacher = runs.teacher_beside(student)
    parts = [f"Data: {_data(runs)}."]
    if teacher is not None:
        parts.append(f"Teacher: {teacher.name}, {number(teacher.metrics['test']['top1'])} % on test.")
    if student is not None:
        parts.append(f"Best student: {_scored(runs, student)} on test at its best epoch.")
        parts += [] if tracked_only else [_helped(runs, student, comparisons)]  # controls are in data/runs
    elif teacher is None:
        commands = f"pipeline teacher-select --recipe {recipe.name}, then pipeline distill --recipe {recipe.name}"
        state = f"{NOT_THE_RECIPES}. To run the recipe" if runs.all else "Nothing has been run yet"
        parts.append(f"{state}: {commands}.")
    if runs.left_out:
        parts.append(f"Left out, for other data are prepared now: {', '.join(runs.left_out)}.")
    if runs.recipe.dataset.source in paper.TABLES:
        parts.append("The paper is arXiv:2502.16762; a difference is our figure minus the paper's.")
    if tracked_only:
        parts.append("Runs in data/runs are left out: DVC does not track them. Without --tracked-only they are shown.")
    return " ".join(parts)


def _data(runs: FinishedRuns) -> str:
    """Name the data; one's own images by the number of their classes."""
    if runs.recipe.dataset.source != "folder":
        return runs.recipe.dataset.source
    return f"your images, {runs.num_classes} classes" if runs.num_classes else "your images"


def _scored(runs: FinishedRuns, run: FinishedRun) -> str:
    """Return a model with its top-1 on test, and of how many seeds it is."""
    seeds = runs.seeds(run.kind, run.name)
    of = f"seed {run.seed}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{run.name}, {spread([one.metrics['test']['top1'] for one in seeds]).partition(' (')[0]} % ({of})"


def _helped(runs: FinishedRuns, student: FinishedRun, comparisons: Sequence[Comparison]) -> str:
    """Say whether the teacher's label helped the best student, as far as controls tell."""
    if not student.metrics["distilled"]:
        return "It does not learn from the teacher."
    for comparison in comparisons:
        taught = [arm for arm in comparison.arms if student in arm.runs.values()]
        if comparison.question == "labels" and taught and comparison.controls:
            score = comparison.top1[-1] if comparison.top1[-1] == "test" else "best"
            minus = taught[0].minus(comparison.controls[0], score)
            if minus is not None:
                interval = f" (95 % interval {interval_text(minus.interval)})" if minus.interval else ""
                if not interval and (pair := comparison.pair(taught[0])):
                    interval = f" (95 % interval over test images {interval_text(pair.over_images)})"
                seeds = "1 seed" if minus.count == 1 else f"{minus.count} seeds"
                return f"The teacher's label changed its top-1 by {minus.mean:+.2f} points{interval}, {seeds}."
    command = f"pipeline distill --recipe {runs.recipe.name} --student {student.name} --labels none"
    return f"Whether the teacher's label helped it is not known without a control: {command}."


def worst_mistakes(context: Context, runs: FinishedRuns) -> list[Figure | Table]:
    """Show the test images that the best student is most confidently wrong on.

    Raises:
        DataError: Predictions or data are damaged.
    """
    from stages.reports.classes import Answers

    student = runs.best_student
    answers = Answers.read(student) if student else None
    if student is None or answers is None or not context.paths.is_prepared:
        return []
    dataset = context.dataset()
    if (student.meta or {}).get("dataset_sha256") != dataset.sha256 or len(answers.targets) != len(dataset.test):
        return []
    wrong = np.flatnonzero(answers.predictions != answers.targets)
    title = f"Worst mistakes of {student.name}"
    if not len(wrong):
        return [Table(title, ("", "test images"), [("wrong", "0"), ("right", str(len(answers.targets)))])]
    worst = wrong[np.argsort(-answers.probabilities[wrong], kind="stable")][:NUM_MISTAKES]
    cells, rows = [], []
    for index, image in zip(worst.tolist(), dataset.test.images[worst], strict=True):
        true, said = (answers.names[labels[index]] for labels in (answers.targets, answers.predictions))
        file = answers.paths[index] if answers.paths else f"#{index}"
        share = f"{100 * answers.probabilities[index]:.0f}"
        teacher = "-" if answers.teacher is None else answers.names[answers.teacher[index]]
        cells.append(Cell(image, [f"true: {true}", f"said: {said}, {share} %", file.rpartition("/")[2]]))
        rows.append([file, true, said, share, teacher])
    padded = [*cells, *[None] * (-len(cells) % NUM_COLUMNS)]
    png = sheet([padded[at : at + NUM_COLUMNS] for at in range(0, len(padded), NUM_COLUMNS)], [""] * NUM_COLUMNS)
    note = f"{answers.note}, {len(wrong)} of them wrong; these are the ones with the highest probability."
    note += "" if answers.paths else " # counts the test images of the prepared data."
    table = Table(title, ("image", "true", "predicted", "probability %", "teacher"), rows, note)
    alt = f"{len(worst)} test images, each with its true class, the predicted one and its probability."
    return [Figure("worst-mistakes", title, png, alt, "", table), table]
