"""Finished runs made up for tests of the report, with curves and predictions that tests choose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.params import load_params
from pipeline.config.recipes import Recipe
from pipeline.system.text import to_csv
from pipeline.training.evaluation import PREDICTION_COLUMNS
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.shared.paths import Paths
from tests.support.project import ROOT

ENVIRONMENT = {
    "device": "a processor, 2 threads", "seconds": 1.0, "commit": "abc", "date": "2026-01-01 00:00:00",
    "versions": {"torch": "2.6"},
}  # fmt: skip

SCORES = {
    "top5": 90.0, "precision": 0.5, "recall": 0.5, "f1": 0.5, "class_top1": 50.0, "distillation_top1": None,
    "agreement": None,
}  # fmt: skip


DATA = "d" * 64
TRAINING = ("epochs", "batch_size", "optimizer", "lr")


def recipe(name: str) -> Recipe:
    return load_params(ROOT / "params.yaml").recipes[name]


def finished(
    folder: Path,
    name: str,
    curve: Sequence[float | None],
    *,
    kind: str = "student",
    seed: int = 0,
    differs: Mapping[str, str] | None = None,
    predictions: Sequence[Sequence[object]] = (),
    trained: Mapping[str, Any] | None = None,
    view_recipe: Mapping[str, Any] | None = None,
    data: str = DATA,
    is_described: bool = True,
    **metrics: Any,
) -> FinishedRun:
    """Write a run whose top-1 by epoch is `curve`.

    `trained` are fields of its recipe as trained beside those of `metrics`, `view_recipe` those of its views; `data` is
    the SHA-256 of its data. The checkpoint's JSON says all of it, unless `is_described` is false; it has no weights.
    """
    label = "-".join([name, *(f"{key}-{value}" for key, value in (differs or {}).items()), f"seed-{seed}"])
    out = folder / label
    count = 0
    while out.exists():
        count += 1
        out = folder / f"{label}-{count}"
    out.mkdir(parents=True)
    known = [value for value in curve if value is not None]
    best = {**SCORES, "epoch": curve.index(max(known)) + 1 if known else 1, "top1": max(known, default=0.0)}
    content = {
        "name": name, "kind": kind, "recipe": "smoke", "differs": dict(differs or {}), "seed": seed,
        "evaluated_on": "test",
        "epochs": len(curve), "batch_size": 1024, "precision": "fp32", "optimizer": "sgd", "lr": 0.1, "views": None,
        "teacher": None, "best": best, "last": {**best, "epoch": len(curve)}, "test": best, "warnings": [],
        "num_train": 50000, "num_test": 10000, "distilled": False, "soft": None, "confidence": False, "parameters": 1,
        "at_chance": False, "paper_gmacs_1024": 1.0, "flops_per_image": 1,
        **metrics,
    }  # fmt: skip
    (out / "metrics.json").write_text(json.dumps(content))
    if is_described:
        training = {**{key: content[key] for key in TRAINING}, "precision": "auto", **(trained or {})}
        inputs: dict[str, Any] = {"views": {"count": content["views"], "mixing": "cutmix", **(view_recipe or {})}}
        if kind == "student":
            training |= {"alpha": 0.5, **(trained or {})} | ({"soft": content["soft"]} if content["soft"] else {})
            inputs |= {"labels": (differs or {}).get("labels", "cached")}
            inputs |= {"teacher": content["teacher"] and content["teacher"]["sha256"]}
        meta = {
            "sha256": "0" * 64 if kind == "teacher" else "5" * 64, "kind": kind, "model": name.partition("-")[0],
            "arguments": {"num_classes": 100}, "dataset_sha256": data, "training": training, "inputs": inputs,
            "seed": seed, "version": "0.1.0",
        }  # fmt: skip
        (out / "best.json").write_text(json.dumps(meta))
    (out / "run.json").write_text(json.dumps(ENVIRONMENT))
    rows = [(epoch, 0.1, 1.0, value, value) for epoch, value in enumerate(curve, start=1)]
    (out / "curve.csv").write_bytes(to_csv(("epoch", "lr", "train_loss", "top1", "top5"), rows))
    (out / "predictions.csv").write_bytes(to_csv(PREDICTION_COLUMNS, predictions))
    run = FinishedRun.read(out)
    assert run is not None
    return run


def finished_runs(of: Recipe, *runs: FinishedRun, winner: str | None = None) -> FinishedRuns:
    """Sort runs as `FinishedRuns.read` does: those of seed 0 that differ in nothing are the recipe's own."""
    recipe_runs = [run for run in runs if not run.seed and not run.differs]
    return FinishedRuns(
        recipe=of,
        paths=Paths(of.name),
        teachers={run.name: run for run in recipe_runs if run.kind == "teacher"},
        students={run.name: run for run in recipe_runs if run.kind == "student"},
        others={str(run.directory): run for run in runs if run not in recipe_runs},
        winner=winner,
    )
