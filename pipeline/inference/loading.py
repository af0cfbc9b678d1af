"""Models ready for use, built from what is known of them: from checkpoints and from exported directories.

The one module of the library above the leaves `students` and `teachers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from pipeline.errors import DataError, UsageError
from pipeline.inference.classifier import Classifier, ImageClassifier, Runner, Transform
from pipeline.inference.descriptions import Description
from pipeline.inference.exporting import CONFIG, FILES, SCHEMA, run_onnx, run_torchscript
from pipeline.system.runtime import resolve_device
from pipeline.system.storage import read_bytes, read_json
from pipeline.training.checkpoints import Checkpoint, load_checkpoint, load_weights


def build_model(kind: str, model: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build an untrained model.

    Args:
        kind: `student` or `teacher`.
        model: Its name in pipeline.models.students.STUDENTS or pipeline.models.teachers.TEACHERS.
        arguments: Of its constructor.

    Raises:
        UsageError: The model's name is unknown, or its geometry does not divide evenly.
    """
    if kind == "student":
        from pipeline.models.students import build_student

        return build_student(model, **arguments)
    from pipeline.models.teachers import build_teacher

    return build_teacher(model, **arguments)


def restore(checkpoint: Checkpoint, device: torch.device, *, inner_block: str = "auto") -> nn.Module:
    """Build a checkpoint's model with its weights, in evaluation mode.

    Args:
        checkpoint: Its JSON describes the model.
        device: Where to put it.
        inner_block: As of pipeline.models.students.use_inner_block.

    Raises:
        DataError: The JSON describes no model, or the weights are another's.
    """
    from pipeline.models.students import Student, use_inner_block

    file = checkpoint.path.with_suffix(".json")
    described = Description.read(checkpoint.meta, file)
    try:
        with torch.device("meta"):
            model = build_model(described.kind, described.model, described.arguments)
    except UsageError as error:
        raise DataError(f"{file}: {error}") from error
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
    inputs = Description.read(meta, file)
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{file}: not a safetensors file ({error}); export it again") from None
    # Weights rounded for carrying away are computed with in float32.
    tensors = {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in tensors.items()}
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
    inputs = Description.read(checkpoint.meta, checkpoint.path.with_suffix(".json"))
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
    inputs = Description.read(config, file)
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


def _ready(
    inputs: Description, format: str, config: Mapping[str, Any], runner: Runner
) -> tuple[ImageClassifier, Transform]:
    classifier = ImageClassifier(inputs.class_names, inputs.image_size, format, config, runner)
    return classifier, Transform(inputs.image_size)


def load_checkpoint_of(path: Path, kind: str | None) -> Checkpoint:
    """Load a checkpoint; arguments and errors as of `load_model`."""
    checkpoint = load_checkpoint(path)
    if kind is not None and checkpoint.meta.get("kind") != kind:
        raise DataError(f"{checkpoint.path}: a {checkpoint.meta.get('kind')}'s checkpoint; a {kind}'s is needed here")
    return checkpoint


def load_model(path: Path, device: torch.device, *, kind: str | None = None) -> tuple[nn.Module, Checkpoint]:
    """Load a trained model in evaluation mode.

    Args:
        path: A directory that a stage wrote, or a .safetensors file in it.
        device: Where to put it.
        kind: `teacher` or `student`, where only one will do.

    Raises:
        UsageError: The path does not exist.
        DataError: It holds no valid checkpoint, or one of the other kind.
    """
    checkpoint = load_checkpoint_of(path, kind)
    return restore(checkpoint, device), checkpoint
