"""What dvc.yaml says of a stage: the code that it depends on, and the files that `dvc commit` needs."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import stages
from pipeline.config.params import Params, load_yaml
from pipeline.errors import UsageError
from pipeline.system.canonical import fingerprint
from stages.shared.paths import DATA, STAGES

_CODE = Path(stages.__file__).parents[1]  # where the code that is running lies
_PACKAGES = ["pipeline", "stages"]
_DVC_FILE = "dvc.yaml"


@functools.cache
def code_digest(stage: str) -> str:
    """Return the SHA-256 of the code that a stage depends on, as it was when this process first asked.

    The package's own dvc.yaml says which that is, not the project's. Of a stage that it lacks, all code counts.

    Args:
        stage: Its name in dvc.yaml, as `prepare` or `teacher@vgg16`.
    """
    definition = _own_definitions().get(stage.partition("@")[0])
    deps = _PACKAGES if definition is None else [dep for dep in definition.get("deps", []) if not _is_data(dep)]
    return fingerprint({dep: _digests(_CODE / dep) for dep in deps})


def can_commit(stage: str, recipe: str, params: Params, project: Path = Path()) -> bool:
    """Tell whether `dvc commit -f STAGE` works in a folder: it is a stage, and whatever it reads and makes is there.

    Args:
        stage: Its name, as `prepare` or `teacher@vgg16`.
        recipe: The recipe that was worked on; DVC knows only that which params.yaml names.
        params: All of params.yaml.
        project: The folder.
    """
    name, _, item = stage.partition("@")
    definition = _definitions(project / _DVC_FILE).get(name)
    lists: dict[str, Mapping[str, str]] = {
        "teacher": {teacher: teacher for teacher in params.teachers},
        "label": {views: views for views in params.view_recipes},
        "student": params.students,
    }
    if recipe != params.recipe or definition is None or item not in lists.get(name, {"": ""}):
        return False
    values = {"recipe": recipe, "key": item, "item": lists[name][item] if item else ""}
    files = [
        next(iter(entry)) if isinstance(entry, Mapping) else entry
        for part in ("deps", "outs", "metrics", "plots")
        for entry in definition.get(part, [])
    ]
    named = [re.sub(r"\$\{(\w+)\}", lambda match: values.get(match[1], ""), file) for file in files]
    return all((project / file).exists() for file in named)


def _is_data(dep: str) -> bool:
    return Path(dep).is_relative_to(DATA)


@functools.cache
def _own_definitions() -> Mapping[str, Mapping[str, Any]]:
    return _definitions(STAGES)


def _definitions(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the stages that a dvc.yaml defines, those of a `foreach` once; none where it cannot be read."""
    try:
        tree = load_yaml(file.read_text(encoding="utf-8"), _DVC_FILE)
        return {name: stage.get("do", stage) for name, stage in tree["stages"].items()}
    except (OSError, UnicodeDecodeError, UsageError, KeyError, TypeError, AttributeError):
        return {}


@functools.cache
def _digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of each file below a folder, but for what Python compiles."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }
