"""--dry-run: what a command would do, and why, without writing anything; why a result is not up to date."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipeline.config.params import load_params
from pipeline.labels.cache import LabelCache
from pipeline.system.stopping import StopSignal
from pipeline.training.checkpoints import RunState
from stages.label import LabelRequest, plan_labels
from stages.shared.context import Context
from stages.shared.runs import differences, why_stale
from tests.support.in_process import invoke
from tests.support.project import Project, unseal


@pytest.fixture(scope="module")
def distilled(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with one teacher, labels and one student. Tests that change anything copy it."""
    project = Project(tmp_path_factory.mktemp("dry") / "project")
    shutil.copytree(taught.path, project.path)
    invoke(project, "label")
    invoke(project, "distill", "--student", "vit")
    return project


@pytest.fixture
def project(distilled: Project, tmp_path: Path) -> Project:
    shutil.copytree(distilled.path, tmp_path / "project")
    return Project(tmp_path / "project")


def dry(project: Project, *arguments: str, code: int = 0) -> str:
    """Run a command with --dry-run, and check that it leaves everything as it is."""

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(project.path.rglob("*"))}

    before = state()
    text = invoke(project, *arguments, "--dry-run", code=code)
    assert state() == before
    return text


def test_what_is_up_to_date_is_called_so(distilled: Project) -> None:
    assert "squeezenet1_1: up to date (data/smoke/teachers/squeezenet1_1)" in dry(distilled, "teacher", "squeezenet1_1")
    assert "vit: up to date (data/smoke/students/vit)" in dry(distilled, "distill", "--student", "vit")
    assert "data/smoke/labels/default.h5: up to date, 2 views" in dry(distilled, "label")
    assert "labels of the views default: data/smoke/labels/default.h5: up to date" in dry(
        distilled, "teacher-select", "--teachers", "squeezenet1_1"
    )
    assert "vit: train 2 epochs (--fresh)" in dry(distilled, "distill", "--student", "vit", "--fresh")


def test_what_would_run_is_named_with_the_fields_that_differ(project: Project) -> None:
    project.edit("squeezenet1_1: {epochs: 8}", "squeezenet1_1: {epochs: 3, lr: 0.05}")
    project.edit("crop: 2, flip: false", "crop: 3, flip: true")
    out = dry(project, "teacher", "squeezenet1_1")
    assert "squeezenet1_1: train 3 epochs (" in out
    for words in ("epochs 8 -> 3", "lr 0.001 -> 0.05", "views.crop 2 -> 3", ", 1 more)"):
        assert words in out
    assert "weight_decay" not in out
    ran = invoke(project, "teacher", "squeezenet1_1", "--set", "epochs=1")
    assert "trains again" not in ran
    out = dry(project, "teacher-select", "--teachers", "squeezenet1_1,mobilenet_v3_large")
    assert "teacher mobilenet_v3_large: train 1 epoch (not trained); writes data/smoke/teachers" in out
    assert "labels of the views default: label 2 views, after the selection from 2 teachers" in out


def test_a_result_that_is_made_again_says_why(project: Project) -> None:
    project.edit("vit: {}", "vit: {epochs: 1}")
    assert "vit: trains again (epochs 2 -> 1)" in invoke(project, "distill", "--student", "vit")


@pytest.mark.parametrize("damage", ['{"seed": 0}', "{"])
def test_a_damaged_checkpoint_is_trained_again(project: Project, damage: str) -> None:
    student = project.data / "students/vit"
    before = (student / "best.safetensors").read_bytes()
    project.forget()
    (unseal(student) / "best.json").write_text(damage)
    assert "its checkpoint is damaged" in dry(project, "distill", "--student", "vit")
    assert "vit: trains again (its checkpoint is damaged)" in invoke(project, "distill", "--student", "vit")
    assert (student / "best.safetensors").read_bytes() == before
    assert "vit: up to date" in invoke(project, "distill", "--student", "vit")


def test_labels_of_other_views_are_labelled_again(project: Project) -> None:
    project.edit("count: 2\n        seed: 0", "count: 2\n        seed: 5")
    out = dry(project, "label")
    assert "view_recipe.seed is 0, expected 5" in out and "label the views 0:2 of 673 images, argmax" in out
    assert "view_recipe.seed" in dry(project, "distill", "--student", "titn", code=3)


def test_an_interrupted_run_goes_on(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.forget("students/vit")
    monkeypatch.setattr("pipeline.training.fit.Fit._save_is_due", lambda fit: fit.progress.epoch == 1)
    monkeypatch.setattr("pipeline.training.checkpoints.RunState.delete", lambda state: state.wait())
    invoke(project, "distill", "--student", "vit")
    project.forget("students/vit")
    out = dry(project, "distill", "--student", "vit")
    assert "vit: interrupted, goes on from epoch 2 of 2, step 6 (not trained)" in out
    assert "train 2 epochs" in dry(project, "distill", "--student", "vit", "--fresh")


def test_labels_are_extended_and_sliced(project: Project) -> None:
    project.edit("count: 2", "count: 6")
    assert "label the views 2:6 of" in dry(project, "label")
    assert "label the views 3:4 of" in dry(project, "label", "--views", "3:4")
    assert "label the views 0:6 of 673 images, argmax, by squeezenet1_1 in fp32 (--fresh)" in dry(
        project, "label", "--fresh"
    )
    invoke(project, "label", "--views", "4:5")
    assert "label the views 2:4, 5:6 of" in dry(project, "label")
    assert LabelCache.open(project.data / "labels/default.h5").num_views == 2


def test_labelling_anew_leaves_what_is_there_until_it_begins(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.edit("count: 2", "count: 4")
    invoke(project, "label", "--views", "3:4")
    labels, work = project.data / "labels", project.path / "data/work/smoke/labels/default"
    parts = {path: path.read_bytes() for path in work.glob("*.part")}
    assert len(parts) == 1
    assert "label the views 0:4 of 673 images" in dry(project, "label", "--fresh")
    assert {path: path.read_bytes() for path in work.glob("*.part")} == parts
    assert [path.name for path in labels.iterdir()] == ["default.h5"]
    monkeypatch.chdir(project.path)
    params = load_params(Path("params.yaml"))
    plan = plan_labels(Context(params, params.select(None), Console(), StopSignal()), LabelRequest(fresh=True))
    assert project.path / plan.parts.directory == work, "which `label --fresh` deletes"
    assert (plan.path, plan.missing) == (Path("data/smoke/labels/default.h5"), [0, 1, 2, 3])
    invoke(project, "label", "--fresh")
    assert not list(work.glob("*.part"))
    assert "up to date, 4 views" in dry(project, "label")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("teacher", "squeezenet1_1"), 3, "pipeline prepare --recipe smoke"),
        (("distill", "--student", "vit"), 3, "pipeline prepare --recipe smoke"),
        (("distill", "--student", "bit"), 2, "titn, tnt, deit, vit"),
        (("label",), 3, "pipeline teacher-select"),
        (("label", "--view-recipe", "cutout"), 2, "default, mixup"),
        (("teacher-select",), 0, "prepare: no prepared data"),
        (("teacher-select",), 0, "teacher squeezenet1_1: train 8 epochs (no data yet)"),
        (("teacher-select", "--recipe", "cifar100"), 3, "--download"),
        (("prepare",), 0, "read the bundled digits"),
        (("prepare",), 0, "write data/smoke/prepared/dataset.json (no data yet)"),
        (("prepare", "--recipe", "cifar100"), 3, "pipeline prepare --recipe cifar100 --download"),
        (("prepare", "--recipe", "mnist", "--download"), 0, "mnist in data/raw, downloading what is missing"),
        (("prepare", "--recipe", "folder"), 2, "--from"),
        (("prepare", "--recipe", "folder", "--from", "nowhere"), 2, "nowhere"),
    ],
)
def test_without_data_it_says_what_is_missing(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    assert words in dry(Project.create(tmp_path), *arguments, code=code)


def test_a_folder_is_counted_and_prepared_data_of_other_settings_are_named(project: Project, tmp_path: Path) -> None:
    for split, label in (("train", "cat"), ("train", "dog"), ("test", "dog")):
        (tmp_path / "images" / split / label).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / split / label / "0.png")
    (tmp_path / "images/train/cat/anim.gif").write_text("mine")
    (tmp_path / "images/train/loose.png").touch()
    assert "digits has 10 classes" in dry(project, "prepare", "--from", str(tmp_path / "images"), code=3)
    whole = Project.create(tmp_path / "whole")
    out = dry(whole, "prepare", "--recipe", "folder", "--from", str(tmp_path / "images"))
    assert "read 2 train, 1 test images of 2 classes in" in out and "1 other file, for which it is refused" in out
    assert "not used: 1 .gif file (train/cat/anim.gif)" in out
    assert "of the same settings" in dry(project, "prepare")
    project.edit("split_seed: 0", "split_seed: 1")
    assert "of other settings: split_seed 0 -> 1" in dry(project, "prepare")


def test_differences_are_named_by_their_last_key_and_once() -> None:
    recorded = {
        "training": {"lr": 0.1, "width": 48, "old": 1},
        "arguments": {"width": 48},
        "seed": 0,
        "scores": {"top1": 1},
    }
    expected = {
        "arguments": {"width": 64},
        "training": {"lr": 0.05, "width": 64, "clip": 1.0},
        "seed": 0,
        "inputs": {"teacher": "new"},
    }
    named = ["width 48 -> 64", "lr 0.1 -> 0.05", "clip none -> 1", "old 1 -> none", "inputs not recorded"]
    assert differences(recorded, expected) == named
    assert differences({}, {"seed": 0, "inputs": {"teacher": "new"}}) == ["seed none -> 0", "inputs not recorded"]
    other = {"dataset_sha256": "b", "mean": [0.5], "inputs": {"teacher": "b"}, "compile": True}
    assert differences({"dataset_sha256": "a", "mean": [0.1], "inputs": {"teacher": "a"}, "compile": False}, other) == [
        "other data",
        "another teacher",
        "compile false -> true",
    ]


def test_a_directory_without_all_of_its_files_is_not_up_to_date(distilled: Project, tmp_path: Path) -> None:
    out = tmp_path / "vit"
    assert why_stale(out, "", {}) == "not trained"
    shutil.copytree(distilled.data / "students/vit", out)
    assert why_stale(out, "", {}) == "trained under other settings, or by another version"
    (out / "curve.csv").unlink()
    assert why_stale(out, "", {}) == "curve.csv missing"
    (out / "best.safetensors").unlink()
    assert why_stale(out, "", {}) == "a checkpoint without its other files"


def test_a_state_can_be_looked_at_without_loading_it(tmp_path: Path) -> None:
    state = RunState(tmp_path, "f")
    assert state.peek() is None
    for step in range(3):
        state.save({"step": torch.tensor(step)}, {"step": step}, {})
    state.wait()
    newest = RunState(tmp_path, "f").peek()
    assert newest is not None and newest["step"] == 2
    assert RunState(tmp_path, "g").peek() is None
    (tmp_path / "state-b.safetensors").write_bytes(b"cut")
    (tmp_path / "state-a.json").write_text("{")
    assert RunState(tmp_path, "f").peek() is None
    state.save({"step": torch.tensor(9)}, {"step": 9}, {})
    state.wait()
    peeked = RunState(tmp_path, "f").peek()
    assert peeked is not None and peeked["step"] == 9
