"""Labels and models of photographs say by which rule and which decoders these became pixels, and belong to these."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.params import load_params
from pipeline.data import encoded
from pipeline.data.decoding import cut, decoders, fit, named_decoders
from pipeline.labels import replay
from pipeline.labels.cache import LabelCache
from stages.reports.runs import FinishedRuns
from stages.shared.paths import Paths
from tests.support.in_process import invoke
from tests.support.project import Project
from tests.support.untrained import untrained

CPU = ("--device", "cpu")
LABELS = "data/smoke/labels/default.h5"
STUDENT = "data/runs/smoke/vit-epochs-1"


def lay(project: Project) -> None:
    """Two classes of JPEGs."""
    rng = np.random.default_rng(0)
    for number in range(40):
        path = project.path / "photos" / ("dark", "bright")[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (30 + number % 31, 25 + number % 37, 3), np.uint8) + number % 2 * 130
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    project.edit("{source: digits, image_size: 32, ", "{source: folder, path: photos, store: encoded, resize: crop, ")


def test_photographs_rule_and_decoders_are_recorded_and_other_pixels_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = untrained(tmp_path / "project", lay)
    invoke(project, "label", *CPU)
    cache = LabelCache.open(project.path / LABELS)
    assert cache.identity["rendition"] == {"image_size": 32, "resize": "crop"}
    assert decoders().items() <= cache.provenance["versions"].items()
    invoke(project, "distill", "--student", "vit", "--set", "epochs=1", *CPU)
    invoke(project, "export", STUDENT, "--format", "safetensors", "--out", "exported")
    for file in (project.path / STUDENT / "best.json", project.path / "exported/config.json"):
        told = json.loads(file.read_text())
        assert (told["resize"], told["exif"], told["decoders"]) == ("crop", "upright", decoders()), file

    monkeypatch.setattr(encoded, "fit", lambda *arguments: fit(*arguments) ^ 1)
    monkeypatch.setattr(encoded, "cut", lambda *arguments: cut(*arguments) ^ 1)
    monkeypatch.setattr(replay, "decoders", lambda: {"pillow": "1.0"})
    words = f"the files were decoded by {named_decoders(decoders())}, and are here by pillow 1.0"
    assert words in invoke(project, "distill", "--student", "titn", "--set", "epochs=1", *CPU, code=3)
    said = invoke(project, "labels", "verify", LABELS, "--sample", "20", code=3)
    assert words in said and "of 20 labels replayed would change" in said


def test_models_stay_with_the_pixels_that_photographs_became(tmp_path: Path) -> None:
    project = untrained(tmp_path / "project", lay)
    invoke(project, "label", *CPU)
    invoke(project, "distill", "--student", "vit", "--set", "epochs=1", "--seeds", "0,1", *CPU)
    export = ("export", STUDENT, "--format", "safetensors", "--out")
    invoke(project, *export, "exported")
    invoke(project, "evaluate", STUDENT, *CPU)
    recipe = load_params(project.path / "params.yaml").select(None)
    summary, online = project.data / "prepared/summary.json", ("--labels", "online", "--teacher", "data/smoke/teacher")
    before = json.loads(summary.read_text())["sha256"]
    titn = ("distill", "--student", "titn", "--set", "epochs=1", *online, *CPU)
    # A Dataset that a call of titn.distill brings has its own store, which the recipe's settings do not name.
    content = json.loads(summary.read_text())
    assert content["settings"].pop("store") == "encoded"
    summary.write_text(json.dumps(content))
    with contextlib.chdir(project.path):
        runs = FinishedRuns.read(recipe, Paths("smoke"))
    assert [run.name for run in runs.all] == ["vit", "vit"] and not runs.left_out
    assert "recorded as" in invoke(project, "record", STUDENT)
    described = project.data / "prepared/dataset.json"
    cropped = described.read_text()
    described.write_text(cropped.replace('"resize": "crop"', '"resize": "squeeze"'))
    assert "resize crop in place of image_size 32, resize squeeze" in invoke(project, "record", STUDENT, code=3)
    described.write_text(cropped)
    for old, new, pixels in (
        ("resize: crop, ", "resize: crop, image_size: 48, ", "image_size 48, resize crop"),
        ("resize: crop, image_size: 48, ", "", "image_size 32, resize squeeze"),
    ):
        project.edit(old, new)
        invoke(project, "prepare")
        assert json.loads(summary.read_text())["sha256"] == before
        words = f"trained on the same files as data/smoke/prepared/dataset.json (SHA-256 {before[:12]}), but with "
        words += f"image_size 32, resize crop in place of {pixels}"
        for command in (
            ("evaluate", STUDENT, *CPU), ("evaluate", "exported", *CPU), ("bench", STUDENT, *CPU), ("record", STUDENT),
            (*export, "again"), titn,
        ):  # fmt: skip
            assert words in invoke(project, *command, code=3)
        assert invoke(project, "report", "--no-figures").count(words) == 2
    mend_refused(project, STUDENT, words)

    # A finished teacher's weights are the same whatever it sees; the label file is still of the former pixels.
    described = project.data / "teacher/best.json"
    described.write_text(described.read_text().replace('"resize": "crop"', '"resize": "squeeze"'))
    invoke(project, *titn)
    mend_refused(project, next(str(run) for run in (project.path / "data/runs/smoke").glob("titn*")), "no labels by")

    with contextlib.chdir(project.path):
        runs = FinishedRuns.read(recipe, Paths("smoke"))
        assert [run.name for run in runs.all] == ["titn"] and len(runs.left_out) == 2
        shutil.rmtree(project.data / "prepared")
        runs = FinishedRuns.read(recipe, Paths("smoke"))
    assert [run.name for run in runs.all] == ["vit", "vit"], "they are most of the runs"
    assert "resize squeeze in place of image_size 32, resize crop" in next(iter(runs.left_out.values()))


def mend_refused(project: Project, run: str, words: str) -> None:
    """Damage the predictions of a run, and let `evaluate --mend` refuse to write others."""
    table = project.path / run / "predictions.csv"
    damaged = table.read_bytes()[:-1]
    table.unlink()
    table.write_bytes(damaged)
    assert words in invoke(project, "evaluate", run, "--mend", *CPU, code=3)
    assert table.read_bytes() == damaged
