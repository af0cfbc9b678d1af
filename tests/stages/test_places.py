"""Each run that differs from its recipe has one directory of its own, and those of earlier versions are found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.config.params import RESERVED
from pipeline.config.recipes import StudentRecipe
from stages.shared.paths import Paths
from stages.shared.places import MAX_NAME, Place, settings_as_written
from tests.support.in_process import invoke
from tests.support.project import Project, unseal

STUDENT = StudentRecipe(model="titn", epochs=3, batch_size=8, lr=0.1)
BY_LABEL = ("distill", "--student", "vit")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a student `vit`, another of the name that a run of it once had, and a run of each."""
    project = Project.create(tmp_path_factory.mktemp("places") / "project")
    project.edit("vit: {}", "vit: {}\n      vit-epochs-1: {model: vit, epochs: 1}")
    invoke(project, "prepare")
    invoke(project, *BY_LABEL, "--set", "epochs=1", "--set", "lr=0.20", "--seed", "1")
    invoke(project, *BY_LABEL, "--set", "epochs=1", "--seed", "1")
    invoke(project, "distill", "--student", "vit-epochs-1", "--seed", "1")
    return project


def name_of(*place: object) -> str:
    """Return the name of a run's directory where nothing has been run yet."""
    return Place(*place).find(Paths("none"), lambda _: False, lambda _: False)  # type: ignore[arg-type]


def folders(project: Project) -> list[str]:
    return sorted(path.name for path in (project.path / "data/runs/smoke").iterdir())


def test_two_runs_never_share_a_directory(trained: Project) -> None:
    *plain, exact = folders(trained)
    assert plain == ["vit-epochs-1-lr-0.2-seed-1", "vit-epochs-1-seed-1"] and exact.startswith("vit-epochs-1-seed-1-")
    names = [
        json.loads((trained.path / "data/runs/smoke" / folder / "metrics.json").read_text())["name"]
        for folder in folders(trained)
    ]
    assert sorted(names) == ["vit", "vit", "vit-epochs-1"]


def test_settings_in_another_order_or_writing_are_the_same_run(trained: Project) -> None:
    for lr in ("0.2", "0.20", "2e-1"):
        out = invoke(trained, *BY_LABEL, "--set", f"lr={lr}", "--set", "epochs=01", "--seed", "1", "--dry-run")
        assert "up to date (data/runs/smoke/vit-epochs-1-lr-0.2-seed-1)" in out


def test_a_directory_named_by_an_earlier_version_is_found(trained: Project) -> None:
    runs = trained.path / "data/runs/smoke"
    former, now = runs / "vit-lr-0.20-epochs-1-seed-1", runs / "vit-epochs-1-lr-0.2-seed-1"
    now.rename(former)
    metrics = unseal(former) / "metrics.json"
    text = metrics.read_text()
    metrics.write_text(json.dumps({**json.loads(text), "differs": {"lr": "0.20", "epochs": "1"}}))
    settings = ("--set", "epochs=1", "--set", "lr=0.2")
    out = invoke(trained, *BY_LABEL, *settings, "--seed", "1", "--dry-run")
    assert "up to date (data/runs/smoke/vit-lr-0.20-epochs-1-seed-1)" in out
    assert "not trained" in invoke(trained, *BY_LABEL, *settings, "--seed", "2", "--dry-run")
    metrics.write_text(text)
    former.rename(now)


def test_what_an_earlier_version_put_there_is_not_overwritten(trained: Project) -> None:
    """There `vit-epochs-1 --seed 1` had the directory of `vit --set epochs=1 --seed 1`."""
    runs = trained.path / "data/runs/smoke"
    [own] = [path for path in runs.iterdir() if path.name.startswith("vit-epochs-1-seed-1-")]
    kept, shared = runs.parent / "kept-aside", runs / "vit-epochs-1-seed-1"
    shared.rename(kept)
    own.rename(shared)
    out = invoke(trained, "distill", "--student", "vit-epochs-1", "--seed", "1", "--dry-run")
    assert "up to date (data/runs/smoke/vit-epochs-1-seed-1)" in out
    out = invoke(trained, *BY_LABEL, "--set", "epochs=1", "--seed", "1", "--dry-run")
    assert "train 1 epoch (not trained); writes data/runs/smoke/vit-epochs-1-seed-1-" in out
    shared.rename(own)
    kept.rename(shared)


def test_a_saved_state_named_by_an_earlier_version_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths, place = Paths("own"), Place("student", "titn", {"epochs": "3", "lr": "0.2"}, 1)
    for name in ("titn-lr-0.20-epochs-3-seed-1", "titn-lr-0.20-epochs-3", "vit-lr-0.20-epochs-3-seed-1"):
        paths.work("runs", name).mkdir(parents=True)
    assert place.find(paths, lambda _: True, Path.is_dir) == "titn-lr-0.20-epochs-3-seed-1"
    assert place.find(paths, lambda _: True, lambda _: False) == "titn-epochs-3-lr-0.2-seed-1"


def test_many_settings_make_no_name_that_is_too_long(trained: Project) -> None:
    settings = {field.name: getattr(STUDENT, field.name) for field in dataclasses.fields(STUDENT)}
    for key in ("arguments", "model", "pixel_size", "pixel_width", "pixel_heads"):  # a ViT has no pixels
        del settings[key]
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}".lower())]
    out = invoke(trained, *BY_LABEL, *options, "--set", "epochs=1", code=2)
    assert "--set epochs=1: write each KEY=VALUE once" in out
    out = invoke(trained, *BY_LABEL, *options, "--dry-run")
    folder = out.strip().rpartition("/")[2]
    assert "not trained" in out and len(folder) == MAX_NAME + 11
    assert name_of("student", "vit", settings_as_written(STUDENT, settings), 0)[:40] == folder[:40]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("student", "titn", {"labels": "none", "epochs": "3"}, 0), "titn-labels-none-epochs-3"),
        (("student", "titn-large-patch", {}, 2), "titn-large-patch-seed-2"),
        (("teacher", "vgg16", {"optimizer": "sgd", "lr": "0.1"}, 0), "vgg16-optimizer-sgd-lr-0.1"),
        (("teacher", "vgg16", {"lr": "1e-05"}, 0), "vgg16-lr-1e-05"),
    ],
)
def test_names_are_those_of_before_where_they_tell_runs_apart(
    place: tuple[str, str, Mapping[str, str], int], name: str
) -> None:
    assert name_of(*place) == name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("student", "titn-epochs-1", {}, 1), ("student", "titn", {"epochs": "1"}, 1)),
        (("student", "vgg16", {}, 1), ("teacher", "vgg16", {}, 1)),
        (("teacher", "vgg16", {"weights": "a/b"}, 0), ("teacher", "vgg16", {"weights": "a_b"}, 0)),
        (("student", "titn", {"views": "a-seed-1"}, 0), ("student", "titn", {"views": "a"}, 1)),
        (("student", "a", {"views": "x" * 200}, 0), ("student", "a", {"views": "x" * 201}, 0)),
        (("student", "a", {"views": "é"}, 0), ("student", "a", {"views": "è"}, 0)),
    ],
)
def test_names_differ_where_those_of_before_did_not(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert name_of(*one) != name_of(*other)
    assert all(len(name_of(*place).encode()) <= MAX_NAME + 11 for place in (one, other))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.20, "0.2"), (1.0, "1"), (1e-5, "1e-05"), (16, "16"), (True, "true"), ("bf16", "bf16"), ({"a": 1}, '{"a":1}')],
)
def test_a_value_has_one_text(value: object, text: str) -> None:
    recipe = dataclasses.replace(STUDENT, width=value)  # type: ignore[arg-type]
    assert settings_as_written(recipe, {"width"}) == {"width": text}


def test_the_names_that_recipes_may_not_have_are_those_of_shared_folders() -> None:
    paths = Paths("a")
    shared = {paths.raw, paths.run("b"), paths.work("b")}
    assert {path.relative_to("data").parts[0] for path in shared} == RESERVED - {"kept"}, "kept is data/work/kept"
