"""Models ready for use, built from what is known of them: from checkpoints and from exported directories.

The one module of the library above the leaves `students` and `teachers`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from pipeline.checkpoints import Checkpoint, check_weights, load_checkpoint, load_weights
from pipeline.classifier import Classifier, ImageClassifier, Runner, Transform
from pipeline.datasets import Channels
from pipeline.errors import DataError, UsageError
from pipeline.exporting import CONFIG, FILES, SCHEMA, run_onnx, run_torchscript
from pipeline.runtime import resolve_device
from pipeline.storage import read_bytes, read_json

STUDENT_ARGUMENTS = {
    "num_classes",
    "image_size",
    "patch_size",
    "pixel_size",
    "pixel_width",
    "pixel_heads",
    "width",
    "depth",
    "num_heads",
    "mlp_ratio",
}
TEACHER_ARGUMENTS = {"num_classes", "bn_momentum"}
"""Not `weights`: what a checkpoint says must not make us read or download anything."""
MAX_ARGUMENT = 65535
MAX_DEPTH = 1024
MAX_IMAGE_SIZE = 4096


@dataclass(frozen=True)
class Inputs:
    """What a model's inputs and classes are.

    Attributes:
        class_names: K names.
        image_size: Side of the images, pixels.
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel, above 0.
    """

    class_names: tuple[str, ...]
    image_size: int
    mean: Channels
    std: Channels

    @classmethod
    def read(cls, meta: Mapping[str, Any], file: Path) -> Inputs:
        """Read them from a checkpoint's JSON or an export's config.json.

        Args:
            meta: The JSON.
            file: Where it was read, for the message.

        Raises:
            DataError: A value is missing or impossible; the message names the first.
        """
        names, size, mean, std = (meta.get(key) for key in ("class_names", "image_size", "mean", "std"))
        arguments = meta.get("arguments")
        built: Mapping[str, Any] = arguments if isinstance(arguments, dict) else {}
        is_valid = {
            "class_names": isinstance(names, list)
            and len(names) > 1
            and all(isinstance(name, str) for name in names)
            and len(set(names)) == len(names) == built.get("num_classes", len(names)),
            "image_size": type(size) is int and 0 < size <= MAX_IMAGE_SIZE and built.get("image_size", size) == size,
            "mean": _is_channels(mean),
            "std": _is_channels(std) and min(std or [0]) > 0,
        }
        wrong = [key for key, valid in is_valid.items() if not valid]
        if wrong:
            raise DataError(f"{file}: {wrong[0]} is missing or impossible; make it again")
        assert isinstance(names, list) and isinstance(size, int) and mean is not None and std is not None
        return cls(tuple(names), size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def build_model(meta: Mapping[str, Any]) -> nn.Module:
    """Build the untrained model that a checkpoint's JSON describes.

    Args:
        meta: Has `kind`, `model` and `arguments`.

    Raises:
        DataError: It describes no model.
        UsageError: The model's name is unknown, or its geometry does not divide evenly.
    """
    kind, model, arguments = (meta.get(key) for key in ("kind", "model", "arguments"))
    allowed = {"student": STUDENT_ARGUMENTS, "teacher": TEACHER_ARGUMENTS}.get(str(kind), set())
    if (
        not isinstance(model, str)
        or not isinstance(arguments, dict)
        or not arguments.keys() <= allowed
        or "num_classes" not in arguments
        or not all(_is_argument(key, value) for key, value in arguments.items())
    ):
        raise DataError("the JSON beside it describes no model; name a checkpoint that a stage wrote")
    if kind == "student":
        from pipeline.students import build_student

        return build_student(model, **arguments)
    from pipeline.teachers import build_teacher

    return build_teacher(model, **arguments)


def restore(checkpoint: Checkpoint, device: torch.device, *, inner_block: str = "auto") -> nn.Module:
    """Build a checkpoint's model with its weights, in evaluation mode.

    Args:
        checkpoint: Its JSON describes the model.
        device: Where to put it.
        inner_block: As of pipeline.students.use_inner_block.

    Raises:
        DataError: The JSON describes no model, or the weights are another's.
    """
    from pipeline.students import Student, use_inner_block

    try:
        with torch.device("meta"):
            model = build_model(checkpoint.meta)
    except (DataError, UsageError) as error:
        raise DataError(f"{checkpoint.path}: {error}") from error
    check_weights(model, checkpoint)  # before memory is taken for sizes that a damaged JSON may name
    model.to_empty(device="cpu")
    load_weights(model, checkpoint)
    if isinstance(model, Student):
        use_inner_block(model, inner_block, device)
    return model.to(device).eval()


def run_safetensors(content: bytes, meta: Mapping[str, Any], file: Path, device: torch.device) -> Runner:
    """Build the model of a safetensors file.

    Args:
        content: The file's.
        meta: What the model and its inputs are: a checkpoint's JSON, or an export's config.json.
        file: Where it lies, for messages.
        device: Where to put it.

    Raises:
        DataError: It is no such file, or not of that model.
    """
    inputs = Inputs.read(meta, file)
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{file}: not a safetensors file ({error}); export it again") from None
    model = restore(Checkpoint(file, meta, tensors), device)
    return Classifier(model, inputs.mean, inputs.std).to(device).eval().run


def load(
    path: Path | str, *, format: str | None = None, device: str | None = "cpu"
) -> tuple[ImageClassifier, Transform]:
    """Load a model and its transform; see pipeline.load."""
    directory = Path(path)
    target = resolve_device(device)
    if not directory.exists():
        raise UsageError(f"{path}: no such model; name what `pipeline export` wrote, or a stage's checkpoint")
    config_file = directory / CONFIG
    if config_file.is_file():
        return _load_export(directory, read_json(config_file), format, target)
    if format not in (None, "checkpoint"):
        raise UsageError(f"format {format!r}: {path} is no export, which a {CONFIG} belongs to; leave it out")
    checkpoint = load_checkpoint(directory)
    inputs = Inputs.read(checkpoint.meta, checkpoint.path.with_suffix(".json"))
    runner = Classifier(restore(checkpoint, target), inputs.mean, inputs.std).to(target).eval().run
    return _ready(inputs, "checkpoint", checkpoint.meta, runner)


def _load_export(
    directory: Path, config: Any, format: str | None, device: torch.device
) -> tuple[ImageClassifier, Transform]:
    """Load one of the files of a directory that `pipeline export` wrote."""
    file = directory / CONFIG
    if not isinstance(config, dict) or config.get("schema") != SCHEMA or not isinstance(config.get("files"), dict):
        raise DataError(f"{file}: not of an export ({SCHEMA}); run `pipeline export` again")
    format = _choose(directory, [name for name in FILES if name in config["files"]], format)
    if format.startswith("onnx") and device.type != "cpu":
        raise UsageError(f"device {device}: ONNX files run on the CPU here; use format='safetensors', or onnxruntime")
    content = read_bytes(directory / FILES[format])
    digest = hashlib.sha256(content).hexdigest()
    entry = config["files"][format]
    if not isinstance(entry, dict) or entry.get("sha256") != digest:
        raise DataError(
            f"{directory / FILES[format]}: SHA-256 {digest[:12]}... is not what {CONFIG} says; export again"
        )
    inputs = Inputs.read(config, file)
    try:
        if format.startswith("onnx"):
            runner = run_onnx(content)
        elif format == "torchscript":
            runner = run_torchscript(content, device)
        else:
            runner = run_safetensors(content, config, directory / FILES[format], device)
    except DataError as error:
        raise DataError(f"{directory}: {error}") from error
    return _ready(inputs, format, config, runner)


def _choose(directory: Path, available: list[str], format: str | None) -> str:
    """Return which of an export's formats to load."""
    if not available:
        raise DataError(f"{directory}: its export did not end; run `pipeline export` again")
    if format is not None:
        if format not in available:
            raise UsageError(f"format {format!r}: {directory} has {', '.join(available)}")
        return format
    safe = [name for name in available if name != "torchscript"]
    if not safe:
        raise UsageError(
            f"{directory} holds a TorchScript archive, which is a program that could read and write files here; if you "
            "trust where it comes from, load it with format='torchscript'"
        )
    return safe[0]


def _ready(inputs: Inputs, format: str, config: Mapping[str, Any], runner: Runner) -> tuple[ImageClassifier, Transform]:
    classifier = ImageClassifier(inputs.class_names, inputs.image_size, format, config, runner)
    return classifier, Transform(inputs.image_size)


def _is_channels(values: Any) -> bool:
    """Whether it is three finite numbers."""
    return isinstance(values, list) and len(values) == 3 and all(_is_finite(value) for value in values)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_argument(key: str, value: Any) -> bool:
    """Whether a constructor's argument has its type and a size that some model may have."""
    if key == "bn_momentum":
        return _is_finite(value) and 0 <= value <= 1
    return type(value) is int and 0 < value <= (MAX_DEPTH if key == "depth" else MAX_ARGUMENT)
