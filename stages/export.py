"""`pipeline export CHECKPOINT`: a trained model as files that others can use, with a model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pipeline
from pipeline.errors import DataError, NumericalError, PipelineError, UsageError
from pipeline.inference import exporting
from pipeline.inference.card import model_card
from pipeline.inference.classifier import INPUT, OUTPUTS, Classifier, Runner
from pipeline.inference.descriptions import Description
from pipeline.inference.exporting import CARD, CONFIG, FILES, SCHEMA
from pipeline.inference.loading import restore, run_safetensors
from pipeline.system.storage import read_json, remove_leftovers, write_atomic, write_json
from pipeline.training.checkpoints import Checkpoint, load_checkpoint
from stages.export_images import RealImages

FORMATS = tuple(name for name in FILES if name != "onnx-int8")
RESULTS = ("top1", "top5", "precision", "recall", "f1", "class_top1", "distillation_top1", "agreement")


def read_inputs(path: Path) -> tuple[Checkpoint, Description]:
    """Load a checkpoint and what its inputs are.

    Raises:
        UsageError: The path does not exist.
        DataError: It holds no valid checkpoint.
    """
    checkpoint = load_checkpoint(path)
    return checkpoint, Description.read(checkpoint.meta, checkpoint.path.with_suffix(".json"))


def check_out(out: Path) -> None:
    """Refuse an output directory that holds anything but a former export, before any work is done.

    Raises:
        UsageError: It does.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: not a directory")
    if out.is_dir() and any(out.iterdir()) and not _is_export(out):
        raise UsageError(f"--out {out}: it holds other files than a former export's; name a new directory")


def export(
    checkpoint: Checkpoint,
    inputs: Description,
    real: RealImages,
    out: Path,
    *,
    formats: Sequence[str],
    int8: bool,
    license: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Export a checkpoint, check every file on real images, and only then write them all.

    Args:
        checkpoint: The model.
        inputs: Its inputs.
        real: What it is checked on; with labels for int8 and bf16.
        out: Directory of the files, as `check_out` allows it; a former export there is replaced.
        formats: Of FORMATS.
        int8: Whether to quantise the ONNX file too.
        license: Of the weights, for the card.
        say: Takes a line for people.

    Returns:
        What config.json says.

    Raises:
        UsageError: An extra is missing, or nothing can be quantised.
        DataError: The checkpoint describes no model.
        NumericalError: A file's outputs are not PyTorch's.
        StorageError: A file cannot be written.
    """
    model = restore(checkpoint, torch.device("cpu"), inner_block="plain")
    classifier = Classifier(model, inputs.mean, inputs.std).eval()
    sample = real.sample()
    contents: dict[str, bytes] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name in formats:
        contents[name] = _make(name, classifier, inputs, checkpoint)
        runner = _run(name, contents[name], checkpoint)
        entries[name] = _entry(name, contents[name], classifier, runner, sample)
        if name == "safetensors-bf16":
            entries[name] |= {"dtype": "bfloat16", **_measured(runner, real)}
            entries[name]["top1_of_checkpoint"] = exporting.top1(classifier.run, real.batches())
        say(f"{_described(entries[name])}, {_agreed(entries[name], real)}")
    if int8:
        contents["onnx-int8"] = exporting.to_onnx_int8(contents["onnx"])
        runners = {name: exporting.run_onnx(contents[name]) for name in ("onnx", "onnx-int8")}
        entries["onnx-int8"] = _entry("onnx-int8", contents["onnx-int8"], classifier, runners["onnx-int8"], sample)
        for name, runner in runners.items():
            entries[name] |= _measured(runner, real)
        say(f"{_described(entries['onnx-int8'])}, {_compared(entries, real)}")
    config = _config(checkpoint, inputs, real, classifier, entries, license)
    _write(out, contents, config)
    say(f"wrote {out}; {out / CARD} is its model card")
    return config


def _make(name: str, classifier: Classifier, inputs: Description, checkpoint: Checkpoint) -> bytes:
    """Return the content of a format's file."""
    if name == "onnx":
        kept = {"model": checkpoint.meta["model"], "class_names": json.dumps(inputs.class_names)}
        kept |= {"checkpoint_sha256": checkpoint.sha256, "input": "uint8 RGB (batch, 3, height, width), not normalised"}
        return exporting.to_onnx(classifier, inputs.image_size, kept)
    if name == "torchscript":
        return exporting.to_torchscript(classifier, inputs.image_size)
    return exporting.to_safetensors(classifier, torch.bfloat16 if name == "safetensors-bf16" else torch.float32)


def _run(name: str, content: bytes, checkpoint: Checkpoint) -> Runner:
    """Load what was made as its users will."""
    cpu = torch.device("cpu")
    if name == "onnx":
        return exporting.run_onnx(content)
    if name == "torchscript":
        return exporting.run_torchscript(content, cpu)
    return run_safetensors(content, checkpoint.meta, checkpoint.path, cpu)


def _entry(name: str, content: bytes, classifier: Classifier, runner: Runner, sample: torch.Tensor) -> dict[str, Any]:
    """Compare what was made with the original, and return what config.json says of the file."""
    # Of int8 the accuracy tells what it is worth; the difference is noted.
    rounded = {"onnx-int8": math.inf, "safetensors-bf16": exporting.BF16_TOLERANCE}
    tolerance = rounded.get(name, exporting.TOLERANCE)
    try:
        agreement = exporting.compare(classifier.run, runner, sample, tolerance=tolerance)
    except NumericalError as error:
        raise NumericalError(f"{FILES[name]}: {error}; nothing was written") from error
    digest = hashlib.sha256(content).hexdigest()
    entry = {"file": FILES[name], "bytes": len(content), "sha256": digest}
    return {**entry, "agreement": dataclasses.asdict(agreement)}


def _measured(runner: Runner, real: RealImages) -> dict[str, Any]:
    return {"top1": exporting.top1(runner, real.batches()), "top1_images": len(real.images)}


def _described(entry: Mapping[str, Any]) -> str:
    return f"{entry['file']}: {entry['bytes'] / 1e6:.2f} MB"


def _agreed(entry: Mapping[str, Any], real: RealImages) -> str:
    agreement = entry["agreement"]
    sizes = ", ".join(map(str, agreement["batch_sizes"]))
    text = (
        f"within {agreement['max_difference']:.1e} of PyTorch's probabilities on {agreement['num_images']} images "
        f"({real.description}) in batches of {sizes}"
    )
    if "top1_of_checkpoint" in entry:
        text += f"; top-1 {entry['top1']:.2f} % beside {entry['top1_of_checkpoint']:.2f} % in float32"
    return text


def _compared(entries: Mapping[str, Mapping[str, Any]], real: RealImages) -> str:
    plain, int8 = entries["onnx"], entries["onnx-int8"]
    return (
        f"{int8['bytes'] / plain['bytes']:.0%} of {plain['file']}; top-1 {int8['top1']:.2f} % beside "
        f"{plain['top1']:.2f} % on {len(real.images)} images ({real.description})"
    )


def _config(
    checkpoint: Checkpoint,
    inputs: Description,
    real: RealImages,
    classifier: Classifier,
    entries: Mapping[str, Mapping[str, Any]],
    license: str,
) -> dict[str, Any]:
    """Return all that is known of the export, as plain JSON values; the model card says it in words."""
    meta = checkpoint.meta
    num_outputs = len(classifier.run(torch.zeros(1, 3, inputs.image_size, inputs.image_size, dtype=torch.uint8)))
    side, num_classes = inputs.image_size, len(inputs.class_names)
    described = {
        key: meta.get(key) for key in ("kind", "model", "arguments", "recipe", "epoch", "seed", "dataset_sha256")
    }
    described |= {key: meta.get(key) for key in ("views", "soft", "confidence")}
    described |= {key: meta.get(key) if isinstance(meta.get(key), dict) else None for key in ("teacher", "training")}
    described["warnings"] = meta["warnings"] if isinstance(meta.get("warnings"), list) else []
    return {
        **described,
        "schema": SCHEMA,
        "class_names": list(inputs.class_names),
        "image_size": side,
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "shape": ["batch", 3, side, side],
            "channels": "RGB",
            "range": [0, 255],
        },
        "outputs": [
            {"name": name, "dtype": "float32", "shape": ["batch", num_classes]} for name in OUTPUTS[:num_outputs]
        ],
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "checkpoint_sha256": checkpoint.sha256,
        "files": {name: dict(entry) for name, entry in entries.items()},
        "checked_on": {"images": real.description, "dataset_sha256": real.sha256},
        "data_source": real.source if real.sha256 == meta.get("dataset_sha256") else None,
        "license": license,
        "versions": _versions(entries),
        **_results(checkpoint, real),
    }


def _results(checkpoint: Checkpoint, real: RealImages) -> dict[str, Any]:
    """Return what the model reached: on the test split if metrics.json lies beside it, else on that which chose it."""
    metrics, run = (_read_beside(checkpoint, name) for name in ("metrics.json", "run.json"))
    scores: Any = metrics.get("test")
    split: str | None = "test"
    selected_on = metrics.get("evaluated_on")
    of_this = (checkpoint.meta.get("epoch"), checkpoint.meta.get("seed"))
    if not isinstance(scores, dict) or (scores.get("epoch"), metrics.get("seed")) != of_this:
        metrics, scores = {}, checkpoint.meta.get("scores")
        split = selected_on = real.evaluated_on
    scores = scores if isinstance(scores, dict) else {}
    return {
        "scores": {key: scores[key] for key in RESULTS if type(scores.get(key)) in (int, float)},
        "scores_split": split,
        "scores_precision": metrics.get("precision"),
        "selected_on": selected_on,
        "num_train": metrics.get("num_train"),
        "num_test": metrics.get("num_test"),
        "trained": {key: run.get(key) for key in ("device", "date", "commit", "versions", "seconds")} if run else None,
    }


def _read_beside(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return a JSON file beside a checkpoint; empty where there is none."""
    file = checkpoint.path.with_name(name)
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise DataError(f"{file}: not what a stage writes; delete it or train again")
    return found


def _versions(entries: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions that the files depend on."""
    names = ["torch", "safetensors", "numpy"]
    names += ["onnx", "onnxscript", "onnxruntime"] if "onnx" in entries else []
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), "titn-pipeline": pipeline.__version__, **found}


def _is_export(out: Path) -> bool:
    """Whether a directory's config.json is an export's."""
    try:
        config = read_json(out / CONFIG) if (out / CONFIG).is_file() else None
    except PipelineError:
        return False
    return isinstance(config, dict) and config.get("schema") == SCHEMA


def _write(out: Path, contents: Mapping[str, bytes], config: Mapping[str, Any]) -> None:
    """Write the files; a killed write leaves a config.json that names none of them, and that a rerun replaces."""
    write_json(out / CONFIG, {"schema": SCHEMA, "files": {}})
    for name, file in FILES.items():
        remove_leftovers(out / file)
        if name in contents:
            write_atomic(out / file, contents[name])
        else:
            (out / file).unlink(missing_ok=True)
    write_atomic(out / CARD, model_card(config).encode())
    write_json(out / CONFIG, config)
