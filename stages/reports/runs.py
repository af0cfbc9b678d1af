"""What has been run: the directories that `teacher` and `distill` have finished."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.recipes import Recipe, deciding_values
from pipeline.errors import DataError
from pipeline.system.storage import read_json
from pipeline.training.checkpoints import read_meta
from stages.shared.paths import Paths
from stages.shared.runs import OUTPUTS, differences
from stages.shared.trained import other_data

Form = Mapping[str, Any]
NUMBER = (int, float)
MAYBE = (int, float, type(None))
SCORES = {
    "epoch": int, "top1": NUMBER, "top5": NUMBER, "precision": NUMBER, "recall": NUMBER, "f1": NUMBER,
    "class_top1": NUMBER, "distillation_top1": MAYBE, "agreement": MAYBE,
}  # fmt: skip
METRICS: Form = {
    "name": str, "kind": str, "recipe": str, "seed": int, "evaluated_on": str,
    "best": SCORES, "last": SCORES, "test": SCORES,
    "epochs": int, "batch_size": int, "optimizer": str, "lr": NUMBER, "precision": str, "views": MAYBE, "soft": MAYBE,
    "num_train": int, "num_test": int, "parameters": int, "paper_gmacs_1024": NUMBER, "flops_per_image": NUMBER,
    "distilled": bool, "at_chance": bool, "warnings": list, "differs": dict, "teacher": (dict, type(None)),
}  # fmt: skip
TEACHER: Form = {"name": str, "sha256": str, "top1": NUMBER}
ENVIRONMENT: Form = {
    "device": str, "seconds": NUMBER, "commit": (str, type(None)), "date": str, "versions": {"torch": str},
}  # fmt: skip
"""What a report needs of metrics.json and run.json at least."""
BUDGET = ("epochs", "batch_size", "optimizer", "lr", "num_train", "num_test", "parameters")


def misfit(content: object, form: Form) -> str | None:
    """Say which field of a JSON object is missing or has a wrong type; None where all fit.

    Args:
        content: The object.
        form: By field its type or types, or the form of an object.
    """
    if not isinstance(content, dict):
        return "not an object"
    for key, kind in form.items():
        if key not in content:
            return f"no {key}"
        if isinstance(kind, Mapping):
            inner = misfit(content[key], kind)
            if inner is not None:
                return f"{key}: {inner}"
        elif not isinstance(content[key], kind):
            return f"{key}: {str(content[key])[:40]!r}"
    return None


@dataclass(frozen=True)
class FinishedRun:
    """A model that has been trained to the end.

    Attributes:
        directory: Where its outputs lie.
        metrics: Its metrics.json, see stages.shared.fitting.
        environment: Its run.json: device, versions, commit, date, seconds.
    """

    directory: Path
    metrics: Mapping[str, Any]
    environment: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> FinishedRun | None:
        """Read a run's directory; None where it is not finished.

        Raises:
            DataError: One of its files is damaged.
        """
        if not all((directory / name).is_file() for name in OUTPUTS):
            return None
        metrics, environment = read_json(directory / "metrics.json"), read_json(directory / "run.json")
        for file, content, form in (("metrics.json", metrics, METRICS), ("run.json", environment, ENVIRONMENT)):
            wrong = misfit(content, form)
            if wrong is None and content.get("teacher") is not None:
                inner = misfit(content["teacher"], TEACHER)
                wrong = inner and f"teacher: {inner}"
            if wrong is not None:
                raise DataError(f"{directory / file}: {wrong}; train the model again")
        return cls(directory, metrics, environment)

    @property
    def name(self) -> str:
        """The teacher's or student's name in the recipe."""
        return str(self.metrics["name"])

    @property
    def kind(self) -> str:
        """`teacher` or `student`."""
        return str(self.metrics["kind"])

    @property
    def seed(self) -> int:
        """Of initialisation and order."""
        return int(self.metrics["seed"])

    @property
    def differs(self) -> dict[str, str]:
        """What differs from the recipe but for the seed, as key and value."""
        return dict(self.metrics.get("differs", {}))

    @property
    def labels(self) -> str:
        """`none`, `cached` or `online`; a teacher counts as `cached`."""
        return self.differs.get("labels", "cached")

    @property
    def views(self) -> int | None:
        """How many views the epochs cycle through; None without any."""
        views: int | None = self.metrics["views"]
        return views

    @property
    def teacher_top1(self) -> tuple[float, str] | None:
        """Its teacher's top-1 in percent and the split it is on: test where that was measured; None without one."""
        teacher = self.metrics["teacher"]
        if not teacher:
            return None
        on_test = "test_top1" in teacher  # not in the metrics.json of former versions
        return (teacher["test_top1"], "test") if on_test else (teacher["top1"], str(self.metrics["evaluated_on"]))

    @property
    def budget(self) -> tuple[Any, ...]:
        """What must be equal in runs that are compared, whatever they learn from."""
        return tuple(self.metrics[key] for key in BUDGET)

    @property
    def lesson(self) -> tuple[Any, ...] | None:
        """What a student learns from its teacher: temperature, weighting, whose labels; None without one."""
        if not self.metrics["distilled"]:
            return None
        return (self.metrics["soft"], self.metrics.get("confidence"), (self.metrics["teacher"] or {}).get("sha256"))

    @property
    def basis(self) -> tuple[Any, ...]:
        """What must be equal in runs of the same model and settings that differ by their seeds alone."""
        same = [self.metrics.get(key) for key in ("views", "soft", "confidence", "distilled")]
        teacher = self.metrics.get("teacher")
        return (*self.budget, *same, teacher["sha256"] if teacher else None)

    @property
    def initial_weights(self) -> str | None:
        """The weights before its training, as `random weights`; None where its checkpoint does not say.

        Raises:
            DataError: Its checkpoint's JSON is damaged.
        """
        return _initial_weights(read_meta(self.directory), self.kind)

    @property
    def teacher_weights(self) -> str | None:
        """Its teacher's weights before training; None without the teacher's checkpoint."""
        teacher = self.metrics["teacher"]
        meta = read_meta(Paths(str(self.metrics["recipe"])).teacher(teacher["name"])) if teacher else None
        return _initial_weights(meta, "teacher") if meta and meta["sha256"] == teacher["sha256"] else None

    def curve(self) -> list[dict[str, float | None]]:
        """Read one row an epoch: epoch (from 1), lr, train_loss and the fields of pipeline.training.metrics.Scores.

        Raises:
            DataError: The file is damaged.
        """
        file, epochs = self.directory / "curve.csv", self.metrics["epochs"]
        rows = self._rows(file)
        try:
            curve = [{key: float(value) if value else None for key, value in row.items()} for row in rows]
        except ValueError:
            curve = []
        if len(curve) != epochs or any("top1" not in row for row in curve):
            raise DataError(f"{file}: not a curve of {epochs} epochs; train the model again")
        return curve

    def predictions(self) -> list[dict[str, str]]:
        """Read one row for each test image, with pipeline.training.evaluation.PREDICTION_COLUMNS.

        Raises:
            DataError: The file is damaged.
        """
        return self._rows(self.directory / "predictions.csv")

    def _rows(self, path: Path) -> list[dict[str, str]]:
        """Read a CSV file, each row as wide as the headings."""
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: no CSV file ({error}); train the model again") from None
        if any(None in row or None in row.values() for row in rows):
            raise DataError(f"{path}: a row is not as wide as the headings; train the model again")
        return rows


@dataclass(frozen=True)
class FinishedRuns:
    """Everything of a recipe that has been run.

    Attributes:
        recipe: The recipe.
        paths: Its files.
        teachers: The candidates, in the recipe's order.
        students: The runs that follow the recipe, with seed 0, in its order.
        others: Runs that differ from the recipe or have another seed, by their directories' names.
        winner: The selected teacher's name; None before `select`.
        left_out: Finished runs that were trained on other data than are prepared now: directory to which data.
    """

    recipe: Recipe
    paths: Paths
    teachers: Mapping[str, FinishedRun]
    students: Mapping[str, FinishedRun]
    others: Mapping[str, FinishedRun]
    winner: str | None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: Recipe, paths: Paths) -> FinishedRuns:
        """Look through data/<recipe> and data/runs/<recipe>.

        Raises:
            DataError: A file is damaged.
        """
        runs = paths.run("")
        others = sorted(path for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
        left_out: dict[str, str] = {}

        def finished(directories: Mapping[str, Path]) -> dict[str, FinishedRun]:
            found = {name: FinishedRun.read(path) for name, path in directories.items()}
            for run in filter(None, found.values()):
                meta = read_meta(run.directory)  # None where the weights were left elsewhere
                if meta is not None and (difference := other_data(meta, paths)) is not None:
                    left_out[str(run.directory)] = difference
            return {name: run for name, run in found.items() if run and str(run.directory) not in left_out}

        return cls(
            recipe=recipe,
            paths=paths,
            teachers=finished({name: paths.teacher(name) for name in recipe.teachers}),
            students=finished({name: paths.student(name) for name in recipe.students}),
            others=finished({path.name: path for path in others}),
            winner=_winner(paths.selection),
            left_out=left_out,
        )

    def seeds(self, name: str) -> list[FinishedRun]:
        """Return the runs of a teacher or student under the recipe, by ascending seed.

        A run with another `basis` than the recipe's first run is left out.
        """
        seed_0 = self.teachers.get(name) or self.students.get(name)
        others = [run for run in self.others.values() if run.name == name and not run.differs]
        runs = sorted([*([seed_0] if seed_0 else []), *others], key=lambda run: run.seed)
        return [run for run in runs if run.basis == runs[0].basis]

    def outdated(self, run: FinishedRun) -> list[str]:
        """Say which settings of a run that follows the recipe have since changed in params.yaml."""
        now = self.recipe.teachers.get(run.name) if run.kind == "teacher" else self.recipe.students.get(run.name)
        meta = read_meta(run.directory)
        if now is None or meta is None or not isinstance(meta.get("training"), dict):
            return []
        return differences(meta, {"training": deciding_values(now)})


def _initial_weights(meta: Mapping[str, Any] | None, kind: str) -> str | None:
    """Read from a checkpoint's JSON the weights before its training."""
    training = meta.get("training") if meta else None
    if not isinstance(training, dict):
        return None
    weights = training.get("weights", "none") if kind == "teacher" else "none"
    return {"none": "random weights", "imagenet": "ImageNet weights"}.get(weights, f"the weights {weights}")


def _winner(path: Path) -> str | None:
    """Read the selected teacher's name from selection.json."""
    selection = read_json(path) if path.is_file() else None
    wrong = None if selection is None else misfit(selection, {"winner": str})
    if wrong is not None:
        raise DataError(f"{path}: {wrong}; run `pipeline select`")
    return None if selection is None else str(selection["winner"])
