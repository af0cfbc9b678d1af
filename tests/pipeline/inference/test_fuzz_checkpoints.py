"""Checkpoints and prepared data, damaged and hostile: refused in one line, never executed, never believed."""

from __future__ import annotations

import pickle
import random
import shutil
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.inference.loading import load
from tests.support.fuzz_campaign import NUM_CHECKPOINTS, NUM_PREPARED
from tests.support.fuzz_checkpoints import (
    Files,
    fuzz_checkpoints,
    fuzz_prepared,
    pickles,
    read_files,
    sealed,
    write_files,
)
from tests.support.project import Project
from tests.support.untrained import untrained


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return untrained(tmp_path_factory.mktemp("untrained") / "project")


@pytest.fixture
def project(shared: Project, tmp_path: Path) -> Project:
    shutil.copytree(shared.path, tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.mark.parametrize("count", [20, pytest.param(NUM_CHECKPOINTS, marks=pytest.mark.slow)])
def test_a_hostile_checkpoint_is_refused_in_one_line(project: Project, count: int) -> None:
    tally = fuzz_checkpoints(project, count, random.Random(count))
    assert tally.wrong == []
    assert tally.counts["refused"] > tally.counts["accepted"]


@pytest.mark.parametrize("count", [8, pytest.param(NUM_PREPARED, marks=pytest.mark.slow)])
def test_damaged_prepared_data_are_refused_or_the_same(project: Project, count: int) -> None:
    assert fuzz_prepared(project, count, random.Random(count)).wrong == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", 10**9),
        ("num_classes", True),
        ("weights", "executed.pt"),
        ("bn_momentum", 2.0),
        ("depth", 10**9),
    ],
)
def test_arguments_that_no_stage_writes_are_refused_before_anything_is_built(
    project: Project, key: str, value: object
) -> None:
    files = read_files(project.data / "teacher")
    assert isinstance(files.meta, dict)
    files.meta["arguments"][key] = value
    write_files(project.data / "teacher", files)
    with pytest.raises(DataError, match="arguments.* missing or impossible"):
        load(project.data / "teacher")


def test_a_model_is_allocated_only_once_its_tensors_fit(project: Project) -> None:
    """Every argument is within its range, but the model would take more than 800 GB."""
    files = read_files(project.data / "teacher")
    assert isinstance(files.meta, dict)
    wide = {"num_classes": 10, "image_size": 32, "width": 8192, "depth": 256, "num_heads": 1}
    write_files(
        project.data / "teacher",
        Files(files.tensors, {**files.meta, "kind": "student", "model": "vit", "arguments": wide}),
    )
    with pytest.raises(DataError, match="it belongs to another model"):
        load(project.data / "teacher")


def test_a_pickle_in_disguise_never_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.path)
    files = read_files(project.data / "teacher")
    assert isinstance(files.meta, dict)
    for pickled in pickles():
        write_files(project.data / "teacher", sealed(pickled, files.meta))
        with pytest.raises(DataError, match="not a safetensors file"):
            load(project.data / "teacher")
    assert not (project.path / "executed").exists()
    pickle.loads(pickles()[0])
    assert (project.path / "executed").exists(), "it would have run where it was unpickled"
