"""predict, evaluate and bench on checkpoints, run in this process; the weights are random, which needs no training."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.decoding import UNUSED_ALPHA
from pipeline.data.images import read_image
from pipeline.errors import PipelineError
from pipeline.inference import speed
from pipeline.inference.classifier import Answer, Classifier
from pipeline.inference.loading import build_model, load
from pipeline.training.checkpoints import save_checkpoint
from pipeline.views.colour import autocontrast
from stages.cli import LESS_MEMORY, cli
from stages.cli import run as run_command
from stages.demo import Demo
from stages.export import from_folder
from tests.support.project import Project
from tests.support.without_float64 import STAND_IN, WithoutFloat64

GEOMETRY = {
    "patch_size": 8,
    "pixel_size": 2,
    "width": 48,
    "depth": 1,
    "num_heads": 3,
    "pixel_width": 12,
    "pixel_heads": 2,
}
CLASSES = ("ant", "bee", "cat")


class Ended(NamedTuple):
    out: str
    err: str
    code: int = 0


def run(folder: Path, *arguments: str, code: int = 0, stdin: bytes = b"") -> Ended:
    """Run a command in this process and check its exit code."""
    out, err, exit_code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main(list(arguments), standalone_mode=False)
            except PipelineError as error:
                exit_code = error.exit_code
                err.write(f"{error}\n")
            except click.ClickException as error:
                exit_code = 2
                err.write(f"{error.format_message()}\n")
    assert exit_code == code, f"exit {exit_code}, expected {code}\n{out.getvalue()}\n{err.getvalue()}"
    return Ended(out.getvalue(), err.getvalue(), exit_code)


def describe(model: str, kind: str, class_names: tuple[str, ...] = CLASSES, **extra: Any) -> dict[str, Any]:
    sizes = {"num_classes": len(class_names)}
    return {
        "kind": kind,
        "model": model,
        "arguments": {**sizes, "image_size": 16, **GEOMETRY} if kind == "student" else sizes,
        "class_names": list(class_names),
        "image_size": 16 if kind == "student" else 32,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "training": {"precision": "fp32"},
        **extra,
    }


def checkpoint(folder: Path, meta: dict[str, Any], seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_checkpoint(folder, "best", build_model(meta["kind"], meta["model"], meta["arguments"]).state_dict(), meta)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three checkpoints and with images, some of them odd or bad, and with nothing else."""
    folder, pixels = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for model, kind in (("titn", "student"), ("vit", "student"), ("squeezenet1_1", "teacher")):
        checkpoint(folder / model, describe(model, kind))
    for index in range(9):
        path = folder / "images" / ("bee", "cat")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (12, 20, 3), np.uint8)).save(path)
    return folder


def answer(folder: Path, files: list[Path]) -> Answer:
    classifier = load(folder)
    return classifier.answer(np.stack([read_image(file, classifier.image_size) for file in files]))


# predict


@pytest.mark.parametrize(
    ("model", "heads"),
    [("titn", ["class", "distillation"]), ("vit", ["class"]), ("squeezenet1_1", ["class"])],
)
def test_json_has_a_line_for_each_image_with_what_the_model_says(place: Path, model: str, heads: list[str]) -> None:
    out = run(place, "predict", model, "images/cat", "images/bee/0.png", "--json", "--topk", "2").out
    lines = [json.loads(line) for line in out.splitlines()]
    names = [f"images/cat/{index}.png" for index in (1, 3, 5, 7)] + ["images/bee/0.png"]
    assert [line["path"] for line in lines] == names
    expected = answer(place / model, [place / name for name in names])
    for line, top in zip(lines, expected.top(2), strict=True):
        assert [(top_class["class"], top_class["probability"]) for top_class in line["top"]] == [
            (name, pytest.approx(value, abs=1e-5)) for name, value in top
        ]
    assert all(list(line["heads"]) == heads for line in lines)
    for head in heads:
        named = [[top_class["class"] for top_class in line["heads"][head]] for line in lines]
        assert named == [[name for name, _ in row] for row in expected.top(2, head)]


def test_people_see_both_heads_beside_the_prediction(place: Path) -> None:
    heading, name, *rows = run(place, "predict", "titn", "images/cat/1.png").out.splitlines()
    assert heading.split() == ["prediction", "class", "head", "distillation", "head"]
    assert name == "images/cat/1.png"
    assert len(rows) == len(CLASSES), "no more classes than there are"
    assert all(row.count("%") == 3 for row in rows)
    one_head = run(place, "predict", "vit", "images/cat/1.png", "images/cat/3.png", "--topk", "1").out.splitlines()
    assert [line.count("%") for line in one_head] == [0, 1, 0, 1]


def test_the_rest_is_answered_where_files_are_bad(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "images", tmp_path / "images")
    good = tmp_path / "images/bee/0.png"
    torn = good.read_bytes()[:200]
    for name, content in (
        ("bee/torn.png", torn),
        ("bee/empty.jpg", b""),
        ("bee/drawing.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("bee/new\nline.png", b""),
        ("bee/film.mp4", b"film"),
    ):
        (tmp_path / "images" / name).write_bytes(content)
    shutil.copy(good, tmp_path / os.fsdecode(b"images/bee/\xff\xfe.png"))
    os.mkfifo(tmp_path / "pipe.png")
    ended = run(tmp_path, "predict", str(place / "vit"), "images", "nowhere.png", "pipe.png", "--json", code=1)
    lines = [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]
    assert len(lines) == 10
    assert lines[5]["path"] == r"images/bee/\xff\xfe.png"
    *named, last = ended.err.splitlines()
    assert last == "6 of 16 could not be read; they are named above"
    problems = dict(line.split(": ", 1) for line in named)
    assert problems["images/bee/empty.jpg"] == "empty"
    assert problems["images/bee/drawing.png"] == "not an image of a known format"
    assert problems[r"images/bee/new\nline.png"] == "empty"
    assert problems["nowhere.png"] == "no such file or folder"
    assert problems["pipe.png"] == "not a regular file"
    assert problems["images/bee/torn.png"].startswith("cannot be read")
    assert problems["left out, not having an image's suffix"] == "1 .mp4"


def test_csv_has_a_row_for_each_image(place: Path, tmp_path: Path) -> None:
    (tmp_path / "=1.png").write_bytes((place / "images/cat/1.png").read_bytes())
    (tmp_path / "torn.png").write_bytes(b"")
    files = ["=1.png", str(place / "images/bee/0.png")]
    model = ("predict", str(place / "titn"))
    told = [json.loads(line) for line in run(tmp_path, *model, *files, "--json").out.splitlines()]
    ended = run(tmp_path, *model, *files, "torn.png", "--csv", "rows.csv", code=1)
    assert ended.out == "rows.csv: written\n" and "torn.png: empty\n1 of 3 could not be read" in ended.err
    rows = rows_of(tmp_path / "rows.csv")
    assert [row["path"] for row in rows] == ["'=1.png", files[1]], "no spreadsheet computes it"
    for row, line in zip(rows, told, strict=True):
        pairs = {"prediction": line["top"], **{f"{name}_head": top for name, top in line["heads"].items()}}
        for key, top in pairs.items():
            probability = row[{"prediction": "probability"}.get(key, f"{key}_probability")]
            assert (row[key], float(probability)) == (top[0]["class"], top[0]["probability"])
    assert list(rows[0]) == [
        "path", "prediction", "probability", "class_head", "class_head_probability", "distillation_head",
        "distillation_head_probability",
    ]  # fmt: skip
    printed = run(tmp_path, "predict", str(place / "vit"), "=1.png", "--csv", "-", "--topk", "9").out
    (row,) = csv.DictReader(io.StringIO(printed))
    assert list(row)[-4:] == ["prediction_2", "probability_2", "prediction_3", "probability_3"], "of three classes"
    assert row["class_head"] == row["prediction"] and row["distillation_head"] == ""
    assert sum(float(row[f"probability{rank}"]) for rank in ("", "_2", "_3")) == pytest.approx(1, abs=1e-5)


def test_a_csv_file_is_whole_or_not_there_and_replaces_no_file_of_a_run(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    arguments = ("predict", "vit", "images/cat/1.png", "--csv", str(file))
    assert "give one of them" in run(place, *arguments, "--json", code=2).err
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Classifier, "answer", lambda *_: 1 / 0)
        run(place, *arguments)
    assert not list(tmp_path.iterdir())
    for odd in (str(tmp_path), "/dev/null"):
        assert f"{odd}: there is something that is no file" in run(place, *arguments[:-1], odd, code=2).err
        rows = ("evaluate", "vit", "--data", "images", "--predictions", odd)
        assert f"{odd}: there is something that is no file" in run(place, *rows, code=2).err
    named = run(place, *arguments[:-1], "vit/manifest.json", code=2).err
    assert "vit/manifest.json: one of a run's own files; name another" in named


def test_predictions_below_the_threshold_are_unsure(place: Path) -> None:
    images = ("predict", "vit", "images/cat/1.png", "images/cat/3.png")
    first, other = (json.loads(line)["top"][0] for line in run(place, *images, "--json").out.splitlines())
    low, high = sorted((first, other), key=lambda top: top["probability"])
    assert low["probability"] < high["probability"], "else the test shows nothing"
    between = ("--threshold", str((low["probability"] + high["probability"]) / 2))
    lines = [json.loads(line) for line in run(place, *images, *between, "--json").out.splitlines()]
    assert [line["unsure"] for line in lines] == [first is low, other is low]
    rows = list(csv.DictReader(io.StringIO(run(place, *images, *between, "--csv", "-").out)))
    assert [row["unsure"] for row in rows] == ["yes" if line["unsure"] else "no" for line in lines]
    text = run(place, *images, *between).out
    assert text.count("unsure") == 1
    assert f".png: unsure ({low['class']} {100 * low['probability']:.2f} %)\n" in text
    assert "unsure" not in run(place, *images, "--json", "--threshold", "0").out.replace('"unsure": false', "")
    assert run(place, *images, "--threshold", "1").out.count(": unsure (") == 2
    assert "unsure" not in run(place, *images, "--csv", "-").out + run(place, *images, "--json").out
    assert "0.0<=x<=1.0" in run(place, *images, "--threshold", "1.5", code=2).err
    assert "nan" in run(place, *images, "--threshold", "nan", code=2).err


def test_a_dash_is_one_images_bytes_on_standard_input(place: Path) -> None:
    content = (place / "images/cat/1.png").read_bytes()
    piped = json.loads(run(place, "predict", "titn", "-", "--json", stdin=content).out)
    named = json.loads(run(place, "predict", "titn", "images/cat/1.png", "--json").out)
    assert piped == {**named, "path": "-"}
    assert "-: empty" in run(place, "predict", "titn", "-", code=1).err
    assert "name it once" in run(place, "predict", "titn", "-", "-", code=2).err


def test_standard_input_without_end_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.predict.MAX_INPUT_BYTES", 100)
    content = (place / "images/cat/1.png").read_bytes()
    assert "-: more than 100 bytes" in run(place, "predict", "titn", "-", code=1, stdin=content).err


def test_names_cannot_command_the_terminal(tmp_path: Path) -> None:
    checkpoint(tmp_path / "vit", describe("vit", "student", ("a\x1b[31m", "b\n", "c")))
    Image.new("RGB", (4, 4)).save(tmp_path / "\x1b[2J.png")
    out = run(tmp_path, "predict", "vit", "\x1b[2J.png").out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"class_names": ["ant", "bee"]}, "num_classes"),
        ({"class_names": ["ant", "bee", "bee"]}, "class_names"),
        ({"class_names": ["ant", "bee", 3]}, "class_names"),
        ({"class_names": None}, "class_names"),
        ({"image_size": 32}, "image_size"),
        ({"image_size": "16"}, "image_size"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": "abc"}, "mean"),
        ({"std": [0.5, 0.0, 0.5]}, "std"),
        ({"training": None}, "give --precision"),
    ],
)
def test_a_checkpoint_that_does_not_say_what_its_inputs_are_is_refused(
    place: Path, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    shutil.copytree(place / "vit", tmp_path / "vit")
    file = tmp_path / "vit/best.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    ended = run(tmp_path, "predict", "vit", "x.png", code=3)
    assert "best.json" in ended.err and word in ended.err


# Exports


def test_an_export_is_used_as_its_checkpoint_is(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "images", tmp_path / "data/test")
    source = str(place / "titn")
    run(tmp_path, "export", source, "--format", "safetensors", "--data", "data", "--out", "exported")
    told = [run(tmp_path, "predict", path, "data", "--json").out.splitlines() for path in (source, "exported")]
    assert len(told[0]) == 9
    for line, other in zip(*(map(json.loads, lines) for lines in told), strict=True):
        assert list(line["heads"]) == list(other["heads"]) == ["class", "distillation"]
        for ours, theirs in zip(line["top"], other["top"], strict=True):
            assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-4)
    scored = [
        json.loads(run(tmp_path, "evaluate", path, "--data", "data", "--json").out)
        for path in (source, "exported/model.safetensors")
    ]
    assert scored[0]["loss"] == pytest.approx(scored[1]["loss"], abs=1e-4)
    assert scored[0]["top1"] == scored[1]["top1"]
    out = run(tmp_path, "bench", source, "exported", "--batch-sizes", "2", "--rounds", "1", "--json").out
    assert [row["format"] for row in json.loads(out)["models"]] == ["checkpoint", "safetensors"]
    assert "--precision bf16" in run(tmp_path, "predict", "exported", "x.png", "--precision", "bf16", code=2).err
    assert "safetensors" in run(tmp_path, "predict", "exported/model.onnx", "x.png", code=2).err


# evaluate


def test_a_folder_is_scored_by_the_names_of_its_classes(place: Path) -> None:
    scores = json.loads(run(place, "evaluate", "titn", "--data", "images", "--per-class", "--json").out)
    paths = sorted((place / "images").glob("*/*.png"))
    top = answer(place / "titn", paths).top(1)
    hits = [path.parent.name == row[0][0] for path, row in zip(paths, top, strict=True)]
    assert scores["num_images"] == 9
    assert scores["top1"] == pytest.approx(100 * sum(hits) / 9)
    assert (scores["absent_classes"], scores["skipped"]) == (["ant"], [])
    by_name = {class_scores["name"]: class_scores for class_scores in scores["classes"]}
    assert {name: class_scores["support"] for name, class_scores in by_name.items()} == {"ant": 0, "bee": 5, "cat": 4}
    assert by_name["bee"]["recall"] == pytest.approx(sum(hits[:5]) / 5)
    assert scores["classes"][-1]["name"] == "ant", "a class without images is not the worst"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_model_of_cropped_images_is_asked_about_cropped_images(place: Path, tmp_path: Path) -> None:
    model = str(checkpoint(tmp_path / "titn", describe("titn", "student", resize="crop")))
    paths, classifier = sorted((place / "images").glob("*/*.png")), load(Path(model))
    crops = np.stack([read_image(path, 16, resize="crop") for path in paths])
    expected = [row[0] for row in classifier.answer(crops).top(1)]
    assert expected != [row[0] for row in answer(Path(model), paths).top(1)], "squeezed images have other answers"
    told = run(place, "predict", model, "images", "--json", "--topk", "1").out.splitlines()
    top = [json.loads(line)["top"][0] for line in told]
    assert [(row["class"], row["probability"]) for row in top] == [
        (name, pytest.approx(value, abs=1e-5)) for name, value in expected
    ]
    run(place, "evaluate", model, "--data", "images", "--predictions", str(tmp_path / "rows.csv"))
    assert [(row["prediction"], float(row["probability"])) for row in rows_of(tmp_path / "rows.csv")] == [
        (name, pytest.approx(value, abs=1e-4)) for name, value in expected
    ]
    [shown] = Demo(classifier, topk=1).answer(paths[0].read_bytes())["top"]
    assert shown["probability"] == pytest.approx(expected[0][1], abs=1e-5)
    loaded = from_folder(place / "images", classifier, labelled=True)
    assert np.array_equal(loaded.images[:], crops)


def test_an_unused_alpha_channel_is_said(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "images", tmp_path / "images")
    Image.fromarray(np.full((8, 8, 4), (9, 9, 9, 0), np.uint8)).save(tmp_path / "images/bee/clear.png")
    arguments = ("evaluate", str(place / "vit"), "--data", "images")
    assert json.loads(run(tmp_path, *arguments, "--json").out)["unused_alpha"] == ["bee/clear.png"]
    assert "10 images, cpu, fp32; alpha is 0 everywhere, and ignored, in 1 image" in run(tmp_path, *arguments).out
    assert run(tmp_path, "predict", str(place / "vit"), "images").err == f"{UNUSED_ALPHA}, in 1 image\n"


@pytest.mark.parametrize("name", ["titn", "vit"])
def test_the_predictions_of_an_evaluation_name_each_image(place: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images/bee/0-torn.png").write_bytes(b"")
    arguments = ("--data", "images", "--skip-bad", "--predictions", "rows.csv", "--json")
    scores = json.loads(run(tmp_path, "evaluate", str(place / name), *arguments).out)
    paths = sorted((place / "images").glob("*/*.png"))
    rows = rows_of(tmp_path / "rows.csv")
    assert [row["path"] for row in rows] == [path.relative_to(place / "images").as_posix() for path in paths]
    assert [row["target"] for row in rows] == [path.parent.name for path in paths]
    assert [row["prediction"] for row in rows] == [top[0][0] for top in answer(place / name, paths).top(1)]
    assert [row["sample"] for row in rows] == list(map(str, range(9)))
    assert all(bool(row["distillation_head"]) == (name == "titn") for row in rows)
    assert 100 * sum(row["prediction"] == row["target"] for row in rows) / 9 == pytest.approx(scores["top1"])


def test_bad_files_refuse_a_folder_or_are_left_out_and_counted(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "images", tmp_path / "images/test")
    (tmp_path / "images/test/cat/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "images/test/stray.png").write_bytes(b"")
    arguments = ("evaluate", str(place / "titn"), "--data", "images")
    ended = run(tmp_path, *arguments, code=3)
    for word in ("images: 2 bad", "test/stray.png (not in a class folder)", "test/cat/torn.png (", "--skip-bad"):
        assert word in ended.err
    scores = json.loads(run(tmp_path, *arguments, "--skip-bad", "--json").out)
    assert scores["num_images"] == 9
    assert [file["path"] for file in scores["skipped"]] == ["test/stray.png", "test/cat/torn.png"]
    out = run(tmp_path, *arguments, "--skip-bad", "--per-class").out
    for word in ("2 bad files left out", "no images of 1 class (ant), which counts 0", "most often taken for"):
        assert word in " ".join(out.split())
    for path in (tmp_path / "images/test").glob("*/*.png"):
        path.write_bytes(b"")
    assert "no image can be read, of 10" in run(tmp_path, *arguments, "--skip-bad", code=3).err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--data", "images", "--split", "val"), 2, ["--data", "--split"]),
        (("--data", "images", "--recipe", "smoke"), 2, ["--data", "--recipe"]),
        (("--skip-bad",), 2, ["--skip-bad", "--data"]),
        (("--data", "nowhere"), 2, ["nowhere", "<class>/<image>"]),
        (("--data", "."), 3, ["images", "not one of the model's 3 classes (ant, bee, cat)"]),
    ],
)
def test_what_cannot_be_scored_is_refused(place: Path, arguments: tuple[str, ...], code: int, words: list[str]) -> None:
    ended = run(place, "evaluate", "vit", *arguments, code=code)
    assert all(word in ended.err for word in words), ended.err


def test_a_recipes_split_is_scored_by_class(tmp_path: Path) -> None:
    project = Project.create(tmp_path)
    run(tmp_path, "prepare")
    summary = json.loads((project.data / "prepared/summary.json").read_text())
    meta = describe("vit", "student", tuple(summary["class_names"]))
    meta |= {"image_size": 32, "arguments": {**meta["arguments"], "image_size": 32}}
    meta["dataset_sha256"] = summary["sha256"]
    checkpoint(tmp_path / "vit", meta)
    line = ("evaluate", "vit", "--split", "val", "--per-class", "--predictions", "rows.csv", "--json")
    scores = json.loads(run(tmp_path, *line).out)
    rows = rows_of(tmp_path / "rows.csv")
    assert "path" not in rows[0], "the digits are no files"
    assert [row["prediction"] == row["target"] for row in rows].count(True) == round(scores["top1"] / 100 * len(rows))
    assert (scores["recipe"], scores["split"]) == ("smoke", "val")
    counts = dict(zip(summary["class_names"], summary["class_counts"]["val"], strict=True))
    assert {row["name"]: row["support"] for row in scores["classes"]} == counts
    assert sum(row["support"] * row["recall"] for row in scores["classes"]) == pytest.approx(
        scores["top1"] / 100 * scores["num_images"]
    )
    recalls = [row["recall"] for row in scores["classes"]]
    assert recalls == sorted(recalls)
    assert "classes" not in json.loads(run(tmp_path, "evaluate", "vit", "--json").out)


# bench


def test_bench_says_what_models_cost_and_how_fast_they_answer(place: Path) -> None:
    threads = torch.get_num_threads()
    command = ("bench", "titn", "vit", "--batch-sizes", "1,3", "--rounds", "2", "--threads", "1", "--device", "cpu")
    measured = json.loads(run(place, *command, "--precision", "fp32", "--json").out)
    assert torch.get_num_threads() == threads
    titn, vit = measured["models"]
    assert (titn["model"], vit["model"], vit["inner_block"], vit["image_size"]) == ("titn", "vit", "none", 16)
    weights = (place / "vit/best.safetensors").stat().st_size
    assert vit["file_bytes"] == weights > 4 * vit["parameters"] > 0
    assert titn["paper_macs"] > vit["paper_macs"] > 0
    assert titn["flops_per_image"] > vit["flops_per_image"] > 0
    assert [(model_speed["name"], model_speed["batch_size"]) for model_speed in measured["speeds"]] == [
        ("titn", 1), ("vit", 1), ("titn", 3), ("vit", 3),
    ]  # fmt: skip
    for model_speed in measured["speeds"]:
        low, high = model_speed["quartiles_ms"]
        assert 0 < low <= model_speed["median_ms"] <= high
        assert model_speed["images_per_second"] == pytest.approx(
            1000 * model_speed["batch_size"] / model_speed["median_ms"]
        )
        assert model_speed["peak_bytes"] is None
    assert all(
        model_speed["p95_ms"] >= model_speed["median_ms"]
        for model_speed in measured["speeds"]
        if model_speed["batch_size"] == 1
    )
    where = measured["environment"]
    assert (where["rounds"], where["threads"]) == (2, 1)
    assert [(row["precision"], row["device"], row["format"]) for row in (titn, vit)] == [
        ("fp32", "cpu", "checkpoint")
    ] * 2
    out = " ".join(run(place, "bench", "vit", "--batch-sizes", "2", "--rounds", "1").out.split())
    for word in ("What they cost", "How fast they answer", "images/s", "1 rounds", "load"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vit", "vit"), ["vit", "twice"]),
        (("vit", "--batch-sizes", "0"), ["--batch-sizes 0"]),
        (("vit", "--batch-sizes", "1,1"), ["1,1", "distinct"]),
        (("vit", "--batch-sizes", "many"), ["--batch-sizes many"]),
        (("vit", "--rounds", "0"), ["--rounds"]),
        (("nowhere",), ["nowhere"]),
        (("vit", "--device", "tpu9"), ["tpu9"]),
    ],
)
def test_a_bench_that_cannot_be_is_refused(place: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    ended = run(place, "bench", *arguments, code=2)
    assert all(word in ended.err for word in words), ended.err


def test_a_batch_too_large_for_the_device_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Classifier, pixels: np.ndarray[Any, Any]) -> None:
        if len(pixels) > 4:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(speed.Classifier, "answer", answer)
    assert "batch size 8: vit" in run(place, "bench", "vit", "--batch-sizes", "4,8", code=2).err


def test_a_gpu_without_enough_memory_is_one_line_with_the_ways_out(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def predictions(*arguments: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB\n..."
        )

    monkeypatch.chdir(place)
    monkeypatch.setattr(speed.Classifier, "answer", predictions)
    assert run_command(["predict", "vit", "images/bee"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"Error: CUDA out of memory. Tried to allocate 2.50 GiB; {LESS_MEMORY}"
    ]


# Apple's GPUs


@pytest.mark.parametrize("model", ["titn", "squeezenet1_1"])
def test_a_device_without_float64_predicts_and_evaluates(
    place: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WithoutFloat64(), pytest.raises(TypeError, match="no float64"):
        autocontrast(torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device=STAND_IN))
    monkeypatch.setattr("pipeline.inference.loading.resolve_device", lambda name: {"mps": STAND_IN}[name])
    with WithoutFloat64():
        predicted = run(place, "predict", model, "images/cat", "--device", "mps", "--json").out
        options = ("--device", "mps", "--per-class", "--predictions", str(tmp_path / "rows.csv"), "--json")
        scores = json.loads(run(place, "evaluate", model, "--data", "images", *options).out)
    assert [json.loads(line)["top"][0]["probability"] for line in predicted.splitlines()] == [1.0] * 4
    assert scores["num_images"] == 1, "what the stand-in says of any number"
    assert len(rows_of(tmp_path / "rows.csv")) == 9


@pytest.mark.parametrize("command", [["distill", "--student", "titn"], ["teacher", "vgg16"], ["label"], ["doctor"]])
def test_a_device_without_float64_is_no_choice_where_views_are_made(tmp_path: Path, command: list[str]) -> None:
    Project.create(tmp_path)
    told = run(tmp_path, *command, "--device", "mps", code=2)
    assert "--device mps: Apple's GPUs have no float64" in told.err + told.out
    assert "mps" not in run(tmp_path, *command[:1], "--help").out
