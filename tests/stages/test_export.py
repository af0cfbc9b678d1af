"""`pipeline export` and `pipeline.load`: what is written, what is refused, and what comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageOps
from ruamel.yaml import YAML

import pipeline
import titn
from pipeline.data.datasets import Dataset
from pipeline.data.images import read_image
from pipeline.errors import DataError, NumericalError, StorageError, UsageError
from pipeline.inference import exporting
from pipeline.inference.card import FILES, model_card
from pipeline.inference.classifier import Classifier, PixelsToOutputs, Transform
from pipeline.losses import probabilities
from pipeline.models import TEACHERS
from pipeline.models.network import Network
from pipeline.models.students import STUDENTS, build_student
from pipeline.models.teachers import build_teacher
from pipeline.training.checkpoints import load_checkpoint, save_checkpoint
from pipeline.views.views import normalize
from stages.export import _write, check_out, from_folder
from stages.shared.runs import RULES
from tests.support.in_process import invoke as run
from tests.support.killing import full_at_each_call, killed_at_each_call
from tests.support.project import ROOT, Project

STUDENT = "data/runs/smoke/titn-labels-none-epochs-1"
FORMATS = ("safetensors", "onnx", "onnx-int8", "torchscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a trained student, exported in every format. Tests that change anything copy it."""
    project = Project.create(tmp_path_factory.mktemp("exported"), alone=True)
    run(project, "prepare")
    run(project, "distill", "--student", "titn", "--labels", "none", "--set", "epochs=1")
    formats = ("--format", "onnx", "--format", "torchscript", "--format", "safetensors", "--int8")
    out = run(project, "export", STUDENT, *formats, "--out", "exported")
    assert "batches of 1, 2, 5, 64" in out and "top-1" in out
    return project


@pytest.fixture
def project(exported: Project, tmp_path: Path) -> Project:
    shutil.copytree(exported.path, tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.fixture(scope="module")
def images(exported: Project) -> torch.Tensor:
    """The test images, `(N, 3, H, W)` uint8."""
    split = Dataset.load(exported.data / "prepared/dataset.json").test
    return torch.from_numpy(np.ascontiguousarray(split.images[:])).permute(0, 3, 1, 2)


def config(project: Project) -> dict[str, Any]:
    exported_config: dict[str, Any] = json.loads((project.path / "exported/config.json").read_text())
    return exported_config


def rewrite(project: Project, **changes: Any) -> None:
    content = {key: value for key, value in config(project).items() if key != "seal"}
    (project.path / "exported/config.json").write_text(json.dumps({**content, **changes}))


def load(project: Project, format: str | None = None) -> Classifier:
    return pipeline.load(project.path / "exported", format=format)[0]


def classifier_of(model: torch.nn.Module, num_classes: int, mean: list[float], std: list[float]) -> Classifier:
    runner = PixelsToOutputs(Network(model, mean, std)).eval()
    return Classifier(runner=runner, class_names=tuple(map(str, range(num_classes))), image_size=32)


def loaded(classifier: Classifier, content: bytes, format: str) -> Classifier:
    cpu = torch.device("cpu")
    runner = exporting.run_torchscript(content, cpu) if format == "torchscript" else exporting.run_onnx(content)
    return dataclasses.replace(classifier, runner=runner, format=format)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_named_with_its_size_and_digest(exported: Project) -> None:
    folder = exported.path / "exported"
    entries = config(exported)["files"]
    assert set(entries) == set(FORMATS)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        *(FILES[name] for name in FORMATS),
    }
    for entry in entries.values():
        content = (folder / entry["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert entries["onnx-int8"]["bytes"] < entries["onnx"]["bytes"] / 2


def test_the_rules_by_which_it_was_judged_go_with_the_model(exported: Project) -> None:
    files = [exported.path / STUDENT / name for name in ("best.json", "last.json", "metrics.json")]
    described = [json.loads(file.read_text()) for file in files]
    assert [(content["rules"], content["evaluated_on"]) for content in described] == [(RULES, "val")] * 3
    assert (config(exported)["rules"], RULES) == (2, 2)


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_whatever_is_loaded_answers_as_the_training_did(
    exported: Project, images: torch.Tensor, format: str | None
) -> None:
    trained, _ = pipeline.load(exported.path / STUDENT)
    with torch.inference_mode():
        outputs = trained.module(normalize(images[:7], trained.config["mean"], trained.config["std"]))
    classifier = load(exported, format)
    assert classifier.format == (format or "safetensors") and classifier.class_names == tuple("0123456789")
    tolerance = 0.05 if format == "onnx-int8" else 1e-4
    torch.testing.assert_close(classifier(images[:7]), probabilities(outputs), atol=tolerance, rtol=0)
    if format != "onnx-int8":
        named = classifier.outputs(images[:7])
        torch.testing.assert_close(named["class_logits"], outputs[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(named["distillation_logits"], outputs[1], atol=1e-3, rtol=0)
        torch.testing.assert_close(classifier(images[:1]), classifier(images[:3])[:1], atol=1e-6, rtol=0)


def test_a_checkpoint_is_loaded_from_where_a_stage_left_it(exported: Project, images: torch.Tensor) -> None:
    for path in (exported.path / STUDENT, exported.path / STUDENT / "best.safetensors"):
        model, transform = pipeline.load(path)
        assert model.format == "checkpoint" and transform.image_size == 32
        torch.testing.assert_close(model(images[:3]), load(exported)(images[:3]))


def test_an_onnx_file_stands_alone(exported: Project, images: torch.Tensor) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession((exported.path / "exported/model.onnx").read_bytes())
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert isinstance(entry.shape[0], str)
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list("0123456789")
    for size in (1, 3, 11):
        rows, *_ = session.run(["probabilities"], {"images": images[:size].numpy()})
        np.testing.assert_allclose(rows.sum(axis=1), np.ones(size), atol=1e-5)


def test_no_file_tells_where_it_was_made(exported: Project) -> None:
    folder = exported.path / "exported"
    with zipfile.ZipFile(folder / "model.torchscript") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    for content in [*contents, *snapshot(folder).values()]:
        assert str(ROOT).encode() not in content and sys.prefix.encode() not in content


def test_int8_is_measured_beside_float(exported: Project, images: torch.Tensor) -> None:
    labels = torch.from_numpy(Dataset.load(exported.data / "prepared/dataset.json").test.labels)
    entries = config(exported)["files"]
    for format in ("onnx", "onnx-int8"):
        # In batches as the command takes them: int8 scales activations by the batch.
        predicted = torch.cat([load(exported, format)(batch).argmax(dim=1) for batch in images.split(64)])
        top1 = 100 * float((predicted == labels).double().mean())
        assert entries[format]["top1"] == pytest.approx(top1) and entries[format]["top1_images"] == len(labels)


def test_weights_in_bf16_are_half_the_size_and_measured(project: Project, images: torch.Tensor) -> None:
    bf16 = ("export", STUDENT, "--format", "safetensors", "--dtype", "bf16")
    out = run(project, *bf16, "--out", "small")
    folder = project.path / "small"
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.bf16.safetensors"}
    described = json.loads((folder / "config.json").read_text())
    (entry,) = described["files"].values()
    assert entry["dtype"] == "bfloat16"
    assert entry["bytes"] < 0.6 * (project.path / "exported/model.safetensors").stat().st_size
    exact = load_checkpoint(project.path / STUDENT).tensors
    stored = safetensors.torch.load_file(folder / "model.bf16.safetensors")
    assert stored.keys() == exact.keys()
    assert all(tensor.equal(exact[name].bfloat16()) for name, tensor in stored.items())
    model, _ = pipeline.load(folder)
    assert model.format == "safetensors-bf16"
    torch.testing.assert_close(model(images[:9]), load(project)(images[:9]), atol=0.02, rtol=0)
    labels = torch.from_numpy(Dataset.load(project.data / "prepared/dataset.json").test.labels)
    for key, classifier in (("top1", model), ("top1_of_checkpoint", load(project))):
        top1 = 100 * float((classifier(images).argmax(dim=1) == labels).double().mean())
        assert entry[key] == pytest.approx(top1) and f"{top1:.2f} %" in out
    card = (folder / "README.md").read_text()
    assert "bfloat16" in card and f"reach {entry['top1_of_checkpoint']:.2f} %" in card
    test = json.loads(run(project, "evaluate", "small/model.bf16.safetensors", "--recipe", "smoke", "--json"))
    assert test["top1"] == pytest.approx(entry["top1"])
    (row,) = json.loads(run(project, "bench", "small", "--batch-sizes", "1", "--rounds", "1", "--json"))["models"]
    assert (row["format"], row["precision"], row["top1"]) == ("safetensors-bf16", "fp32", None)
    Image.new("L", (9, 9), 200).save(project.path / "grey.png")
    assert "grey.png" in run(project, "predict", "small", "grey.png")


def test_bf16_is_refused_where_it_cannot_be_measured_or_is_too_far_off(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = ("export", STUDENT, "--format", "safetensors", "--dtype", "bf16", "--out", "new")
    Image.new("L", (9, 9), 200).save(project.path / "grey.png")
    assert "; --int8 and --dtype bf16 are measured on labelled images" in run(project, *bf16, "--data", ".", code=3)
    monkeypatch.setattr(exporting, "BF16_TOLERANCE", 1e-9)
    assert "model.bf16.safetensors" in run(project, *bf16, code=5)
    assert not (project.path / "new").exists()


def test_the_papers_titn_in_bf16_takes_less_than_12_mb() -> None:
    with torch.device("meta"):
        model = build_student("titn", num_classes=100)
    classifier = classifier_of(model.to_empty(device="cpu"), 100, [0.5] * 3, [0.25] * 3)
    assert len(exporting.to_safetensors(classifier, torch.bfloat16)) < 12e6


def test_the_card_is_what_hubs_read_and_says_what_was_measured(exported: Project) -> None:
    card = (exported.path / "exported/README.md").read_text()
    _, front, text = card.split("---\n", 2)
    fields = YAML(typ="safe", pure=True).load(front)
    assert fields["library_name"] == "titn-pipeline" and fields["pipeline_tag"] == "image-classification"
    assert fields["license"] == "unknown" and "onnx" in fields["tags"]
    (entry,) = fields["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "titn-smoke" and result["task"]["type"] == "image-classification"
    metrics = json.loads((exported.path / STUDENT / "metrics.json").read_text())
    by_name = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert result["dataset"]["split"] == "test"
    assert by_name["Top-1 accuracy"] == pytest.approx(metrics["test"]["top1"] / 100, abs=1e-6)
    assert {metric["type"] for metric in result["metrics"]} <= set(fields["metrics"])
    for words in ("handwritten digits", "2502.16762", f"{metrics['test']['top1']:.2f} %", "## Limits", "pipeline.load"):
        assert words in text


def test_the_readmes_example_runs(exported: Project, tmp_path: Path) -> None:
    code = re.findall(r"`(model.*?)`", (ROOT / "README.md").read_text())
    assert [example.partition("(")[0] for example in code] == ["model, transform = titn.load", "model.predict"]
    shutil.copytree(exported.path / "exported", tmp_path / "data/digits/students/titn")
    Image.new("LA", (50, 20), (90, 128)).save(tmp_path / "image.png")
    names: dict[str, Any] = {"titn": titn}
    with contextlib.chdir(tmp_path):
        exec(code[0], names)
        prediction = eval(code[1], names)
    assert prediction.class_name in "0123456789" and 0.1 <= prediction.probability <= 1


def test_the_cards_examples_run_and_name_the_class(
    exported: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(exported.path / "exported", tmp_path / "exported")
    Image.new("RGB", (50, 20), "teal").save(tmp_path / "exported/image.png")
    examples = re.findall(r"```python\n(.*?)```", (tmp_path / "exported/README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    answers = []
    with contextlib.chdir(tmp_path / "exported"):
        for example in examples:
            names: dict[str, Any] = {}
            exec(example, names)
            answers.append(np.asarray(names["probabilities"]).ravel())
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-4)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in said] == [config(exported)["class_names"][answers[0].argmax()]] * 2
    assert [float(value) for _, value in said] == pytest.approx([answers[0].max()] * 2, abs=1e-4)


def test_a_folders_classes_are_known_in_either_unicode_form_and_thumbnails_are_passed_over(tmp_path: Path) -> None:
    for name in ("caf\u00e9/1.png", "dog/2.tif", "dog/@eaDir/2.tif/thumb.jpg", ".hidden/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    classifier: Any = SimpleNamespace(class_names=("dog", "cafe\u0301"), image_size=4, resize="squeeze")
    labels = from_folder(tmp_path, classifier, labelled=True).labels
    assert labels is not None and labels.tolist() == [1, 0]


def test_labelled_images_are_those_that_evaluate_takes(tmp_path: Path) -> None:
    for name in ("train/dog/1.png", "test/dog/2.png", "test/dog/3.png", "elsewhere/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "test/cat").symlink_to(tmp_path / "elsewhere")
    classifier: Any = SimpleNamespace(class_names=("cat", "dog"), image_size=4, resize="squeeze")
    labels = from_folder(tmp_path, classifier, labelled=True).labels
    assert labels is not None and sorted(labels.tolist()) == [0, 1, 1]
    assert len(from_folder(tmp_path / "test", classifier, labelled=False).images) == 3


def test_a_transform_prepares_images_as_prepare_does(exported: Project, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(file)
    _, transform = pipeline.load(exported.path / "exported")
    expected = torch.from_numpy(read_image(file, 32)).permute(2, 0, 1)
    assert transform(file).equal(expected) and transform(str(file)).equal(expected)
    assert transform(Image.open(file)).equal(expected)
    file.write_bytes(b"no image")
    with pytest.raises(DataError, match="image.png"):
        transform(file)


def test_a_model_of_cropped_images_crops_them_and_its_card_says_so_in_code_and_words(
    exported: Project, tmp_path: Path
) -> None:
    project, file = Project(tmp_path / "project"), tmp_path / "image.jpg"
    shutil.copytree(exported.path, project.path)
    exif = Image.Exif()
    exif[0x0112] = 6
    colours = np.random.default_rng(0).integers(0, 256, (50, 81, 3), np.uint8)
    Image.fromarray(colours).save(file, exif=exif)
    told = config(project)
    assert (told["resize"], told["exif"], told["decoders"]) == ("squeeze", "upright", None)
    rewrite(project, resize="crop", decoders={"pillow": "13.0.0", "libjpeg": "turbo-3.2.0"})
    classifier = load(project)
    expected = read_image(file, 32, resize="crop")
    assert classifier.transform(file).permute(1, 2, 0).equal(torch.from_numpy(expected))
    card = model_card(config(project))
    names = {"Image": Image, "ImageOps": ImageOps}
    start, end = card.index("image = ImageOps"), card.index("batch = np")
    with contextlib.chdir(tmp_path):
        exec(card[start:end].replace("image.png", "image.jpg"), names)
    assert np.array_equal(np.asarray(names["image"]), expected)
    assert "shorter side has 36 pixels" in card and "pillow 13.0.0, libjpeg turbo-3.2.0" in card
    rewrite(project, resize="stretch")
    with pytest.raises(DataError, match="resize missing or impossible"):
        load(project)


@pytest.mark.parametrize("resize", ["squeeze", "crop"])
def test_the_cards_example_without_pytorch_reads_odd_images_as_the_transform_does(
    exported: Project, tmp_path: Path, resize: str
) -> None:
    card, transform = model_card({**config(exported), "resize": resize}), Transform(32, resize)
    start, end = card.index("image = ImageOps"), card.index("probabilities = session")
    draws = np.random.default_rng(0)
    glass = Image.fromarray(draws.integers(0, 256, (40, 60, 4), np.uint8))
    unused = Image.fromarray(draws.integers(0, 256, (40, 60, 3), np.uint8))
    unused.putalpha(0)
    palette = glass.convert("RGB").quantize(8)
    palette.info["transparency"] = 3
    deep = Image.fromarray(draws.integers(0, 2**16, (40, 60), np.uint16))
    for image in (glass, glass.convert("LA"), unused, palette, deep, deep.convert("L")):
        image.save(tmp_path / "image.png")
        names: dict[str, Any] = {"Image": Image, "ImageOps": ImageOps, "np": np}
        with contextlib.chdir(tmp_path):
            exec(card[start:end], names)
        expected = transform(tmp_path / "image.png").numpy()
        np.testing.assert_array_equal(names["batch"], expected[None], err_msg=image.mode)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 32, 32), torch.zeros(0, 3, 32, 32), torch.zeros(1, 3, 32, 31)])
def test_wrong_images_are_refused_with_what_is_needed(exported: Project, wrong: torch.Tensor) -> None:
    for images in (wrong.byte(), torch.zeros(1, 3, 32, 32)):
        with pytest.raises(UsageError, match=r"\(B, 3, 32, 32\)"):
            load(exported)(images)


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_bit_is_found(project: Project, format: str) -> None:
    file = project.path / "exported" / FILES[format]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256"):
        load(project, format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_is_another_kind_is_refused_though_its_digest_fits(project: Project, format: str) -> None:
    content = pickle.dumps({"weights": 1})
    (project.path / "exported" / FILES[format]).write_bytes(content)
    entries = config(project)["files"]
    entries[format]["sha256"] = hashlib.sha256(content).hexdigest()
    rewrite(project, files=entries)
    with pytest.raises(DataError):
        load(project, format)


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_a_file_of_other_classes_is_refused(project: Project, images: torch.Tensor, format: str) -> None:
    arguments = {**config(project)["arguments"], "num_classes": 3}
    rewrite(project, class_names=["a", "b", "c"], arguments=arguments)
    with pytest.raises(DataError, match="outputs"):
        load(project, format)(images[:2])


def test_torchscript_is_loaded_only_by_name(project: Project) -> None:
    entries = config(project)["files"]
    rewrite(project, files={"torchscript": entries["torchscript"]})
    with pytest.raises(UsageError, match="program"):
        load(project)
    with pytest.raises(UsageError, match="torchscript"):
        load(project, "onnx")
    assert load(project, "torchscript").format == "torchscript"
    file, image = "exported/model.torchscript", project.path / "grey.png"
    with pytest.raises(UsageError, match=r"model.torchscript is a TorchScript archive, a program .* format='torch"):
        pipeline.load(project.path / file)
    assert pipeline.load(project.path / file, format="torchscript")[0].format == "torchscript"
    Image.new("L", (9, 9), 200).save(image)
    for command in (("predict", file, str(image)), ("bench", file, "--batch-sizes", "1", "--rounds", "1")):
        run(project, *command)
        run(project, command[0], "exported", *command[2:], code=2)
    run(project, "evaluate", file)


def test_a_file_is_not_loaded_as_another_format(exported: Project) -> None:
    folder = exported.path / "exported"
    for format, asked in (("torchscript", "safetensors"), ("onnx", "torchscript"), ("safetensors", "checkpoint")):
        with pytest.raises(UsageError, match=rf"format '{asked}': \S+ is of format '{format}'; give that, or name \S+"):
            pipeline.load(folder / FILES[format], format=asked)
    for format in ("safetensors", "onnx"):
        assert pipeline.load(folder / FILES[format])[0].format == format
        assert pipeline.load(folder / FILES[format], format=format)[0].format == format


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "other"},
        {"files": []},
        {"files": {}},
        {"files": {"safetensors": None}},
        {"class_names": ["a"]},
        {"image_size": 0},
        {"image_size": True},
        {"std": [0.0, 1.0, 1.0]},
        {"mean": [0.1, 0.2]},
        {"kind": "other"},
        {"model": 3},
        {"model": "resnet50"},
        {"arguments": {"num_classes": 10, "weights": "/etc/passwd"}},
        {"kind": "teacher", "model": "resnet50", "arguments": {"num_classes": 10, "weights": "imagenet"}},
        {"arguments": {"num_classes": 10, "depth": 10**9}},
        {"arguments": {"num_classes": 10, "width": 65535, "depth": 1}},
        {"arguments": {"num_classes": 10, "patch_size": 7}},
    ],
    ids=str,
)
def test_a_config_that_says_something_else_is_refused(project: Project, changes: dict[str, Any]) -> None:
    rewrite(project, **changes)
    with pytest.raises(DataError):
        load(project)


def test_what_is_no_model_is_refused(exported: Project, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model"):
        pipeline.load(tmp_path / "missing")
    with pytest.raises(DataError, match="no checkpoint"):
        pipeline.load(tmp_path)
    with pytest.raises(UsageError, match="no export"):
        pipeline.load(exported.path / STUDENT, format="onnx")
    with pytest.raises(UsageError, match="not available"):
        pipeline.load(exported.path / "exported", device="meta")


@pytest.mark.gpu
def test_a_model_answers_alike_on_a_gpu(exported: Project, images: torch.Tensor) -> None:
    for path, format in ((exported.path / STUDENT, None), (exported.path / "exported", "torchscript")):
        model, _ = pipeline.load(path, format=format, device="cuda")
        on_gpu = model(images[:7])
        assert on_gpu.device.type == "cuda"
        torch.testing.assert_close(on_gpu.cpu(), load(exported)(images[:7]), atol=1e-3, rtol=0)
    with pytest.raises(UsageError, match="ONNX files run on the CPU"):
        pipeline.load(exported.path / "exported", format="onnx", device="cuda")


def test_a_directory_of_other_files_is_left_alone(project: Project) -> None:
    (project.path / "mine").mkdir()
    (project.path / "mine/README.md").write_text("mine")
    before = snapshot(project.path)
    for out in ("mine", "params.yaml", STUDENT):
        assert "--out" in run(project, "export", STUDENT, "--format", "safetensors", "--out", out, code=2)
    assert snapshot(project.path) == before


def test_the_last_epochs_weights_are_told_as_those_of_a_run_that_nothing_chose(project: Project) -> None:
    source = project.path / STUDENT
    last, metrics = load_checkpoint(source / "last.safetensors"), json.loads((source / "metrics.json").read_text())
    scores = {**last.meta["scores"], "epoch": 3, "top1": 12.5}
    save_checkpoint(project.path / "run", "last", last.tensors, {**last.meta, "epoch": 3, "scores": scores})
    told = []
    for name, changes in (("its", {"last": scores, "epochs": 3}), ("other", {})):
        (project.path / "run/metrics.json").write_text(json.dumps({**metrics, **changes}))
        run(project, "export", "run/last.safetensors", "--format", "safetensors", "--out", name)
        described = json.loads((project.path / name / "config.json").read_text())
        assert (described["selected_on"], described["scores_split"], described["scores"]["top1"]) == (None, "val", 12.5)
        assert "epoch was chosen" not in (project.path / name / "README.md").read_text()
        told.append([described[key] for key in ("num_train", "num_test", "scores_precision")])
    assert told == [[metrics[key] for key in ("num_train", "num_test", "precision")], [None] * 3]
    run(project, "export", f"{STUDENT}/last.safetensors", "--format", "safetensors", "--out", "also")
    also = json.loads((project.path / "also/config.json").read_text())
    assert (also["selected_on"], also["scores_split"]) == (None, "test"), "it is the best epoch too"
    assert (config(project)["selected_on"], also["num_test"]) == ("val", metrics["num_test"])


def test_a_former_export_is_replaced_whole(project: Project) -> None:
    rewrite(project, files={})  # as a killed export leaves it
    with pytest.raises(DataError, match="did not end"):
        load(project)
    arguments = ("--format", "safetensors", "--out", "exported", "--license", "mit", "--json")
    shown = json.loads(run(project, "export", STUDENT, *arguments).partition("\n{")[2].join(("{", "")))
    assert shown == config(project) and shown["license"] == "mit"
    names = {path.name for path in (project.path / "exported").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    assert load(project).format == "safetensors"


def test_a_full_disk_leaves_the_former_export_and_a_kill_one_that_is_told_and_replaced(
    exported: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "exported", {"former": 0, "later": 0, "mixed": 0}

    def write(contents: dict[str, bytes]) -> None:
        entries = {name: {**config(exported)["files"][name], "sha256": digest(data)} for name, data in contents.items()}
        _write(out, contents, {**config(exported), "files": entries})

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def former() -> None:
        shutil.rmtree(out, ignore_errors=True)
        write({"onnx": b"former", "safetensors": b"former weights"})

    def check() -> None:
        check_out(out)
        there = {name: data for name, data in snapshot(out).items() if not name.startswith(".")}
        entries = json.loads(there["config.json"])["files"].values()
        is_whole = all(digest(there[entry["file"]]) == entry["sha256"] for entry in entries)
        seen["mixed" if not is_whole else "former" if len(entries) == 2 else "later"] += 1
        former()

    former()
    full_at_each_call(monkeypatch, lambda: write({"onnx": b"later"}), check, StorageError)
    # Open, write and flush model, card and config.json; then open and flush the folder twice.
    assert seen == {"former": 9, "mixed": 2, "later": 2}
    killed_at_each_call(monkeypatch, lambda: write({"onnx": b"later"}), check)
    assert seen["mixed"] < 8 < seen["later"] + seen["former"], "in the instant of the renames their digests tell"
    shutil.rmtree(out)
    killed_at_each_call(monkeypatch, lambda: write({"onnx": b"later"}), lambda: not out.exists() or check_out(out))


def test_nothing_is_written_where_outputs_differ(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    line = run(project, "export", STUDENT, "--format", "torchscript", "--out", "new", code=5)
    assert "model.torchscript" in line and "nothing was written" in line
    assert not (project.path / "new").exists()


def test_a_model_whose_outputs_are_not_finite_is_not_exported(project: Project) -> None:
    checkpoint = load_checkpoint(project.path / STUDENT)
    tensors = {name: tensor * 1e30 for name, tensor in checkpoint.tensors.items()}
    save_checkpoint(project.path / "huge", "best", tensors, checkpoint.meta)
    assert "not finite" in run(project, "export", "huge", "--format", "safetensors", "--out", "new", code=5)
    assert not (project.path / "new").exists()
    with pytest.raises(NumericalError):
        pipeline.load(project.path / "huge")[0](torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_compare_finds_a_difference_in_any_batch_size() -> None:
    reference = classifier_of(build_student("vit", num_classes=3, depth=1, width=24), 3, [0.5] * 3, [0.5] * 3)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    agreement = exporting.compare(reference.outputs, reference.outputs, images, (1, 3))
    assert dataclasses.astuple(agreement) == (0.0, 0.0, 4, (1, 3))

    def wrong_alone(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: value + 2e-4 * (len(batch) == 1) for name, value in reference.outputs(batch).items()}

    with pytest.raises(NumericalError, match="batch of 1"):
        exporting.compare(reference.outputs, wrong_alone, images, (3, 1))


def test_images_come_from_a_folder_where_there_is_no_data_set(project: Project) -> None:
    shutil.rmtree(project.data)
    arguments = ("export", STUDENT, "--format", "safetensors", "--out", "new")
    assert "--data" in run(project, *arguments, code=3)
    assert "no image in it" in run(project, *arguments, "--data", STUDENT, code=3)
    Image.new("L", (9, 9), 200).save(project.path / "grey.png")
    (project.path / "params.yaml").unlink()
    out = run(project, *arguments, "--data", ".")
    assert (
        "on 1 images" in out
        and load_checkpoint(project.path / STUDENT).sha256 in snapshot(project.path / "new")["config.json"].decode()
    )
    card = (project.path / "new/README.md").read_text()
    assert "recipe smoke" in card and "datasets:" not in card
    int8 = ("export", STUDENT, "--format", "onnx", "--int8", "--out", "new", "--data", ".")
    assert "; --int8 and --dtype bf16 are measured on labelled images" in run(project, *int8, code=3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--format", "safetensors", "--int8"), "only ONNX"),
        (("--format", "onnx", "--int8", "--dtype", "bf16"), "--dtype bf16 --int8: only a safetensors file"),
        (("--format", "safetensors", "--format", "onnx", "--dtype", "bf16"), "--dtype bf16 --format onnx: only"),
        (("--format", "torchscript", "--dtype", "bf16"), "--dtype bf16 --format torchscript: only"),
        (("--format", "safetensors", "--dtype", "fp16"), "fp16"),
        (("--format", "onnx", "--data", ".", "--recipe", "smoke"), "one of them"),
        (("--format", "onnx", "--license", "a b"), "--license"),
        (("--format", "onnx", "--data", "missing"), "no such folder"),
        (("--format", "pickle"), "pickle"),
        ((), "--format"),
    ],
)
def test_wrong_usage_is_one_line(exported: Project, arguments: tuple[str, ...], words: str) -> None:
    assert words in run(exported, "export", STUDENT, *arguments, "--out", "new", code=2)
    assert not (exported.path / "new").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(project: Project, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    line = run(project, "export", STUDENT, "--format", "onnx", "--out", "new", code=2)
    assert missing in line and "pip install 'titn-pipeline[onnx]'" in line
    assert not (project.path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STUDENTS, "titn-large-patch", *TEACHERS])
def test_every_model_is_the_same_in_every_format(name: str) -> None:
    torch.manual_seed(0)
    if name in TEACHERS:
        model = build_teacher(name, num_classes=10)
    else:
        large = {"patch_size": 16, "pixel_size": 4} if name == "titn-large-patch" else {}
        model = build_student(name.partition("-")[0], num_classes=10, **large)
    classifier = classifier_of(model, 10, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    images = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    content = exporting.to_onnx(classifier, {})
    exporting.compare(classifier.outputs, loaded(classifier, content, "onnx").outputs, images, (1, 2, 9))
    archive = exporting.to_torchscript(classifier)
    exporting.compare(classifier.outputs, loaded(classifier, archive, "torchscript").outputs, images, (1, 2, 9))
    if name == "squeezenet1_1":
        with pytest.raises(UsageError, match="only convolutions"):
            exporting.to_onnx_int8(content)
    elif len(content) < 100e6:  # VGG's 500 MB take minutes
        smaller = exporting.to_onnx_int8(content)
        assert len(smaller) < len(content)
        int8 = loaded(classifier, smaller, "onnx-int8")
        exporting.compare(classifier.outputs, int8.outputs, images, (1, 9), tolerance=float("inf"))
