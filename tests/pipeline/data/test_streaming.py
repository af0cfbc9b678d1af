"""Images on the host give what images on the device give: views, losses, labels, scores; to the bit on the CPU."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.arrays import StoredFile, StoredImages
from pipeline.data.streaming import HostImages, in_batches, place_images
from pipeline.errors import Interrupted, StorageError
from pipeline.labels.replay import make_canaries
from pipeline.labels.teacher import label_view
from pipeline.system.runtime import AT_ONCE, RESIDENT_VARIABLE
from pipeline.system.stopping import StopSignal
from pipeline.system.storage import read_json
from pipeline.training.batches import EvaluationData
from pipeline.training.evaluation import evaluate
from pipeline.training.fit import FitResult
from pipeline.views.views import Views
from tests.pipeline.labels import test_teacher as test_labelling
from tests.pipeline.training import test_fit as test_training
from tests.pipeline.training.test_fit import Watcher, make_fit, small_model
from tests.pipeline.views.test_views import NUM_SAMPLES, RECIPES, make_views
from tests.support.commands import run
from tests.support.project import Project

CPU = torch.device("cpu")


def on_host(images: Tensor, device: torch.device = CPU, path: Path | None = None) -> HostImages:
    """The same images, as an array of (N, H, W, 3), or in a file."""
    array = images.permute(0, 2, 3, 1).contiguous().numpy()
    if path is None:
        return HostImages(array, device)
    path.write_bytes(b"something before them" + array.tobytes())
    with path.open("rb") as file:
        return HostImages(StoredImages(file.fileno(), array.shape, len(b"something before them")), device)


@pytest.mark.parametrize(
    "rows", [slice(None), slice(2, 9, 3), slice(None, None, -1), slice(8, 2, -2), slice(5, 2), slice(5, 2, 2)]
)
def test_a_slice_of_images_in_a_file_is_that_of_an_array(tmp_path: Path, rows: slice) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    images.tofile(tmp_path / "images")
    with (tmp_path / "images").open("rb") as file:
        stored = StoredImages(file.fileno(), images.shape)
    assert np.array_equal(stored[rows], images[rows])
    chosen = np.array([7, 1, 4, 5, 9, 0])
    assert np.array_equal(stored.select(chosen)[rows], images[chosen][rows])


def streamed(views: Views, **kwargs: Any) -> Views:
    return Views(on_host(views.images, **kwargs), views.labels, views.recipe, key=views.key)


def same(first: Any, second: Any) -> bool:
    """Whether two batches agree in every tensor."""
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(one is other is None or torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("in_file", [False, True])
def test_views_of_images_on_the_host_are_the_same(tmp_path: Path, name: str, in_file: bool) -> None:
    resident = make_views(RECIPES[name])
    host = streamed(resident, path=tmp_path / "images" if in_file else None)
    parts = list(torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(0)).split(7))
    for view in (2, 0):
        assert host.digest(view) == resident.digest(view)
        pairs = list(zip(host.batches(view, parts), resident.batches(view, parts), parts, strict=True))
        assert all(same(one, other) and same(one, resident.batch(view, part)) for one, other, part in pairs)
        assert torch.equal(torch.cat([one.indices for one, _, _ in pairs]), torch.cat(parts))
    assert make_canaries(host, 3) == make_canaries(resident, 3)


def test_a_view_of_images_on_the_host_is_never_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr("pipeline.views.augment.plan", lambda *_: lambda images: made.append(len(images)) or images)
    views = streamed(make_views(RECIPES["everything"]))
    views.prepare(0)
    assert made == []
    parts = list(torch.arange(NUM_SAMPLES).split(10))
    assert len(list(views.batches(0, parts))) == 3
    partners = views.drawn(0)["partner"]
    assert made == [len({*part.tolist(), *partners[part].tolist()}) for part in parts]


def test_no_batch_is_made_of_nothing() -> None:
    assert list(make_views(RECIPES["everything"]).batches(0, [])) == []
    assert list(streamed(make_views(RECIPES["everything"])).batches(0, [])) == []


def test_images_are_placed_on_the_device_up_to_the_limit_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8)
    placed = place_images(images, CPU, images.nbytes)
    assert isinstance(placed, Tensor) and np.array_equal(placed.permute(0, 2, 3, 1).numpy(), images)
    kept = place_images(images, CPU, images.nbytes - 1)
    assert isinstance(kept, HostImages) and kept.shape == tuple(placed.shape) and len(kept) == 9
    for batches in (list(in_batches(kept, 4)), list(in_batches(placed, 4))):
        assert [len(batch) for batch in batches] == [4, 4, 1] and torch.equal(torch.cat(batches), placed)


def train(directory: Path, *, stream: bool) -> tuple[FitResult, dict[str, Tensor]]:
    fit = make_fit(directory, model=small_model())
    if stream:
        fit.data = dataclasses.replace(fit.data, views=streamed(fit.data.views, path=directory.with_suffix(".raw")))
        fit.evaluation = dataclasses.replace(fit.evaluation, images=on_host(fit.evaluation.images))
    return fit.run(), fit.model.state_dict()


def test_a_run_on_streamed_images_has_the_same_losses_scores_and_weights(tmp_path: Path) -> None:
    (resident, expected), (result, weights) = (train(tmp_path / str(flag), stream=flag) for flag in (False, True))
    assert len(result.curve) == 4 and result.curve == resident.curve
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_scores_of_streamed_images_are_the_same_in_batches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data: EvaluationData = test_training.evaluation()
    host = dataclasses.replace(data, images=on_host(data.images))
    for size in (1, 7, 30):
        monkeypatch.setitem(AT_ONCE, "cpu", size)
        assert evaluate(small_model(), host) == evaluate(small_model(), data)


def test_labels_of_streamed_images_are_the_same() -> None:
    teacher, views = test_labelling.make_teacher(), test_labelling.make_views()
    host = streamed(views)
    for view in range(3):
        resident, kept = label_view(teacher, views, view, 2), label_view(teacher, host, view, 2)
        assert np.array_equal(resident.labels, kept.labels) and np.array_equal(resident.classes, kept.classes)
        assert np.array_equal(resident.probabilities, kept.probabilities)
    assert np.array_equal(teacher.label(host.images), teacher.label(views.images))


class Failing(HostImages):
    """Images whose file can't be read from the third batch on."""

    reads = 0

    def read(self, rows: Any, boxes: Any = None) -> Tensor:
        self.reads += 1
        if self.reads > 2:
            raise OSError("the disk is gone")
        return super().read(rows, boxes)


def test_an_error_of_the_reading_thread_ends_the_run(tmp_path: Path) -> None:
    watcher = Watcher()
    fit = make_fit(tmp_path / "run", watcher=watcher)
    views = streamed(fit.data.views)
    views.images = Failing(views.images._images, CPU)
    fit.data = dataclasses.replace(fit.data, views=views)
    with pytest.raises(OSError, match="the disk is gone"):
        fit.run()
    assert watcher.steps == 2
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_a_file_that_is_cut_while_it_streams_ends_the_run_with_an_error(tmp_path: Path) -> None:
    class Cutting(Watcher):
        def stepped(self) -> None:
            super().stepped()
            if self.steps == 6:
                os.truncate(tmp_path / "images", 100)

    watcher = Cutting()
    fit = make_fit(tmp_path / "run", watcher=watcher)
    fit.data = dataclasses.replace(fit.data, views=streamed(fit.data.views, path=tmp_path / "images"))
    with pytest.raises(StorageError, match="cut short or overwritten"):
        fit.run()
    assert watcher.steps in (6, 7), "one batch is read ahead"


def test_a_run_on_streamed_images_stops_and_goes_on(tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", stream=True)[0].curve
    stop = StopSignal()
    for part in ({"stop": stop, "watcher": Watcher(stop, stop_at=6)}, {}):
        fit = make_fit(tmp_path / "run", **part)
        fit.data = dataclasses.replace(fit.data, views=streamed(fit.data.views))
        if part:
            with pytest.raises(Interrupted):
                fit.run()
            assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    assert fit.run().curve == expected


@pytest.mark.slow
def test_commands_stream_beyond_the_limit_and_make_the_same_files(taught: Project, tmp_path: Path) -> None:
    outputs = []
    for limit in ("100000000", "1000"):
        project = Project(tmp_path / limit)
        shutil.copytree(taught.path, project.path)
        said = []
        for command in (("label",), ("distill", "--student", "vit", "--set", "epochs=1")):
            ended = run(project.path, *command, "--device", "cpu", **{RESIDENT_VARIABLE: limit})
            assert ended.code == 0, ended.err
            said.append("they stream from data/smoke/prepared to cpu" in ended.out)
        assert said == [limit == "1000"] * 2
        (student,) = (project.path / "data/runs/smoke").iterdir()
        weights, labels = (student / "best.safetensors").read_bytes(), project.data / "labels/default.h5"
        outputs.append((labels.read_bytes(), weights, read_json(student / "metrics.json")))
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_views_of_images_on_the_host_are_the_same_on_a_gpu(tmp_path: Path, name: str) -> None:
    resident = make_views(RECIPES[name], num_samples=3000)
    host = streamed(resident, device=torch.device("cuda"), path=tmp_path / "images")
    parts = list(torch.randperm(3000).split(700))
    for expected, batch in zip(resident.batches(1, parts), host.batches(1, parts), strict=True):
        assert batch.images.is_cuda and torch.equal(batch.images.cpu(), expected.images)
        assert torch.equal(batch.partner_labels.cpu(), expected.partner_labels)


def test_a_file_is_read_alike_where_there_is_no_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 4
    (tmp_path / "file").write_bytes(content)
    for name in ("pread", "preadv"):  # as on Windows
        monkeypatch.delattr(os, name)
    file, buffer = StoredFile.opened(tmp_path / "file", 1024), bytearray(30)
    file.read([(250, 10), (700, 20)], memoryview(buffer))
    assert bytes(buffer) == content[250:260] + content[700:720]
    assert file.part(1000, 24) == content[1000:]
    with pytest.raises(StorageError, match="cut short or overwritten"):
        file.part(1000, 25)
