"""Labels of any teacher beside the selected one's: ensembles, checkpoints, given labels, and their students."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.datasets import Dataset
from pipeline.labels.cache import LabelCache
from pipeline.models.teachers import build_teacher
from pipeline.training.checkpoints import read_meta, save_checkpoint
from tests.support.in_process import invoke
from tests.support.project import Project, unseal

WINNER, OTHER = "data/smoke/teacher", "elsewhere/other"
LABELS = Path("data/smoke/labels")
SPLITS = ("val", "test")


def with_another_teacher(project: Project) -> Project:
    """Add a teacher of other weights, which the recipe does not know."""
    meta = read_meta(project.path / WINNER)
    assert meta is not None
    torch.manual_seed(7)
    model = build_teacher(meta["model"], **meta["arguments"])
    save_checkpoint(project.path / OTHER, "best", model.state_dict(), meta)
    return project


@pytest.fixture(scope="module")
def labelled(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the labels of the selected teacher, another, both, and given ones. Who changes it copies it."""
    folder = tmp_path_factory.mktemp("labelled") / "project"
    shutil.copytree(taught.path, folder)
    project = with_another_teacher(Project(folder))
    keep = ("--keep", "topk=10")
    invoke(project, "label", *keep)
    invoke(project, "label", *keep, "--teacher", OTHER)
    invoke(project, "label", *keep, "--teacher", WINNER, "--teacher", OTHER, "--as", "both")
    cache = LabelCache.open(project.path / LABELS / "default@both.h5")
    clean = {f"clean_{split}": cache.clean[split] for split in ("test",)}
    np.savez(folder / "labels.npz", classes=cache.classes, probabilities=cache.probabilities, **clean)
    np.save(folder / "plain.npy", cache.labels.astype(np.int64))
    return project


@pytest.fixture
def project(labelled: Project, tmp_path: Path) -> Project:
    shutil.copytree(labelled.path, tmp_path / "project")
    return Project(tmp_path / "project")


def opened(project: Project, name: str | None = None) -> LabelCache:
    return LabelCache.open(project.path / LABELS / ("default.h5" if name is None else f"default@{name}.h5"))


def metrics(directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((directory / "metrics.json").read_text())
    return result


def right(project: Project, cache: LabelCache) -> dict[str, float]:
    dataset = Dataset.load(project.data / "prepared/dataset.json")
    return {split: 100 * float((row == dataset.splits[split].labels).mean()) for split, row in cache.clean.items()}


# Files


def test_two_teachers_files_have_one_identity_and_two_provenances(labelled: Project) -> None:
    selected, other, both = opened(labelled), opened(labelled, "other"), opened(labelled, "both")
    assert selected.fingerprint == other.fingerprint == both.fingerprint
    assert selected.provenance != other.provenance != both.provenance
    assert selected.accuracy is None, "the bytes of such files stay as they were"
    assert other.accuracy == pytest.approx(right(labelled, other)) and other.accuracy.keys() == set(SPLITS)
    names = {path.name for path in (labelled.path / LABELS).iterdir()}
    assert names == {"default.h5", "default@other.h5", "default@both.h5"}


def test_an_ensembles_probabilities_are_the_mean_of_its_members(labelled: Project) -> None:
    def by_class(cache: LabelCache) -> np.ndarray[Any, Any]:
        assert cache.classes is not None and cache.probabilities is not None
        order = np.argsort(cache.classes, axis=2)
        return np.take_along_axis(cache.probabilities.astype(np.float32), order, axis=2)

    selected, other, both = (by_class(opened(labelled, name)) for name in (None, "other", "both"))
    np.testing.assert_allclose(both, (selected + other) / 2, atol=2**-10)
    recorded = opened(labelled, "both").provenance
    shas = [opened(labelled, name).provenance["checkpoint_sha256"] for name in (None, "other")]
    assert [member["checkpoint_sha256"] for member in recorded["members"]] == shas
    assert recorded["teacher"] == "squeezenet1_1 + squeezenet1_1"


@pytest.mark.slow
def test_labels_of_a_name_are_extended_sliced_and_come_back(project: Project) -> None:
    file, named = project.path / LABELS / "default@other.2.h5", ("--teacher", OTHER, "--as", "other.2")
    default = (project.path / LABELS / "default.h5").read_bytes()
    assert "no labels yet" in invoke(project, "label", *named, "--dry-run")
    assert "labelled 1/1 views" in invoke(project, "label", *named, "--views", "1:2")
    assert not file.exists() and "labelled 1/1 views" in invoke(project, "label", *named)
    whole = file.read_bytes()
    file.unlink()
    assert "put back" in invoke(project, "label", *named) and file.read_bytes() == whole
    assert "up to date" in invoke(project, "label", *named)
    project.edit("count: 2", "count: 3")
    assert "labelled 1/1 views" in invoke(project, "label", *named)
    assert np.array_equal(opened(project, "other.2").labels[:2], opened(project, "other").labels)
    assert (project.path / LABELS / "default.h5").read_bytes() == default
    assert "7 kept results" in invoke(project, "clean") and "removed" in invoke(project, "clean", "--kept")
    assert not [path for path in (project.path / "data/work/kept").rglob("*") if path.suffix in (".h5", ".json")]


def test_ranks_without_locks_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TITN_NO_LOCKS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "TITN_NO_LOCKS=1: ranks know by their locks who is at work" in invoke(project, "label", code=2)


def test_a_name_is_not_taken_from_another_teacher(project: Project) -> None:
    before = (project.path / LABELS / "default@other.h5").read_bytes()
    out = invoke(project, "label", "--teacher", WINNER, "--as", "other", code=2)
    sha = opened(project, "other").provenance["checkpoint_sha256"][:12]
    assert f"labels by squeezenet1_1 (SHA-256 {sha}...) have this name" in out and "--as" in out and "--fresh" in out
    assert (project.path / LABELS / "default@other.h5").read_bytes() == before
    invoke(project, "label", "--teacher", WINNER, "--as", "other", "--fresh")
    assert np.array_equal(opened(project, "other").labels, opened(project).labels)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--from", "plain.npy", "--teacher", OTHER), "--teacher: --from takes the labels of plain.npy as they are"),
        (("--from", "plain.npy", "--keep", "topk=2"), "--keep: --from takes"),
        (("--from", "plain.npy", "--views", "0:1"), "--views: --from takes"),
        (
            (
                "--from",
                "nowhere.npy",
            ),
            "nowhere.npy: No such file",
        ),
        (("--teacher", "nowhere"), "nowhere"),
        (("--teacher", OTHER, "--as", "a/b"), "--as 'a/b': no name"),
        (("--teacher", OTHER, "--as", ""), "--as '': no name"),
    ],
)
def test_what_label_cannot_do_is_refused(labelled: Project, arguments: tuple[str, ...], words: str) -> None:
    assert words in invoke(labelled, "label", *arguments, code=2)


# Given labels


def test_given_labels_are_sealed_with_the_canaries_of_the_views(project: Project) -> None:
    out = invoke(project, "label", "--from", "labels.npz")
    both, given = opened(project, "both"), opened(project, "given")
    assert "default@given.h5: 2 views" in out and "right on" in out
    assert np.array_equal(given.labels, both.labels) and np.array_equal(given.probabilities, both.probabilities)
    assert given.canaries == both.canaries and given.identity == both.identity
    assert given.provenance["given"] is True and given.provenance["teacher"] == "labels.npz"
    assert given.accuracy == {"test": pytest.approx(right(project, both)["test"])}
    assert "up to date" in invoke(project, "label", "--from", "labels.npz")
    np.save(project.path / "plain.npy", np.stack([both.labels[0]] * 3))
    out = invoke(project, "label", "--from", "plain.npy", "--as", "mine", "--dry-run")
    assert "plain.npy: 3 views, the recipe asks for 2 (recipes.smoke.views.default.count)" in out
    assert "label the views 0:3" in out and "argmax, as plain.npy gives them (no labels yet)" in out
    assert "have this name" in invoke(project, "label", "--from", "plain.npy", code=2)
    invoke(project, "label", "--from", "plain.npy", "--as", "mine")
    assert opened(project, "mine").num_views == 3 and opened(project, "mine").accuracy == {}


@pytest.mark.parametrize("topk", [5, 200])
def test_given_labels_keep_what_they_keep_whatever_the_recipe_asks_for(project: Project, topk: int) -> None:
    project.edit("label: {", f"label: {{topk: {topk}, ")
    for words in ("sealed", "up to date"):
        assert words in invoke(project, "label", "--from", "plain.npy", "--as", "mine")
    assert opened(project, "mine").topk == 0


def test_the_way_out_makes_the_file_that_it_is_about(project: Project) -> None:
    invoke(project, "label", "--from", "labels.npz")
    project.edit("count: 2\n        seed: 0", "count: 2\n        seed: 5")
    for name, source in (("other", "--teacher WHAT"), ("given", "--from FILE")):
        command = f"label again with `pipeline label --recipe smoke {source} --as {name} --fresh`"
        assert command in invoke(project, "distill", "--student", "deit", "--teacher-labels", name, code=3)
        assert command in invoke(project, "labels", "verify", f"{LABELS}/default@{name}.h5", code=3)
    assert invoke(project, "distill", "--student", "deit", code=3).endswith("label --recipe smoke --fresh`")
    (project.path / LABELS / "default@other.h5").write_bytes(b"damaged")
    line = invoke(project, "distill", "--student", "deit", "--teacher-labels", "other", code=3)
    assert line.endswith("--teacher WHAT --as other --fresh`, or with --from FILE")


def test_given_labels_that_do_not_fit_are_refused(project: Project) -> None:
    np.save(project.path / "plain.npy", opened(project).labels[:, 1:])
    assert "plain.npy: no labels of these data" in invoke(project, "label", "--from", "plain.npy", code=3)
    assert "10 of sample" not in invoke(project, "label", "--from", "labels.npz", "--dry-run")
    np.save(project.path / "plain.npy", opened(project).labels + 5)
    assert "is outside of the 10 classes" in invoke(project, "label", "--from", "plain.npy", code=3)


# Replay


def test_each_file_is_replayed_by_whom_it_says(project: Project) -> None:
    shutil.copytree(project.path / OTHER, project.data / "teachers/vgg16")
    for name in ("default", "default@other", "default@both"):
        assert "0 differ" in invoke(project, "labels", "verify", f"{LABELS}/{name}.h5", "--sample", "200"), name
    shutil.rmtree(project.data / "teachers/vgg16")
    file = f"{LABELS}/default@both.h5"
    sha = opened(project, "other").provenance["checkpoint_sha256"][:12]
    assert f"labelled by checkpoint {sha}..." in invoke(project, "labels", "verify", file, code=3)
    named = ("--teacher", OTHER, "--teacher", WINNER)  # in any order
    assert "0 differ" in invoke(project, "labels", "verify", file, *named, "--sample", "50")
    assert "name the right one" in invoke(project, "labels", "verify", file, "--teacher", OTHER, code=3)
    shown = json.loads(invoke(project, "labels", "inspect", file, "--json"))
    assert shown["accuracy"] == opened(project, "both").accuracy and len(shown["provenance"]["members"]) == 2


def test_given_labels_are_verified_as_far_as_they_can_be(project: Project) -> None:
    invoke(project, "label", "--from", "plain.npy")
    file = f"{LABELS}/default@given.h5"
    out = invoke(project, "labels", "verify", file)
    assert "the seal holds, and the views are those of today" in out and "no teacher to ask" in out
    assert "by no teacher" in invoke(project, "labels", "verify", file, "--teacher", OTHER, code=2)
    project.edit("count: 2\n        seed: 0", "count: 2\n        seed: 1")
    assert "view_recipe.seed" in invoke(project, "labels", "verify", file, code=3)


# Students


def test_a_student_learns_from_the_labels_that_it_is_told(project: Project) -> None:
    invoke(project, "label", "--from", "labels.npz")
    before = (project.path / LABELS / "default.h5").read_bytes()
    titn = ("distill", "--student", "titn", "--set", "epochs=1")
    runs = project.path / "data/runs/smoke"
    trained = {name: runs / f"titn-teacher_labels-{name}-epochs-1" for name in ("both", "given")}
    for name in trained:
        invoke(project, *titn, "--teacher-labels", name)
    for name, out in trained.items():
        taught, cache = metrics(out)["teacher"], opened(project, name)
        assert (taught["labels"], taught["sha256"]) == (name, cache.provenance["checkpoint_sha256"])
        assert metrics(out)["distilled"] and taught["test_top1"] == pytest.approx(right(project, cache)["test"])
        meta = read_meta(out)
        assert meta is not None and meta["inputs"]["teacher_labels"] == name
    assert [metrics(trained[name])["teacher"]["top1"] is None for name in trained] == [False, True]
    # The same labels train the same student, wherever they come from.
    assert read_meta(trained["both"])["sha256"] == read_meta(trained["given"])["sha256"]  # type: ignore[index]
    assert metrics(trained["given"])["best"]["agreement"] is None, "on val it is not known"
    assert metrics(trained["given"])["test"]["agreement"] == metrics(trained["both"])["test"]["agreement"]
    assert "up to date" in invoke(project, *titn, "--teacher-labels", "both")
    assert (project.path / LABELS / "default.h5").read_bytes() == before and not (project.data / "students").exists()


@pytest.mark.slow
def test_a_student_of_given_labels_alone_is_reported_recorded_and_mended(project: Project) -> None:
    invoke(project, "label", "--from", "plain.npy", "--as", "api")
    for labels in (("--teacher-labels", "api"), ("--labels", "none")):
        invoke(project, "distill", "--student", "titn", "--set", "epochs=1", *labels)
    out = project.path / "data/runs/smoke/titn-teacher_labels-api-epochs-1"
    taught = metrics(out)["teacher"]
    assert (taught["name"], taught["labels"], taught["top1"], taught["test_top1"]) == ("plain.npy", "api", None, None)
    assert metrics(out)["test"]["agreement"] is None
    invoke(project, "report", "--no-figures")
    text = (project.data / "reports/report.md").read_text()
    assert "plain.npy (labels api)" in text and "teacher_labels" in text
    assert "Does the teacher's label help?" in text, "the control is compared with it"
    invoke(project, "record", str(out), "--out", "records.jsonl")
    record = json.loads((project.path / "records.jsonl").read_text())
    assert record["teacher"] == {"name": "plain.npy", "top1": None, "split": None, "labels": "api"}
    (out / "predictions.csv").unlink()
    assert "written again, byte for byte" in invoke(project, "evaluate", str(out), "--mend")
    exported = project.path / "exported"
    invoke(project, "export", str(out), "--format", "safetensors", "--out", str(exported))
    assert "`plain.npy`, labels `api`" in (exported / "README.md").read_text()
    shutil.rmtree(unseal(out))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--teacher-labels", "nobody"), 3, "default@nobody.h5: no labels of this name"),
        (("--teacher-labels", "nobody"), 3, "there are both, other"),
        (("--teacher-labels", "../default"), 2, "--teacher-labels '../default': no name"),
        (("--teacher-labels", "both", "--labels", "none"), 2, "--labels none reads no label file"),
        (("--teacher-labels", "both", "--views", "3"), 3, "--as both --views :3"),
    ],
)
def test_labels_that_a_student_cannot_have_are_refused(
    labelled: Project, arguments: tuple[str, ...], code: int, words: str
) -> None:
    assert words in invoke(labelled, "distill", "--student", "titn", *arguments, code=code)
