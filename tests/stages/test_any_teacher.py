"""Teachers beside the eight through the commands: their own input, finished ones, and the user's own code."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import pipeline
from pipeline.data.datasets import Dataset
from pipeline.errors import DataError
from pipeline.labels.cache import LabelCache
from stages.reports.runs import FinishedRun
from tests.support.in_process import invoke
from tests.support.project import Project

MEAN, STD = [0.5, 0.25, 0.5], [0.25, 0.5, 0.25]
MINE = f"""
from torch import nn

def build(num_classes):
    body = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(body, nn.Linear(256, num_classes))

build.input_size, build.mean, build.std = 24, {MEAN}, {STD}
"""
TEACHERS = """mine: {{model: mine.py:build, epochs: 4, lr: 0.01}}
      finished: {{model: mine.py:build, epochs: 0, weights: {weights}}}
      timm-small: {{model: timm/test_resnet, input_size: 40}}
      convnext: {{model: torchvision/convnext_tiny, input_size: 32, normalization: model}}
      squeezenet1_1: {{epochs: 8"""
WEIGHTS = "data/smoke/teachers/mine/best.safetensors"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with two teachers of the user's own, one trained, the other made of its weights and selected."""
    project = Project.create(tmp_path_factory.mktemp("any"), alone=True)
    project.edit("squeezenet1_1: {epochs: 8", TEACHERS.format(weights=WEIGHTS))
    text = (project.path / "params.yaml").read_text()
    lists = "teachers: [squeezenet1_1, mobilenet_v3_large]"
    assert lists in text
    (project.path / "params.yaml").write_text(text.replace(lists, "teachers: [mine, finished]"))
    (project.path / "mine.py").write_text(MINE)
    invoke(project, "prepare")
    invoke(project, "teacher", "mine")
    shutil.copy(project.path / WEIGHTS, project.path / "w.safetensors")
    project.edit(WEIGHTS, "w.safetensors")
    invoke(project, "teacher", "finished")
    invoke(project, "teacher-select", "--teachers", "finished")
    return project


def read(project: Project, path: str) -> dict[str, object]:
    return json.loads((project.data / path).read_text())


def test_a_finished_teacher_is_evaluated_as_it_is(project: Project) -> None:
    trained, finished = (read(project, f"teachers/{name}/metrics.json") for name in ("mine", "finished"))
    assert finished["test"] == {**trained["test"], "epoch": 0}
    assert finished["best"] == finished["last"] == {**trained["best"], "epoch": 0}
    assert (finished["epochs"], finished["at_chance"]) == (0, False)
    with (project.data / "teachers/finished/curve.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["epoch"], row["train_loss"]) == ("0", "") and float(row["top1"]) > 30
    assert "up to date" in invoke(project, "teacher", "finished")
    assert read(project, "selection.json")["winner"] == "finished"


def test_its_own_size_and_normalisation_stand_in_the_checkpoint_and_are_used_everywhere(project: Project) -> None:
    out = project.path / "data/smoke/teachers/mine"
    meta = read(project, "teachers/mine/best.json")
    assert (meta["mean"], meta["std"]) == (MEAN, STD) != (list(dataset(project).mean), list(dataset(project).std))
    assert meta["arguments"] == {"num_classes": 10, "bn_momentum": 0.0, "input_size": 24}
    assert (meta["model"], len(meta["inputs"]["code_sha256"])) == ("mine.py:build", 64)
    test = dataset(project).test
    pixels = torch.from_numpy(np.asarray(test.images[:])).permute(0, 3, 1, 2)
    # The same by hand: torch's resizing and the weights in the user's architecture.
    images = (pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    scope: dict[str, object] = {}
    exec(MINE, scope)
    module: nn.Module = scope["build"](10)  # type: ignore[operator]
    state = safetensors.torch.load_file(out / "best.safetensors")
    module.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    with torch.no_grad():
        logits = module.eval()(nn.functional.interpolate(images, 24, mode="bilinear"))
    top1 = 100 * (logits.argmax(1).numpy() == test.labels).mean()
    assert read(project, "teachers/mine/metrics.json")["test"]["top1"] == pytest.approx(top1, abs=0.2)
    cache = LabelCache.open(project.data / "labels/default.h5")
    assert (cache.clean["test"] == logits.argmax(1).numpy()).mean() > 0.99
    assert (cache.provenance["mean"], cache.provenance["std"]) == (MEAN, STD)
    result = json.loads(invoke(project, "evaluate", str(out.relative_to(project.path)), "--json"))
    assert result["top1"] == pytest.approx(top1, abs=0.2)
    with contextlib.chdir(project.path):
        model, _ = pipeline.load(out, own_code=("mine.py:build",))
    torch.testing.assert_close(model(pixels[:8]), logits[:8].softmax(1), rtol=1e-4, atol=1e-4)


def dataset(project: Project) -> Dataset:
    return Dataset.load(project.data / "prepared/dataset.json")


def test_such_a_teacher_is_distilled_and_reported(project: Project) -> None:
    invoke(project, "distill", "--student", "deit", "--set", "epochs=1")
    (run,) = (project.path / "data/runs/smoke").glob("deit-*")
    taught = json.loads((run / "metrics.json").read_text())["teacher"]
    assert taught["sha256"] == read(project, "teachers/finished/best.json")["sha256"]
    invoke(project, "record", "data/smoke/teachers/finished")
    invoke(project, "report", "--no-figures")
    report = (project.data / "reports/report.md").read_text()
    assert re.search(r"\| finished\W.*not trained", report)
    began = {name: FinishedRun.read(project.data / "teachers" / name) for name in ("mine", "finished")}
    assert {name: run and run.initial_weights for name, run in began.items()} == {
        "mine": "the weights that mine.py:build returns",
        "finished": "the weights w.safetensors",
    }


@pytest.mark.slow
def test_such_a_teacher_is_asked_online_exported_and_benched(project: Project) -> None:
    teacher = "data/smoke/teachers/mine"
    online = ("distill", "--student", "titn", "--set", "epochs=1", "--labels", "online", "--teacher", teacher)
    invoke(project, *online)
    formats = (part for name in ("safetensors", "torchscript", "onnx") for part in ("--format", name))
    invoke(project, "export", teacher, *formats, "--out", "exported")
    assert '"flops_per_image"' in invoke(project, "bench", teacher, "--batch-sizes", "2", "--rounds", "1", "--json")
    invoke(project, "report")
    invoke(project, "doctor")


def test_a_checkpoint_alone_never_has_your_code_run(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.data / "teachers/mine", tmp_path / "mine")
    (tmp_path / "mine.py").write_text("raise SystemExit('run')\n")
    elsewhere = Project(tmp_path)
    said = invoke(elsewhere, "evaluate", "mine", "--data", str(tmp_path), code=3)
    assert "its model is your own code, mine.py:build, which is run only where you name it" in said
    with pytest.raises(DataError, match=r"pipeline.load\(..., own_code=\('mine.py:build',\)\)"):
        pipeline.load(tmp_path / "mine")
    with contextlib.chdir(project.path):
        model, transform = pipeline.load("data/smoke/teachers/mine", own_code=("mine.py:build",))
    assert model(transform(np.zeros((8, 8, 3), np.uint8))[None]).shape == (1, 10)


def test_a_teacher_of_timm_trains_at_a_size_of_its_own(project: Project) -> None:
    assert "; images resized to 40 x 40\n" in invoke(project, "teacher", "timm-small")
    meta = read(project, "teachers/timm-small/best.json")
    assert (meta["model"], meta["arguments"]["input_size"]) == ("timm/test_resnet", 40)
    assert meta["mean"] == list(dataset(project).mean), "its weights are not ImageNet's"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-small", "convnext"])
def test_students_learn_from_teachers_of_timm_and_torchvision(project: Project, tmp_path: Path, name: str) -> None:
    copy = Project(tmp_path / "copy")
    shutil.copytree(project.path, copy.path)
    invoke(copy, "teacher-select", "--teachers", name)
    made_by = read(copy, f"teachers/{name}/best.json")
    cache = LabelCache.open(copy.data / "labels/default.h5")
    assert cache.provenance["checkpoint_sha256"] == made_by["sha256"]
    assert cache.provenance["mean"] == made_by["mean"]
    assert (made_by["mean"] == [0.485, 0.456, 0.406]) == (name == "convnext")
    invoke(copy, "distill", "--student", "titn", "--set", "epochs=1")
    invoke(copy, "labels", "verify", str(Path("data/smoke/labels/default.h5")))


def test_labels_by_the_teacher_as_it_was_are_not_learned_from(project: Project, tmp_path: Path) -> None:
    """The weights are the same, so that their SHA-256 does not tell."""
    shutil.copytree(project.path, tmp_path / "project")
    copy = Project(tmp_path / "project")
    invoke(copy, "distill", "--student", "deit", "--dry-run")
    copy.edit("epochs: 0, weights", "epochs: 0, input_size: 40, weights")
    invoke(copy, "teacher", "finished")
    invoke(copy, "select", "--teachers", "finished")
    refusal = invoke(copy, "distill", "--student", "deit", code=3)
    assert "labels/default.h5 does not fit: input_size is 24, expected 40; label again with `pipeline label" in refusal
    (copy.path / "mine.py").unlink()  # as on a machine that has the labels and not the teacher's code
    copy.edit("epochs: 0, input_size: 40, weights", "epochs: 0, weights")
    shutil.rmtree(copy.data / "teacher")
    shutil.copytree(project.data / "teacher", copy.data / "teacher")
    invoke(copy, "distill", "--student", "deit", "--dry-run")


def test_a_changed_file_of_the_users_trains_again(project: Project) -> None:
    file = project.path / "mine.py"
    file.write_text(MINE + "# changed\n")
    try:
        assert "(other code)" in invoke(project, "teacher", "mine", "--dry-run")
    finally:
        file.write_text(MINE)


def test_a_finished_teacher_needs_a_head_for_these_classes(project: Project) -> None:
    said = invoke(project, "teacher", "squeezenet1_1", "--set", "epochs=0", code=2)
    assert "weights 'none' leave its head for 10 classes random" in said
