"""Where the runs that differ from their recipe go: one directory for each, whatever way its settings were written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.recipes import RecipeSection, StudentRecipe, TeacherRecipe
from pipeline.errors import DataError, StorageError
from pipeline.system.canonical import canonical_json, fingerprint
from pipeline.system.storage import read_json
from stages.shared.paths import Paths

MAX_NAME = 120  # characters; file systems take 255 bytes, of which locks and temporary files need some
NUM_DIGITS = 10
_KEYS = {
    "labels", "teacher", "teacher_labels", "confidence", "num_views", "seed",
    *(field.name for cls in (TeacherRecipe, StudentRecipe) for field in dataclasses.fields(cls)),
}  # fmt: skip


def settings_as_written(recipe: RecipeSection, keys: Collection[str]) -> dict[str, str]:
    """Return fields of a recipe as texts: in the recipe's order, and one text for each value, as 0.2 for 0.20."""
    return {
        field.name: _as_written(getattr(recipe, field.name))
        for field in dataclasses.fields(recipe)
        if field.name in keys
    }


def _as_written(value: Any) -> str:
    if isinstance(value, Mapping):
        return canonical_json(dict(value))
    return json.dumps(value).removesuffix(".0") if isinstance(value, bool | float) else str(value)


class Place(NamedTuple):
    """What a run that differs from its recipe is, as its directory's name tells.

    Attributes:
        kind: `teacher` or `student`.
        name: Of the model in the recipe.
        differs: What differs from the recipe but for the seed, as key and text.
        seed: Of initialisation and order.
    """

    kind: str
    name: str
    differs: Mapping[str, str]
    seed: int

    def find(self, paths: Paths, has_ended: Callable[[Path], bool], is_under_way: Callable[[Path], bool]) -> str:
        """Return the name of the directory: where this very run is, finished or under way, else where it goes.

        Earlier versions wrote settings into the name as they were given, and did not tell all runs apart.

        Args:
            paths: Of the recipe.
            has_ended: Tells whether a directory holds the outputs of just these settings.
            is_under_way: Tells whether a directory of data/work holds a saved state of them.
        """
        own = self._own
        if self._is_anothers(paths.run(own)):
            own = self._exact
        ended, under_way = paths.run(""), paths.work("runs")
        for path in (ended / own, *_folders(ended)):
            if self._is_mine(_read(path / "metrics.json")) and has_ended(path):
                return path.name
        for path in (under_way / own, *_folders(under_way)):
            if self._may_be_mine(path.name) and is_under_way(path):
                return path.name
        return own

    @property
    def _plain(self) -> str:
        changes = [f"{key}-{value}" for key, value in self.differs.items()]
        return "-".join([self.name, *changes, *([f"seed-{self.seed}"] if self.seed else [])])

    @property
    def _exact(self) -> str:
        """A name that no other run has, by a digest of the whole."""
        plain = re.sub(r"[^A-Za-z0-9._+-]", "_", self._plain)[:MAX_NAME]
        return f"{plain}-{fingerprint({**self._asdict(), 'differs': dict(self.differs)})[:NUM_DIGITS]}"

    @property
    def _own(self) -> str:
        """The plain name, where it is a name for a folder and tells of this run alone."""
        from pipeline.models import TEACHERS

        texts = [f"-{text}-" for text in (self.name, *self.differs.values())]
        is_clear = not any(f"-{key}-" in text for key in _KEYS for text in texts)
        is_clear &= self.kind == "teacher" or self.name not in TEACHERS
        is_name = re.fullmatch(rf"[A-Za-z0-9._+-]{{1,{MAX_NAME}}}", self._plain) is not None
        return self._plain if is_clear and is_name else self._exact

    def _is_mine(self, metrics: Any) -> bool:
        """Tell by its metrics.json whether a finished run has this model, kind, seed and kinds of settings."""
        if not isinstance(metrics, dict) or not isinstance(metrics.get("differs"), dict):
            return False
        mine = (self.kind, self.name, self.seed, self.differs.keys())
        return mine == (metrics.get("kind"), metrics.get("name"), metrics.get("seed"), metrics["differs"].keys())

    def _is_anothers(self, out: Path) -> bool:
        metrics = _read(out / "metrics.json")
        return metrics is not None and not self._is_mine(metrics)

    def _may_be_mine(self, folder: str) -> bool:
        """Tell by its name alone, which of a state of data/work is all there is, whether a folder may be this run's."""
        keys = [*self.differs, *(["seed"] if self.seed else [])]
        return folder.startswith(f"{self.name}-") and all(f"-{key}-" in folder for key in keys)


def _folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.is_dir())


def _read(file: Path) -> Any:
    """Return a file's JSON; None where there is none, or it is damaged."""
    try:
        return read_json(file) if file.is_file() else None
    except (DataError, StorageError):
        return None
