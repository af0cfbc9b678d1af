"""Commands import what they use: `import torch` takes seconds, torchvision and the compiler that it imports as long."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from pipeline.data.datasets import Dataset
from pipeline.models.students import build_student
from pipeline.training.checkpoints import save_checkpoint
from stages.shared.runs import describe
from tests.support.project import Project, environment

UNUSED = ("torch._dynamo", "sympy", "triton", "sklearn", "scipy", "timm", "onnx")
CHECK = """
import sys
from stages.cli import run

def check(names, *command):
    assert not command or run(command) == 0
    found = set(names) & set(sys.modules)
    assert not found, f"{command} imports {found}"
"""


def run(project: Project, program: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHECK + program], cwd=project.path, env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_what_computes_nothing_does_without_torch(taught: Project, tmp_path: Path) -> None:
    shutil.copytree(taught.path, tmp_path / "project")
    run(
        Project(tmp_path / "project"),
        """
check(["torch"], "prepare")
check(["torch"], "teacher", "--help")
check(["torch", "matplotlib"], "select", "--teachers", "squeezenet1_1")
""",
    )


def test_what_computes_does_without_the_compiler_and_other_libraries(small_labelled: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(small_labelled.path, project.path)
    dataset = Dataset.load(project.data / "prepared" / "dataset.json")
    geometry = {"image_size": dataset.image_size, "patch_size": 8, "pixel_size": 2, "width": 48, "depth": 1}
    arguments = {**geometry, "num_classes": dataset.num_classes, "num_heads": 3, "pixel_width": 12, "pixel_heads": 2}
    torch.manual_seed(0)
    weights = build_student("titn", **arguments).state_dict()
    described = describe(dataset, "smoke", kind="student", model="titn", arguments=arguments)
    save_checkpoint(project.path / "titn", "best", weights, {**described, "training": {"precision": "fp32"}})
    Image.fromarray(dataset.test.images[0]).save(project.path / "image.png")
    run(
        project,
        f"""
unused = {UNUSED!r}
check([*unused, "torchvision", "h5py", "matplotlib", "rich"], "predict", "titn", "image.png")
check([*unused, "torchvision", "matplotlib"], "label")
check([*unused, "torchvision", "matplotlib"], "distill", "--student", "titn", "--dry-run")
from stages.shared.fitting import carry_out
check([*unused, "torchvision", "matplotlib"])
from stages.shared.runs import costs
costs({{"kind": "student", "model": "titn", "arguments": {arguments!r}}}, {dataset.image_size})
check([*unused, "torchvision", "matplotlib"])
""",
    )
