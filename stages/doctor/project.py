"""The project's folder: DVC, prepared data or what they are made from, and the teachers' initial weights."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import torch

from pipeline.config.recipes import Recipe
from pipeline.data.sources import check_source
from pipeline.models.teachers import weights_url
from stages.doctor.findings import FAULTS, OK, PROBLEM, WARNING, Finding
from stages.doctor.work import Job
from stages.shared.context import Context

DVC = Path(".dvc")


def dvc() -> list[Finding]:
    """Say whether `dvc repro` works here, and where `dvc push` would go."""
    try:
        version = importlib.metadata.version("dvc")
    except importlib.metadata.PackageNotFoundError:
        return []  # named among the extras
    if shutil.which("dvc", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") is None:
        return [Finding("project", WARNING, f"DVC {version} is installed, but there is no command `dvc`", "mend PATH")]
    if not (DVC.is_dir() and Path("dvc.yaml").is_file()):
        what = f"DVC {version}, but this folder has no .dvc and dvc.yaml: `dvc repro` does not work here"
        return [Finding("project", WARNING, what, "run it in a clone of the project, or use the commands alone")]
    remotes = _remotes()
    where = f"remotes {', '.join(remotes)}" if remotes else "no remote: `dvc push` and `dvc pull` have no place to go"
    return [Finding("project", OK, f"DVC {version} in a checkout, {where}")]


def dvc_setting(section: str, key: str) -> str | None:
    """Return a setting of DVC's own configuration in this folder; None where there is none."""
    parser = _configuration()
    return parser.get(section, key, fallback=None)


def _remotes() -> list[str]:
    sections = (section.strip("'\" ") for section in _configuration().sections())
    return [section.split()[-1].strip('"') for section in sections if section.startswith("remote ")]


def _configuration() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read([DVC / "config", DVC / "config.local"])
    except (configparser.Error, UnicodeDecodeError):
        return configparser.ConfigParser()
    return parser


def data(context: Context) -> tuple[list[Finding], bool]:
    """Say whether there are data, or what to make them from, and return whether the prepared ones can be used."""
    paths, recipe = context.paths, context.recipe
    if paths.is_prepared:
        try:
            dataset = context.dataset()
        except FAULTS as error:
            return [Finding("data", PROBLEM, str(error))], False
        counts = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
        size = f"{dataset.image_size}x{dataset.image_size}"
        return [Finding("data", OK, f"{paths.dataset}: {counts} images of {size}, {dataset.num_classes} classes")], True
    try:
        check_source(recipe, paths.raw)
    except FAULTS as error:
        return [Finding("data", PROBLEM, str(error))], False
    where = "comes with this package" if recipe.dataset.source == "digits" else f"is in {paths.raw}"
    makers = "`pipeline prepare`, teacher-select and DVC make them"
    return [Finding("data", OK, f"no prepared data yet; {recipe.dataset.source} {where}, and {makers}")], False


def has_source(recipe: Recipe, raw: Path) -> bool:
    """Tell whether the recipe's source lies in `raw`, as far as names tell."""
    try:
        check_source(recipe, raw)
    except FAULTS:
        return False
    return True


def weights_file(teacher: str) -> Path:
    """Return where torch.hub keeps a teacher's ImageNet weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / weights_url(teacher).rsplit("/", 1)[1]


def weights(context: Context, jobs: list[Job]) -> list[Finding]:
    """Say whether the initial weights of the teachers that are to be trained are there."""
    found, missing = [], []
    wanted = [
        (job.name, context.recipe.teachers[job.name].weights) for job in jobs if job.kind == "teacher" and job.why
    ]
    for name, source in wanted:
        if source == "imagenet" and not weights_file(name).is_file():
            missing.append(name)
        elif source not in ("imagenet", "none") and not Path(source).is_file():
            text = f"teachers.{name}: weights {source!r} does not exist"
            found.append(Finding("data", PROBLEM, text, "choose imagenet, none or the path of a state dict"))
    if missing:
        folder = weights_file(missing[0]).parent
        text = f"ImageNet weights of {', '.join(missing)} are not in {folder}: torchvision downloads them"
        found.append(Finding("data", WARNING, text, "without a network put them there, or write weights: none"))
    elif any(source == "imagenet" for _, source in wanted):
        found.append(Finding("data", OK, f"ImageNet weights are in {torch.hub.get_dir()}"))
    return found
