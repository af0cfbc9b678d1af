"""Device, precision, seeds and torchrun's ranks. PyTorch is imported where it is asked: not every command needs it."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError
from pipeline.system.memory import ram
from pipeline.system.neighbours import num_ranks_here

if TYPE_CHECKING:
    import torch

CODE = ("pipeline", "stages", "benchmarks")
RESIDENT_VARIABLE = "TITN_MAX_RESIDENT_BYTES"
AT_ONCE = {"cpu": 256, "cuda": 4096}
"""Kind of device to images of a batch without gradients: it should fit a CPU's cache, a GPU is best with large ones."""
MANY_TOKENS = 64  # of an image of 32 x 32 in patches of 4


@dataclass(frozen=True)
class Ranks:
    """This process's place in torchrun's group.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: Number of processes.
        local_rank: Index on this machine, which is also the index of its GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes the group's files."""
        return self.rank == 0


def current_ranks() -> Ranks:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets.

    Raises:
        UsageError: A value is not an integer in range.
    """
    values = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise UsageError(f"{name}={text}: not a whole number; unset it or start with torchrun")
        values[name] = int(text)
    if not values["RANK"] < values["WORLD_SIZE"]:
        raise UsageError(f"RANK={values['RANK']} must be below WORLD_SIZE={values['WORLD_SIZE']}; start with torchrun")
    return Ranks(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])


def resolve_device(name: str | None = None) -> torch.device:
    """Return the device to run on.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, `mps`; None takes a GPU if there is one, else the CPU. With several ranks `cuda`
            means each rank's own GPU.

    Raises:
        UsageError: The device is unknown or not available.
    """
    import torch

    ranks = current_ranks()
    if torch.cuda.is_available() and (name is None or (name == "cuda" and ranks.world_size > 1)):
        if ranks.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"LOCAL_RANK={ranks.local_rank}: there are {torch.cuda.device_count()} GPUs here; start torchrun with "
                "--nproc-per-node of at most that, or give --device cpu"
            )
        return torch.device("cuda", ranks.local_rank)
    try:
        device = torch.device("cpu" if name is None else name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise NotImplementedError
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {name}: not available here; leave it out, or use cpu") from None
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn `auto` into `bf16` if the device has units for it, else into `fp32`.

    Args:
        precision: `auto`, `fp32` or `bf16`.
        device: Where the model runs.
    """
    if precision != "auto":
        return precision
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):  # PyTorch asks the current one
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16" if has_units else "fp32"
    return "fp32"


def images_at_once(device: torch.device, image_size: int, model: object = None, *, asked: int | None = None) -> int:
    """Return how many images go through a model at once where nothing is trained: evaluation, labels, predictions.

    They are AT_ONCE up to 32 x 32 pixels and MANY_TOKENS tokens; of larger images fewer, as their activations grow.

    Args:
        device: Where the model is.
        image_size: Side of the images, pixels.
        model: Its `tokens_per_image` count, where it has them, as students do; and its `input_size`, pixels, where it
            sees images at a size of its own, as teachers may.
        asked: The number that a recipe asks for: the result is at most that. A CPU's cache is no limit then.
    """
    most = AT_ONCE.get("cuda" if asked is not None else device.type, AT_ONCE["cpu"])
    tokens, size = max(1, int(getattr(model, "tokens_per_image", 1))), getattr(model, "input_size", None)
    image_size = max(image_size, size if type(size) is int else 0)
    return max(1, min(most, asked or most, most * 32**2 // image_size**2, most * MANY_TOKENS // tokens))


def resident_limit(device: torch.device | None = None) -> int:
    """Return how many bytes of images may stay in a device's memory; larger data sets are streamed to it.

    For a GPU it is a quarter of the memory that is free now, else a quarter of the RAM of the machine (or control
    group) divided by torchrun's processes on it. A prepared view needs as much again, model and activations the rest.
    The environment variable RESIDENT_VARIABLE overrides both; it changes where images are kept, and no result.

    Args:
        device: The device; None is the CPU, also for images read into RAM.

    Raises:
        UsageError: The variable, or torchrun's LOCAL_WORLD_SIZE, is not a whole number.
    """
    text = os.environ.get(RESIDENT_VARIABLE)
    if text is not None:
        if not (text.isascii() and text.isdecimal()):
            raise UsageError(f"{RESIDENT_VARIABLE}={text}: not a whole number of bytes; correct it or unset it")
        return int(text)
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] // 4
    return ram() // (4 * num_ranks_here())


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of giving them back to the system.

    Each training step on the CPU frees and allocates all gradients. Fresh pages for a VGG's 540 MB take a third of its
    backward pass. Without glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context of a resolved precision; for fp32 one that does nothing."""
    if precision == "bf16":
        import torch

        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def deciding(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which classes are decided, by evaluation, labels and predictions: fp32 is float32 there.

    On recent GPUs cuDNN rounds the factors of float32 convolutions to tf32, with 10 bits of fraction, unless it is
    told not to. Training leaves it at that.

    Args:
        device: Where the model computes.
        precision: `fp32`, or `bf16`, where the last layer may be a convolution in float32.
    """
    return _unrounded(device, precision) if device.type == "cuda" else autocast(device, precision)


@contextlib.contextmanager
def _unrounded(device: torch.device, precision: str) -> Iterator[None]:
    import torch

    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    former, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        with autocast(device, precision):
            yield
    finally:
        convolutions.fp32_precision = former


def device_name(device: torch.device) -> str:
    """Return the device's marketing name, such as `NVIDIA H200`, or the CPU's model and thread count."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions that numbers depend on."""
    import numpy
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _torchvision_version(),
        "numpy": numpy.__version__,
    }


def _torchvision_version() -> str:
    """Return torchvision's version from its file of that name: importing all of it takes half as long as PyTorch."""
    found = importlib.util.find_spec("torchvision")
    if found is not None and found.origin is not None:
        with contextlib.suppress(OSError):
            text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
            if match := re.search(r"^__version__ = '([^'\\\n]+)'$", text, re.MULTILINE):
                return match[1]
    import torchvision

    return str(torchvision.__version__)


def environment(device: torch.device) -> dict[str, Any]:
    """Describe where and when a run took place: device, versions, commit, date (UTC)."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "versions": versions(),
        "commit": commit_of(Path(__file__).parents[2]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
    }


def commit_of(checkout: Path) -> str | None:
    """Return a checkout's commit, with `+` where code, also of new files, differs from it.

    Results and dvc.lock change whenever a run ends, and a run records its recipe, so they are no part of it.

    Args:
        checkout: The folder that holds pipeline/.

    Returns:
        Twelve hexadecimal digits, or None where git does not keep pipeline/, as in a virtual environment.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if not git("ls-files", "--", "pipeline/__init__.py"):
            return None
        head = git("rev-parse", "--short=12", "HEAD")
        return f"{head}+" if git("status", "--porcelain", "--", *CODE) else head
    except (OSError, subprocess.SubprocessError):
        return None
