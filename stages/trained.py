"""Trained models, ready to answer: from a stage's checkpoint, or from what `pipeline export` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config.recipes import PRECISIONS
from pipeline.errors import DataError, UsageError
from pipeline.inference.descriptions import Description
from pipeline.inference.exporting import CONFIG, FILES
from pipeline.inference.loading import load, load_model
from pipeline.inference.prediction import Network, Predictor
from pipeline.losses import Outputs
from pipeline.system.runtime import resolve_device, resolve_precision


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model.

    Attributes:
        predictor: The model, ready to answer.
        description: What it is built from.
        file: Its weights.
        meta: The JSON beside them.
        precision: `fp32` or `bf16`, or `int8` of a quantised export.
        format: `checkpoint`, or an export's.
    """

    predictor: Predictor
    description: Description
    file: Path
    meta: Mapping[str, Any]
    precision: str
    format: str = "checkpoint"


def load_trained(path: Path, device: str | None = None, precision: str | None = None) -> Trained:
    """Load a trained model; nothing else is needed.

    Args:
        path: A directory that a stage wrote, or a .safetensors file in it; or one that `pipeline export` wrote, or a
            file in it, which says what format to take.
        device: As of pipeline.system.runtime.resolve_device; without one an ONNX file runs on the CPU.
        precision: `auto`, `fp32` or `bf16`; None takes that of the training. Exports compute as they were exported.

    Raises:
        UsageError: The path or the device does not exist, or the precision is not the export's.
        DataError: There is no valid model.
    """
    directory = path.parent if path.name in FILES.values() else path
    if (directory / CONFIG).is_file():
        if precision == "bf16":
            raise UsageError(f"--precision bf16: {path} is an export, which computes in fp32 or int8; leave it out")
        return _load_export(path, directory, device)
    model, checkpoint = load_model(path, on := resolve_device(device))
    file = checkpoint.path.with_suffix(".json")
    if precision is None:
        training = checkpoint.meta.get("training")
        precision = training.get("precision") if isinstance(training, dict) else None
        if precision not in PRECISIONS:
            raise DataError(f"{file}: training.precision is {precision!r}; give --precision")
    description, precision = Description.read(checkpoint.meta, file), resolve_precision(precision, on)
    network = Network(model=model, mean=description.mean, std=description.std, precision=precision)
    predictor = Predictor(
        network=network, class_names=description.class_names, image_size=description.image_size, device=on
    )
    return Trained(
        predictor=predictor,
        description=description,
        file=checkpoint.path,
        meta=checkpoint.meta,
        precision=precision,
    )


def _has_weights(directory: Path) -> bool:
    """Whether an export holds weights, which are computed with on any device."""
    return any((directory / FILES[name]).is_file() for name in ("safetensors", "safetensors-bf16"))


def _load_export(path: Path, directory: Path, device: str | None) -> Trained:
    """Load what `pipeline export` wrote."""
    formats = {file: format for format, file in FILES.items()}
    if device is None and (path.suffix == ".onnx" or not _has_weights(directory)):
        device = "cpu"
    on = resolve_device(device)
    classifier, _ = load(directory, format=None if path == directory else formats[path.name], device=str(on))

    def network(images: Tensor) -> Outputs:
        outputs = classifier.outputs(images)
        logits = [outputs[name] for name in ("class_logits", "distillation_logits") if name in outputs]
        return logits[0] if len(logits) == 1 else (logits[0], logits[1])

    return Trained(
        predictor=Predictor(
            network=network, class_names=classifier.class_names, image_size=classifier.image_size, device=on
        ),
        description=Description.read(classifier.config, directory / CONFIG),
        file=directory / FILES[classifier.format],
        meta=classifier.config,
        precision="int8" if classifier.format == "onnx-int8" else "fp32",
        format=classifier.format,
    )
