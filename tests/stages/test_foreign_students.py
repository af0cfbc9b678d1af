"""Students of timm and of a user's file by the commands: trained, taught by both heads, and used again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.models.students import STUDENTS, Student
from pipeline.system.stopping import StopSignal
from pipeline.training.checkpoints import read_meta
from stages.doctor import space
from stages.reports.runs import FinishedRuns
from stages.reports.tables import drops_table, settings_table
from stages.shared.context import Context
from stages.shared.params import read_params
from tests.support.in_process import invoke
from tests.support.project import Project

OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, width), nn.BatchNorm1d(width))
        self.class_head, self.distillation_head = nn.Linear(width, num_classes), nn.Linear(width, num_classes)

    def forward(self, images):
        features = self.body(images)
        return self.class_head(features), self.distillation_head(features)

def build(num_classes, image_size, width=8):
    return Net(num_classes, width)
"""
GEOMETRY = {"patch_size", "pixel_size", "width", "depth", "num_heads", "pixel_width", "pixel_heads"}


@pytest.fixture(scope="module")
def trained(small_labelled: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a student of the user's own file and one of timm."""
    pytest.importorskip("timm")
    project = Project(tmp_path_factory.mktemp("foreign") / "project")
    shutil.copytree(small_labelled.path, project.path)
    (project.path / "my_student.py").write_text(OWN)
    project.edit(
        "vit: {}",
        "vit: {}\n      mine: {model: 'my_student.py:build', epochs: 1, arguments: {width: 12}}\n      small: "
        "{model: timm/test_vit, epochs: 1, decay: matrices, arguments: {depth: 1, embed_dim: 24, num_heads: 3}}",
    )
    for student in ("mine", "small"):
        invoke(project, "distill", "--student", student)
    return project


def test_a_users_student_learns_by_its_second_head_and_its_checkpoint_says_what_it_was(trained: Project) -> None:
    out, code = trained.data / "students/mine", hashlib.sha256(OWN.encode()).hexdigest()
    meta, metrics = read_meta(out), json.loads((out / "metrics.json").read_text())
    assert meta is not None and meta["model"] == "my_student.py:build"
    assert meta["arguments"] == {"num_classes": 10, "image_size": meta["image_size"], "width": 12}
    assert meta["inputs"]["code_sha256"] == code and not GEOMETRY & meta["training"].keys()
    assert metrics["distilled"] and metrics["test"]["distillation_top1"] is not None
    assert metrics["parameters"] == 192 * 12 + 12 + 2 * 12 + 2 * (12 * 10 + 10)
    small = json.loads((trained.data / "students/small/metrics.json").read_text())
    assert not small["distilled"] and "code_sha256" not in (read_meta(trained.data / "students/small") or {})["inputs"]


def test_a_changed_file_trains_again_and_geometry_of_others_does_not(trained: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(trained.path, project.path)
    project.edit("depth: 1, width: 48", "depth: 2, width: 96")
    for student in ("mine", "small"):
        assert f"{student}: up to date" in invoke(project, "distill", "--student", student, "--dry-run")
    (project.path / "my_student.py").write_text(OWN + "\n# another\n")
    assert "mine: train 1 epoch (other code)" in invoke(project, "distill", "--student", "mine", "--dry-run")


@pytest.mark.parametrize("student", ["mine", "small"])
def test_it_is_evaluated_used_exported_and_measured(trained: Project, student: str, tmp_path: Path) -> None:
    out = trained.data / "students" / student
    size = (read_meta(out) or {})["image_size"]
    Image.fromarray(np.full((size, size, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    best = json.loads((out / "metrics.json").read_text())["test"]["top1"]
    assert f"{best:.2f}" in invoke(trained, "evaluate", str(out))
    answer = json.loads(invoke(trained, "predict", str(out), str(tmp_path / "grey.png"), "--json"))
    assert answer
    exported = tmp_path / "exported"
    invoke(trained, "export", str(out), "--format", "safetensors", "--format", "torchscript", "--out", str(exported))
    assert invoke(trained, "predict", str(exported), str(tmp_path / "grey.png"), "--json")
    measured = invoke(trained, "bench", str(out), "--rounds", "1", "--batch-sizes", "1", "--json")
    parameters = json.loads((out / "metrics.json").read_text())["parameters"]
    assert json.loads(measured)["models"][0]["parameters"] == parameters


def known_to_dvc(project: Project) -> None:
    """Name both in the list at the top, which `dvc repro` and the doctor go by."""
    file = project.path / "params.yaml"
    file.write_text(file.read_text().replace("students:\n", "students:\n  mine: default\n  small: default\n", 1))


def test_tables_name_their_figures_and_the_doctor_tries_them(trained: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(trained.path, project.path)
    known_to_dvc(project)
    with contextlib.chdir(project.path):
        params = read_params(Path("params.yaml"))
        context = Context(params, params.select("smoke"), Console(quiet=True), StopSignal(), "cpu")
        rows = {row[0]: row[1:] for row in settings_table(context.recipe, 10).rows}
        assert rows["mine"] == ["32", "-", "-", "-", "-", "-", "0.00"] and rows["small"][:-1] == rows["mine"][:-1]
        runs = FinishedRuns.read(context.recipe, context.paths)
        assert [runs.outdated(runs.students[name]) for name in ("mine", "small")] == [[], []]
        taught = [row[1] for row in drops_table(runs).rows]
        assert "mine" in taught and "small" not in taught
        sizes = space.sizes(context, prepared=True)
        assert sizes is not None
        found = [finding.text for finding in space.foreign_students(context, sizes)]
        assert found == [
            "students.mine: my_student.py:build works and has both heads",
            "students.small: timm/test_vit works and has a class head alone",
        ]
        Path("my_student.py").write_text(OWN.replace("AvgPool2d(4)", "AvgPool2d(8)"))
        wrong, _ = space.foreign_students(context, sizes)
        assert wrong.mark == "problem"
        assert "students.mine: model my_student.py:build in training mode, for images (2, 3, 32, 32)" in wrong.text


@pytest.mark.slow
def test_a_report_shows_them_and_onnx_files_answer_as_they_do(trained: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(trained.path, project.path)
    invoke(project, "report")
    text = (project.data / "reports/report.md").read_text()
    assert "| mine |" in text and "| small |" in text
    known_to_dvc(project)
    assert "students.mine: my_student.py:build works" in invoke(project, "doctor", code=None)
    for student in ("mine", "small"):
        out = project.data / "students" / student
        invoke(project, "export", str(out), "--format", "onnx", "--int8", "--out", str(tmp_path / student))
        assert invoke(project, "evaluate", str(tmp_path / student))
    (project.path / "my_student.py").write_text(OWN.replace("AvgPool2d(4)", "AvgPool2d(8)"))
    assert "students.mine: model my_student.py:build in training mode" in invoke(project, "doctor", code=1)


class Averaged(Student):
    """A student of a researcher's own: made with numbers that the device meta lacks, with a constant no file holds."""

    has_distillation_head: ClassVar[bool] = True

    def __init__(self, *, num_classes: int, image_size: int = 32, width: int = 8) -> None:
        super().__init__()
        scale = [number.item() for number in torch.linspace(0, 1, 3)]
        self.register_buffer("ramp", torch.arange(image_size) / image_size + scale[0], persistent=False)
        self.body = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3 * (image_size // 8) ** 2, width))
        self.class_head, self.distillation_head = nn.Linear(width, num_classes), nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images + self.ramp)
        return self.class_head(features), self.distillation_head(features)


def test_a_students_class_that_is_added_is_trained_evaluated_and_reported(
    small_labelled: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDENTS, "averaged", Averaged)
    project = Project(tmp_path / "project")
    shutil.copytree(small_labelled.path, project.path)
    project.edit("vit: {}", "vit: {}\n      averaged: {epochs: 1}")
    invoke(project, "distill", "--student", "averaged")
    out = project.data / "students/averaged"
    parameters = json.loads((out / "metrics.json").read_text())["parameters"]
    assert parameters == (48 * 48 + 48) + 2 * (48 * 10 + 10)
    assert "899 images, cpu, fp32" in invoke(project, "evaluate", str(out))
    file = project.path / "params.yaml"
    file.write_text(file.read_text().replace("students:\n", "students:\n  averaged: default\n", 1))
    invoke(project, "report")
    assert "| averaged |" in (project.data / "reports/report.md").read_text()
    refused = invoke(project, "distill", "--student", "averaged", "--set", "depth=2", code=2)
    assert "--set depth: averaged takes no such argument" in refused


def test_what_cannot_be_counted_is_not_trained_first(
    small_labelled: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uncounted(Averaged):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            if len(images) == 1:
                raise UsageError("one image is too few")
            return super().forward(images)

    monkeypatch.setitem(STUDENTS, "uncounted", Uncounted)
    project = Project(tmp_path / "project")
    shutil.copytree(small_labelled.path, project.path)
    project.edit("vit: {}", "vit: {}\n      uncounted: {epochs: 1}")
    said = invoke(project, "distill", "--student", "uncounted", code=2)
    assert "one image is too few" in said and "epoch 1" not in said


def test_a_checkpoint_alone_has_no_code_run(trained: Project, tmp_path: Path) -> None:
    for student, code in (("mine", 3), ("small", 0)):
        out = shutil.copytree(trained.data / "students" / student, tmp_path / student)
        shutil.copy(trained.path / "my_student.py", tmp_path)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
        answer = invoke(Project(tmp_path), "predict", str(out), "black.png", code=code)
        assert ("its model is your own code, my_student.py:build, which is run only where you" in answer) == bool(code)


def test_an_exported_program_is_benched_without_the_code_of_its_model(trained: Project, tmp_path: Path) -> None:
    exported, elsewhere = tmp_path / "exported", Project(tmp_path)
    invoke(trained, "export", "data/smoke/students/mine", "--format", "torchscript", "--out", str(exported))
    (tmp_path / "my_student.py").write_text("from pathlib import Path\nPath('ran').touch()\n" + OWN)
    bench = ("bench", str(exported / "model.torchscript"), "--rounds", "1", "--batch-sizes", "1")
    keys = ("parameters", "paper_macs", "flops_per_image")
    there, here = (json.loads(invoke(at, *bench, "--json"))["models"][0] for at in (elsewhere, trained))
    parameters = json.loads((trained.data / "students/mine/metrics.json").read_text())["parameters"]
    assert [there[key] for key in keys] == [parameters, None, None]
    assert here["parameters"] == parameters and here["paper_macs"] > 0 and here["flops_per_image"] > 0
    assert "What they cost" in invoke(elsewhere, *bench)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("drop_path=0.1", "students.mine.drop_path: 0.1, but my_student.py:build takes no such argument; set it to 0"),
        ("micro_batch=4", "micro_batch: 4: the model has batch norm, which needs whole ones; set it to 0"),
        ("inner_block=fused", "inner_block: fused is not available here: the student has no inner blocks"),
        ("arguments={width: 0}", "my_student.py:build"),
        ("soft=2", "keeps argmax"),
        ("depth=2", "--set depth: my_student.py:build takes no such argument; leave it out"),
    ],
)
def test_what_such_a_student_cannot_do_is_said(trained: Project, setting: str, words: str) -> None:
    code = 3 if setting == "soft=2" else 2
    assert words in invoke(trained, "distill", "--student", "mine", "--set", setting, code=code)


def test_a_timm_student_without_a_second_head_learns_nothing_softly(trained: Project) -> None:
    refusal = invoke(trained, "distill", "--student", "small", "--soft", "2", code=2)
    assert "--soft 2: student small (timm/test_vit) has no distillation head; choose from deit, titn" in refusal
