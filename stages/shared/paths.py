"""The layout of data/, which no other file knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import stages

PROJECT = Path(stages.__file__).parent / "project"
"""The params.yaml and dvc.yaml that come with the package; in a clone they are links to its own."""
STAGES = PROJECT / "stages.yaml"
"""Of these the dvc.yaml, by another name: DVC takes every dvc.yaml of a repository for one more pipeline."""
PARAMS = Path("params.yaml")
DATA = Path("data")
RECORDS = Path("results") / "runs.jsonl"


def labels_name(view_recipe: str, teacher: str | None = None) -> str:
    """Return the name of a label file without suffix, which its parts, locks and second name have too."""
    return view_recipe if teacher is None else f"{view_recipe}@{teacher}"


def label_command(name: str, options: str = "", *, given: bool = False) -> str:
    """Return the command that makes a label file, in backticks.

    Args:
        name: The file's, see `labels_name`.
        options: More options, with a space before each.
        given: Whether something else has computed its labels.
    """
    view_recipe, _, teacher = name.partition("@")
    views = "" if view_recipe == "default" else f" --view-recipe {view_recipe}"
    source = f" {'--from FILE' if given else '--teacher WHAT'} --as {teacher}" if teacher else ""
    return f"`pipeline label{views}{source}{options}`"


def relabel(name: str, *, given: bool | None = None) -> str:
    """Return the way out where a label file does not fit; `given` as for `label_command`, None if it is not known."""
    either = ", or with --from FILE" if given is None and "@" in name else ""
    return f"label again with {label_command(name, ' --fresh', given=bool(given))}{either}"


@dataclass(frozen=True)
class Paths:
    """The files of one recipe.

    Attributes:
        recipe: The recipe's name.
        project: The project's folder; that of the process by default, as commands have it.
    """

    recipe: str
    project: Path = Path()

    @property
    def root(self) -> Path:
        """Everything that DVC manages of the recipe."""
        return self.project / DATA / self.recipe

    @property
    def raw(self) -> Path:
        """Downloads, shared by all recipes."""
        return self.project / DATA / "raw"

    @property
    def prepared(self) -> Path:
        """What `prepare` writes: dataset.json and what belongs beside it, summary.json."""
        return self.root / "prepared"

    @property
    def dataset(self) -> Path:
        """The data set."""
        return self.prepared / "dataset.json"

    @property
    def prepare_memory(self) -> Path:
        """What `prepare` remembers of the files that it read: their sizes, times and SHA-256."""
        return self.work("prepare.json")

    @property
    def is_prepared(self) -> bool:
        """Whether the prepared data are there."""
        return all((self.prepared / name).is_file() for name in ("dataset.json", "summary.json"))

    def teacher(self, name: str) -> Path:
        """One candidate's checkpoint, metrics and curve."""
        return self.root / "teachers" / name

    @property
    def winner(self) -> Path:
        """The selected teacher's checkpoint."""
        return self.root / "teacher"

    @property
    def selection(self) -> Path:
        """The comparison of the candidates."""
        return self.root / "selection.json"

    def labels(self, view_recipe: str, teacher: str | None = None) -> Path:
        """The label cache of a view recipe: that of the selected teacher, or another that has a name of its own."""
        return self.root / "labels" / f"{labels_name(view_recipe, teacher)}.h5"

    def student(self, name: str) -> Path:
        """One student's checkpoints, metrics and curve."""
        return self.root / "students" / name

    @property
    def reports(self) -> Path:
        """What `report` writes: report.html, report.md, report.json, tables/, figures/."""
        return self.root / "reports"

    def run(self, name: str) -> Path:
        """A run that differs from the recipe."""
        return self.project / DATA / "runs" / self.recipe / name

    def work(self, *parts: str) -> Path:
        """The state of a run under way; never tracked."""
        return self.project.joinpath(DATA, "work", self.recipe, *parts)

    @staticmethod
    def kept_of_all(project: Path = Path()) -> Path:
        """Finished results of every recipe, kept where DVC does not look; see stages.shared.kept."""
        return project / DATA / "work" / "kept"

    @property
    def kept(self) -> Path:
        """Finished results of the recipe, likewise."""
        return self.kept_of_all(self.project) / self.recipe
