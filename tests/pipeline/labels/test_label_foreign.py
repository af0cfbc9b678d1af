"""Labels that belong to something else reach no student: refused by the command line, naming what differs."""

from __future__ import annotations

import dataclasses
import random
import shutil

import numpy as np
import pytest

from pipeline.labels.cache import SCHEMA_VERSION, LabelCache
from pipeline.labels.file import SEAL_SIZE, make_seal
from tests.support.commands import Ended, run
from tests.support.label_mutations import damage
from tests.support.project import Project

FILE = "data/smoke/labels/default.h5"
DISTILL = ("distill", "--student", "titn")


@pytest.fixture(scope="module")
def project(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    path = tmp_path_factory.mktemp("foreign") / "project"
    shutil.copytree(taught.path, path)
    assert run(path, "label", "--device", "cpu").code == 0
    return Project(path)


@pytest.fixture
def honest(project: Project):
    """The project's labels; they are put back after the test."""
    data = (project.path / FILE).read_bytes()
    yield LabelCache.from_bytes(data)
    (project.path / FILE).write_bytes(data)


def refuse(project: Project, *arguments: str, code: int = 3, **options) -> str:
    """Run a command, check that it is refused in one line with nothing trained, and return the line."""
    ended: Ended = run(project.path, *arguments, **options)
    assert ended.code == code and len(ended.err.splitlines()) == 1, ended
    for folder in ("data/smoke/students", "data/work/smoke/students", "data/runs", "data/work/smoke/runs"):
        assert not (project.path / folder).exists()
    return ended.err


def forge(project: Project, honest: LabelCache, **changes) -> None:
    (project.path / FILE).write_bytes(dataclasses.replace(honest, **changes).to_bytes())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 0),
        ("dataset_sha256", "d" * 64),
        ("split", "val"),
        ("class_names", [*"1023456789"]),
        ("view_recipe.seed", 1),
        ("view_recipe.crop", 3),
        ("view_recipe.autoaugment", "none"),
        ("view_recipe.mixing", "mixup"),
    ],
)
def test_labels_of_something_else_are_refused_by_the_field_that_differs(project, honest, field, value) -> None:
    name, _, inner = field.partition(".")
    forge(
        project, honest, identity={**honest.identity, name: {**honest.identity[name], inner: value} if inner else value}
    )
    for command in (DISTILL, ("labels", "verify", FILE)):
        line = refuse(project, *command)
        assert f"{field} is " in line or f"{field}[0] is " in line
        assert "--fresh" in line and FILE in line


def test_labels_of_another_number_of_images_are_refused(project, honest) -> None:
    identity = {**honest.identity, "num_samples": honest.num_samples - 1}
    forge(project, honest, identity=identity, labels=np.ascontiguousarray(honest.labels[:, 1:]), canaries=())
    for command in (DISTILL, ("labels", "verify", FILE)):
        assert "num_samples is 672, expected 673" in refuse(project, *command)


def test_labels_of_another_schema_version_are_refused_by_every_command(project, honest) -> None:
    data = honest.to_bytes()
    content = memoryview(data)[SEAL_SIZE:]
    (project.path / FILE).write_bytes(make_seal(content, SCHEMA_VERSION + 1) + bytes(content))
    for command in (DISTILL, ("labels", "verify", FILE), ("labels", "inspect", FILE)):
        assert f"schema version is {SCHEMA_VERSION + 1}" in refuse(project, *command)


def test_labels_of_another_teacher_are_refused(project, honest) -> None:
    forge(project, honest, provenance={**honest.provenance, "checkpoint_sha256": "e" * 64})
    assert 'checkpoint_sha256 is "eeee' in refuse(project, *DISTILL)
    line = refuse(project, "labels", "verify", FILE)
    assert "labelled by checkpoint eeeeeeeeeeee" in line and "--teacher" in line
    ended = run(project.path, "labels", "inspect", FILE)
    assert ended.code == 0 and "eeee" in ended.out, "looking at labels of anything is allowed"


@pytest.mark.parametrize("change", ["missing", "short"])
def test_labels_of_other_evaluation_images_are_refused(project, honest, change) -> None:
    rows = {split: row for split, row in honest.clean.items() if split != "val"}
    forge(project, honest, clean=rows if change == "missing" else {**rows, "val": honest.clean["val"][:1]})
    line = refuse(project, *DISTILL)
    assert "clean.val is missing" in line if change == "missing" else "clean.val is 1, expected 225" in line


@pytest.mark.parametrize("seed", range(4))
def test_damaged_labels_are_refused_by_every_command_and_made_again_by_label(project, honest, seed) -> None:
    file = project.path / FILE
    whole = file.read_bytes()
    file.write_bytes(damage(whole, whole[::-1], random.Random(seed)))
    for command in (DISTILL, ("labels", "verify", FILE), ("labels", "inspect", FILE)):
        line = refuse(project, *command)
        assert "is not a valid label cache" in line and "--fresh" in line
    ended = run(project.path, "label", "--device", "cpu")
    assert ended.code == 0 and "labelling every view again" in ended.out
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "command",
    [
        DISTILL,
        ("distill", "--student", "vit"),
        (*DISTILL, "--labels", "none"),
        (*DISTILL, "--seed", "1", "--set", "epochs=1"),
        ("labels", "verify", FILE),
    ],
    ids=lambda command: "-".join(command[:1] + command[2:]),
)
def test_views_that_have_changed_since_they_were_labelled_train_nothing(project, command) -> None:
    line = refuse(project, *command, before=change_one_pixel)
    assert "the pixels of view 0 are not those that were labelled" in line
    assert ("labels replayed would change: label again" if command[0] == "labels" else "labels verify") in line


def test_a_canary_of_other_pixels_trains_nothing(project, honest) -> None:
    *others, last = honest.canaries
    forge(project, honest, canaries=(*others, dataclasses.replace(last, sha256="0" * 64)))
    for command in (DISTILL, ("labels", "verify", FILE)):
        assert f"view {last.view}" in refuse(project, *command)


def test_no_view_is_added_to_labels_of_other_pixels(project, honest) -> None:
    line = refuse(project, "label", "--views", ":3", before=change_one_pixel)
    assert "the pixels of view 0 are not those that were labelled" in line and "--fresh`" in line
    assert run(project.path, "label", "--views", "3:4").code == 0
    folder = project.path / "data/work/smoke/labels/default"
    [part] = folder.glob("*.part")
    content = part.read_bytes()
    again = run(project.path, "label", "--fresh", before=change_one_pixel)
    assert again.code == 0 and not folder.exists()
    folder.mkdir()
    part.write_bytes(content)
    ended = run(project.path, "label", "--views", "3:4", before=change_one_pixel)
    assert "1 finished view is damaged, or of another" in ended.out and "labelled 1/1 views" in ended.out
    assert part.read_bytes()[-32:] != content[-32:]


def change_one_pixel() -> None:
    """Let the random crop change one bit of the first pixel of each image."""
    from pipeline.views import geometry, per_image

    def changing(real):
        def changed(*args, **kwargs):
            images = real(*args, **kwargs).clone()
            images[:, 0, 0, 0] ^= 1
            return images

        return changed

    geometry.gather, per_image.crop_flip = changing(geometry.gather), changing(per_image.crop_flip)
