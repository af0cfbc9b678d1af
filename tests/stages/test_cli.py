"""Both stages through the real command line, on the recipe `smoke`."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.datasets import Dataset
from pipeline.labels.cache import LabelCache
from pipeline.labels.parts import LabelParts, seal
from pipeline.training.checkpoints import load_checkpoint
from tests.support.commands import Command
from tests.support.project import ROOT, TEACHERS, Project, environment, unseal


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which both stages have been run. Tests that change anything copy it."""
    project = Project.create(tmp_path_factory.mktemp("finished"), alone=True)
    assert f"{TEACHERS[1]} (teacher 2 of 2): epoch 1/" in project.run("teacher-select")
    for student in ("titn", "vit"):
        project.run("distill", "--student", student)
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    shutil.copytree(finished.path, tmp_path / "project")
    return Project(tmp_path / "project")


def metrics(directory: Path) -> dict[str, object]:
    result: dict[str, object] = json.loads((directory / "metrics.json").read_text())
    return result


def state_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_both_stages_write_what_the_design_says(finished: Project) -> None:
    data = finished.data
    for path in [*(data / "teachers" / name for name in TEACHERS), data / "students/titn", data / "students/vit"]:
        names = {"best.safetensors", "best.json", "metrics.json", "curve.csv", "predictions.csv", "run.json"}
        names |= {"last.safetensors", "last.json"} if path.parent.name == "students" else set()
        assert {file.name for file in path.iterdir()} == {*names, "log.jsonl", "manifest.json"}
        digests = json.loads((path / "manifest.json").read_text())["files"]
        assert digests == {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    assert {path.name for path in (data / "teacher").iterdir()} == {"best.safetensors", "best.json", "manifest.json"}
    selection = json.loads((data / "selection.json").read_text())
    best = max(selection["candidates"], key=lambda row: (row["best"]["top1"], -row["best"]["loss"]))
    assert selection["winner"] == best["name"]
    assert json.loads((data / "teacher/best.json").read_text())["model"] == best["name"]
    cache, dataset = LabelCache.open(data / "labels/default.h5"), Dataset.load(data / "prepared/dataset.json")
    assert cache.labels.shape == (2, len(dataset.train))
    assert set(cache.clean) == {"val", "test"}
    work = finished.path / "data/work"
    rest = [path for path in work.rglob("*") if path.is_file() and path.suffix != ".lock" and "kept" not in path.parts]
    assert rest == []
    kept = {path.stem for path in (work / "kept/smoke").glob("*.json")}
    assert kept == {"prepare", *(f"teacher@{name}" for name in TEACHERS), "select", "label@default", "student@titn",
                    "student@vit"}  # fmt: skip


@pytest.mark.parametrize("model", ["teachers/squeezenet1_1", "students/titn", "students/vit"])
def test_the_predictions_of_the_test_images_give_the_scores(finished: Project, model: str) -> None:
    path = finished.data / model
    with (path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    test = metrics(path)["test"]
    assert isinstance(test, dict)

    def share(column: str, other: str) -> float | None:
        return 100 * sum(row[column] == row[other] for row in rows) / len(rows) if rows[0][column] else None

    dataset = Dataset.load(finished.data / "prepared/dataset.json")
    assert [int(row["sample"]) for row in rows] == list(range(len(dataset.test)))
    assert [row["target"] for row in rows] == [dataset.class_names[label] for label in dataset.test.labels]
    assert share("prediction", "target") == pytest.approx(test["top1"])
    assert share("class_head", "target") == pytest.approx(test["class_top1"])
    for column, other, score in (
        ("distillation_head", "target", "distillation_top1"),
        ("teacher", "prediction", "agreement"),
    ):
        expected = test[score]
        assert share(column, other) == (None if expected is None else pytest.approx(expected))
    assert all(1 / dataset.num_classes - 1e-4 <= float(row["probability"]) <= 1.0 for row in rows)


def test_a_teacher_has_one_accuracy_wherever_it_is_shown(finished: Project) -> None:
    student = finished.data / "students/titn"
    with (student / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    teacher = metrics(student)["teacher"]
    assert isinstance(teacher, dict)
    labels = 100 * sum(row["teacher"] == row["target"] for row in rows) / len(rows)
    scores = metrics(finished.data / "teachers" / teacher["name"])
    assert isinstance(scores["test"], dict) and isinstance(scores["best"], dict)
    assert teacher["test_top1"] == pytest.approx(labels) == pytest.approx(scores["test"]["top1"])
    assert teacher["top1"] == pytest.approx(scores["best"]["top1"]), "on val"


def test_every_models_metrics_have_the_same_keys_and_no_times(finished: Project) -> None:
    all_metrics = [metrics(path.parent) for path in sorted(finished.data.rglob("metrics.json"))]
    assert len(all_metrics) == 4

    def keys(tree: object) -> object:
        return {key: keys(value) for key, value in tree.items() if key != "teacher"} if isinstance(tree, dict) else None

    assert all(keys(model_metrics) == keys(all_metrics[0]) for model_metrics in all_metrics)
    assert "seconds" not in json.dumps(all_metrics)
    assert "date" not in json.dumps(all_metrics)


def test_the_curve_has_a_row_for_every_epoch(finished: Project) -> None:
    with (finished.data / "students/titn/curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    best = metrics(finished.data / "students/titn")["best"]
    assert isinstance(best, dict)
    assert max(float(row["top1"]) for row in rows) == pytest.approx(best["top1"], rel=1e-5)
    assert all(float(row["agreement"]) >= 0 for row in rows)


def test_the_validation_split_decides_and_test_is_scored_once_at_the_end(finished: Project) -> None:
    student_metrics = metrics(finished.data / "students/titn")
    assert student_metrics["evaluated_on"] == "val"
    scored = json.loads(finished.run("evaluate", "data/smoke/students/titn", "--json"))
    assert scored["split"] == "test"
    assert isinstance(student_metrics["test"], dict)
    for key in ("top1", "top5", "precision", "recall", "f1", "class_top1", "distillation_top1"):
        assert scored[key] == pytest.approx(student_metrics["test"][key])
    on_val = json.loads(finished.run("evaluate", "data/smoke/students/titn", "--split", "val", "--json"))
    assert isinstance(student_metrics["best"], dict)
    assert on_val["top1"] == pytest.approx(student_metrics["best"]["top1"])


def test_running_again_changes_nothing(project: Project) -> None:
    before = (
        state_of(project.data / "teachers") | state_of(project.data / "students") | state_of(project.data / "labels")
    )
    out = project.run("teacher-select") + project.run("distill", "--student", "titn")
    assert out.count("up to date") == len(TEACHERS) + 2
    after = (
        state_of(project.data / "teachers") | state_of(project.data / "students") | state_of(project.data / "labels")
    )
    assert before == after


def test_fresh_trains_again_to_the_same_weights(project: Project) -> None:
    file = project.data / "students/titn/last.safetensors"
    before, written = file.read_bytes(), file.stat().st_mtime_ns
    project.run("distill", "--student", "titn", "--fresh")
    assert file.stat().st_mtime_ns > written
    assert file.read_bytes() == before


def test_a_dry_run_says_what_is_up_to_date_and_writes_nothing(project: Project) -> None:
    project.edit("squeezenet1_1: {epochs: 8}", "squeezenet1_1: {epochs: 3}")
    before = state_of(project.path)
    out = project.run("teacher-select", "--dry-run")
    assert "teacher squeezenet1_1: train 3 epochs (epochs 8 -> 3)" in out
    assert "teacher mobilenet_v3_large: up to date" in out
    assert state_of(project.path) == before


def test_a_teacher_at_chance_is_never_selected(project: Project) -> None:
    winner = json.loads((project.data / "selection.json").read_text())["winner"]
    for name in (winner, next(name for name in TEACHERS if name != winner)):
        file = unseal(project.data / "teachers" / name) / "metrics.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "at_chance": True}))
        if name == winner:
            assert f"selected {winner}" not in project.run("select")
    assert "has learned anything" in project.run("select", code=3)


def test_the_report_names_every_model_and_its_conditions(project: Project) -> None:
    out = project.run("report")
    text = (project.data / "reports/report.md").read_text()
    for name in (*TEACHERS, "titn", "vit"):
        assert f"| {name}" in text
        assert name in out
    for word in (
        "device",
        "precision fp32",
        " and 128 of the students",
        "views 2",
        "seed 0",
        " and 2 of the students",
        "teacher ",
    ):
        assert word in text, word
    figures = json.loads((project.data / "reports/report.json").read_text())
    assert set(figures["models"]) == {*TEACHERS, "titn", "vit"}
    assert figures["selected"] in TEACHERS
    assert all(model["run"]["seconds"] > 0 and model["best"]["top1"] >= 0 for model in figures["models"].values())
    assert "test top-1 %" in text, "smoke has a validation split, so the test score stands apart"
    assert "Not run: tnt, deit, titn-large-patch, titn-mixup." in text


def test_labels_can_be_inspected_and_verified(finished: Project) -> None:
    file = "data/smoke/labels/default.h5"
    inspected = json.loads(finished.run("labels", "inspect", file, "--json"))
    assert (inspected["num_views"], inspected["num_classes"]) == (2, 10)
    assert inspected["provenance"]["teacher"] in TEACHERS
    assert "0 differ" in finished.run("labels", "verify", file, "--sample", "300")


def test_a_label_that_is_not_the_teachers_is_found(project: Project) -> None:
    file = project.data / "labels/default.h5"
    cache = LabelCache.open(file)
    labels = np.array(cache.labels)
    labels[1, 5] = (labels[1, 5] + 1) % 10
    parts = LabelParts(project.path / "parts", identity=cache.identity, provenance=cache.provenance)
    for view, row in enumerate(labels):
        parts.write(view, row)
    seal(file, parts=parts, count=2, clean=cache.clean, canaries=cache.canaries)
    out = project.run("labels", "verify", str(file), "--sample", "100000", code=1)
    assert f"view 1, sample 5: cached {labels[1, 5]}" in out
    assert "1 differ, 1 by more than" in out


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("count: 2\n        seed: 0", "count: 2\n        seed: 1", "view_recipe.seed is 0, expected 1"),
        ("crop: 2, flip: false", "crop: 3, flip: false", "view_recipe.crop is 2, expected 3"),
        ("mixing: cutmix", "mixing: none", 'view_recipe.mixing is "cutmix", expected "none"'),
    ],
)
def test_a_student_refuses_labels_of_other_views_field_by_field(
    project: Project, old: str, new: str, field: str
) -> None:
    project.edit(old, new)
    assert field in project.run("distill", "--student", "titn", code=3)


@pytest.mark.slow
def test_a_student_refuses_labels_of_another_teacher_than_the_selected(project: Project) -> None:
    other = next(
        name for name in TEACHERS if name != LabelCache.open(project.data / "labels/default.h5").provenance["teacher"]
    )
    for name in ("best.safetensors", "best.json"):
        shutil.copy(project.data / "teachers" / other / name, unseal(project.data / "teacher") / name)
    assert "checkpoint_sha256" in project.run("distill", "--student", "titn", "--fresh", code=3)
    assert "labelling every view again" in project.run("label")
    project.run("distill", "--student", "titn")


def test_a_student_needs_data_and_labels_alone(project: Project) -> None:
    project.forget("teachers", "teacher", "students")
    program = (
        "import sys; sys.modules['pipeline.models.teachers'] = None; sys.argv[1:] = ['distill', '--student', 'titn'];"
        "from stages.cli import main; main()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=project.path, env=environment(), check=True, timeout=300)
    assert (project.data / "students/titn/metrics.json").is_file()


@pytest.mark.slow
def test_a_cache_with_too_few_views_is_refused_and_can_be_extended(project: Project) -> None:
    file = project.data / "labels/default.h5"
    project.edit("count: 2", "count: 4")
    assert "2 views, the recipe asks for 4" in project.run("distill", "--student", "titn", code=3)
    out = project.run("label")
    assert "labelled 2/2 views" in out
    extended = file.read_bytes()
    project.run("label", "--fresh")
    assert file.read_bytes() == extended


@pytest.mark.slow
def test_two_ranks_label_the_same_file_as_one(project: Project) -> None:
    file = project.data / "labels/default.h5"
    project.edit("count: 2", "count: 5")
    project.run("label", "--fresh")
    alone = file.read_bytes()
    project.forget("labels")
    ranks = [Command(project.path, "label", RANK=rank, WORLD_SIZE="2", LOCAL_RANK="0") for rank in "01"]
    assert [rank.finish().code for rank in ranks] == [0, 0]
    assert file.read_bytes() == alone


@pytest.mark.slow
def test_controls_are_kept_apart_from_the_recipes_own_run(project: Project) -> None:
    before = state_of(project.data / "students")
    project.run("distill", "--student", "titn", "--labels", "none")
    project.run("distill", "--student", "titn", "--labels", "online", "--teacher", "data/smoke/teacher")
    project.run("distill", "--student", "titn", "--seed", "1", "--set", "epochs=1")
    assert state_of(project.data / "students") == before
    runs = project.path / "data/runs/smoke"
    assert {path.name for path in runs.iterdir()} == {"titn-labels-none", "titn-labels-online", "titn-epochs-1-seed-1"}
    selected = (project.data / "teacher/best.safetensors").read_bytes()
    other = next(
        path for path in (project.data / "teachers").iterdir() if (path / "best.safetensors").read_bytes() != selected
    )
    online_by = ("distill", "--student", "titn", "--labels", "online", "--teacher", f"data/smoke/teachers/{other.name}")
    digest = json.loads((other / "best.json").read_text())["sha256"]
    assert f"writes data/runs/smoke/titn-labels-online-teacher-{digest[:10]}\n" in project.run(*online_by, "--dry-run")
    cached, online = metrics(project.data / "students/titn"), metrics(runs / "titn-labels-online")
    assert cached["best"] == online["best"]
    assert [trained["distilled"] for trained in (cached, online, metrics(runs / "titn-labels-none"))] == [
        True,
        True,
        False,
    ]


def test_a_student_without_a_distillation_head_trains_without_a_cache(project: Project) -> None:
    best = metrics(project.data / "students/vit")["best"]
    assert isinstance(best, dict)
    assert best["agreement"] is not None
    shutil.rmtree(project.data / "labels")
    project.run("distill", "--student", "vit", "--fresh")
    without = metrics(project.data / "students/vit")["best"]
    assert isinstance(without, dict)
    assert without["agreement"] is None
    assert without["top1"] == best["top1"]


@pytest.mark.slow
def test_mixup_and_large_patches_train_on_demand(project: Project) -> None:
    project.run("label", "--view-recipe", "mixup", "--teacher", "data/smoke/teacher")
    project.run("distill", "--student", "titn-mixup")
    project.run("distill", "--student", "titn-large-patch")
    assert metrics(project.data / "students/titn-mixup")["views"] == 2


@pytest.mark.slow
def test_the_optimiser_sweep_trains_the_winner_apart(project: Project) -> None:
    out = project.run("teacher-select", "--teachers", "squeezenet1_1", "--optimizers", "adamw,sgd")
    assert "squeezenet1_1 by optimiser" in out
    (run,) = (project.path / "data/runs/smoke").iterdir()
    assert json.loads((run / "metrics.json").read_text())["differs"] == {
        "optimizer": "sgd",
        "lr": "0.1",
        "weight_decay": "0.0001",
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_exits_by_its_signal_and_goes_on_to_the_same_weights(project: Project, number: int) -> None:
    long = ("distill", "--student", "vit", "--set", "epochs=12")
    project.run(*long)
    out = project.path / "data/runs/smoke/vit-epochs-12"
    whole = (out / "last.safetensors").read_bytes()
    shutil.rmtree(out)
    with project.start(*long) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "; fp32; " in first and first.endswith("; batch 128\n")
        assert "epoch 1/12" in process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "run the same command again to go on" in err
    assert not out.exists()
    assert "going on from epoch" in project.run(*long)
    assert (out / "last.safetensors").read_bytes() == whole
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    told = [line["event"] for line in logged if line["event"] not in ("epoch", "warned")]
    assert told == ["started", "stopped", "started", "ended"]
    assert [line["epoch"] for line in logged if line["event"] == "epoch"] == list(range(1, 13))


@pytest.mark.slow
def test_a_compiled_student_has_the_same_names_and_a_missing_compiler_is_one_line(project: Project) -> None:
    project.run_anew("distill", "--student", "vit")
    plain = load_checkpoint(project.path / "data/smoke/students/vit", stem="last")
    out = project.run_anew("distill", "--student", "vit", "--set", "compile=true")
    assert "; torch.compile; batch 128" in out
    compiled = load_checkpoint(project.path / "data/runs/smoke/vit-compile-true", stem="last")
    assert compiled.tensors.keys() == plain.tensors.keys()
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(compiled.tensors[name], tensor, rtol=1e-3, atol=1e-4)
    without = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(project.path / "cache")}
    out = project.run_anew("distill", "--student", "vit", "--set", "compile=true", "--fresh", code=2, **without)
    assert "compile: true: torch.compile fails here" in out and "set it to false or install a C++ compiler" in out


def test_a_diverging_teacher_ends_with_code_5_and_one_line(project: Project) -> None:
    settings = ("--set", "optimizer=sgd", "--set", "lr=100.0", "--set", "clip=0.0")
    out = project.run("teacher", "squeezenet1_1", *settings, code=5)
    for word in ("epoch 1, step", "lr 100", "lower lr"):
        assert word in out


def test_a_second_run_of_the_same_thing_is_refused(project: Project) -> None:
    first = Command(project.path, "distill", "--student", "vit", "--set", "epochs=300")
    held = project.path / "data/work/smoke/runs/vit-epochs-300.lock"
    while not held.is_file() or not held.read_bytes():
        assert first.is_alive()
        time.sleep(0.01)
    assert "held by another run" in project.run("distill", "--student", "vit", "--set", "epochs=300", code=4)
    assert first.is_alive()
    first.kill()
    assert first.finish().code == -signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("distill", "--student", "titan"), 2, ["titan", "titn, tnt, deit, vit"]),
        (("teacher", "resnet51"), 2, ["resnet51", "vgg16_bn"]),
        (("teacher-select", "--teachers", "vgg16,vgg61"), 2, ["vgg61"]),
        (("teacher-select", "--optimizers", "lion"), 2, ["lion", "adamw"]),
        (("prepare", "--recipe", "imagenet21k"), 2, ["imagenet21k", "digits"]),
        (("label", "--view-recipe", "cutout"), 2, ["cutout", "default, mixup"]),
        (("evaluate", "nowhere"), 2, ["nowhere"]),
        (("distill", "--student", "titn", "--set", "epochs"), 2, ["epochs", "KEY=VALUE"]),
        (("distill", "--student", "titn", "--labels", "online"), 2, ["--teacher"]),
        (("distill", "--student", "titn", "--device", "tpu9"), 2, ["tpu9", "cpu"]),
        (("prepare", "--recipe", "cifar100"), 3, ["--download", "--from"]),
        (("prepare", "--recipe", "folder"), 2, ["--from"]),
        (("distill", "--student", "titn"), 3, ["pipeline prepare"]),
        (("label",), 3, ["pipeline teacher-select"]),
        (("labels", "inspect", "params.yaml"), 3, ["params.yaml"]),
        (("distil",), 2, ["distil"]),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_with_its_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    out = Project.create(tmp_path).run(*arguments, code=code)
    for word in words:
        assert word in out


def test_a_users_folder_is_prepared_and_its_bad_files_are_named(tmp_path: Path) -> None:
    project, pixels = Project.create(tmp_path / "project"), np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images/train" / label).mkdir(parents=True)
        for index in range(20):
            image = Image.fromarray(pixels.integers(0, 256, (40, 30, 3), dtype=np.uint8))
            image.save(tmp_path / "images/train" / label / f"{index}.png")
    (tmp_path / "images/train/cat/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    command = ("prepare", "--recipe", "folder", "--from", str(tmp_path / "images"))
    out = project.run(*command, code=3)
    assert "torn.png" in out
    assert "--skip-bad" in out
    assert "skipped 1 bad file;" in project.run(*command, "--skip-bad")
    dataset = Dataset.load(project.path / "data/folder/prepared/dataset.json")
    assert dataset.class_names == ("cat", "dog")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 28, "val": 4, "test": 8}
    other = ("prepare", "--recipe", "cifar100-small", "--from", str(tmp_path / "images"), "--skip-bad")
    assert "cifar100 has 100 classes, 'cat' is none of them" in project.run(*other, code=3)


def test_distill_without_labels_names_stage_one(tmp_path: Path) -> None:
    project = Project.create(tmp_path)
    project.run("prepare")
    assert "pipeline teacher-select" in project.run("distill", "--student", "titn", code=3)


def test_changed_data_settings_are_noticed(project: Project) -> None:
    project.edit("split_seed: 0", "split_seed: 1")
    out = project.run("distill", "--student", "titn", code=3)
    assert "split_seed" in out
    assert "pipeline prepare" in out


def test_imagenet_weights_that_cannot_be_had_name_the_ways_out(project: Project) -> None:
    out = project.run(
        "teacher", "squeezenet1_1", "--set", "weights=imagenet", code=4, TORCH_HOME=str(project.path / "hub"),
        https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9",
    )  # fmt: skip
    for word in ("squeezenet1_1", "weights: none", "weights: PATH"):
        assert word in out


def test_models_are_listed_as_json(tmp_path: Path) -> None:
    listed = json.loads(Project.create(tmp_path).run("models", "--classes", "100", "--json"))
    by_name = {model["name"]: model for model in listed}
    assert len(listed) == 13
    assert set(listed[0]) == {"name", "kind", "parameters", "paper_gmacs_1024", "flops_per_image"}
    assert by_name["titn"]["parameters"] == 5_845_220
    assert by_name["titn"]["paper_gmacs_1024"] == pytest.approx(111.400, abs=5e-4)
    assert by_name["vgg16_bn"]["parameters"] == 134_678_692


def test_help_names_every_command_by_stage(tmp_path: Path) -> None:
    out = Project.create(tmp_path).run("--help")
    for word in ("Stage one", "Stage two", "teacher-select", "distill", "evaluate", "models"):
        assert word in out


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    out = subprocess.run(
        [sys.executable, "-m", "stages.cli", "--version"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert version("titn-pipeline") in out.stdout
