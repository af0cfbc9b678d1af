"""A project that looks as if the whole recipe `cifar100` had run, with scores made up by formulas."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report import paper
from pipeline.system.storage import write_json
from stages.shared.paths import Paths
from tests.support.finished_runs import finished
from tests.support.project import ROOT, Project

RECIPE = "cifar100"
STUDENTS = ("titn", "tnt", "deit", "vit", "titn-large-patch", "titn-mixup")
CLASS_NAMES = [f"class_{index}" for index in range(99)] + ['<script>alert("|`x`|")</script> & *co*']
EPOCHS = 20
TEACHER = {"name": "vgg16_bn", "sha256": "0" * 64, "top1": 78.0}


def create(path: Path, *, seeds: int = 3) -> Project:
    """Write the project; the students titn and vit have several seeds."""
    path.mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", path / "params.yaml")
    project = Project(path)
    for shift, name in enumerate(paper.TEACHERS[RECIPE]):
        add(project, name, 78.0 - 4 * (shift != 6) - shift, kind="teacher")
    add(
        project, "vgg16_bn", 60.0, kind="teacher", differs={"optimizer": "rmsprop", "lr": "0.0001"}, optimizer="rmsprop"
    )
    write_json(path / "data" / RECIPE / "selection.json", {"winner": "vgg16_bn", "by": "top1", "candidates": []})
    for shift, name in enumerate(STUDENTS):
        for seed in range(seeds if name in ("titn", "vit") else 1):
            add(project, name, 75.0 - shift + seed, seed=seed, teacher=TEACHER, distilled=name not in ("vit", "tnt"))
    add(project, "titn", 71.0, differs={"labels": "none"}, teacher=TEACHER)
    return project


def add(
    project: Project, name: str, top1: float, *, kind: str = "student", seed: int = 0, teacher: Any = None,
    differs: Mapping[str, str] | None = None, **metrics: Any,
) -> None:  # fmt: skip
    """Add a run whose best epoch is the last but one, at `top1` percent."""
    curve = [top1 * (1 - 0.8 * 0.8**epoch) for epoch in range(EPOCHS - 2)] + [top1, top1 - 0.25]
    scores = {"top5": top1 + 15, "precision": 0.7, "recall": 0.71, "f1": 0.705, "class_top1": top1 - 1}
    scores |= {"distillation_top1": top1 - 0.5, "agreement": 80.0 if teacher else None, "loss": 1.0}
    best, last = {"epoch": EPOCHS - 1, "top1": top1, **scores}, {"epoch": EPOCHS, **scores, "top1": top1 - 0.25}
    costs = {"parameters": 5_845_220, "paper_gmacs_1024": 111.4, "flops_per_image": 220_000_000}
    run = finished(
        project.path / "made", name, curve, kind=kind, seed=seed, differs=differs, predictions=predictions(top1, seed),
        recipe="cifar100", best=best, last=last, test=best, teacher=teacher,
        **{"views": None if kind == "teacher" else EPOCHS, **costs, **metrics},
    )  # fmt: skip
    paths = Paths(RECIPE)
    recipe_run = paths.teacher(name) if kind == "teacher" else paths.student(name)
    out = project.path / (paths.run(run.directory.name) if seed or differs else recipe_run)
    out.parent.mkdir(parents=True, exist_ok=True)
    run.directory.rename(out)


def predictions(top1: float, seed: int) -> list[tuple[object, ...]]:
    """Return rows of predictions.csv of 1,000 images."""
    draws = np.random.default_rng(seed)
    target = np.arange(1000) % 100
    guesses = [np.where(draws.random(1000) * 100 < top1, target, draws.integers(0, 100, 1000)) for _ in range(4)]
    columns = [[CLASS_NAMES[index] for index in indices] for indices in (target, *guesses)]
    prediction, class_head, distillation_head, teacher = columns[1:]
    rows = zip(range(1000), columns[0], prediction, ["0.9"] * 1000, class_head, distillation_head, teacher, strict=True)
    return list(rows)
