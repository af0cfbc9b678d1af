"""`import titn`: both stages from Python, in a folder of their own."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import titn
from pipeline.config.params import load_params
from pipeline.errors import DataError, UsageError
from pipeline.models.own import code_sha256
from pipeline.report.progress import RunWatcher
from pipeline.system.stopping import StopSignal
from stages import python
from stages.shared.paths import PARAMS, PROJECT
from tests.support.in_process import invoke
from tests.support.project import Project, environment

COLOURS = {"blue": 2, "green": 1, "red": 0}
TINY: dict[str, Any] = {
    "teacher": "squeezenet1_1", "weights": "none", "teacher_epochs": 2, "epochs": 2, "device": "cpu",
    "settings": {
        "views": {"operations": {"autoaugment": "none", "mixing": "none"}},
        "teacher": {"batch_size": 8, "lr": 0.001, "precision": "fp32"},
        "label": {"precision": "fp32"},
        "student": {"batch_size": 8, "width": 48, "depth": 1, "precision": "fp32"},
    },
}  # fmt: skip


def coloured(count: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]:
    """Noisy images of three colours, `(N, 32, 32, 3)`, their labels and the class names."""
    draws, labels = np.random.default_rng(seed), np.arange(count) % 3
    images = draws.integers(0, 80, (count, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[..., list(COLOURS.values())[label]] += 150
    return images, labels, list(COLOURS)


class Trained:
    """A folder of images that has been distilled once.

    Attributes:
        folder: Holds `images` and the project `work`.
        model: The student.
        said: What was printed.
    """

    def __init__(self, folder: Path, capture: Callable[[], str]) -> None:
        self.folder = folder
        for number, (image, label) in enumerate(zip(*coloured(60)[:2], strict=True)):
            file = folder / "images" / list(COLOURS)[label] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
        self.model = self.distill()
        self.said = capture()

    def distill(self, **changes: Any) -> titn.TrainedModel:
        return titn.distill(self.folder / "images", **{**TINY, "folder": self.folder / "work", **changes})

    @property
    def image(self) -> Path:
        return self.folder / "images/green/1.png"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from contextlib import redirect_stdout
    from io import StringIO

    elsewhere, out = tmp_path_factory.mktemp("elsewhere"), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(elsewhere)
        made = Trained(tmp_path_factory.mktemp("python"), out.getvalue)
    assert not list(elsewhere.iterdir()), "all is in its folder"
    return made


def test_it_says_what_the_commands_say_and_returns_the_student_that_they_would_load(trained: Trained) -> None:
    model = trained.model
    for words in ("43 train, 5 val, 12 test images of 3 classes", "selected squeezenet1_1 by top1", "2 views of 43"):
        assert words in trained.said
    assert model.class_names == tuple(COLOURS) and model.folder == trained.folder / "work/data/folder/students/titn"
    assert model.scores == json.loads((model.folder / "metrics.json").read_text())["test"]
    assert f"titn, 3 classes, {model.scores['top1']:.2f} % of the test images" in repr(model)
    loaded, transform = titn.load(model.folder)
    images = transform(trained.image)[None]
    assert torch.equal(model(images), loaded(images)) and torch.equal(images[0], model.transform(trained.image))
    heads = model.module(torch.zeros(1, 3, 32, 32))
    assert len(heads) == 2 and heads[0].shape == (1, 3)


def test_images_of_every_kind_are_predicted_and_a_list_gives_a_list(trained: Trained) -> None:
    model, path = trained.model, trained.image
    with Image.open(path) as opened:
        pixels = np.asarray(opened)
    expected = model(model.transform(path)[None])[0]
    one = model.predict(path)
    assert one.class_name == model.class_names[int(expected.argmax())]
    assert one.probability == float(expected.max()) == next(iter(one.probabilities.values()))
    assert one.probabilities == dict(zip(model.class_names, expected.tolist(), strict=True))
    assert list(one.probabilities.values()) == sorted(one.probabilities.values(), reverse=True)
    content = path.read_bytes()
    buffers: list[Any] = [bytearray(content), memoryview(content)]
    assert [model.predict(kind) for kind in buffers] == [one] * 2
    kinds = [str(path), content, Image.fromarray(pixels), pixels]
    assert [model.predict(kind) for kind in kinds] == [one] * 4
    many = model.predict(kinds)
    assert [each.class_name for each in many] == [one.class_name] * 4
    assert [each.probability for each in many] == pytest.approx([one.probability] * 4, abs=1e-5)
    assert model.predict([]) == [] and model.predict((path,)) == [one]
    with pytest.raises(DataError, match=r"array \(1, 32, 32, 3\) uint8 is no image"):
        model.predict(pixels[None])


def test_many_images_are_answered_in_batches(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    images = list(coloured(7)[0])
    expected = trained.model.predict(images)
    monkeypatch.setattr(type(trained.model.classifier), "batch_size", 3)
    assert [one.class_name for one in trained.model.predict(images)] == [one.class_name for one in expected]


def test_a_second_call_trains_nothing_and_a_quiet_one_prints_nothing(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained.model.folder / "best.safetensors"
    before = file.stat().st_mtime_ns
    again = trained.distill()
    said = capsys.readouterr().out
    assert said.count("up to date") == 4 and "epoch" not in said
    assert file.stat().st_mtime_ns == before and again.scores == trained.model.scores
    trained.distill(quiet=True)
    assert capsys.readouterr() == ("", "")


def test_its_folder_is_a_project_for_the_commands(trained: Trained) -> None:
    work = Project(trained.folder / "work")
    for arguments in (("teacher", "squeezenet1_1"), ("label",), ("distill", "--student", "titn")):
        assert "up to date" in invoke(work, *arguments)


def test_labels_come_as_a_cache_and_distilling_goes_on_from_them(trained: Trained) -> None:
    asked = {key: value for key, value in TINY.items() if key not in ("epochs", "student")}
    cache = titn.label(trained.folder / "images", views=3, folder=trained.folder / "work", quiet=True, **asked)
    assert isinstance(cache, titn.LabelCache) and cache.labels.shape == (3, 43)
    assert cache.provenance["teacher"] == "squeezenet1_1"
    assert trained.distill(quiet=True).scores == trained.model.scores  # two of the views


def test_labels_are_those_of_the_view_recipe_that_the_settings_name(trained: Trained) -> None:
    asked = {key: value for key, value in TINY.items() if key not in ("epochs", "student")}
    asked["settings"] = {**asked["settings"], "student": {"views": "mixup"}}
    cache = titn.label(trained.folder / "images", views=1, folder=trained.folder / "work", quiet=True, **asked)
    assert cache.labels.shape == (1, 43)  # the default's have more
    assert trained.distill(quiet=True).scores == trained.model.scores  # and writes its own params.yaml again


def test_numpys_numbers_and_pytorchs_devices_are_taken(trained: Trained) -> None:
    tiny = TINY["settings"]["student"]
    changes = {"seed": np.int64(0), "epochs": np.int64(2), "views": np.uint8(2), "device": torch.device("cpu")}
    settings = {**TINY["settings"], "student": {**tiny, "width": np.int32(tiny["width"]), "lr": np.float64(0.1)}}
    assert trained.distill(**changes, settings=settings, quiet=True).scores == trained.model.scores
    assert type(python._checked_seed(np.uint8(7))) is int


def test_a_model_of_a_relative_folder_works_from_another_directory(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.folder)
    model = trained.distill(folder="work")
    assert str(trained.folder / "work") not in capsys.readouterr().out  # messages have it as it was given
    monkeypatch.chdir(tmp_path)
    assert model.folder == trained.model.folder and titn.load(model.folder)
    assert (model.export("exported", format="safetensors") / "README.md").is_file()


def test_the_commands_find_own_files_that_are_given_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def build(num_classes, image_size): ...\n")

    def written(model: str) -> str:
        python._open(
            tmp_path, model, "titn", epochs=1, teacher_epochs=1, weights="none", views=1, image_size=None,
            device="cpu", settings={}, folder=Path("work"), quiet=True,
        )  # fmt: skip
        (teacher,) = load_params(Path("work") / PARAMS).recipes["folder"].teachers.values()
        return teacher.model

    names = written(f"{tmp_path}/own.py:build"), written("own.py:build")
    monkeypatch.chdir("work")
    assert code_sha256(names[0]) is not None
    with pytest.raises(UsageError, match=r"no file own.py"):
        code_sha256(names[1])


def test_an_export_is_loaded_again(trained: Trained, tmp_path: Path) -> None:
    folder = trained.model.export(tmp_path / "exported", format="safetensors", license="mit")
    model, _ = titn.load(folder)
    assert model.predict(trained.image).class_name == trained.model.predict(trained.image).class_name
    assert "mit" in (folder / "README.md").read_text()
    with pytest.raises(UsageError, match="only ONNX files are quantised"):
        trained.model.export(tmp_path / "other", format="safetensors", int8=True)


def test_an_export_is_of_the_model_that_is_asked_for_it(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.distill(seed=2, quiet=True).folder, tmp_path / "run")
    model = dataclasses.replace(trained.model, folder=tmp_path / "run")
    with pytest.raises(DataError, match="run: holds another run by now; export a model before `distill` trains"):
        model.export(tmp_path / "exported", format="safetensors")
    assert not (tmp_path / "exported").exists()


def test_a_programs_own_random_numbers_are_the_same_after_training(trained: Trained) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trained.distill(seed=3, quiet=True)
    assert torch.equal(torch.rand(3), expected)


def test_files_that_cannot_be_read_are_left_out_on_demand(trained: Trained, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(trained.folder / "images", images)
    (images / "red/empty.png").touch()
    asked = {key: value for key, value in TINY.items() if key not in ("epochs", "student")}
    with pytest.raises(DataError, match=r"1 bad: red/empty.png .*; mend them or add skip_bad=True$"):
        titn.label(images, views=1, folder=tmp_path / "work", quiet=True, **asked)
    cache = titn.label(images, views=1, folder=tmp_path / "work", skip_bad=True, quiet=True, **asked)
    assert cache.labels.shape == (1, 43)


def test_what_a_command_advises_is_said_in_words_of_python() -> None:
    with pytest.raises(DataError) as error, python._in_python():
        raise DataError("lower recipes.folder.teacher.lr, or run `pipeline prepare --skip-bad`, or add --skip-bad")
    assert str(error.value) == (
        "lower teacher.lr of settings, or run `pipeline prepare --skip-bad`, or add skip_bad=True"
    )


def test_ctrl_c_ends_after_the_step_and_the_next_call_goes_on(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started, former = RunWatcher.started, signal.getsignal(signal.SIGINT)

    def interrupted(watcher: RunWatcher, *arguments: Any) -> None:
        started(watcher, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="in epoch 1 of 2"):
        patch.setattr(RunWatcher, "started", interrupted)
        trained.distill(seed=1)
    assert signal.getsignal(signal.SIGINT) is former
    capsys.readouterr()
    model = trained.distill(seed=1)
    assert "going on from epoch 1, step 1" in capsys.readouterr().out
    assert model.folder.name == "titn-seed-1" and model.metrics["seed"] == 1


def test_another_thread_leaves_ctrl_c_alone() -> None:
    former, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with StopSignal().taking_ctrl_c():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [former]
    with StopSignal().taking_ctrl_c():
        assert signal.getsignal(signal.SIGINT) is not former


def test_arrays_and_data_sets_are_prepared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = coloured(30)

    def prepare(data: Any) -> titn.Dataset:
        context = python._open(
            data, "resnet50", "titn", epochs=1, teacher_epochs=1, weights="none", views=1, image_size=None,
            device="cpu", settings={}, folder=tmp_path, quiet=False,
        )  # fmt: skip
        python._prepare(context, data)
        return context.dataset()

    dataset = prepare(arrays)
    assert "21 train, 3 val, 6 test images" in capsys.readouterr().out
    same = titn.Dataset.from_arrays(*arrays, val_fraction=0.1, test_fraction=0.2)
    assert dataset.sha256 == same.sha256
    for again in (arrays, same):
        assert prepare(again).sha256 == dataset.sha256 and "up to date" in capsys.readouterr().out
    other = prepare(coloured(30, seed=1))
    assert other.sha256 != dataset.sha256 and "another data set than before" in capsys.readouterr().out


def test_the_rule_by_which_images_became_squares_is_that_of_the_data(tmp_path: Path) -> None:
    def taken(data: Any, name: str, **settings: Any) -> titn.Dataset:
        context = python._open(
            data, "resnet50", "titn", epochs=1, teacher_epochs=1, weights="none", views=1, image_size=None,
            device="cpu", settings={"dataset": settings}, folder=tmp_path / name, quiet=True,
        )  # fmt: skip
        python._prepare(context, data)
        kept = titn.Dataset.load(context.paths.dataset)
        assert context.dataset().resize == kept.resize == context.recipe.dataset.resize
        return kept

    arrays = coloured(30)
    cropped = titn.Dataset.from_arrays(*arrays, resize="crop")
    assert taken(arrays, "arrays").resize == "squeeze"
    assert taken(arrays, "cropped arrays", resize="crop").resize == "crop"
    assert taken(cropped, "set").resize == taken(cropped, "set", resize="crop").resize == "crop"
    with pytest.raises(UsageError) as error:
        taken(cropped, "other", resize="squeeze")
    assert str(error.value) == (
        "settings: dataset.resize: 'squeeze': the Dataset's images become squares by 'crop'; "
        "leave it out, or make the Dataset by Dataset.from_arrays(..., resize='squeeze')"
    )
    unnamed = titn.Dataset.from_arrays(*arrays)  # as pixels of a former version, which may have been cropped
    assert taken(unnamed, "unnamed").resize == "squeeze"
    for name in ("unnamed", "unnamed as crop"):
        assert taken(unnamed, name, resize="crop").resize == "crop"
    with pytest.raises(UsageError, match=r"^settings: dataset.resize: 'stretch'"):
        taken(unnamed, "other", resize="stretch")
    for number, image in enumerate(arrays[0]):
        file = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    files = taken(tmp_path / "images", "files", store="encoded", resize="crop")
    assert taken(files, "files again").resize == "crop"
    squeezed = taken(tmp_path / "images", "squeezed files", store="encoded")
    with pytest.raises(UsageError, match=r"settings: dataset.resize: 'crop': .* by 'squeeze'; leave it out$"):
        taken(squeezed, "other", store="encoded", resize="crop")


def test_the_defaults_are_the_recipes() -> None:
    recipe = load_params(PROJECT / PARAMS).recipes["folder"]
    defaults = {name: one.default for name, one in inspect.signature(titn.distill).parameters.items()}
    student, teacher = recipe.students[defaults["student"]], recipe.teachers[defaults["teacher"]]
    assert (defaults["epochs"], defaults["teacher_epochs"]) == (student.epochs, teacher.epochs)
    assert defaults["weights"] == teacher.weights
    made = python._tree("resnet50", "titn", 100, 30, "imagenet", 100, {})["recipes"]["folder"]
    assert all(made[section] == shared for section, shared in packaged().items())


def packaged() -> dict[str, Any]:
    from pipeline.config.params import load_yaml

    recipe = load_yaml((PROJECT / PARAMS).read_text(), "params.yaml")["recipes"]["folder"]
    return {section: recipe[section] for section in ("dataset", "views", "teacher", "select", "label", "student")}


def test_few_epochs_warm_up_for_a_tenth_and_other_fields_are_merged() -> None:
    settings = {"views": {"seed": 7, "operations": {"flip": False}}, "student": {"lr": 0.05}}
    tree = python._tree("torchvision/convnext_tiny", "titn-mixup", 4, 2, "none", 9, settings)
    recipe = tree["recipes"]["folder"]
    assert (recipe["student"]["warmup_epochs"], recipe["teacher"]["warmup_epochs"]) == (0.4, 0.2)
    assert recipe["student"]["lr"] == 0.05 and recipe["views"]["default"]["seed"] == 7
    crop = packaged()["views"]["default"]["operations"]
    assert recipe["views"]["default"]["operations"] == {**crop, "flip": False}
    assert recipe["teachers"] == {"convnext_tiny": {"model": "torchvision/convnext_tiny"}}
    assert tree["view_recipes"] == ["mixup"] and recipe["views"]["mixup"]["count"] == 9


@pytest.mark.parametrize(
    ("model", "name"),
    [("timm/vit_small_patch16_224.augreg_in21k", "vit_small_patch16_224-augreg_in21k"),
     ("models/My Teacher.py:build", "my-teacher-build"), ("vgg16", "vgg16"), ("/", "model")],
)  # fmt: skip
def test_a_model_has_a_name(model: str, name: str) -> None:
    assert python._name_of(model) == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "missing"}, "data='missing': no such folder"),
        ({"data": ""}, "data: an empty path"),
        ({"data": 7}, "data: a int"),
        ({"data": ([1], [2])}, "data: a tuple must hold images"),
        *(
            (
                {"data": titn.Dataset.from_arrays(*coloured(30)), "settings": {"dataset": {key: value}}},
                f"settings: dataset.{key}: {value}: the Dataset has its splits; leave it out",
            )
            for key, value in {"val_fraction": 0.3, "test_fraction": 0.3, "split_seed": 5}.items()
        ),
        *(
            ({"seed": seed}, f"seed={seed!r}: write a whole number from 0 to 2147483647")
            for seed in (1.5, "0", -1, True, 2**40)
        ),
        ({"data": coloured(6), "image_size": 64}, "image_size=64: the images have 32 pixels"),
        ({"image_size": 28}, "patch_size 8 does not divide image_size 28"),
        ({"epochs": 0}, "epochs: 0 is out of range"),
        ({"epochs": 1.5}, "epochs: 1.5 is not an integer"),
        ({"views": 0}, "views: 0 is out of range"),
        ({"teacher_epochs": -1}, "teacher_epochs: -1 is out of range"),
        ({"image_size": 2}, "image_size: 2 is out of range"),
        ({"weights": 3}, "weights: 3 is not a text"),
        ({"student": "vit"}, "student='vit': student vit (vit) has no distillation head; choose from deit, titn"),
        ({"student": "tnn"}, "student: 'tnn' is no student"),
        ({"teacher": "vgg15"}, "teachers.vgg15: 'vgg15' is no teacher"),
        ({"settings": {"students": {}}}, "settings: 'students'"),
        ({"settings": {"student": {"epochs": 3}}}, "settings: student.epochs: give it as epochs="),
        ({"settings": {"student": {"depht": 3}}}, "settings: students.titn.depht: unknown key"),
        ({"device": "tpu"}, "device=tpu: not available here"),
        ({"teacher": None}, "teacher=None: write its model as a text"),
        ({"data": (np.zeros((6, 3, 32, 32), np.uint8), [0], ["a"])}, "data: images are uint8 of shape (6, 3, 32, 32)"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    data = changes.pop("data", tmp_path)
    with pytest.raises(UsageError) as error:
        titn.distill(data, folder=tmp_path / "work", quiet=True, **changes)
    assert words in str(error.value) and "recipes." not in str(error.value)
    assert not (tmp_path / "work/data").exists()


def test_anothers_project_is_not_touched(tmp_path: Path) -> None:
    project = Project.create(tmp_path)
    before = (project.path / "params.yaml").read_bytes()
    with pytest.raises(UsageError, match=r"params.yaml of its own; name another folder"):
        titn.distill(tmp_path, folder=tmp_path)
    assert (project.path / "params.yaml").read_bytes() == before


def test_importing_it_is_quick_and_offers_what_it_names() -> None:
    program = """
import sys, titn
assert titn.__version__ and set(titn.__all__) <= set(dir(titn))
titn.distill, titn.label, titn.load
assert not {"torch", "torchvision", "h5py"} & set(sys.modules), "slow"
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
    assert all(getattr(titn, name).__doc__ for name in titn.__all__)
    with pytest.raises(AttributeError, match="'titn' has no attribute 'distil'"):
        titn.distil  # type: ignore[attr-defined]  # noqa: B018
