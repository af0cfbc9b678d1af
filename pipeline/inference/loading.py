"""Models ready for use, built from what is known of them: from checkpoints and from exported directories."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from pipeline.config.recipes import PRECISIONS
from pipeline.errors import DataError, UsageError
from pipeline.inference.classifier import Classifier, PixelsToOutputs
from pipeline.inference.descriptions import Description
from pipeline.inference.exporting import CONFIG, FILES, SCHEMA, run_onnx, run_torchscript
from pipeline.models.network import Network
from pipeline.system.runtime import resolve_device, resolve_precision
from pipeline.system.storage import read_bytes, read_json
from pipeline.training.checkpoints import Checkpoint, load_checkpoint, load_weights


def load(
    path: Path | str, *, format: str | None = None, device: str | None = "cpu", precision: str | None = "fp32"
) -> Classifier:
    """Load a trained model.

    Args:
        path: A directory that a stage wrote, or a .safetensors file in it; or one that `pipeline export` wrote, or a
            file in it, whose name says what format to take.
        format: Of an export; see pipeline.load.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; None takes a GPU where there is one, but the CPU for ONNX files.
        precision: `auto`, `fp32` or `bf16`; None takes that of the training. Exports compute as they were exported.

    Raises:
        UsageError: The path, the format or the device does not exist, or the precision is not the export's.
        DataError: There is no valid model.
    """
    path = Path(path)
    named = next((name for name, file in FILES.items() if file == path.name), None)
    directory = path.parent if named else path
    if device is not None:
        resolve_device(device)
    if (directory / CONFIG).is_file():
        if precision == "bf16":
            raise UsageError(f"--precision bf16: {path} is an export, which computes in fp32 or int8; leave it out")
        return _load_export(directory, named or format, device)
    if not path.exists():
        raise UsageError(f"{path}: no such model; name what `pipeline export` wrote, or a stage's checkpoint")
    if format not in (None, "checkpoint"):
        raise UsageError(f"format {format!r}: {path} is no export, which a {CONFIG} belongs to; leave it out")
    return from_checkpoint(load_checkpoint(path), resolve_device(device), precision=precision)


def load_checkpoint_of(path: Path, kind: str) -> Checkpoint:
    """Load a checkpoint where only one kind will do.

    Args:
        path: A directory that a stage wrote, or a .safetensors file in it.
        kind: `teacher` or `student`.

    Raises:
        UsageError: The path does not exist.
        DataError: It holds no valid checkpoint, or one of the other kind.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.meta.get("kind") != kind:
        raise DataError(f"{checkpoint.path}: a {checkpoint.meta.get('kind')}'s checkpoint; a {kind}'s is needed here")
    return checkpoint


def from_checkpoint(
    checkpoint: Checkpoint, device: torch.device, *, precision: str | None = "fp32", inner_block: str = "auto"
) -> Classifier:
    """Build a checkpoint's model with its weights, in evaluation mode.

    Args:
        checkpoint: Its JSON describes the model.
        device: Where to put it.
        precision: As `load` takes it.
        inner_block: As pipeline.models.students.use_inner_block takes it.

    Raises:
        DataError: The JSON describes no model or no precision, or the weights are another's.
    """
    from pipeline.models.students import Student, use_inner_block

    file = checkpoint.path.with_suffix(".json")
    described = Description.read(checkpoint.meta, file)
    if precision is None:
        training = checkpoint.meta.get("training")
        precision = training.get("precision") if isinstance(training, dict) else None
        if precision not in PRECISIONS:
            raise DataError(f"{file}: training.precision is {precision!r}; give --precision")
    try:
        with torch.device("meta"):
            module = build_model(described.kind, described.model, described.arguments)
    except UsageError as error:
        raise DataError(f"{file}: {error}") from error
    load_weights(module, checkpoint)
    if isinstance(module, Student):
        use_inner_block(module, inner_block, device)
    precision = resolve_precision(precision, device)
    network = Network(module.to(device).eval(), described.mean, described.std, precision)
    return Classifier(
        runner=PixelsToOutputs(network).eval(),
        class_names=described.class_names,
        image_size=described.image_size,
        device=device,
        precision=precision,
        file=checkpoint.path,
        config=checkpoint.meta,
    )


def from_file(format: str, content: bytes, config: Mapping[str, Any], file: Path, device: torch.device) -> Classifier:
    """Build the model of one file of an export.

    Args:
        format: One of pipeline.inference.exporting.FILES.
        content: The file's.
        config: What the model and its inputs are: the export's config.json, or the JSON of the checkpoint behind it.
        file: Where it lies, for messages.
        device: Where to put it; the CPU for ONNX files.

    Raises:
        UsageError: onnxruntime is not installed.
        DataError: It is no such file, or not of that model.
    """
    described = Description.read(config, file.with_name(CONFIG))
    if format.startswith("safetensors"):
        try:
            tensors = safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise DataError(f"{file}: not a safetensors file ({error}); export it again") from None
        # Weights rounded for carrying away are computed with in float32.
        exact = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in tensors.items()}
        return dataclasses.replace(from_checkpoint(Checkpoint(file, config, exact), device), format=format)
    try:
        runner = run_torchscript(content, device) if format == "torchscript" else run_onnx(content)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    return Classifier(
        runner=runner,
        class_names=described.class_names,
        image_size=described.image_size,
        device=device,
        precision="int8" if format == "onnx-int8" else "fp32",
        format=format,
        file=file,
        config=config,
    )


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


def _load_export(directory: Path, format: str | None, device: str | None) -> Classifier:
    """Load one of the files of a directory that `pipeline export` wrote."""
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict) or config.get("schema") != SCHEMA or not isinstance(config.get("files"), dict):
        raise DataError(f"{directory / CONFIG}: not of an export ({SCHEMA}); run `pipeline export` again")
    format = _choose(directory, [name for name in FILES if name in config["files"]], format)
    is_onnx, file = format.startswith("onnx"), directory / FILES[format]
    target = resolve_device("cpu" if is_onnx and device is None else device)
    if is_onnx and target.type != "cpu":
        raise UsageError(f"device {target}: ONNX files run on the CPU here; use format='safetensors', or onnxruntime")
    content, entry = read_bytes(file), config["files"][format]
    digest = hashlib.sha256(content).hexdigest()
    if not isinstance(entry, dict) or entry.get("sha256") != digest:
        raise DataError(f"{file}: SHA-256 {digest[:12]}... is not what {CONFIG} says; export again")
    return from_file(format, content, config, file, target)


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
