"""Commands that find their result gone: they put back what is kept, or make it again where that does not fit."""

from __future__ import annotations

import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config.params import load_params
from pipeline.system.storage import read_json
from stages.shared import dvc_file, kept
from stages.shared.dvc_file import can_commit
from tests.support.in_process import invoke
from tests.support.project import ROOT, Project

TEACHER = ("teacher", "squeezenet1_1")
SELECT = ("select", "--teachers", "squeezenet1_1")
PREPARE = ("prepare", "--recipe", "folder-small")


@pytest.fixture
def project(taught: Project, tmp_path: Path) -> Project:
    shutil.copytree(taught.path, tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.fixture
def undigested() -> Iterator[None]:
    """No stage's code has been digested by this process yet."""
    dvc_file.code_digest.cache_clear()
    yield
    dvc_file.code_digest.cache_clear()


@pytest.fixture
def other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "code_digest", lambda stage: "other")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.suffix != ".lock"}


def test_a_teacher_that_is_gone_is_put_back_and_counts_as_up_to_date(project: Project) -> None:
    out = project.data / "teachers/squeezenet1_1"
    trained = contents(out)
    assert "log.jsonl" in trained
    shutil.rmtree(out)
    assert "squeezenet1_1: put back what was finished on 20" in invoke(project, *TEACHER, "--dry-run")
    assert not out.exists()
    said = invoke(project, *TEACHER).splitlines()
    assert len(said) == 2 and "put back as it was finished on" in said[0] and "up to date" in said[1]
    assert contents(out) == trained


def test_fresh_and_another_recipe_put_nothing_back(project: Project) -> None:
    shutil.rmtree(project.data / "teachers/squeezenet1_1")
    assert "train 8 epochs (--fresh)" in invoke(project, *TEACHER, "--fresh", "--dry-run")
    project.edit("squeezenet1_1: {epochs: 8}", "squeezenet1_1: {epochs: 1}")
    out = invoke(project, *TEACHER)
    assert "put back" not in out and "epoch 1/1" in out


@pytest.mark.usefixtures("other_code")
def test_other_code_makes_it_again(project: Project) -> None:
    shutil.rmtree(project.data / "teachers/squeezenet1_1")
    assert "train 8 epochs (not trained)" in invoke(project, *TEACHER, "--dry-run")


@pytest.mark.usefixtures("undigested")
@pytest.mark.parametrize(
    ("work", "command", "stage"),
    [
        ("pipeline.training.fit.Fit.run", TEACHER, "teacher@squeezenet1_1"),
        ("stages.prepare._write", ("prepare",), "prepare"),
    ],
)
def test_code_that_is_edited_while_the_work_goes_on_did_not_make_the_result(
    project: Project, monkeypatch: pytest.MonkeyPatch, work: str, command: tuple[str, ...], stage: str
) -> None:
    project.edit("squeezenet1_1: {epochs: 8}", "squeezenet1_1: {epochs: 1}")
    code, done = ["made it"], pkgutil.resolve_name(work)
    monkeypatch.setattr(dvc_file, "_digests", lambda path: code[-1])

    def edited(*given: Any, **more: Any) -> Any:
        code.append("edited")
        return done(*given, **more)

    monkeypatch.setattr(work, edited)
    invoke(project, *command, "--fresh")
    assert code[1:], "the work was done"
    code.append("made it")
    dvc_file.code_digest.cache_clear()
    assert read_json(project.path / f"data/work/kept/smoke/{stage}.json")["code"] == dvc_file.code_digest(stage)


def test_the_selection_comes_back_where_its_candidates_are_gone(project: Project) -> None:
    teacher, selection = contents(project.data / "teacher"), (project.data / "selection.json").read_bytes()
    for name in ("teachers", "teacher"):
        shutil.rmtree(project.data / name)
    assert "metrics.json: missing" in invoke(project, *SELECT, code=3), "selection.json is there"
    (project.data / "selection.json").unlink()
    assert "selection.json: put back as it was" in invoke(project, *SELECT)
    assert contents(project.data / "teacher") == teacher
    assert (project.data / "selection.json").read_bytes() == selection


def test_labels_come_back_with_all_views_that_they_had(project: Project) -> None:
    file = project.data / "labels/default.h5"
    invoke(project, "label")
    two = file.read_bytes()
    file.unlink()
    out = invoke(project, "label")
    assert "put back" in out and "up to date, 2 views" in out and file.read_bytes() == two
    project.edit("count: 2", "count: 3")
    assert "labelled 1/1 views" in invoke(project, "label")
    three = file.read_bytes()
    file.unlink()  # a link to what is kept: never to be written into
    file.write_bytes(two)
    assert "put back what was finished on" in invoke(project, "label", "--dry-run")
    assert "labelled" not in invoke(project, "label") and file.read_bytes() == three
    project.edit("count: 3", "count: 2")
    file.unlink()
    file.write_bytes(two)
    out = invoke(project, "label")
    assert "a newer result, of 20" in out and f"rm -r {Path('data/smoke/labels/default.h5')}" in out
    assert "labelled 2/2 views" in invoke(project, "label", "--fresh")


def test_labels_come_back_only_with_as_many_probabilities_as_are_asked_for(project: Project) -> None:
    file = project.data / "labels/default.h5"
    invoke(project, "label", "--keep", "topk=2")
    file.unlink()
    assert "labelled 2/2 views" in invoke(project, "label", "--keep", "topk=3")
    file.unlink()
    out = invoke(project, "label")
    assert "put back" in out and "keeps topk=3 and goes on with it" in out


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 24 images."""
    for number in range(24):
        path = tmp_path / "photos/train" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 2 * number, 255)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def own(photos: Path, tmp_path: Path) -> Project:
    """A project whose data were prepared from that folder."""
    project = Project.create(tmp_path / "own")
    invoke(project, *PREPARE, "--from", str(photos))
    return project


def test_prepared_data_come_back_where_their_folder_is_not_named(
    own: Project, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = own.path / "data/folder-small/prepared"
    prepared = contents(out)
    shutil.rmtree(out)
    assert "put back what was finished on" in invoke(own, *PREPARE, "--dry-run")
    assert "put back what was finished on" in invoke(own, "teacher-select", "--recipe", "folder-small", "--dry-run")
    assert "put back what was finished on" in invoke(own, "doctor", "--recipe", "folder-small", code=None)
    said = invoke(own, *PREPARE)
    assert "put back as it was finished on" in said and contents(out) == prepared
    monkeypatch.setattr(kept, "code_digest", lambda stage: "other")
    shutil.rmtree(out)
    assert "perhaps by other code than today's" in invoke(own, *PREPARE) and contents(out) == prepared
    params = own.path / "params.yaml"
    params.write_text(params.read_text().replace("{source: folder, image_size: 32", "{source: folder, image_size: 16"))
    shutil.rmtree(out)
    assert "its source is `folder`" in invoke(own, *PREPARE, code=2) and not out.exists()


def test_a_changed_image_or_changed_code_is_prepared_again(
    own: Project, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = own.path / "data/folder-small/prepared"
    prepared, named = contents(out), (*PREPARE, "--from", str(photos))
    shutil.rmtree(out)
    said = invoke(own, *named)
    assert "put back" in said and "up to date" in said
    shutil.rmtree(out)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(photos / "train/cat/new.png")
    assert "SHA-256" in invoke(own, *named) and contents(out) != prepared
    newer = contents(out)
    for name, data in prepared.items():  # as DVC does
        (out / name).unlink()
        (out / name).write_bytes(data)
    assert "a newer result, of 20" in invoke(own, *PREPARE)
    shutil.rmtree(out)
    invoke(own, *PREPARE)
    assert contents(out) == newer
    assert "up to date" in invoke(own, *named)
    monkeypatch.setattr(kept, "code_digest", lambda stage: "other")
    assert "up to date" not in invoke(own, *named) and contents(out) == newer
    assert "up to date" in invoke(own, *named)


def test_data_of_unknown_code_are_kept_where_nothing_else_is(own: Project) -> None:
    own.forget()
    prepared = contents(own.path / "data/folder-small/prepared")
    assert "kept, of the same settings" in invoke(own, *PREPARE)
    shutil.rmtree(own.path / "data/folder-small/prepared")
    assert "perhaps by other code" in invoke(own, *PREPARE)
    assert contents(own.path / "data/folder-small/prepared") == prepared


@pytest.fixture
def checkout(project: Project) -> Project:
    """The project with what DVC looks at."""
    shutil.copy(ROOT / "dvc.yaml", project.path)
    for name in ("pipeline", "stages"):
        (project.path / name).symlink_to(ROOT / name)
    (project.path / ".dvc").mkdir()
    return project


def test_dvc_can_adopt_a_stage_of_its_own_that_is_all_there(checkout: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout.path)
    params = load_params(Path("params.yaml"))

    def can(stage: str, recipe: str = "smoke") -> bool:
        return can_commit(stage, recipe, params)

    assert can("prepare") and can("teacher@squeezenet1_1")
    assert not can("prepare", "digits"), "DVC knows params.yaml's own recipe alone"
    assert not can("teacher@vgg16"), "not in `teachers`"
    assert not can("student@deit") and not can("other") and not can("label@default")
    Path("data/smoke/teachers/squeezenet1_1/curve.csv").unlink()
    assert not can("teacher@squeezenet1_1"), "an out is missing"
    shutil.rmtree("data/smoke/prepared")
    assert not can("prepare")
    (checkout.path / "dvc.yaml").write_text("stages: [")
    assert not can("select")


def test_the_line_that_adopts_names_only_what_dvc_can(checkout: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "dvc commit -f label@default" in invoke(checkout, "label")
    monkeypatch.setenv("DVC_STAGE", "label@default")
    assert "dvc commit" not in invoke(checkout, "label", "--fresh")
    monkeypatch.delenv("DVC_STAGE")
    shutil.copytree(checkout.path / "data/smoke", checkout.path / "data/digits")
    checkout.know_all_recipes("digits")
    assert "dvc commit" not in invoke(checkout, "label", "--recipe", "smoke", "--fresh")
