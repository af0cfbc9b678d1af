"""What has been run: the directories that `teacher` and `distill` have finished."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.config.recipes import Recipe
from pipeline.errors import DataError, printable
from pipeline.models.own import is_own
from pipeline.system.canonical import is_whole
from pipeline.system.storage import read_json
from pipeline.training.manifest import MANIFEST, read_checked, read_json_checked
from stages.shared.paths import Paths
from stages.shared.runs import OUTPUTS, describe_finished, differences, training_values
from stages.shared.trained import SHORT, prepared_rendition, rendition, shown_otherwise

Form = Mapping[str, Any]
SWEPT = ("training.optimizer", "training.lr")
"""The places in a description in which runs of Figure 5 differ."""
DECAY = "training.weight_decay"
"""Another place, in which runs of two optimisers may differ."""
SAME = ("dataset_sha256", "rendition", "rules")
"""The places in which even the runs of two models must be equal, or their scores say nothing of each other."""
SHOWN = 40  # characters of a wrong value
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
TEACHER: Form = {"name": str, "sha256": str, "top1": MAYBE}
ENVIRONMENT: Form = {
    "device": str, "seconds": NUMBER, "commit": (str, type(None)), "date": str, "versions": {"torch": str},
}  # fmt: skip
"""What a report needs of metrics.json and run.json at least."""


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
            return f"{key}: {str(content[key])[:SHOWN]!r}"
    return None


@dataclass(frozen=True)
class FinishedRun:
    """A model that has been trained to the end.

    Attributes:
        directory: Where its outputs lie.
        metrics: Its metrics.json, see stages.shared.fitting.
        environment: Its run.json: device, versions, commit, date, seconds.
        meta: Its best.json, the checkpoint's JSON; None where it has none. The weights may be elsewhere.
    """

    directory: Path
    metrics: Mapping[str, Any]
    environment: Mapping[str, Any]
    meta: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, directory: Path) -> FinishedRun | None:
        """Read a run's directory; None where it is not finished.

        Raises:
            DataError: One of its files is damaged.
        """
        if not all((directory / name).is_file() for name in OUTPUTS):
            return None
        metrics, environment = (read_json_checked(directory / name) for name in ("metrics.json", "run.json"))
        for file, content, form in (("metrics.json", metrics, METRICS), ("run.json", environment, ENVIRONMENT)):
            wrong = misfit(content, form)
            if wrong is None and content.get("teacher") is not None:
                inner = misfit(content["teacher"], TEACHER)
                wrong = inner and f"teacher: {inner}"
            if wrong is not None:
                raise DataError(f"{directory / file}: {wrong}; train the model again")
        checkpoint = directory / "best.json"
        meta = read_json_checked(checkpoint) if checkpoint.is_file() else None
        if meta is not None and misfit(meta, {"sha256": str}):
            raise DataError(f"{checkpoint}: names no SHA-256; train the model again")
        return cls(directory, metrics, environment, meta)

    @property
    def is_sealed(self) -> bool:
        """Whether a manifest tells its files from damaged ones; older versions wrote none."""
        return (self.directory / MANIFEST).is_file()

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
        """What differed from params.yaml when it was trained, but for the seed, as the command gave it."""
        return dict(self.metrics["differs"])

    @property
    def description(self) -> dict[str, Any] | None:
        """Everything that decided its result, see stages.shared.runs.describe_finished; None where it is not known."""
        return describe_finished(self.meta, self.metrics)

    def settings(self, *but: str) -> dict[str, Any]:
        """Return its description without the seed and without other parts; without a description, nothing.

        Args:
            but: Places in the description, as `inputs.views.count`.
        """
        return {} if self.description is None else _without(self.description, ("seed", *but))

    def key(self, *but: str) -> str:
        """Return a text that is equal for runs of the same kind and name that differ in the seed and in `but` at most.

        A run without a description is equal to itself alone.
        """
        settings = self.settings(*but)
        return f"{self.name} {json.dumps(settings, sort_keys=True)}" if settings else str(self.directory)

    def is_comparable(self, other: FinishedRun) -> bool:
        """Whether both runs' scores are of the same images and by the same rules, so that they may be subtracted."""
        first, second = self.description, other.description
        return first is not None and second is not None and all(first.get(key) == second.get(key) for key in SAME)

    @property
    def weight_decay(self) -> float | None:
        """Its weight decay; None without a description."""
        decay: float | None = self.settings().get("training", {}).get("weight_decay")
        return decay

    @property
    def labels(self) -> str:
        """`none` where it does not learn from a teacher, else `cached` or `online`; of teachers `none`."""
        description = self.description or {"inputs": {}}
        return str(description["inputs"].get("labels", "none"))

    @property
    def views(self) -> int | None:
        """How many views the epochs cycle through; None without any."""
        views: int | None = self.metrics["views"]
        return views

    @property
    def teacher_top1(self) -> tuple[float, str] | None:
        """Its teacher's top-1 in percent and the split it is on: test where that was measured; None without one.

        Labels that something else has computed may say nothing of unaugmented images.
        """
        teacher = self.metrics["teacher"] or {}
        scores = {"test": teacher.get("test_top1"), str(self.metrics["evaluated_on"]): teacher.get("top1")}
        return next(((score, split) for split, score in scores.items() if score is not None), None)

    @property
    def taught_by(self) -> str | None:
        """Its teacher's name, and that of the label file where it is not the selected teacher's; None without one."""
        teacher = self.metrics["teacher"]
        if not teacher:
            return None
        return f"{teacher['name']} (labels {teacher['labels']})" if teacher.get("labels") else str(teacher["name"])

    @property
    def sha256(self) -> str | None:
        """SHA-256 of its best weights; None where its checkpoint is missing."""
        return str(self.meta["sha256"]) if self.meta else None

    @property
    def labels_sha256(self) -> str | None:
        """Digest of the labels that it learned from; None where from none, and of older versions, which named none."""
        digest: str | None = (self.meta or {}).get("labels_sha256")
        return digest

    @property
    def initial_weights(self) -> str | None:
        """The weights before its training, as `random weights`; None where its checkpoint does not say."""
        training = self.meta.get("training") if self.meta else None
        if self.meta is None or not isinstance(training, dict):
            return None
        weights = str(training.get("weights", "none")) if self.kind == "teacher" else "none"
        if weights == "none" and is_own(model := str(self.meta.get("model"))):
            return f"the weights that {model} returns"
        return {"none": "random weights", "imagenet": "ImageNet weights"}.get(weights, f"the weights {weights}")

    def curve(self) -> list[dict[str, float | None]]:
        """Read one row an epoch: epoch (from 1), lr, train_loss and the fields of pipeline.training.metrics.Scores.

        Of a finished teacher, which was not trained, there is one, epoch 0.

        Raises:
            DataError: The file is damaged.
        """
        file, epochs = self.directory / "curve.csv", self.metrics["epochs"]
        rows = self._rows(file)
        try:
            curve = [{key: float(value) if value else None for key, value in row.items()} for row in rows]
        except ValueError:
            curve = []
        if len(curve) != max(epochs, 1) or any("top1" not in row for row in curve):
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
            rows = list(csv.DictReader(io.StringIO(read_checked(path).decode(), newline="")))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: no CSV file ({error}); train the model again") from None
        if any(None in row or None in row.values() for row in rows):
            raise DataError(f"{path}: a row is not as wide as the headings; train the model again")
        return rows


def _without(tree: Mapping[str, Any], places: Iterable[str]) -> dict[str, Any]:
    """Return a tree of JSON values without some of its parts."""
    here = {place for place in places if "." not in place}
    kept = {key: value for key, value in tree.items() if key not in here}
    for place in places:
        key, _, rest = place.partition(".")
        if rest and isinstance(kept.get(key), Mapping):
            kept[key] = _without(kept[key], (rest,))
    return kept


def pools(runs: Iterable[FinishedRun], *but: str) -> list[list[FinishedRun]]:
    """Group runs that are equal in everything but the seed and `but`, in the order in which they first appear.

    Runs that learned from different labels are not equal, though all else is; those that do not name their labels
    go with the first that do. With `but`, which may decide the labels, these do not count.

    Args:
        runs: Runs.
        but: See `FinishedRun.key`.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(run.key(*but), []).append(run)
    return list(groups.values()) if but else [group for equal in groups.values() for group in _by_labels(equal)]


def _by_labels(runs: Iterable[FinishedRun]) -> list[list[FinishedRun]]:
    """Split runs that are equal otherwise by the labels that they learned from, see `pools`."""
    runs = list(runs)
    first = next((run.labels_sha256 for run in runs if run.labels_sha256), None)
    groups: dict[str | None, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(run.labels_sha256 or first, []).append(run)
    return list(groups.values())


def one_for_each_seed(runs: Iterable[FinishedRun]) -> list[FinishedRun]:
    """Return runs by ascending seed; of several with the same seed, which are the same run, the first."""
    by_seed: dict[int, FinishedRun] = {}
    for run in runs:
        by_seed.setdefault(run.seed, run)
    return [by_seed[seed] for seed in sorted(by_seed)]


@dataclass(frozen=True)
class FinishedRuns:
    """Everything of a recipe that has been run, on the same data.

    Attributes:
        recipe: The recipe.
        paths: Its files.
        teachers: The candidates, in the recipe's order.
        students: The runs that follow the recipe, with seed 0, in its order.
        others: Runs that differ from the recipe or have another seed, by their directories' names.
        winner: The selected teacher's name; None before `select`.
        left_out: Finished runs on other data than are prepared now, or on other pixels of the same files, which are in
            none of the above: directory to which data. Where nothing is prepared, the data of most runs count.
    """

    recipe: Recipe
    paths: Paths
    teachers: Mapping[str, FinishedRun]
    students: Mapping[str, FinishedRun]
    others: Mapping[str, FinishedRun]
    winner: str | None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: Recipe, paths: Paths, *, tracked_only: bool = False) -> FinishedRuns:
        """Look through data/<recipe> and data/runs/<recipe>.

        Args:
            recipe: The recipe.
            paths: Its files.
            tracked_only: Whether to leave data/runs alone, which DVC does not track: a damaged run there is none of
                its business.

        Raises:
            DataError: A file is damaged.
        """
        runs = paths.run("")
        is_shown = runs.is_dir() and not tracked_only
        others = sorted(path for path in runs.iterdir() if path.is_dir()) if is_shown else []
        finished = [
            _finished({name: paths.teacher(name) for name in recipe.teachers}),
            _finished({name: paths.student(name) for name in recipe.students}),
            _finished({path.name: path for path in others}),
        ]
        for name, run in [*finished[0].items(), *finished[1].items()]:
            if run.name != name:
                file = run.directory / "metrics.json"
                raise DataError(f"{file}: of {printable(run.name[:SHOWN])!r}, not of {name!r}; train the model again")
        every = [run for group in finished for run in group.values()]
        data, these = _data(paths, every)
        left_out: dict[str, str] = {}
        for run in every:
            trained, of = _data_of(run), printable(str(run.metrics["recipe"]))
            if trained is not None and data is not None and trained != data:
                which = f"recipe {of}, SHA-256 {printable(trained[0][:SHORT])}"
                why = f"trained on other data ({which}) than {these}"
                is_same = trained[0] == data[0]
                left_out[str(run.directory)] = shown_otherwise(trained[1], these, data[1]) if is_same else why
        kept = [{name: run for name, run in group.items() if str(run.directory) not in left_out} for group in finished]
        return cls(recipe, paths, kept[0], kept[1], kept[2], _winner(paths.selection), left_out)

    @property
    def all(self) -> list[FinishedRun]:
        """Teachers, students and others."""
        return [*self.teachers.values(), *self.students.values(), *self.others.values()]

    @property
    def num_classes(self) -> int | None:
        """How many classes the data have; None where no run says."""
        described = [run.description["arguments"].get("num_classes") for run in self.all if run.description]
        return next((count for count in described if isinstance(count, int)), None)

    def reference(self, kind: str, name: str) -> FinishedRun | None:
        """Return the recipe's run of a model; without one, its first run with another seed.

        Args:
            kind: `teacher` or `student`: one of each may have the same name.
            name: Its name in the recipe.
        """
        first = min((run for run in self._of(kind, name) if not run.differs), key=lambda run: run.seed, default=None)
        return (self.teachers if kind == "teacher" else self.students).get(name) or first

    def _of(self, kind: str, name: str) -> list[FinishedRun]:
        """Return the others that are of a model."""
        return [run for run in self.others.values() if (run.kind, run.name) == (kind, name)]

    def equal(self, kind: str, name: str) -> list[FinishedRun]:
        """Return all runs that equal `reference`, itself first; it may come twice."""
        reference = self.reference(kind, name)
        return [] if reference is None else pools([reference, *self._of(kind, name)])[0]

    def seeds(self, kind: str, name: str) -> list[FinishedRun]:
        """Return the recipe's runs of a model, by ascending seed: all that equal `reference`."""
        return one_for_each_seed(self.equal(kind, name))

    def sweep(self) -> list[list[FinishedRun]]:
        """Return the selected teacher's runs by optimiser and learning rate, in which alone they differ, its own first.

        Those of another optimiser may differ in weight decay, too. Each list has a run for each seed. Empty before
        `select`.
        """
        selected = self.seeds("teacher", self.winner or "")
        if not selected:
            return []
        own = selected[0]
        others = []
        for run in self.others.values():
            but = SWEPT if run.metrics["optimizer"] == own.metrics["optimizer"] else (*SWEPT, DECAY)
            if run.key(*but) == own.key(*but):
                others.append(run)
        return [one_for_each_seed(group) for group in pools([*selected, *others])]

    def apart(self, kind: str, name: str) -> list[FinishedRun]:
        """Return the runs of a model that follow params.yaml but for the seed, or did, and are none of `seeds`."""
        seeds = self.seeds(kind, name)
        return [run for run in self._of(kind, name) if not run.differs and run not in seeds]

    def teacher_of(self, run: FinishedRun) -> FinishedRun | None:
        """Return the teacher whose labels a run has, by its SHA-256; None where another has taken its place."""
        teacher = run.metrics["teacher"] or {}
        found = [other for other in self.teachers.values() if teacher and other.sha256 == teacher["sha256"]]
        # Its name there is its architecture, which two teachers of a recipe may share.
        return next((other for other in found if other.name == teacher["name"]), found[0] if found else None)

    @property
    def best_student(self) -> FinishedRun | None:
        """The student with the highest top-1 on the split that decides, over its seeds; the first of equals."""

        def score(run: FinishedRun) -> float:
            return fmean(float(one.metrics["best"]["top1"]) for one in self.seeds("student", run.name))

        found = (self.reference("student", name) for name in self.recipe.students)
        return max((run for run in found if run is not None), key=score, default=None)

    def teacher_beside(self, student: FinishedRun | None) -> FinishedRun | None:
        """Return the teacher that a student learned from; where it did not, and without one, the selected teacher."""
        if student is not None and student.metrics["distilled"]:
            return self.teacher_of(student)
        return self.teachers.get(self.winner or "")

    def outdated(self, run: FinishedRun) -> list[str]:
        """Say which settings of a run that follows the recipe have since changed in params.yaml."""
        now = self.recipe.teachers.get(run.name) if run.kind == "teacher" else self.recipe.students.get(run.name)
        if now is None or run.meta is None or not isinstance(run.meta.get("training"), dict):
            return []
        return differences(run.meta, {"training": training_values(now)})


def _data_of(run: FinishedRun) -> tuple[str, str | None] | None:
    """Return the SHA-256 of a run's data, and of an encoded store the rendition; None where it is not known."""
    data, shown = (run.meta or {}).get("dataset_sha256"), (run.description or {}).get("rendition")
    return None if data is None else (str(data), None if shown is None else rendition(shown))


def _data(paths: Paths, runs: Iterable[FinishedRun]) -> tuple[tuple[str, str | None] | None, str]:
    """Return what `_data_of` does of the prepared data, and their name; where there are none, of most runs' data."""
    summary: Any = read_json(paths.prepared / "summary.json") if paths.is_prepared else None
    if misfit(summary, {"sha256": str}) is None:
        these = f"{paths.dataset} (SHA-256 {printable(summary['sha256'][:SHORT])})"
        with contextlib.suppress(DataError):  # loading the data will say what is wrong
            return (summary["sha256"], prepared_rendition(paths)), these
    known = Counter(data for run in runs if (data := _data_of(run)) is not None)
    return known.most_common(1)[0][0] if known else None, "most runs of this recipe"


def _winner(path: Path) -> str | None:
    """Read the selected teacher's name from selection.json."""
    selection = read_json(path) if path.is_file() else None
    wrong = None if selection is None else misfit(selection, {"winner": str})
    if wrong is None and selection is not None and not is_whole(selection):
        wrong = "changed since it was written"
    if wrong is not None:
        raise DataError(f"{path}: {wrong}; run `pipeline select`")
    return None if selection is None else str(selection["winner"])


def _finished(directories: Mapping[str, Path]) -> dict[str, FinishedRun]:
    runs = {name: FinishedRun.read(path) for name, path in directories.items()}
    return {name: run for name, run in runs.items() if run is not None}
