"""The commands on views of pairs that mix either way, erase, and have timm's RandAugment."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.labels.cache import LabelCache
from tests.support.in_process import invoke
from tests.support.project import Project

FIELDS = (
    "autoaugment: randaugment, magnitudes: timm, probability: 0.5, erasing: 0.3, mixing: both, "
    "mixing_probability: 0.8, cutmix_alpha: 1.0, mixup_alpha: 0.8, partner: paired"
)


@pytest.mark.slow
def test_pairs_are_labelled_verified_learned_from_and_shown(taught: Project, tmp_path: Path) -> None:
    shutil.copytree(taught.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    project.edit("autoaugment: cifar10, mixing: cutmix}", f"{FIELDS}}}")
    invoke(project, "label")
    assert "0 differ" in invoke(project, "labels", "verify", "data/smoke/labels/default.h5", "--sample", "100")
    cache = LabelCache.open(project.data / "labels/default.h5")
    recorded = cache.identity["view_recipe"]
    assert (recorded["partner"], recorded["magnitudes"], recorded["erasing"]) == ("paired", "timm", 0.3)
    assert "resized_crop" not in recorded and "magnitude" not in recorded
    invoke(project, "distill", "--student", "vit")
    assert "up to date" in invoke(project, "distill", "--student", "vit", "--dry-run")
    invoke(project, "report")
    page = (project.data / "reports/report.html").read_text()
    assert "CutMix or MixUp" in page and "SolarizeAdd" in page and "mixing" in page
    project.edit("mixup_alpha: 0.8", "mixup_alpha: 0.4")
    assert "view_recipe.mixup_alpha is 0.8, expected 0.4" in invoke(project, "label", "--dry-run")
