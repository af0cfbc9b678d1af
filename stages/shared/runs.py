"""One model to be trained: what decides its result, where that goes, and whether it is there already."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pipeline
from pipeline.config.recipes import FitRecipe, StudentRecipe, deciding_values
from pipeline.data.datasets import Dataset
from pipeline.errors import DataError, StorageError
from pipeline.inference.descriptions import GEOMETRY
from pipeline.inference.loading import build_model
from pipeline.models.counting import flops_per_image, num_parameters, paper_gmacs_1024
from pipeline.system.storage import lock, remove_leftovers
from pipeline.training.checkpoints import RunState, fingerprint, read_meta
from stages.shared.paths import Paths

NOT_TRAINED = "not trained"
MAX_NAMED = 3
_ABSENT = object()
# In the place of values that say nothing to people.
_PHRASES = {"dataset_sha256": "other data", "teacher": "another teacher", "weights_sha256": "other initial weights"}
# Follow from the data.
_CONSEQUENCES = ("class_names", "image_size", "mean", "std", "num_classes")

CHECKPOINTS = ("best.safetensors", "best.json", "last.safetensors", "last.json")
OUTPUTS = ("metrics.json", "curve.csv", "predictions.csv", "run.json")


@dataclass(frozen=True)
class Run:
    """One model to be trained.

    Attributes:
        name: As shown to people.
        out: Where the outputs go.
        work: Where the resumable state lies while it runs.
        stage: The DVC stage whose outputs these are; None for runs that differ from the recipe.
        description: The checkpoint's JSON, see stages.shared.runs.describe.
        recipe: How it is trained.
        seed: Of initialisation and order.
        inputs: Whatever else decides the result, as plain JSON values.
        differs: What differs from the recipe but for the seed, as key and value; empty for the recipe's own run.
        metric: The score that decides the best epoch.
        num_views: Views that the epochs cycle through; None for a teacher, which never sees a view twice.
        soft: Temperature of soft distillation; None for hard labels and without a teacher.
        confidence: Whether the teacher's confidence weighs the samples.
        keep_last: Whether the last epoch's weights are kept beside the best's.
    """

    name: str
    out: Path
    work: Path
    stage: str | None
    description: Mapping[str, Any]
    recipe: FitRecipe
    seed: int
    inputs: Mapping[str, Any]
    differs: Mapping[str, str]
    metric: str = "top1"
    num_views: int | None = None
    soft: float | None = None
    confidence: bool = False
    keep_last: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the result, the code's version included."""
        return fingerprint(
            model=dict(self.description),
            recipe=deciding_values(self.recipe),
            seed=self.seed,
            inputs=dict(self.inputs),
            version=pipeline.__version__,
        )

    @property
    def decided_by(self) -> dict[str, Any]:
        """What decides the result, as the checkpoint's JSON keeps it."""
        own = {"training": deciding_values(self.recipe), "seed": self.seed, "inputs": dict(self.inputs)}
        return {**self.description, **own, "version": pipeline.__version__}

    def why_stale(self) -> str | None:
        """Say in a phrase why the outputs are not those of exactly this run; None where they are."""
        return why_stale(self.out, OUTPUTS, self.fingerprint, self.decided_by)

    @property
    def lock(self) -> Path:
        """The lock of whoever writes the outputs."""
        return self.work.with_name(f"{self.work.name}.lock")

    def remove_leftovers(self) -> None:
        """Remove what killed writers of the outputs left; for the holder of the lock."""
        for name in (*CHECKPOINTS, *OUTPUTS):
            remove_leftovers(self.out / name)

    def clean_up(self) -> None:
        """Remove what a run left that was killed between writing its outputs and its end."""
        if self.work.exists():
            with contextlib.suppress(StorageError), lock(self.lock):
                self.remove_leftovers()
                RunState(self.work, self.fingerprint).delete()


def place(
    paths: Paths, work: str, name: str, settings: Mapping[str, str], seed: int, out: Path, stage: str
) -> tuple[Path, Path, str | None]:
    """Return output directory, work directory and DVC stage; what differs from the recipe goes to data/runs."""
    differences = [f"{key}-{value}" for key, value in settings.items()]
    if seed:
        differences.append(f"seed-{seed}")
    if not differences:
        return out, paths.work(*work.split("/")), stage
    label = "-".join([name, *differences]).replace("/", "_")
    return paths.run(label), paths.work("runs", label), None


def why_stale(out: Path, files: Sequence[str], fingerprint: str, expected: Mapping[str, Any]) -> str | None:
    """Say in a phrase why a directory does not hold a run's outputs; None where it does.

    Args:
        out: The run's directory.
        files: What a finished run has there beside its checkpoint.
        fingerprint: Of everything that decides the result.
        expected: The same as plain JSON values, as far as the checkpoint's JSON keeps it.
    """
    try:
        meta = read_meta(out)
    except DataError:
        return "its checkpoint is damaged"  # what runs the stage again must not be stopped by it
    if meta is None:
        return "a checkpoint without its other files" if any((out / name).exists() for name in files) else NOT_TRAINED
    missing = [name for name in files if not (out / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    if meta.get("fingerprint") == fingerprint:
        return None
    found = differences(meta, expected)
    more = f", {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more if found else "trained under other settings, or by another version"


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two trees of JSON values differ, as `lr 0.1 -> 0.05`.

    Args:
        found: What was; what `expected` does not have does not count.
        expected: What is asked for. A part of it that `found` lacks altogether is passed over: an older version of
            this project did not keep it.
    """
    named: dict[str, str] = {}
    for part, wanted in expected.items():
        if part in found:
            _compare(part, found[part], wanted, named)
    if "other data" in named.values():
        named = {name: phrase for name, phrase in named.items() if name not in _CONSEQUENCES}
    return list(named.values())


def _compare(name: str, found: Any, wanted: Any, named: dict[str, str]) -> None:
    """Add what differs below a field, each under its own name."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        inner = f"{name}." if name == "views" else ""
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            _compare(f"{inner}{key}", found.get(key, _ABSENT), wanted.get(key, _ABSENT), named)
    elif found != wanted and name not in named:
        named[name] = _PHRASES.get(name, f"{name} {_text(found)} -> {_text(wanted)}")


def _text(value: Any) -> str:
    """Write a value as params.yaml does, a long one cut."""
    if value is _ABSENT or value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def student_arguments(recipe: StudentRecipe, *, num_classes: int, image_size: int) -> dict[str, Any]:
    """Return what pipeline.models.students.build_student needs, as plain JSON values."""
    geometry = {key: value for key, value in dataclasses.asdict(recipe).items() if key in GEOMETRY}
    return {"num_classes": num_classes, "image_size": image_size, **geometry}


def describe(dataset: Dataset, recipe_name: str, *, kind: str, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a checkpoint's JSON from which the model can be built and used again."""
    return {
        "kind": kind,
        "model": model,
        "arguments": arguments,
        "recipe": recipe_name,
        "class_names": list(dataset.class_names),
        "image_size": dataset.image_size,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "dataset_sha256": dataset.sha256,
    }


def costs(meta: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Return parameters, the paper's GMACs of a batch of 1024, and PyTorch's FLOPs of one image."""
    with torch.device("meta"):
        model = build_model(meta["kind"], meta["model"], meta["arguments"])
    return {
        "parameters": num_parameters(model),
        "paper_gmacs_1024": round(paper_gmacs_1024(model, image_size), 3),
        "flops_per_image": flops_per_image(model, image_size),
    }


def plan_run(run: Run, *, fresh: bool = False) -> str:
    """Say in one line what training a model would do, and why; writes nothing."""
    why = "--fresh" if fresh else run.why_stale()
    if why is None:
        return f"{run.name}: up to date ({run.out})"
    state = None if fresh else RunState(run.work, run.fingerprint).peek()
    if state is None:
        epochs = f"{run.recipe.epochs} epochs" if run.recipe.epochs > 1 else "1 epoch"
        return f"{run.name}: train {epochs} ({why}); writes {run.out}"
    where = f"epoch {state['epoch'] + 1} of {run.recipe.epochs}, step {state['step']}"
    return f"{run.name}: interrupted, goes on from {where} ({why}); writes {run.out}"
