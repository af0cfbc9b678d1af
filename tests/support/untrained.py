"""A project with an untrained teacher, made in a second, for tests of refusals."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.config.params import load_params
from pipeline.data.datasets import Dataset
from pipeline.models.teachers import build_teacher
from pipeline.training.checkpoints import save_checkpoint
from stages.prepare import prepare
from stages.shared.runs import describe
from tests.support.project import Project

NAME = "squeezenet1_1"


def untrained(path: Path, lay: Callable[[Project], object] = lambda project: None) -> Project:
    """Make a project with prepared data and a selected teacher of random weights; `lay` may change it before."""
    project = Project.create(path, alone=True)
    lay(project)
    recipe = load_params(path / "params.yaml").select(None)
    with contextlib.chdir(path):
        prepare(recipe, out=project.data.relative_to(path) / "prepared", raw=Path("data/raw"))
    dataset = Dataset.load(project.data / "prepared" / "dataset.json")
    arguments = {"num_classes": dataset.num_classes, "bn_momentum": 0.0}
    torch.manual_seed(0)
    model = build_teacher(NAME, weights="none", **arguments)
    description = describe(dataset, recipe.name, kind="teacher", model=NAME, arguments=arguments)
    meta = {**description, "training": dataclasses.asdict(recipe.teachers[NAME])}
    save_checkpoint(project.data / "teacher", "best", model.state_dict(), meta)
    return project
