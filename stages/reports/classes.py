"""Results by class on the test images: confusion, the worst classes, and agreement with the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.report.figures import DotRow, dots, heat_map
from pipeline.report.tables import Figure, Table, number
from pipeline.system.text import from_cell, to_cell
from pipeline.training.metrics import ClassScores, class_scores, worst_first
from stages.reports.runs import FinishedRun, FinishedRuns

MANY = 20  # classes; of more not all are shown
NUM_WORST = 15
NUM_SHOWN = 30


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's predictions on the test images.

    Attributes:
        run: The model.
        names: K class names.
        targets: `(N,)` int64.
        predictions: `(N,)` int64.
        teacher: `(N,)` int64, the teacher's labels of the same images; None where there are none.
        probabilities: `(N,)` float64 in [0, 1], the model's of its predictions.
        paths: N paths of the images' files as in predictions.csv; empty where the data do not know them.
    """

    run: FinishedRun
    names: tuple[str, ...]
    targets: NDArray[np.int64]
    predictions: NDArray[np.int64]
    teacher: NDArray[np.int64] | None
    probabilities: NDArray[np.float64]
    paths: Sequence[str]

    @classmethod
    def read(cls, run: FinishedRun) -> Answers | None:
        """Read a run's predictions; None where there are none.

        Raises:
            DataError: They are damaged.
        """
        rows = run.predictions()
        if not rows:
            return None
        path = run.directory / "predictions.csv"
        try:
            columns = {key: [row[key] for row in rows] for key in ("target", "prediction", "teacher")}
            probabilities = np.array([float(row["probability"]) for row in rows])
        except KeyError as error:
            raise DataError(f"{path}: no column {error.args[0]}; train the model again") from None
        except ValueError as error:
            raise DataError(f"{path}: a probability is no number ({error}); train the model again") from None
        names = (run.meta or {}).get("class_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            names = sorted(map(from_cell, {*columns["target"], *columns["prediction"], *columns["teacher"]} - {""}))
        index = {name: label for label, name in enumerate(names)}  # files of former versions escaped nothing
        index |= {to_cell(name): label for label, name in enumerate(names)}
        if not any(columns["teacher"]):
            del columns["teacher"]
        arrays = {}
        for key, values in columns.items():
            unknown = next((value for value in values if value not in index), None)
            if unknown is not None:
                raise DataError(f"{path}: {key} {unknown!r} is none of the model's classes; train the model again")
            arrays[key] = np.array([index[value] for value in values], dtype=np.int64)
        paths = [from_cell(row["path"]) for row in rows] if rows[0].get("path") else ()
        labels = (arrays["target"], arrays["prediction"], arrays.get("teacher"))
        return cls(run, tuple(names), *labels, probabilities, paths)

    @property
    def title(self) -> str:
        """The model's name, and whether it is a teacher."""
        return f"{self.run.name}{' (teacher)' if self.run.kind == 'teacher' else ''}"

    @property
    def note(self) -> str:
        """The run and the images of the predictions."""
        metrics = self.run.metrics
        epoch = f"epoch {metrics['test']['epoch']} of {metrics['epochs']}"
        return f"{self.title}, {epoch}, seed {self.run.seed}; {len(self.targets)} test images"

    def confusion(self) -> NDArray[np.int64]:
        """Count, `(K, K)`, row: target, column: prediction."""
        count = len(self.names)
        return np.bincount(self.targets * count + self.predictions, minlength=count**2).reshape(count, count)

    def scores(self) -> list[ClassScores]:
        """Score every class."""
        return class_scores(torch.from_numpy(self.targets), torch.from_numpy(self.predictions), self.names)


def by_class(runs: FinishedRuns) -> list[Figure | Table]:
    """Show confusion, worst classes and agreement of the best student and of its teacher.

    Raises:
        DataError: A run's predictions are damaged.
    """
    best = runs.best_student
    student = Answers.read(best) if best else None
    beside = runs.teacher_beside(best)
    teacher = Answers.read(beside) if beside else None
    shown: list[Figure | Table] = []
    for answers in (student, teacher):
        if answers is not None:
            shown += confusion(answers)
    if student is not None:
        shown.append(worst_classes(student, teacher))
        if student.teacher is not None:
            shown += agreement(student, student.teacher)
    return shown


def confusion(answers: Answers) -> list[Figure | Table]:
    """Draw a model's confusion matrix; of many classes, the most confused pairs stand in a table."""
    counts = answers.confusion()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    title = f"Confusion on test, {answers.title}"
    png = heat_map(
        shares,
        answers.names,
        x_label="prediction",
        y_label="target",
        bar_label="share of the target's images, %",
        numbers=counts,
    )
    rows = [[name, *map(str, row)] for name, row in zip(answers.names, counts.tolist(), strict=True)]
    data = Table(f"{title}, images", ["target \\ prediction", *answers.names], rows)
    right = int(counts.trace())
    alt = f"Matrix of targets by predictions; {right} of {counts.sum()} images lie on its diagonal."
    note = f"{answers.note}. " + ("Numbers are images." if len(answers.names) <= MANY else "Not all classes are named.")
    figure = Figure(f"confusion-{answers.run.kind}", title, png, alt, note, data)
    return [figure, *([confused_pairs(answers)] if len(answers.names) > MANY else [])]


def confused_pairs(answers: Answers) -> Table:
    """Return the wrong pairs of target and prediction that occur most often."""
    counts = answers.confusion()
    supports = counts.sum(axis=1)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:NUM_WORST]
    rows = []
    for target, prediction in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[target, prediction]:
            share = number(100 * wrong[target, prediction] / supports[target], 1)
            cells = [answers.names[prediction], str(wrong[target, prediction]), share]
            rows.append([answers.names[target], *cells, str(wrong[prediction, target])])
    columns = ("target", "taken for", "images", "% of the target's images", "images the other way round")
    return Table(f"Most confused classes, {answers.title}", columns, rows, f"{answers.note}.")


def worst_classes(student: Answers, teacher: Answers | None) -> Table:
    """Return the classes that the student recognises worst, with the teacher's figures."""
    beside = {scores.name: scores for scores in teacher.scores()} if teacher else {}
    columns = ["class", "images", "recall %", "precision %", "most often taken for"]
    columns += ["teacher's recall %", "teacher's precision %"] if beside else []
    rows = []
    for scores in worst_first(student.scores())[:NUM_WORST]:
        confused = f"{scores.confused_with} ({scores.num_confused})" if scores.confused_with is not None else "-"
        row = [scores.name, str(scores.support), _percent(scores.recall), _percent(scores.precision), confused]
        if beside:
            teachers = beside.get(scores.name)  # none of a class that is no target and that it never predicts
            row += [_percent(teachers.recall), _percent(teachers.precision)] if teachers else ["-", "-"]
        rows.append(row)
    count = min(NUM_WORST, len(student.names))
    what = "All classes" if count == len(student.names) else f"The {count} worst classes"
    note = student.note + (f"; the teacher's columns: {teacher.note}" if teacher else "")
    return Table(f"{what}, {student.title}", columns, rows, f"{note}. Lowest recall first, then lowest F1.")


def agreement(student: Answers, labels: NDArray[np.int64]) -> list[Figure | Table]:
    """Show by class how often student and teacher predict the same, and how often they are right."""
    same, right = student.predictions == labels, student.predictions == student.targets
    teachers = labels == student.targets
    outcomes = np.stack([same, right, teachers, right & ~teachers, teachers & ~right])
    shares = []
    for label, name in enumerate(student.names):
        members = student.targets == label
        if members.any():
            shares.append((name, int(members.sum()), (100 * outcomes[:, members].mean(axis=1)).tolist()))
    shares.sort(key=lambda entry: entry[2][0])
    overall = 100 * float(same.mean())
    columns = ["class", "images", "agreement %", "student right %", "teacher right %"]
    columns += ["only the student right %", "only the teacher right %"]
    title = f"Agreement with the teacher by class, {student.title}"
    rows = [[name, str(count), *(number(value, 1) for value in values)] for name, count, values in shares]
    note = f"{student.note}; lowest agreement first: the share of images with the same prediction."
    table = Table(title, columns, rows, note, optional=columns[5:])
    series = ["agreement", "student right", "teacher right"]
    drawn = [DotRow(name, values[:3], remark=str(count)) for name, count, values in shares[:NUM_SHOWN]]
    png = dots(
        drawn, series, x_label="share of the class's images, %", y_label="target", overall=[overall], remarks="images"
    )
    alt = f"Dots: agreement, student's and teacher's accuracy of each class. Overall agreement {overall:.1f} %."
    part = f" The {NUM_SHOWN} classes of least agreement of {len(shares)}." if len(shares) > NUM_SHOWN else ""
    shortened = Table(title, columns, rows[:NUM_SHOWN], note + part, optional=columns[5:])
    return [Figure("agreement", title, png, alt, note + part, table), shortened]


def _percent(share: float | None) -> str:
    return "-" if share is None else number(100 * share, 1)
