"""`pipeline prepare`: what it writes, what it refuses, and that a refusal writes nothing."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.config.recipes import DatasetRecipe, LabelRecipe, Recipe, SelectRecipe
from pipeline.data.datasets import Dataset
from pipeline.errors import DataError, UsageError
from stages.prepare import prepare


def make_recipe(source, **settings):
    dataset = DatasetRecipe(source=source, **settings)
    return Recipe(
        name="own", dataset=dataset, views={}, teachers={}, select=SelectRecipe(), label=LabelRecipe(), students={}
    )


@pytest.fixture
def folder(tmp_path):
    """Twenty images of each of two classes, and one damaged file."""
    for number in range(40):
        path = tmp_path / "images" / "train" / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 2 * number, 255)).save(path)
    (tmp_path / "images" / "train" / "cat" / "\udcff.png").write_bytes(b"")
    return tmp_path / "images"


def test_digits_are_prepared_and_summarized(tmp_path):
    out = tmp_path / "data" / "own" / "prepared"
    summary = prepare(make_recipe("digits"), out=out, raw=tmp_path / "raw")
    dataset = Dataset.load(out / "dataset.h5")
    assert sorted(path.name for path in out.iterdir()) == ["dataset.h5", "summary.json"]
    assert summary["sha256"] == dataset.sha256 and summary["num_samples"] == {"train": 1437, "test": 360}
    assert (summary["evaluation"], summary["settings"]["image_size"], summary["num_skipped"]) == ("test", 32, 0)
    assert summary["class_counts"]["test"] == np.bincount(dataset.test.labels).tolist()
    assert (summary["mean"], summary["std"]) == (list(dataset.mean), list(dataset.std))


def test_preparing_again_gives_the_same_bytes(tmp_path):
    recipe = make_recipe("digits", val_fraction=0.1)
    contents = []
    for _ in range(2):
        assert prepare(recipe, out=tmp_path, raw=tmp_path / "raw")["evaluation"] == "val"
        contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert contents[0] == contents[1]


def test_the_summary_names_what_was_skipped(tmp_path, folder):
    recipe = make_recipe("folder", image_size=8, val_fraction=0.25)
    summary = prepare(recipe, out=tmp_path / "out", raw=tmp_path / "raw", folder=folder, skip_bad=True)
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written == {
        "recipe": "own",
        "source": "folder",
        "settings": dataclasses.asdict(recipe.dataset),
        "num_samples": {"train": 24, "val": 8, "test": 8},
        "class_counts": {"train": [12, 12], "val": [4, 4], "test": [4, 4]},
        "class_names": ["cat", "dog"],
        "evaluation": "val",
        "mean": summary["mean"],
        "std": summary["std"],
        "sha256": Dataset.load(tmp_path / "out" / "dataset.h5").sha256,
        "num_skipped": 1,
        "skipped": [{"path": "train/cat/\\xff.png", "reason": "empty"}],
    }
    assert summary["std"][2] == 1.0


def test_what_is_refused_leaves_the_earlier_data_set(tmp_path, folder):
    out = tmp_path / "out"
    prepare(make_recipe("digits"), out=out, raw=tmp_path / "raw")
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match="--skip-bad"):
        prepare(make_recipe("folder"), out=out, raw=tmp_path / "raw", folder=folder)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == earlier


def test_a_folder_and_a_download_exclude_each_other(tmp_path, folder):
    with pytest.raises(UsageError, match=r"--from .*images and --download"):
        prepare(make_recipe("cifar10"), out=tmp_path, raw=tmp_path / "raw", folder=folder, download=True)


def test_the_source_folder_without_a_folder_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="--from FOLDER"):
        prepare(make_recipe("folder"), out=tmp_path / "out", raw=tmp_path / "raw")
    assert not (tmp_path / "out").exists()
