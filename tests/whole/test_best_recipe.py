"""The recipe `cifar100-best`: what it says, and all of it end to end at a small size on the digits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.config.params import load_params
from pipeline.models.students import STUDENTS
from tests.support.in_process import invoke as run
from tests.support.project import ROOT, Project

NAME = "cifar100-best"
TEACHER = "mobilenet_v3_large"


def shrunken() -> dict[str, Any]:
    """Return params.yaml with the recipe made small: digits, one small teacher, tiny students, two epochs and views."""
    tree: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    recipe = tree["recipes"][NAME]
    recipe["dataset"] |= {"source": "digits", "test_fraction": 0.5}
    for views in recipe["views"].values():
        views["count"] = 2
    recipe["teacher"] |= {"epochs": 3, "batch_size": 32, "weights": "none", "precision": "fp32"}
    recipe["teacher"] |= {"warmup_epochs": 0.0}
    recipe["teachers"] = {TEACHER: {"optimizer": "adamw", "lr": 0.002, "clip": 1.0, "bn_momentum": 0.1}}
    recipe["label"] |= {"precision": "fp32", "topk": 10}
    small = {"epochs": 2, "batch_size": 128, "warmup_epochs": 0.5, "precision": "fp32"}
    recipe["student"] |= {**small, "depth": 1, "width": 48}
    return {**tree, "recipe": NAME, "teachers": [TEACHER], "students": {"titn": "default"}, "recipes": {NAME: recipe}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The shrunken recipe with its teacher and labels."""
    path = tmp_path_factory.mktemp("best")
    (path / "params.yaml").write_text(json.dumps(shrunken()))  # JSON is YAML, too
    project = Project(path)
    run(project, "prepare")
    run(project, "teacher", TEACHER)
    run(project, "select")
    run(project, "label")
    return project


def test_its_variants_change_one_ingredient_each() -> None:
    recipe = load_params(ROOT / "params.yaml").recipes[NAME]
    whole = dataclasses.asdict(recipe.students["titn"])
    assert (whole["width"], whole["depth"], whole["patch_size"], whole["pixel_width"]) == (192, 12, 8, 12)
    changed = {}
    for name, student in recipe.students.items():
        values = dataclasses.asdict(student)
        if student.model == "titn":
            changed[name] = {key for key in values if values[key] != whole[key]}
        assert (student.soft > 0) <= STUDENTS[student.model].has_distillation_head
    assert changed == {
        "titn": set(), "titn-patch4": {"patch_size", "pixel_size"}, "titn-hard": {"soft"}, "titn-light": {"views"},
        "titn-mixup": {"views"}, "titn-no-drop-path": {"drop_path"}, "titn-ema": {"ema"},
        "titn-512": {"batch_size", "lr"}, "titn-sgd": {"optimizer", "lr", "weight_decay", "decay"},
    }  # fmt: skip
    differ = {name: different(views, recipe.views["default"]) for name, views in recipe.views.items()}
    assert differ == {"default": set(), "mixup": {"mixing"}, "light": {"autoaugment"}}
    assert recipe.dataset.val_fraction == 0.1 and recipe.label.topk == 20


def different(one: Any, other: Any) -> set[str]:
    """Return the fields in which two recipes of one kind differ."""
    return {field.name for field in dataclasses.fields(one) if getattr(one, field.name) != getattr(other, field.name)}


def test_what_is_trained_at_the_end_has_its_settings_and_all_images() -> None:
    recipes = load_params(ROOT / "params.yaml").recipes
    best, final = recipes[NAME], recipes["cifar100-final"]
    assert different(best.dataset, final.dataset) == {"val_fraction"} and final.dataset.val_fraction == 0
    assert (best.select, best.label) == (final.select, final.label)
    for kind in ("views", "teachers", "students"):
        chosen = getattr(final, kind)
        assert chosen and {name: getattr(best, kind)[name] for name in chosen} == chosen


@pytest.mark.slow
def test_it_runs_through_all_stages_in_small(project: Project) -> None:
    for name in ("titn", "titn-hard"):
        run(project, "distill", "--student", name)
    all_metrics = {}
    for name in ("titn", "titn-hard"):
        directory = project.path / "data" / NAME / "students" / name
        all_metrics[name] = json.loads((directory / "metrics.json").read_text())
        assert (directory / "best.safetensors").is_file()
    whole = all_metrics["titn"]
    assert (whole["soft"], whole["optimizer"], whole["evaluated_on"], whole["distilled"]) == (1.0, "adamw", "val", True)
    assert all_metrics["titn-hard"]["soft"] is None
    assert whole["last"] != all_metrics["titn-hard"]["last"]
    meta = json.loads((project.path / "data" / NAME / "students/titn/best.json").read_text())
    assert meta["training"]["drop_path"] == 0.1 and meta["inputs"]["topk"] == 10  # of ten classes
    out = run(project, "report", "--no-figures", "--out", "report")
    text = (project.path / "report/report.md").read_text()
    assert "titn-hard" in text and "left out: " not in out
    for name in ("titn-ema", "titn-sgd", "titn-light"):
        assert f"| {name} | not run" in text


@pytest.mark.slow
def test_views_of_its_own_need_labels_of_their_own(project: Project) -> None:
    out = run(project, "distill", "--student", "titn-light", code=3)
    assert "pipeline label --recipe cifar100-best --view-recipe light" in out


def test_the_papers_views_are_in_its_recipe() -> None:
    recipes = load_params(ROOT / "params.yaml").recipes
    ours, papers = recipes[NAME].views["default"], recipes["cifar100"].views["default"]
    assert dataclasses.replace(ours, count=papers.count) == papers


def test_it_says_that_it_has_not_been_run() -> None:
    text = Path(ROOT / "params.yaml").read_text()
    comment = text.partition(f"  {NAME}:\n")[0].rpartition("\n\n")[2]
    assert "UNCONFIRMED" in comment
