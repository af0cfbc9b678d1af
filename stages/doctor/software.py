"""What the doctor finds, one line each; and Python, torch, torchvision, GPUs and the optional extras.

Imports nothing heavy: torch may be what is broken.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError, NumericalError, StorageError, UsageError

# What becomes a finding; a signal ends the doctor like any command.
FAULTS = (UsageError, DataError, StorageError, NumericalError)
OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        topic: What it is about: `software`, `device`, `project`, `data` or `space`.
        mark: OK; WARNING: a run works, though perhaps not as it might; PROBLEM: a full run cannot work.
        text: What was found.
        remedy: The way out.
    """

    topic: str
    mark: str
    text: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """Text and way out."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


def size_text(num_bytes: float) -> str:
    """Write a size in decimal units, as 4.41 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


DISTRIBUTION = "titn-pipeline"
PYTHON = (3, 11)
# Of those who change the project.
DEVELOPMENT = ("test", "dev", "bench", "docs")
PURPOSES = {
    "dvc": "`dvc repro`",
    "fast": "a C++ compiler, for the fused inner block",
    "report": "the figures of `pipeline report`, the last stage of `dvc repro`",
    "onnx": "`pipeline export --format onnx`",
}
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)[^;]*;.*extra\s*==\s*['\"]([A-Za-z0-9._-]+)['\"]")


def software() -> list[Finding]:
    """Look at Python and what is installed for it; without a problem, torch and torchvision can be imported."""
    found = [_python()]
    for name in ("torch", "torchvision"):
        finding = _import(name)
        found.append(finding)
        if finding.mark == PROBLEM:
            return found
    return [*found, *extras()]


def _python() -> Finding:
    text = f"Python {platform.python_version()} ({sys.prefix})"
    if sys.version_info < PYTHON:
        return Finding("software", PROBLEM, text, f"install Python {'.'.join(map(str, PYTHON))} or newer")
    return Finding("software", OK, text)


def _import(name: str) -> Finding:
    """Import a package that everything needs; torch and torchvision of different releases fail here."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # broken binaries fail in many ways
        reason = " ".join(str(error).split())
        return Finding(
            "software",
            PROBLEM,
            f"{name} cannot be imported ({type(error).__name__}: {reason})",
            "install torch and torchvision together, as https://pytorch.org says for this machine",
        )
    text = f"{name} {module.__version__}"
    if name == "torch":
        text += f", built for {_build(module.version)}"
    return Finding("software", OK, text)


def _build(version: object) -> str:
    for name, kind in (("cuda", "CUDA"), ("hip", "ROCm")):
        number = getattr(version, name, None)
        if number:
            return f"{kind} {number}"
    return "CPUs alone"


def gpus() -> list[Finding]:
    """Say which GPUs there are, or why torch finds none."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        count = torch.cuda.device_count() if available else 0
    found = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 1e9:.3g} GB"
        text = f"cuda:{index}: {properties.name}, {memory}, compute capability {capability}"
        found.append(Finding("device", OK, text))
    if found:
        return found
    driver = Path("/proc/driver/nvidia/version")
    reason = " ".join(str(caught[0].message).split()) if caught else ""
    if driver.is_file() or reason:
        why = reason or "torch is built for " + _build(torch.version)
        remedy = "install a torch built for the driver's CUDA, as https://pytorch.org says, or give --device cpu"
        return [Finding("device", WARNING, f"there is an NVIDIA driver, but torch finds no GPU ({why})", remedy)]
    return []


def extras() -> list[Finding]:
    """Say which optional extras are installed, and the pip line of those that are not."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("software", WARNING, f"{DISTRIBUTION} is not installed", "pip install -e .")]
    wanted: dict[str, list[str]] = {}
    for requirement in requirements:
        if (match := _REQUIREMENT.match(requirement)) is not None and match[1].lower() != DISTRIBUTION:
            wanted.setdefault(match[2], []).append(match[1])
    found, absent = [], []
    for extra, names in wanted.items():
        missing = [name for name in names if not _is_installed(name)]
        if extra in DEVELOPMENT:
            absent += [extra] if missing else []
        else:
            found.append(_extra(extra, names, missing))
    if absent:
        found.append(Finding("software", OK, f"extras of those who change the project, not here: {', '.join(absent)}"))
    return found


def _extra(extra: str, names: list[str], missing: list[str]) -> Finding:
    purpose = f", for {PURPOSES[extra]}" if extra in PURPOSES else ""
    if not missing:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        return Finding("software", OK, f"extra {extra}: {versions}")
    mark = OK if extra == "fast" else WARNING
    what = f"extra {extra}{purpose}: {', '.join(missing)} not installed"
    return Finding("software", mark, what, f"pip install -e '.[{extra}]'")


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
