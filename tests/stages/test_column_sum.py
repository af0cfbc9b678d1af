"""A VGG through `pipeline teacher`: its first layer is summed, its checkpoint torchvision's; a plain run goes on so."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch

from tests.support.in_process import invoke
from tests.support.project import Project

VGG = "from tests.support.vgg import small_vgg\n\n\ndef build(num_classes):\n    return small_vgg(num_classes)\n"
TEACHERS = "vgg: {model: vgg.py:build, epochs: 2, optimizer: sgd, lr: 0.1, clip: 1.0}\n      squeezenet1_1: {epochs: 8"
SUMMED = "first linear layer as its column sum"
OUT = "teachers/vgg"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "project", alone=True)
    project.edit("squeezenet1_1: {epochs: 8", TEACHERS)
    (project.path / "vgg.py").write_text(VGG)
    invoke(project, "prepare")
    return project


def weights(project: Project) -> dict[str, object]:
    return {
        name: tensor.tolist()
        for name, tensor in safetensors.torch.load_file(project.data / OUT / "best.safetensors").items()
    }


def test_a_vgg_is_trained_as_its_column_sum_to_a_checkpoint_of_torchvisions_shape(project: Project) -> None:
    assert SUMMED in invoke(project, "teacher", "vgg")
    run = json.loads((project.data / OUT / "run.json").read_text())
    assert run["execution"]["column_sum"] is True
    layer = weights(project)["classifier.0.weight"]
    assert (len(layer), len(layer[0])) == (16, 8 * 49)  # type: ignore[arg-type, index]
    scores = json.loads((project.data / OUT / "metrics.json").read_text())["test"]
    again = json.loads(invoke(project, "evaluate", f"data/smoke/{OUT}", "--json"))
    assert again["top1"] == pytest.approx(scores["top1"], abs=0.2)
    assert again["loss"] == pytest.approx(scores["loss"], rel=1e-4), "the checkpoint's columns make the same logits"
    assert SUMMED not in invoke(project, "teacher", "vgg", "--set", "optimizer=rmsprop", "--set", "epochs=1")


def test_a_run_that_began_plain_goes_on_plain(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(step=2)
    monkeypatch.setattr("pipeline.system.stopping.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    with monkeypatch.context() as older:
        older.setattr("pipeline.training.column_sum.SUMMABLE", ())
        assert SUMMED not in invoke(project, "teacher", "vgg")
        whole = weights(project)
        project.forget(OUT)
        invoke(project, "teacher", "vgg", "--time-limit", "11s", code=75)
    out = invoke(project, "teacher", "vgg")
    assert "going on from epoch" in out and SUMMED not in out
    assert weights(project) == whole
    assert SUMMED in invoke(project, "teacher", "vgg", "--fresh")
