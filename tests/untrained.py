"""A project whose teacher has learned nothing, made in a second: for tests of what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from pipeline.checkpoints import save_checkpoint
from pipeline.datasets import Dataset
from pipeline.params import load_params
from pipeline.teachers import build_teacher
from stages.models import describe
from stages.prepare import prepare
from tests.project import Project

NAME = "squeezenet1_1"


def untrained(path: Path) -> Project:
    """Make a project with prepared data and a selected teacher of random weights."""
    project = Project.create(path)
    recipe = load_params(path / "params.yaml").select(None)
    prepare(recipe, out=project.data / "prepared", raw=path / "data" / "raw")
    dataset = Dataset.load(project.data / "prepared" / "dataset.h5")
    arguments = {"num_classes": dataset.num_classes, "bn_momentum": 0.0}
    torch.manual_seed(0)
    model = build_teacher(NAME, weights="none", **arguments)
    description = describe(dataset, recipe.name, kind="teacher", model=NAME, arguments=arguments)
    meta = {**description, "training": dataclasses.asdict(recipe.teachers[NAME])}
    save_checkpoint(project.data / "teacher", "best", model.state_dict(), meta)
    return project
