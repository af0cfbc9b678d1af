"""`pipeline prepare`: what it writes, what it refuses, and that a refusal writes nothing."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.recipes import DatasetRecipe, LabelRecipe, Recipe, SelectRecipe, deciding_values
from pipeline.data import decoding
from pipeline.data.collecting import Collector
from pipeline.data.datasets import Dataset
from pipeline.data.listing import Listing
from pipeline.data.sources import load_digits
from pipeline.errors import DataError, UsageError
from pipeline.system import storage
from pipeline.system.storage import sha256_file
from stages.prepare import prepare, remarks
from stages.shared import prepared
from stages.shared.prepared import READER
from tests.support.in_process import invoke
from tests.support.project import Project


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
    (tmp_path / "images" / "train" / "cat" / "notes.json").write_bytes(b"")
    return tmp_path / "images"


def test_digits_are_prepared_and_summarized(tmp_path):
    out = tmp_path / "data" / "own" / "prepared"
    summary = prepare(make_recipe("digits"), out=out, raw=tmp_path / "raw")
    dataset = Dataset.load(out / "dataset.json")
    arrays = [f"{split}-{part}.npy" for split in ("test", "train") for part in ("images", "labels")]
    assert sorted(path.name for path in out.iterdir()) == ["dataset.json", "summary.json", *arrays]
    assert summary["sha256"] == dataset.sha256 and summary["num_samples"] == {"train": 1437, "test": 360}
    assert (summary["evaluation"], summary["settings"]["image_size"], summary["num_skipped"]) == ("test", 32, 0)
    assert summary["class_counts"]["test"] == np.bincount(dataset.test.labels).tolist()
    assert (summary["mean"], summary["std"]) == (list(dataset.mean), list(dataset.std))


def test_pixels_are_kept_with_the_rule_by_which_they_became_squares(tmp_path):
    digests = []
    for resize in ("squeeze", "crop"):
        prepare(make_recipe("digits", resize=resize), out=tmp_path / resize, raw=tmp_path / "raw")
        dataset = Dataset.load(tmp_path / resize / "dataset.json")
        assert dataset.resize == resize
        digests.append(dataset.sha256)
    assert digests[0] != digests[1]


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
        "settings": deciding_values(recipe.dataset),
        "num_samples": {"train": 24, "val": 8, "test": 8},
        "class_counts": {"train": [12, 12], "val": [4, 4], "test": [4, 4]},
        "class_names": ["cat", "dog"],
        "evaluation": "val",
        "mean": summary["mean"],
        "std": summary["std"],
        "sha256": Dataset.load(tmp_path / "out" / "dataset.json").sha256,
        "num_skipped": 1,
        "skipped": [{"path": "train/cat/\\xff.png", "reason": "empty"}],
        "left_out": [{"kind": ".json file", "count": 1, "names": ["train/cat/notes.json"]}],
        "unused_alpha": None,
        "notes": [],
        "copies": {"in_train": {"val": 0, "test": 0}, "repeated": 0, "in_two_classes": 0, "examples": {}},
        "folder": "images",
        "source_sha256": summary["source_sha256"],
        "reader": READER,
    }
    assert remarks(summary) == ["not used: 1 .json file (train/cat/notes.json)"]
    assert summary["std"][2] == 1.0


def test_splits_that_small_classes_enlarge_are_said(tmp_path):
    for number in range(30):
        path = tmp_path / "images" / "abcdefghij"[number % 10] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 2, 255)).save(path)
    recipe = make_recipe("folder", image_size=4, test_fraction=0.2, val_fraction=0.1)
    summary = prepare(recipe, out=tmp_path / "out", raw=tmp_path / "raw", folder=tmp_path / "images")
    assert summary["num_samples"] == {"train": 10, "val": 10, "test": 10}
    assert summary["notes"] == [
        "test_fraction 0.2: 10 of 30 images, since each class has one there at least",
        "val_fraction 0.1: 10 of 20 images, since each class has one there at least",
    ]


@pytest.mark.parametrize("store", ["pixels", "encoded"])
def test_what_the_listing_shows_is_refused_before_a_file_is_read(tmp_path, folder, store, monkeypatch):
    (folder / "train/loose.png").write_bytes(b"")
    monkeypatch.setattr(prepared, "digest_files", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(Collector, "collect", lambda *_: pytest.fail("read"))
    with pytest.raises(
        DataError, match=r"1 bad: train/loose.png \(not in a class folder\); mend them or add --skip-bad"
    ):
        prepare(make_recipe("folder", store=store), out=tmp_path / "out", raw=tmp_path / "raw", folder=folder)


def test_an_image_that_is_replaced_while_files_are_collected_is_noticed_by_the_next_run(tmp_path, folder, monkeypatch):
    recipe, out = make_recipe("folder", store="encoded"), tmp_path / "out"
    (folder / "train/cat/\udcff.png").unlink()
    where = {"out": out, "raw": tmp_path / "raw", "folder": folder, "memory": tmp_path / "memory.json"}
    collect, file = Collector.collect, folder / "train/cat/00.png"

    def replaced(*arguments):
        collected = collect(*arguments)
        Image.new("RGB", (9, 9), "red").save(file)
        return collected

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", replaced)
        former = prepare(recipe, **where)
    again = prepare(recipe, **where)
    assert again["source_sha256"] != former["source_sha256"] and again["sha256"] != former["sha256"]


@pytest.mark.parametrize("store", ["pixels", "encoded"])
def test_an_image_that_may_not_be_read_can_be_skipped(tmp_path, folder, store, monkeypatch):
    forbidden, access, real, decode = folder / "train/cat/00.png", os.access, Path.open, decoding._open

    def refuse(path, *arguments, otherwise, **settings):  # root may read everything
        if path == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return otherwise(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", functools.partialmethod(refuse, otherwise=real))
    monkeypatch.setattr(decoding, "_open", functools.partial(refuse, otherwise=decode))
    monkeypatch.setattr(os, "access", lambda path, mode, **how: path != forbidden and access(path, mode, **how))
    recipe, where = make_recipe("folder", store=store), {"out": tmp_path / "out", "raw": tmp_path, "folder": folder}
    with pytest.raises(DataError, match=r"2 bad: .*train/cat/00.png \(cannot be read: Permission denied\)"):
        prepare(recipe, **where)
    assert prepare(recipe, **where, skip_bad=True)["num_skipped"] == 2


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


def test_a_path_of_the_recipe_and_a_download_exclude_each_other(tmp_path, folder):
    with pytest.raises(UsageError, match=r"recipes\.own\.dataset\.path: 'images' and --download"):
        prepare(make_recipe("cifar10", path="images"), out=tmp_path, raw=tmp_path / "raw", download=True)


def test_the_digest_is_of_paths_sizes_and_contents_alone(tmp_path, folder):
    """The same images elsewhere, of another time, and beside other files are the same source; by hand."""
    recipe = make_recipe("folder", image_size=8)
    digests = []
    for number in range(2):
        summary = prepare(recipe, out=tmp_path / "out", raw=tmp_path, folder=folder, skip_bad=True)
        digests.append(summary["source_sha256"])
        folder = folder.rename(tmp_path / "moved") if number == 0 else folder
        os.utime(folder / "train/cat/00.png", (1, 1))
        (folder / "train/cat/notes.json").write_bytes(b"more")
    digest = hashlib.sha256()
    for name in ("cat", "dog"):
        for path in sorted((folder / "train" / name).glob("*.png"), key=os.fsencode):
            content = path.read_bytes()
            line = ["train", name, f"train/{name}/{path.name}", len(content), hashlib.sha256(content).hexdigest()]
            digest.update((json.dumps(line) + "\n").encode())
    assert digests == [digest.hexdigest()] * 2


# --- the check whether it is up to date, through the command ---------------------------------------------


@pytest.fixture
def project(tmp_path, folder):
    """A project whose recipe `smoke` takes its images from a folder in it."""
    project = Project.create(tmp_path / "project")
    (folder / "train/cat/\udcff.png").unlink()
    (folder / "train/cat/notes.json").unlink()
    folder.rename(project.path / "my-images")
    project.edit("{source: digits, ", "{source: folder, path: my-images, ")
    return project


def state(project: Project) -> dict[str, tuple[bytes, int]]:
    """Content and time of what `prepare` wrote."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (project.data / "prepared").iterdir()}


def test_a_path_in_the_recipe_is_read_and_what_is_up_to_date_is_left_alone(project):
    assert "15 train, 5 val, 20 test images" in invoke(project, "prepare")
    written = state(project)
    (project.path / "my-images/train/cat/notes.json").write_bytes(b"")
    out = invoke(project, "prepare")
    assert "up to date, of the same settings and images; not used: 1 .json file (train/cat/notes.json)" in out
    assert "up to date" in invoke(project, "prepare", "--dry-run")
    assert state(project) == written
    (project.path / "my-images/train/cat/notes.json").unlink()
    invoke(project, "prepare", "--fresh")
    after = state(project)
    assert {name: content for name, (content, _) in after.items()} == {name: old for name, (old, _) in written.items()}
    assert all(after[name][1] > written[name][1] for name in written)


@pytest.mark.parametrize("change", ["new", "gone", "other content", "other class", "renamed"])
def test_every_change_of_the_images_is_noticed(project, change):
    invoke(project, "prepare")
    written, images = state(project), project.path / "my-images/train"
    first = images / "cat/00.png"
    if change == "new":
        shutil.copy(first, images / "dog/more.png")
    elif change == "gone":
        first.unlink()
    elif change == "other content":
        Image.new("RGB", (8, 8), "white").save(first)
    elif change == "other class":
        first.rename(images / "dog/00.png")
    else:
        first.rename(images / "cat/0.png")
    assert "of the same settings and other images, of my-images" in invoke(project, "prepare", "--dry-run")
    assert state(project) == written
    out = invoke(project, "prepare")
    assert ("another data set than before" in out) == (change != "renamed")
    assert state(project)["summary.json"][0] != written["summary.json"][0]
    assert "up to date" in invoke(project, "prepare")


def test_contents_are_read_again_only_where_size_or_time_changed(project, monkeypatch):
    invoke(project, "prepare")
    read: list[str] = []

    def spy(path: Path) -> str:
        read.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr("pipeline.data.digests.sha256_file", spy)
    assert "up to date" in invoke(project, "prepare") and read == []
    os.utime(project.path / "my-images/train/cat/02.png", (5, 5))
    assert "up to date" in invoke(project, "prepare") and read == ["02.png"]
    assert "up to date" in invoke(project, "prepare") and read == ["02.png"]
    (project.path / "data/work/smoke/prepare.json").write_bytes(b"{")
    assert "up to date" in invoke(project, "prepare") and len(read) == 41


def test_two_processes_may_remember_at_once(tmp_path, monkeypatch):
    memory, real, others = tmp_path / "prepare.json", storage._new_file, []

    def remember(name):
        prepared.remember_files(Listing(tmp_path), {name: (1, 2, "0" * 64)}, memory)

    @contextlib.contextmanager
    def slow(path):
        with real(path) as descriptor:
            yield descriptor
            monkeypatch.setattr(storage, "_new_file", real)
            others.append(threading.Thread(target=remember, args=("second",)))
            others[0].start()
            others[0].join(0.3)

    monkeypatch.setattr(storage, "_new_file", slow)
    (tmp_path / ".prepare.json.0123.tmp").touch()  # of a process that was killed
    remember("first")
    others[0].join()
    assert list(json.loads(memory.read_text())["files"]) == ["second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepare.json", "prepare.json.lock"]


def test_data_whose_source_is_not_here_are_kept_and_that_is_said(project):
    invoke(project, "prepare")
    written = state(project)
    (project.path / "my-images").rename(project.path / "elsewhere")
    assert "kept, of the same settings; recipes.smoke.dataset.path: my-images does not exist" in invoke(
        project, "prepare"
    )
    assert state(project) == written
    assert "up to date" in invoke(project, "prepare", "--from", "elsewhere"), "the name of the folder decides nothing"
    project.edit("path: my-images, ", "")
    assert "kept, of the same settings; it is of the folder my-images" in invoke(project, "prepare")
    assert state(project) == written
    project.edit("split_seed: 0", "split_seed: 1")
    assert "say which with `pipeline prepare --recipe smoke --from FOLDER`" in invoke(project, "prepare", code=2)
    project.edit("{source: folder, ", "{source: folder, path: my-images, ")
    assert "recipes.smoke.dataset.path: 'my-images' does not exist; mend it" in invoke(project, "prepare", code=2)
    assert "--from nowhere: no such folder" in invoke(project, "prepare", "--from", "nowhere", code=2)
    assert state(project) == written


@pytest.mark.parametrize("name", ["dataset.json", "val-images.npy", "train-paths.npy", "summary.json"])
def test_damaged_data_are_made_again(project, name):
    invoke(project, "prepare")
    written, path = state(project), project.data / "prepared" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if name != "summary.json" else content[:-9])
    invoke(project, "prepare")
    assert state(project)[name][0] == written[name][0]


def test_copies_and_unused_alpha_are_said_and_kept_in_the_summary(project):
    images = project.path / "my-images/train"
    shutil.copy(images / "cat/00.png", images / "dog/00.png")
    shutil.copytree(images, project.path / "my-images/test")
    Image.fromarray(np.full((8, 8, 4), (9, 9, 9, 0), np.uint8)).save(images / "dog/clear.png")
    out = invoke(project, "prepare")
    assert "alpha is 0 everywhere, and ignored, in 1 image (train/dog/clear.png)" in out
    assert "warning: 1 of 11 val images is a copy of training images, as train/" in out
    assert (
        "warning: 31 of 41 test images are copies of training images, as test/" in out
        and "scores on them are too high" in out
    )
    assert "warning: 1 image is under two classes, as " in out
    summary = json.loads((project.data / "prepared/summary.json").read_text())
    train, val = (summary["num_samples"][name] for name in ("train", "val"))
    assert (train, val, summary["num_samples"]["test"]) == (31, 11, 41)
    assert summary["copies"]["in_two_classes"] == 1 and summary["copies"]["in_train"] == {"val": 1, "test": 31}
    splits = Dataset.load(project.data / "prepared/dataset.json").splits.values()
    assert sum(bool((image == 9).all()) for split in splits for image in split.images[:]) == 1


def test_a_folder_that_is_not_the_source_is_refused_by_the_command(project):
    project.edit("{source: folder, ", "{source: cifar10, ")
    for arguments in (("prepare",), ("prepare", "--dry-run")):
        out = invoke(project, *arguments, code=3)
        assert "dataset.source: cifar10 has 10 classes" in out and "source: folder" in out
    assert not (project.path / "data/work").exists(), "nothing is remembered of what was refused"


def test_a_folder_of_a_known_source_is_another_data_set_than_its_download(tmp_path):
    """The digits as files, under the recipe of the digits: accepted, in another order, which is said."""
    project = Project.create(tmp_path)
    levels, labels = load_digits()
    for number, (pixels, label) in enumerate(zip(levels, labels, strict=True)):
        path = tmp_path / f"digits/train/{label}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(path)
    invoke(project, "prepare")
    out = invoke(project, "prepare", "--from", "digits")
    assert "a folder and a download of the same images are two data sets, since their order differs" in out
    assert json.loads((project.data / "prepared/summary.json").read_text())["folder"] == "digits"
    assert "kept" in invoke(project, "prepare")


def test_prepared_data_of_a_former_version_are_up_to_date_without_a_folder_and_made_again_with_one(project):
    invoke(project, "prepare")
    file = project.data / "prepared/summary.json"
    summary = json.loads(file.read_text())
    for key in ("folder", "source_sha256", "reader", "left_out", "unused_alpha", "notes", "copies"):
        del summary[key]
    file.write_text(json.dumps(summary))
    assert "of the same settings, of the source's own files or by a former version" in invoke(
        project, "prepare", "--dry-run"
    )
    project.edit("path: my-images, ", "")
    assert "up to date" in invoke(project, "prepare")


# --- a former layout, and an encoded store ---------------------------------------------------------------


def test_prepared_data_of_a_former_layout_are_named_and_made_again(project):
    prepared = project.data / "prepared"
    prepared.mkdir(parents=True)
    (prepared / "dataset.h5").write_bytes(b"former")
    (prepared / "summary.json").write_text(json.dumps({"settings": {}}))
    said = invoke(project, "teacher", "squeezenet1_1", "--device", "cpu", code=3)
    assert "data/smoke/prepared/dataset.h5: of a former layout; run `pipeline prepare --recipe smoke` again" in said
    assert "in place of one of a former layout" in invoke(project, "prepare", "--dry-run")
    invoke(project, "prepare")
    assert not (prepared / "dataset.h5").exists() and "up to date" in invoke(project, "prepare")


def test_an_encoded_store_is_verified_and_kept_and_put_back(project):
    project.edit("{source: folder, ", "{source: folder, store: encoded, ")
    assert "15 train, 5 val, 20 test images of 2 classes" in invoke(project, "prepare")
    written, file = state(project), project.data / "prepared/files.bin"
    assert "up to date" in invoke(project, "prepare") and state(project) == written
    assert not (project.data / "prepared.part").exists()
    shutil.rmtree(file.parent)
    assert "put back as it was finished" in invoke(project, "prepare") and state(project) == written
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.unlink()  # which is the kept one's too
    file.write_bytes(content)
    assert "in place of one that is damaged" in invoke(project, "prepare", "--dry-run")
    invoke(project, "prepare")
    assert state(project)["files.bin"][0] == written["files.bin"][0]
    assert "up to date" in invoke(project, "prepare")


def test_max_side_is_of_an_encoded_store(project):
    project.edit("{source: folder, ", "{source: folder, max_side: 512, ")
    assert "recipes.smoke.dataset.max_side: 512 is of an encoded store; add store: encoded" in invoke(
        project, "prepare", code=2
    )


@pytest.mark.parametrize("store", ["pixels", "encoded"])
def test_a_long_preparation_says_how_far_it_is(project, monkeypatch, store):
    monkeypatch.setattr("pipeline.report.progress.SECONDS_BETWEEN_LINES", -1)
    project.edit("path: my-images, ", f"path: my-images, store: {store}, ")
    said = [line.partition(",")[0] for line in invoke(project, "prepare").splitlines() if line.startswith("read ")]
    assert said == [f"read {count}/40 files" for count in range(1, 41)]
