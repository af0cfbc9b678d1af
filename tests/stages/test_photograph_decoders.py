"""Labels and models of photographs say by which rule and which decoders these became pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import encoded
from pipeline.data.decoding import cut, decoders, fit, named_decoders
from pipeline.labels import replay
from pipeline.labels.cache import LabelCache
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
