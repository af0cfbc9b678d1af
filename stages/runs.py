"""One model to be trained: what decides its result, where that goes, and whether it is there already."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline
from pipeline.checkpoints import RunState, fingerprint
from pipeline.errors import StorageError
from pipeline.recipes import FitRecipe, deciding_values
from pipeline.storage import lock, remove_leftovers
from stages.paths import Paths
from stages.staleness import why_stale

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
        description: The checkpoint's JSON, see stages.models.describe.
        recipe: How it is trained.
        seed: Of initialisation and order.
        inputs: Whatever else decides the result, as plain JSON values.
        differs: What differs from the recipe but for the seed, as key and value; empty for the recipe's own run.
        teacher: Name, SHA-256 and top-1 of the teacher against whose labels it is measured, if any.
        is_distilled: Whether it also learns from that teacher's labels.
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
    teacher: Mapping[str, Any] | None = None
    is_distilled: bool = False
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
