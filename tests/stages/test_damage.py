"""Files of finished results that rotted, were cut or edited: told by whoever reads them, and mended where possible."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from pipeline.config.params import load_params
from pipeline.errors import DataError
from pipeline.system.storage import beside
from pipeline.training.checkpoints import RunState
from pipeline.training.manifest import write_with_manifest
from stages.reports.runs import FinishedRuns
from stages.shared.paths import Paths
from tests.support.in_process import invoke
from tests.support.project import Project, unseal

NAME = "squeezenet1_1"
TEACHER = ("teacher", NAME)
OUT = f"data/smoke/teachers/{NAME}"


@pytest.fixture
def project(taught: Project, tmp_path: Path) -> Project:
    """A project with a trained teacher, of which nothing else is kept."""
    shutil.copytree(taught.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    project.forget()
    return project


def flip(file: Path, at: int = -100) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_flipped_weights_are_not_up_to_date_and_nothing_is_trained_before_the_cheaper_ways_are_named(
    project: Project,
) -> None:
    weights = project.path / OUT / "best.safetensors"
    flip(weights)
    before = files(weights.parent)
    for command in (TEACHER, (*TEACHER, "--dry-run"), ("teacher-select", "--teachers", NAME)):
        said = invoke(project, *command, code=3)
        ways = (f"{OUT}/best.safetensors: not what manifest.json says", "`dvc checkout", "a kept copy", "--fresh")
        at = [said.index(way) for way in ways]
        assert at == sorted(at) and "evaluate" not in said
    assert f"{OUT}/best.safetensors: not what" in invoke(project, "select", "--teachers", NAME, code=3)
    assert files(weights.parent) == before
    assert "train 8 epochs (--fresh)" in invoke(project, *TEACHER, "--fresh", "--dry-run")
    project.edit(f"{NAME}: {{epochs: 8}}", f"{NAME}: {{epochs: 1}}")
    assert "train 1 epoch (" in invoke(project, *TEACHER, "--dry-run"), "other settings replace it anyway"


@pytest.mark.parametrize("name", ["best.safetensors", "curve.csv", "manifest.json"])
def test_what_is_damaged_comes_back_where_a_whole_copy_is_kept(taught: Project, tmp_path: Path, name: str) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(taught.path, project.path)  # the copy has no links
    before = files(project.path / OUT)
    flip(project.path / OUT / name, at=len(before[name]) // 2)
    said = invoke(project, *TEACHER)
    assert "put back as it was finished" in said and "up to date" in said and files(project.path / OUT) == before


def test_each_reader_names_the_damaged_file_that_it_uses(project: Project) -> None:
    out, whole = project.path / OUT, files(project.path / OUT)
    readers = {
        "metrics.json": (("report", "--no-figures"), ("bench", OUT), ("select", "--teachers", NAME)),
        "curve.csv": (("record", OUT),),
        "run.json": (("export", OUT, "--format", "safetensors", "--out", "exported"),),
        "best.json": (("predict", OUT, "x.png"),),
        "best.safetensors": (("label", "--teacher", OUT), ("evaluate", OUT)),
    }
    for name, commands in readers.items():
        (out / name).write_bytes(whole[name].replace(b"1", b"2", 1))
        assert (out / name).read_bytes() != whole[name]
        for command in commands:
            assert f"{OUT}/{name}: not what manifest.json says" in invoke(project, *command, code=3), command
        (out / name).write_bytes(whole[name])
    flip(project.data / "teacher/best.safetensors")
    assert "teacher/best.safetensors: not what" in invoke(project, "label", code=3)
    invoke(project, "select", "--teachers", NAME)
    assert files(project.data / "teacher")["best.safetensors"] == whole["best.safetensors"]


def test_evaluate_mends_what_follows_from_the_weights(project: Project) -> None:
    out, whole = project.path / OUT, files(project.path / OUT)
    mend = ("evaluate", OUT, "--mend")
    (out / "metrics.json").write_bytes(b"")
    data = whole["predictions.csv"]
    (out / "predictions.csv").write_bytes(data[: len(data) // 2])
    said = invoke(project, *mend)
    assert "predictions.csv and metrics.json written again, byte for byte as before" in said
    assert files(out) == whole and "nothing to mend" in invoke(project, *mend)
    (out / "predictions.csv").write_bytes(data.replace(b",7,", b",8,", 1))
    assert f"`pipeline evaluate --recipe smoke {OUT} --mend`" in invoke(project, *TEACHER, code=3)
    assert "s: predictions.csv written again, byte" in invoke(project, *mend).replace(f"{NAME}:", "s:")
    assert files(out) == whole and "up to date" in invoke(project, *TEACHER)
    rows = ("evaluate", OUT, "--predictions", f"{OUT}/predictions.csv")
    assert "one of a run's own files; name another" in invoke(project, *rows, code=2)
    flip(out / "curve.csv")
    assert "curve.csv: not what" in invoke(project, *mend, code=3), "no part of what evaluate can tell"
    unseal(out)
    assert "has no manifest.json of a run" in invoke(project, *mend, code=2)


def test_a_result_of_an_older_version_is_accepted_and_that_is_said_once(project: Project) -> None:
    unseal(project.path / OUT)
    assert f"without manifest.json, as older versions wrote none, so that damage is not told: 1 run, {OUT}" in invoke(
        project, "report", "--no-figures"
    )
    first, second = invoke(project, *TEACHER), invoke(project, *TEACHER)
    assert f"{OUT}: no manifest.json, as older versions wrote none" in first and "up to date" in first
    assert "up to date" in second and "manifest" not in second
    flip(project.path / OUT / "curve.csv")
    assert f"{OUT}/curve.csv: not what manifest.json says" in invoke(project, *TEACHER, code=3)


def test_a_result_whose_replacing_was_killed_is_put_in_place_by_the_next_command(project: Project) -> None:
    out, whole = project.path / OUT, files(project.path / OUT)
    for name in whole.keys() - {"best.json", "log.jsonl"}:  # the first has been renamed already, the other came before
        (out / name).rename(beside(out / name, "0" * 16))
    write_with_manifest(out, {"best.safetensors": b"former", "curve.csv": b"former", "metrics.json": b"{}"})
    assert f"{OUT}/best.safetensors: not what manifest.json says" not in invoke(project, *TEACHER)
    assert files(out) == whole and "up to date" in invoke(project, *TEACHER)


def test_a_selection_that_was_changed_is_told(project: Project) -> None:
    file = project.data / "selection.json"
    content = json.loads(file.read_text())
    content["candidates"][0]["test"]["top1"] = 100.0
    file.write_text(json.dumps(content))
    recipe = load_params(project.path / "params.yaml").select(None)
    with contextlib.chdir(project.path), pytest.raises(DataError, match="selection.json: changed since it was written"):
        FinishedRuns.read(recipe, Paths("smoke"))


def test_a_damaged_state_is_named_before_anything_starts_over(project: Project) -> None:
    shutil.rmtree(project.path / OUT)
    fingerprint = json.loads((project.data / "teacher/best.json").read_text())["fingerprint"]
    work = project.path / "data/work/smoke/teachers" / NAME
    state = RunState(work, fingerprint)
    state.save({}, {"epoch": 2, "step": 0}, {})
    state.wait()
    assert "goes on from epoch 3 of 8" in invoke(project, *TEACHER, "--dry-run")
    flip(work / "state-b.json", at=20)
    for command in (TEACHER, (*TEACHER, "--dry-run")):
        said = invoke(project, *command, code=3)
        assert f"data/work/smoke/teachers/{NAME}: state-b damaged" in said and "--fresh starts over" in said
