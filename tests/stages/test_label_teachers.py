"""Labels by models of torchvision and timm, of a user's own file, and of state dicts: made, replayed, learned from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from pipeline.data.datasets import Dataset
from pipeline.labels.cache import LabelCache
from pipeline.labels.identity import PROVENANCE_FIELDS
from pipeline.models.folding import fold
from pipeline.models.own import code_sha256
from pipeline.models.teachers import build_teacher
from pipeline.training.checkpoints import checkpoint_files, read_meta
from tests.support.in_process import invoke
from tests.support.project import Project

LABELS = Path("data/smoke/labels")
ONE = ("--views", ":1")
EIGHT = "squeezenet1_1"
OWN = """
import torch

def build(num_classes):
    torch.manual_seed(3)
    layers = torch.nn.Conv2d(3, 4, 5, stride=3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
    return torch.nn.Sequential(*layers, torch.nn.Linear(4 * 10 * 10, num_classes))

build.mean, build.std = (0.25, 0.5, 0.75), (0.5, 0.5, 0.25)
"""
FLIPPED = """
def flipped(num_classes):
    net = build(num_classes)
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(3),))
    return net

flipped.mean, flipped.std = build.mean, build.std
"""


@pytest.fixture(scope="module")
def labelled(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with one view labelled by timm's, a user's and downloaded models. Who changes it copies it."""
    timm = pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("kinds") / "project"
    shutil.copytree(taught.path, folder)
    project = Project(folder)
    (folder / "mine.py").write_text(OWN)
    torch.manual_seed(1)
    resnet, squeezenet = timm.create_model("test_resnet", num_classes=10), build_teacher(EIGHT, num_classes=10)
    for module, head, size in ((resnet, resnet.fc, 48), (squeezenet, squeezenet.get_submodule("classifier.1"), 32)):
        with torch.no_grad():  # else random weights give every image the same class
            head.bias -= logits_of(project, module, size)[:50].mean(0)
    torch.save(resnet.state_dict(), folder / "resnet.pth")
    nested = {"epoch": 3, "model": {f"module.{key}": value for key, value in squeezenet.state_dict().items()}}
    torch.save(nested, folder / "theirs.pth")
    entry = "small: {model: timm/test_resnet, weights: resnet.pth, input_size: 48, epochs: 0}"
    project.edit("      densenet121: {}", f"      densenet121: {{}}\n      {entry}")
    for teacher in ("small", "mine.py:build", f"{EIGHT}=theirs.pth"):
        invoke(project, "label", *ONE, "--teacher", teacher)
    return project


def opened(project: Project, name: str) -> LabelCache:
    return LabelCache.open(project.path / LABELS / f"default@{name}.h5")


def logits_of(project: Project, module: nn.Module, size: int, mean: Any = None, std: Any = None) -> torch.Tensor:
    """The logits of the test images, by hand; without mean and std, normalised by the data's."""
    dataset = Dataset.load(project.data / "prepared/dataset.json")
    mean, std = mean or dataset.mean, std or dataset.std
    images = torch.from_numpy(np.asarray(dataset.test.images)).permute(0, 3, 1, 2).float() / 255
    inputs = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    resized = nn.functional.interpolate(inputs, (size, size), mode="bilinear")
    with torch.no_grad():
        logits: torch.Tensor = module.eval()(resized)
    return logits


def test_a_model_of_timm_labels_at_its_own_size(labelled: Project) -> None:
    import timm

    cache, module = opened(labelled, "small"), timm.create_model("test_resnet", num_classes=10)
    module.load_state_dict(torch.load(labelled.path / "resnet.pth", weights_only=True))
    recorded, dataset = cache.provenance, Dataset.load(labelled.data / "prepared/dataset.json")
    assert (recorded["teacher"], recorded["input_size"]) == ("timm/test_resnet", 48)
    sha256 = hashlib.sha256((labelled.path / "resnet.pth").read_bytes()).hexdigest()
    assert recorded["checkpoint_sha256"] == sha256, "of the file that it was given"
    assert recorded["mean"] == list(dataset.mean) and recorded["versions"]["timm"] == timm.__version__
    assert recorded.get("folded", True) == fold(module, 48)[1]
    labels = logits_of(labelled, module, 48).argmax(1).numpy()
    assert (cache.clean["test"] == labels).mean() > 0.99 and len(set(labels.tolist())) > 1


def test_a_state_dict_from_elsewhere_labels(labelled: Project) -> None:
    cache, module = opened(labelled, "theirs"), build_teacher(EIGHT, num_classes=10)
    state = torch.load(labelled.path / "theirs.pth", weights_only=True)["model"]
    module.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    assert set(cache.provenance) == set(PROVENANCE_FIELDS) and cache.accuracy is not None
    labels = logits_of(labelled, module, 32).argmax(1).numpy()
    assert (cache.clean["test"] == labels).mean() > 0.99 and len(set(labels.tolist())) > 1


def test_a_users_function_labels_with_its_own_normalisation(labelled: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(labelled.path)
    cache, namespace = opened(labelled, "mine"), {}
    exec(OWN, namespace)
    build: Callable[..., nn.Module] = namespace["build"]
    module = build(num_classes=10)
    recorded = cache.provenance
    assert (recorded["teacher"], recorded["mean"], recorded["std"]) == (
        "mine.py:build",
        [0.25, 0.5, 0.75],
        [0.5, 0.5, 0.25],
    )
    assert recorded["code_sha256"] == code_sha256("mine.py:build") and "input_size" not in recorded
    assert recorded["checkpoint_sha256"] == checkpoint_files("best", module.state_dict(), {})[1]
    labels = logits_of(labelled, module, 32, [0.25, 0.5, 0.75], [0.5, 0.5, 0.25]).argmax(1).numpy()
    assert (cache.clean["test"] == labels).mean() > 0.99


def test_all_have_one_fingerprint_and_are_replayed(labelled: Project) -> None:
    assert len({opened(labelled, name).fingerprint for name in ("small", "theirs", "mine")}) == 1
    named = {"theirs": ("--teacher", f"{EIGHT}=theirs.pth"), "mine": ("--teacher", "mine.py:build"), "small": ()}
    for name, teacher in named.items():
        out = invoke(labelled, "labels", "verify", f"{LABELS}/default@{name}.h5", "--sample", "60", *teacher)
        assert "60 labels replayed, 0 differ" in out, name
    for name in ("theirs", "mine"):  # a state dict's file is not recorded, and no label file runs code
        out = invoke(labelled, "labels", "verify", f"{LABELS}/default@{name}.h5", code=3)
        assert "name the right one with --teacher" in out


def test_a_teacher_that_sees_otherwise_is_another(labelled: Project, tmp_path: Path) -> None:
    shutil.copytree(labelled.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    assert "up to date" in invoke(project, "label", *ONE, "--teacher", "small")
    project.edit("input_size: 48", "input_size: 64")
    assert "have this name" in invoke(project, "label", *ONE, "--teacher", "small", code=2)
    verify = ("labels", "verify", f"{LABELS}/default@small.h5")
    assert "input_size is 48, expected 64" in invoke(project, *verify, code=3)
    project.edit("weights: resnet.pth", "weights: theirs.pth")
    assert "name the right one with --teacher" in invoke(project, *verify, code=3)


def test_another_function_of_the_same_file_is_another_teacher(labelled: Project, tmp_path: Path) -> None:
    """Its weights are the same, and so is the file."""
    shutil.copytree(labelled.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    (project.path / "two.py").write_text(OWN + FLIPPED)
    label = ("label", *ONE, "--as", "two", "--teacher")
    assert "sealed" in invoke(project, *label, "two.py:build")
    assert "up to date" in invoke(project, *label, "./two.py:build"), "the same, spelled otherwise"
    assert "labels by two.py:build (SHA-256 " in invoke(project, *label, "two.py:flipped", code=2)


@pytest.mark.parametrize("name", ["small", "mine"])
def test_a_student_learns_from_any_of_them(labelled: Project, tmp_path: Path, name: str) -> None:
    shutil.copytree(labelled.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    invoke(project, "distill", "--student", "deit", "--views", "1", "--set", "epochs=1", "--teacher-labels", name)
    [out] = (project.path / "data/runs/smoke").glob(f"deit-teacher_labels-{name}-*")
    meta = read_meta(out)
    assert meta is not None and meta["teacher"]["labels"] == name
    assert meta["inputs"]["teacher"] == opened(project, name).provenance["checkpoint_sha256"]


@pytest.mark.slow
def test_a_student_learns_from_a_convnext_of_torchvision(taught: Project, tmp_path: Path) -> None:
    shutil.copytree(taught.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    torch.save(torchvision.models.convnext_tiny(num_classes=10).state_dict(), project.path / "convnext.pth")
    entry = "convnext: {model: torchvision/convnext_tiny, weights: convnext.pth, input_size: 64, epochs: 0}"
    project.edit("      densenet121: {}", f"      densenet121: {{}}\n      {entry}")
    invoke(project, "label", "--teacher", "convnext", *ONE)
    assert opened(project, "convnext").provenance["input_size"] == 64
    file = f"{LABELS}/default@convnext.h5"
    assert "0 differ" in invoke(project, "labels", "verify", file, "--sample", "50")
    invoke(project, "distill", "--student", "titn", "--views", "1", "--set", "epochs=1", "--teacher-labels", "convnext")


@pytest.mark.parametrize(
    ("teacher", "code", "words"),
    [
        ("theirs.pth", 2, "no checkpoint of ours; write --teacher MODEL=theirs.pth"),
        ("mine.py", 2, "write --teacher mine.py:FUNCTION"),
        ("mine.py:nothing", 2, "has no function 'nothing'"),
        ("torchvision/resnet81", 2, "--teacher torchvision/resnet81: torchvision has no classification model"),
        ("torchvision/resnet18", 2, "random"),
        ("squeezenet1_1=resnet.pth", 3, "teacher squeezenet1_1: weights"),
        ("resnet18=theirs.pth", 2, "no teacher of recipe smoke"),
        ("densenet121", 3, "densenet121 is not trained; run `pipeline teacher --recipe smoke densenet121`"),
        ("nobody", 2, "no path that exists and no model"),
        ("", 2, "an empty path"),
        ("x" * 5000, 2, "no path that exists and no model"),
    ],
)  # fmt: skip
def test_what_is_no_teacher_is_refused(labelled: Project, teacher: str, code: int, words: str) -> None:
    assert words in invoke(labelled, "label", "--teacher", teacher, "--dry-run", code=code)
