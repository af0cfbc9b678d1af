"""A student belongs to the labels that it learned from, not to their teacher alone."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.labels.cache import LabelCache
from pipeline.system.storage import read_json, to_json
from tests.support.in_process import invoke
from tests.support.project import Project, unseal

DISTILL = ("distill", "--student", "deit")


@pytest.fixture(scope="module")
def distilled(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a teacher, labels and a DeiT. Tests copy it."""
    project = Project(tmp_path_factory.mktemp("labels") / "project")
    shutil.copytree(taught.path, project.path)
    invoke(project, "label")
    invoke(project, *DISTILL)
    return project


@pytest.fixture
def project(distilled: Project, tmp_path: Path) -> Project:
    shutil.copytree(distilled.path, tmp_path / "project")
    return Project(tmp_path / "project")


def relabel(project: Project, view: int) -> None:
    """Give one image of a view another label, as another precision or device may."""
    file = project.data / "labels/default.h5"
    cache = LabelCache.open(file)
    labels = np.array(cache.labels)
    labels[view, 7] = (labels[view, 7] + 1) % cache.num_classes
    file.write_bytes(dataclasses.replace(cache, labels=labels).to_bytes())


@pytest.mark.parametrize("view", [0, 1])
def test_one_of_other_labels_is_trained_again(project: Project, view: int) -> None:
    before = (project.data / "students/deit/best.safetensors").read_bytes()
    relabel(project, view)
    assert "deit: train 2 epochs (other labels)" in invoke(project, *DISTILL, "--dry-run")
    assert "deit: trains again (other labels)" in invoke(project, *DISTILL)
    assert (project.data / "students/deit/best.safetensors").read_bytes() != before
    assert "deit: up to date" in invoke(project, *DISTILL)


def test_one_that_dvc_deleted_is_not_put_back_beside_other_labels(project: Project) -> None:
    shutil.rmtree(project.data / "students/deit")
    assert "deit: put back what was finished on" in invoke(project, *DISTILL, "--dry-run")
    relabel(project, 1)
    assert "deit: train 2 epochs (not trained)" in invoke(project, *DISTILL, "--dry-run")


def test_a_state_of_other_labels_is_not_gone_on_with(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.forget("students/deit")
    monkeypatch.setattr("pipeline.training.fit.Fit._save_is_due", lambda fit: fit.progress.epoch == 1)
    monkeypatch.setattr("pipeline.training.checkpoints.RunState.delete", lambda state: state.wait())
    invoke(project, *DISTILL)
    project.forget("students/deit")
    assert "deit: interrupted, goes on from epoch 2 of 2" in invoke(project, *DISTILL, "--dry-run")
    relabel(project, 1)
    assert "deit: train 2 epochs" in invoke(project, *DISTILL, "--dry-run")


def test_further_views_and_labels_that_it_does_not_read_change_nothing(project: Project) -> None:
    invoke(project, "label", "--views", ":3")
    relabel(project, 2)
    assert "deit: up to date" in invoke(project, *DISTILL)
    invoke(project, "distill", "--student", "vit")
    relabel(project, 0)
    assert "vit: up to date" in invoke(project, "distill", "--student", "vit"), "it learns from no label"


def test_one_learned_from_a_teacher_that_is_asked_belongs_to_how_it_answers(project: Project) -> None:
    online = (*DISTILL, "--labels", "online", "--teacher", "data/smoke/teacher", "--set", "epochs=1")
    invoke(project, *online)
    assert "deit: up to date" in invoke(project, *online, "--dry-run")
    project.edit("batch_size: 256, precision: fp32", "batch_size: 256, precision: bf16")
    assert "deit: train 1 epoch (other labels)" in invoke(project, *online, "--dry-run")


def test_labels_of_unaugmented_images_teach_nothing(project: Project) -> None:
    file = project.data / "labels/default.h5"
    cache = LabelCache.open(file)
    clean = {split: (row + 1) % cache.num_classes for split, row in cache.clean.items()}
    file.write_bytes(dataclasses.replace(cache, clean=clean).to_bytes())
    assert "deit: up to date" in invoke(project, *DISTILL)


def test_one_of_an_older_version_which_named_no_labels_stands(project: Project) -> None:
    file = unseal(project.data / "students/deit") / "best.json"
    meta = read_json(file)
    assert meta.pop("labels_sha256") == LabelCache.open(project.data / "labels/default.h5").digest(2, topk=False)
    file.write_bytes(to_json(meta))
    relabel(project, 0)
    assert "deit: up to date" in invoke(project, *DISTILL)


def test_students_that_learn_from_no_label_need_no_complete_file(project: Project) -> None:
    project.edit("count: 2", "count: 3")
    needed = "2 views, the recipe asks for 3 (recipes.smoke.views.default.count)"
    assert needed in invoke(project, *DISTILL, code=3)
    for arguments in (("vit",), ("deit", "--labels", "none")):
        assert ": train 2 epochs (" in invoke(project, "distill", "--student", *arguments, "--dry-run")
    assert needed in invoke(project, "distill", "--student", "deit", "--labels", "cached", code=3)
