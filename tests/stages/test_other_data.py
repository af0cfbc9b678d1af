"""A checkpoint and data that were prepared anew: refused wherever the two meet, and both named."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipeline.config.params import load_params
from pipeline.data.datasets import Dataset
from pipeline.inference.loading import build_model
from pipeline.system.stopping import StopSignal
from pipeline.training.checkpoints import read_meta, save_checkpoint
from stages.reports.runs import FinishedRuns
from stages.selection import compare
from stages.shared.context import Context
from stages.shared.paths import Paths
from stages.shared.runs import describe
from tests.support.finished_runs import finished
from tests.support.in_process import invoke
from tests.support.project import TEACHERS, Project, unseal
from tests.support.untrained import NAME, untrained

WINNER, CANDIDATE = "data/smoke/teacher", f"data/smoke/teachers/{NAME}"
STUDENT = "data/smoke/students/vit"
CPU = ("--device", "cpu")
EXPORT = ("export", WINNER, "--format", "safetensors", "--out", "exported")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a teacher and a student that have finished; then other images became test images."""
    project = untrained(tmp_path_factory.mktemp("made") / "project")
    for name, top1, loss in zip(TEACHERS, (60.0, 60.0), (1.0, 1.5), strict=True):
        score = {"top1": top1, "loss": loss, "epoch": 1}
        add(project, project.data / "teachers" / name, name, "teacher", score)
    shutil.copy(project.data / "teacher/best.safetensors", project.data / "teachers" / NAME)
    shutil.copy(project.data / "teacher/best.json", project.data / "teachers" / NAME)
    dataset = Dataset.load(project.data / "prepared/dataset.json")
    arguments = {"num_classes": 10, "image_size": 32, "width": 48, "depth": 1}
    description = describe(dataset, "smoke", kind="student", model="vit", arguments=arguments)
    add(project, project.data / "students/vit", "vit", "student", {"top1": 50.0, "loss": 1.0, "epoch": 1})
    model = build_model("student", "vit", arguments)
    meta = {
        **description,
        "epoch": 1,
        "seed": 0,
        "fingerprint": "f",
        "scores": {"top1": 50.0},
        "training": {"precision": "fp32"},
    }
    save_checkpoint(project.data / "students/vit", "best", model.state_dict(), meta)
    for index in range(10):
        folder = project.path / "photos" / str(index)
        folder.mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), 25 * index, np.uint8)).save(folder / "0.png")
    return project


def add(project: Project, out: Path, name: str, kind: str, score: dict[str, float]) -> None:
    """Let a model look as if it had been trained."""
    scores = {"top5": 90.0, "precision": 0.5, "recall": 0.5, "f1": 0.5, "class_top1": 50.0, "distillation_top1": None}
    full = {**scores, "agreement": None, **score}
    run = finished(
        project.path / "made", name, [score["top1"]], kind=kind, evaluated_on="val", best=full, last=full,
        test={**full, "top1": 41.0},
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    run.directory.rename(out)


@pytest.fixture
def project(made: Project, tmp_path: Path) -> Project:
    shutil.copytree(made.path, tmp_path / "project")
    return Project(tmp_path / "project")


def split_again(project: Project) -> tuple[str, str]:
    """Prepare another split of the same images, and return the first digits of the data's SHA-256 before and now."""
    summary = project.data / "prepared/summary.json"
    before = json.loads(summary.read_text())["sha256"]
    project.edit("split_seed: 0", "split_seed: 1")
    invoke(project, "prepare")
    now = json.loads(summary.read_text())["sha256"]
    assert before != now
    return before[:12], now[:12]


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        (("evaluate", STUDENT, *CPU), "--data"),
        (("evaluate", WINNER, "--split", "val", *CPU), "--data"),
        (EXPORT, "--data"),
        (("bench", STUDENT, *CPU), "its export"),
        (("record", STUDENT), "train it again"),
        (("label", *CPU), "pipeline teacher-select --recipe smoke"),
        (("label", "--teacher", CANDIDATE, *CPU), "pipeline teacher-select --recipe smoke"),
        (("select", "--teachers", NAME), f"pipeline teacher {NAME} --recipe smoke"),
        (("distill", "--student", "titn", "--labels", "online", "--teacher", WINNER), "train a teacher on these data"),
    ],
)
def test_a_model_of_other_data_is_refused_and_both_are_named(
    project: Project, arguments: tuple[str, ...], way_out: str
) -> None:
    before, now = split_again(project)
    error = invoke(project, *arguments, code=3)
    for word in (f"trained on other data (recipe smoke, SHA-256 {before})", f"dataset.json (SHA-256 {now})", way_out):
        assert word in error, error
    assert not (project.path / "exported").exists() and not (project.path / "results").exists()


def test_classes_that_are_not_those_of_its_data_are_damage(project: Project) -> None:
    unseal(project.path / STUDENT)
    file = project.path / STUDENT / "best.json"
    file.write_text(file.read_text().replace('"9"', '"y"', 1))
    for command in (("evaluate", STUDENT, *CPU), ("export", STUDENT, *EXPORT[2:]), ("bench", STUDENT, *CPU)):
        assert "names other classes than data/smoke/prepared/dataset.json" in invoke(project, *command, code=3)


def test_images_of_a_folder_stay_possible_and_are_named(project: Project) -> None:
    split_again(project)
    scores = json.loads(invoke(project, "evaluate", STUDENT, "--data", "photos", "--json", *CPU))
    assert (scores["data"], scores["num_images"]) == ("photos", 10)
    assert f"{STUDENT}/best.safetensors on photos" in invoke(project, "evaluate", STUDENT, "--data", "photos", *CPU)
    invoke(project, *EXPORT, "--data", "photos")
    config = json.loads((project.path / "exported/config.json").read_text())
    assert config["checked_on"] == {"images": "photos", "dataset_sha256": None}
    assert (config["data_source"], config["rules"]) == (None, 1)
    bench = ("bench", "exported", "--batch-sizes", "1", "--rounds", "1", *CPU)
    assert "What they cost" in invoke(project, *bench), "an export needs no data"


def test_the_same_data_prepared_again_are_no_others(project: Project) -> None:
    invoke(project, "prepare")
    invoke(project, "evaluate", STUDENT, *CPU)
    assert "recorded as" in invoke(project, "record", STUDENT)
    shutil.rmtree(project.data / "prepared")
    assert "is in" in invoke(project, "record", STUDENT), "without data there is nothing to compare with"


def test_a_checkpoint_that_names_no_data_is_scored_on_a_folder_alone(project: Project) -> None:
    file = project.path / STUDENT / "best.json"
    meta = json.loads(file.read_text())
    del meta["dataset_sha256"]
    file.write_text(json.dumps(meta))
    assert "names no data that it was trained on" in invoke(project, "evaluate", STUDENT, *CPU, code=3)
    invoke(project, "evaluate", STUDENT, "--data", "photos", *CPU)


def test_a_report_leaves_out_what_was_trained_on_other_data_and_names_it(project: Project) -> None:
    (project.data / "teachers" / TEACHERS[1] / "best.json").unlink()
    with contextlib.chdir(project.path):
        recipe = load_params(project.path / "params.yaml").select(None)
        runs = FinishedRuns.read(recipe, Paths("smoke"))
        assert list(runs.students) == ["vit"] and not runs.left_out
    invoke(project, "report", "--no-figures")
    before, now = split_again(project)
    with contextlib.chdir(project.path):
        runs = FinishedRuns.read(recipe, Paths("smoke"))
    assert not runs.students and list(runs.teachers) == [TEACHERS[1]], "of which no weights are here to tell"
    assert list(runs.left_out) == [CANDIDATE, STUDENT]
    out = invoke(project, "report", "--no-figures")
    for directory in (CANDIDATE, STUDENT):
        assert f"left out: {directory}: trained on other data (recipe smoke, SHA-256 {before})" in out
    text = (project.data / "reports/report.md").read_text()
    assert f"Left out, for other data are prepared now: {CANDIDATE}, {STUDENT}." in text
    content = json.loads((project.data / "reports/report.json").read_text())
    assert now in content["left_out"][STUDENT] and "vit" not in content["models"]


def test_of_teachers_that_tie_the_lower_loss_counts_then_the_first(project: Project) -> None:
    params = load_params(project.path / "params.yaml")

    def winner(*losses: float, order: tuple[str, ...] = TEACHERS) -> str:
        for name, loss in zip(TEACHERS, losses, strict=True):
            file = project.data / "teachers" / name / "metrics.json"
            metrics = json.loads(file.read_text())
            metrics["best"]["loss"] = loss
            file.write_text(json.dumps(metrics))
        with contextlib.chdir(project.path):
            comparison = compare(Context(params, params.select(None), Console(), StopSignal()), order)
        return str(comparison["winner"])

    assert winner(1.5, 1.0) == TEACHERS[1]
    assert winner(1.0, 1.5) == TEACHERS[0]
    assert winner(1.0, 1.0) == TEACHERS[0]
    assert winner(1.0, 1.0, order=TEACHERS[::-1]) == TEACHERS[1]


def test_bench_names_the_split_of_each_score_and_prefers_the_test_split(project: Project) -> None:
    bench = ("bench", STUDENT, "--batch-sizes", "1", "--rounds", "1", *CPU)
    [row] = json.loads(invoke(project, *bench, "--json"))["models"]
    assert (row["top1"], row["top1_split"]) == (41.0, "test"), "that of metrics.json, not the 50 on val"
    assert "test top-1 %" in " ".join(invoke(project, *bench).split())
    meta = read_meta(project.path / STUDENT)
    assert meta is not None
    (project.path / STUDENT / "best.json").write_text(json.dumps({**meta, "epoch": 2}))
    [row] = json.loads(invoke(project, *bench, "--json"))["models"]
    assert (row["top1"], row["top1_split"]) == (50.0, "val"), "metrics.json has the test score of another epoch"
    (project.path / STUDENT / "metrics.json").unlink()
    [row] = json.loads(invoke(project, *bench, "--json"))["models"]
    assert (row["top1"], row["top1_split"]) == (50.0, None)


def test_the_model_card_names_the_split_of_the_teachers_score(project: Project) -> None:
    file = project.path / STUDENT / "best.json"
    teacher = {"name": NAME, "sha256": "0" * 64, "top1": 60.0}

    def card(teacher: dict[str, object]) -> str:
        file.write_text(json.dumps({**json.loads(file.read_text()), "teacher": teacher}))
        invoke(project, "export", STUDENT, "--format", "safetensors", "--out", "exported", "--data", "photos")
        return (project.path / "exported/README.md").read_text()

    text = card({**teacher, "test_top1": 55.0})
    assert f"| teacher | `{NAME}`, top-1 55.00 % on the split `test` |" in text
    assert "On the split `test`" in text and "| Top-1 accuracy | 41.00 % |" in text
    assert f"| teacher | `{NAME}`, top-1 60.00 % on the split `val` |" in card(teacher)
