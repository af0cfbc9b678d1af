"""Findings of the doctor, and its checks of Python, torch, torchvision, GPUs and the optional extras.

Nothing heavy is imported at the top, because torch may be broken.
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
from pipeline.system import home
from pipeline.system.home import cache_folder, can_keep
from stages.shared.code import ROOT, WAY_OUT, other_code

# Errors that become findings; a signal ends the doctor like any command.
FAULTS = (UsageError, DataError, StorageError, NumericalError)
OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """A line of the diagnosis.

    Attributes:
        topic: `software`, `device`, `project`, `data` or `space`.
        mark: OK; WARNING, a full run works but not as well as it could; PROBLEM, it cannot work.
        text: The fact.
        remedy: The way out.
    """

    topic: str
    mark: str
    text: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """Text and remedy."""
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
# Extras for developers of the project.
DEVELOPMENT = ("test", "dev", "bench", "docs")
PURPOSES = {
    "dvc": "`dvc repro`",
    "fast": "a C++ compiler, for the fused inner block",
    "report": "the figures of `pipeline report`, the last stage of `dvc repro`",
    "onnx": "`pipeline export --format onnx`",
    "timm": "teachers and students of timm",
}
UNNEEDED = ("fast", "timm")
"""Extras without which every recipe of ours works as well."""
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)[^;]*;.*extra\s*==\s*['\"]([A-Za-z0-9._-]+)['\"]")


def software() -> list[Finding]:
    """Check Python and its packages; without a problem, torch and torchvision can be imported."""
    text = f"Python {platform.python_version()} ({sys.prefix})"
    if sys.version_info < PYTHON:
        findings = [Finding("software", PROBLEM, text, f"install Python {'.'.join(map(str, PYTHON))} or newer")]
    else:
        findings = [Finding("software", OK, text)]
    findings += [_code(), *_home()]
    for name in ("torch", "torchvision"):
        findings.append(_import(name))
        if findings[-1].mark == PROBLEM:
            return findings
    return [*findings, *extras()]


def _code() -> Finding:
    """Say whose code runs, and warn where this folder has another."""
    text = f"the code in {ROOT} runs"
    if (here := other_code()) is None:
        return Finding("software", OK, text)
    return Finding("software", WARNING, f"{text}, not that in {here}", WAY_OUT)


def _home() -> list[Finding]:
    """Warn where nothing can be kept in the user's home directory."""
    if can_keep():
        return []
    folder = cache_folder()
    text = "there is no home directory" if folder is None else f"{folder} cannot be written to"
    text += ": no inner block is compiled for the CPU, ImageNet's weights are not kept, caches end with each command"
    return [Finding("software", WARNING, text, home.WAY_OUT)]


def _import(name: str) -> Finding:
    """Import a required package; torch and torchvision of different releases fail here."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # broken binaries fail in many ways
        reason = " ".join(str(error).split())
        text = f"{name} cannot be imported ({type(error).__name__}: {reason})"
        remedy = "install torch and torchvision together, as https://pytorch.org says for this machine"
        return Finding("software", PROBLEM, text, remedy)
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
    findings = []
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        text = f"cuda:{index}: {gpu.name}, {gpu.total_memory / 1e9:.3g} GB, compute capability {gpu.major}.{gpu.minor}"
        findings.append(Finding("device", OK, text))
    if findings:
        return findings
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
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        if (match := _REQUIREMENT.match(requirement)) is not None and match[1].lower() != DISTRIBUTION:
            packages.setdefault(match[2], []).append(match[1])
    findings, absent = [], []
    for extra, names in packages.items():
        versions = {name: version_of(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        if not missing and extra not in DEVELOPMENT:
            installed = ", ".join(f"{name} {version}" for name, version in versions.items())
            findings.append(Finding("software", OK, f"extra {extra}: {installed}"))
        elif missing and extra in DEVELOPMENT:
            absent.append(extra)
        elif missing:
            purpose = f", for {PURPOSES[extra]}" if extra in PURPOSES else ""
            text = f"extra {extra}{purpose}: {', '.join(missing)} not installed"
            mark = OK if extra in UNNEEDED else WARNING
            findings.append(Finding("software", mark, text, f"pip install -e '.[{extra}]'"))
    if absent:
        findings.append(Finding("software", OK, f"extras for developers, not here: {', '.join(absent)}"))
    return findings


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
