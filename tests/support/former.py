"""What a former commit left on disk: labels, labels under way, a run under way, a trained and an exported student.

Newer code must open all of it and go on from it. The commands of that commit wrote the files, see make_former.py; every
path below a folder is the path below a project:

    former/params.yaml  the recipe `tiny`: digits, four views, a TITN of 7 KB of weights
    former/former.json  what was true then: digests, fingerprints, answers of `predict`, and the machine
    former/finished/    the sealed label file, the trained teacher and student, the selection
    former/labelling/   the parts of two of the four views
    former/training/    the saved state of the student, stopped in an epoch
    former/exported/    the student as `pipeline export` wrote it

Two things are made anew. `prepare` makes the data. The teacher's weights, 3 MB, are drawn from SHAKE-256, so that they
are the same bytes everywhere; the teacher has been trained from them at a learning rate of 0, and still has them.
Weights that several files hold are stored once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch
import torchvision

from tests.support.project import Project

FORMER = Path(__file__).parent / "former"
TEACHER, STUDENT = "squeezenet1_1", "titn"
TEACHER_WEIGHTS = Path("teacher.safetensors")  # as params.yaml names them
IMAGES = ("stripes.ppm", "disc.ppm", "noise.ppm")
# With them each of the ten classes is the answer for some of the digits.
_HEAD_BIAS = (9, 6, -1, -3, 1, 12, 5, 3, -15, -15)


def facts() -> dict[str, Any]:
    """Read what was true at the former commit."""
    found: dict[str, Any] = json.loads((FORMER / "former.json").read_text())
    return found


def new_project(path: Path) -> Project:
    """Make a project of the former recipe, with the teacher's weights and the images for `predict`."""
    path.mkdir()
    shutil.copy(FORMER / "params.yaml", path)
    (path / TEACHER_WEIGHTS).write_bytes(draw_teacher())
    for name, pixels in zip(IMAGES, _images(), strict=True):
        (path / name).write_bytes(b"P6 32 32 255\n" + pixels.astype(np.uint8).tobytes())
    return Project(path)


def lay(project: Project, *parts: str) -> None:
    """Copy folders of the fixtures into a project; weights that are stored elsewhere go beside their JSON."""
    for part in parts:
        shutil.copytree(FORMER / part, project.path, dirs_exist_ok=True)
    weights = {sha256(file): file for file in (project.path / TEACHER_WEIGHTS, *FORMER.rglob("*.safetensors"))}
    for name in ("best", "last"):
        for file in project.path.glob(f"data/tiny/**/{name}.json"):
            if not (target := file.with_suffix(".safetensors")).exists():
                shutil.copy(weights[json.loads(file.read_text())["sha256"]], target)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def draw_teacher() -> bytes:
    """Return a safetensors file of a SqueezeNet of ten classes with drawn weights.

    Each weight is an integer in [-128, 127] times a float64, rounded to float32: no library and no processor has a say
    in its bits.
    """
    with torch.device("meta"):
        model = torchvision.models.squeezenet1_1(num_classes=10)
    tensors = {}
    for name, empty in model.state_dict().items():
        shape = empty.shape
        drawn = np.frombuffer(hashlib.shake_256(f"4 {name}".encode()).digest(math.prod(shape)), np.int8)
        std = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.02  # He's, for ReLUs
        scale = std * math.sqrt(3) / 128 * (16 if name == "classifier.1.weight" else 1)
        tensors[name] = torch.from_numpy((drawn * scale).astype(np.float32).reshape(shape))
    tensors["classifier.1.bias"] = torch.tensor(_HEAD_BIAS, dtype=torch.float32)
    return safetensors.torch.save(tensors)


def _images() -> Iterator[np.ndarray[Any, Any]]:
    """Yield three images, `(32, 32, 3)` integers in [0, 255]."""
    row, column = np.mgrid[:32, :32]
    yield np.stack([row // 4 % 2 * 255, column * 8, row * 8], axis=2)
    yield np.stack([((row - 16) ** 2 + (column - 16) ** 2 < 100) * 200] * 3, axis=2)
    yield np.frombuffer(hashlib.shake_256(b"noise").digest(32 * 32 * 3), np.uint8).reshape(32, 32, 3)


@contextlib.contextmanager
def at_versions(recorded: Mapping[str, str]) -> Iterator[None]:
    """Let this process report the library versions of the labels' provenance.

    Labels of two PyTorch versions never meet in one file, rightly. So with other versions than the recorded ones a
    command would label every view again, and going on would stay untested. Patched is what the libraries say of
    themselves, not a name of this project that may move.
    """
    libraries = {"torch": torch, "torchvision": torchvision, "numpy": np}
    assert recorded.keys() == {"python", *libraries}
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(platform, "python_version", lambda: recorded["python"]))
        for name, library in libraries.items():
            patches.enter_context(mock.patch.object(library, "__version__", recorded[name]))
        yield


def machine() -> dict[str, str]:
    """Name what decides the last bits of sums on a CPU."""
    model = next((line for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {
        "machine": platform.machine(),
        "cpu": model.partition(":")[2].strip(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }


def _cpuinfo() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text().splitlines()
    return []
