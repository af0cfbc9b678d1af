"""Steps replayed from CUDA graphs against eager steps, and which of them a recipe and a device get."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.recipes import FitRecipe, StudentRecipe
from pipeline.errors import Interrupted, UsageError
from pipeline.labels.source import TeacherAnswer
from pipeline.losses import training_loss
from pipeline.models.students import build_student, use_inner_block, use_outer_block
from pipeline.system.runtime import Ranks
from pipeline.system.stopping import StopSignal
from pipeline.training.batches import Batch, EvaluationData, TrainingData
from pipeline.training.checkpoints import RunState
from pipeline.training.distributed import Group
from pipeline.training.execution import Execution
from pipeline.training.fit import Fit, FitResult, Session
from pipeline.training.optimization import build_optimizer
from pipeline.training.step import CapturedStep
from pipeline.views.views import Views
from tests.pipeline.training.test_fit import MEAN, NUM_CLASSES, STD, VIEW_RECIPE, Watcher, images_and_labels
from tests.pipeline.training.test_fit import make_fit as make_cpu_fit

# Counted without a GPU, where a compiled pass stands for one launch forward and three backward; the aim is 420.
MOST_LAUNCHES = 620
# PyTorch's compiler looks at inputs' gradients.
COMPILES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def make_fit(
    directory: Path,
    *,
    captured: bool,
    inner_block: str = "plain",
    outer_block: str = "plain",
    precision: str = "fp32",
    depth: int = 2,
    watcher: Watcher | None = None,
    stop: StopSignal | None = None,
    ema: float = 0.0,
    drop_path: float = 0.0,
    **settings: Any,
) -> Fit:
    """A tiny TITN's run on the GPU, with a batch of another size at the end of every epoch."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "width": 48, "depth": depth}
    model = build_student("titn", num_classes=NUM_CLASSES, drop_path=drop_path, **sizes).to(CUDA)
    use_inner_block(model, inner_block, CUDA)
    use_outer_block(model, outer_block, CUDA)
    images, labels = (values.to(CUDA) for values in images_and_labels(50, seed=0))
    teacher_labels = (labels + 1) % NUM_CLASSES
    return Fit(
        model=model,
        data=TrainingData(
            Views(images, labels, VIEW_RECIPE), MEAN, STD, VIEW_RECIPE.count, lambda view, indices, _: answer(indices)
        ),
        evaluation=EvaluationData(images, labels, MEAN, STD, NUM_CLASSES, teacher_labels),
        objective=training_loss,
        recipe=FitRecipe(**{"epochs": 8, "batch_size": 16, "lr": 0.05, "clip": 1.0, "warmup_epochs": 1.0, **settings}),
        seed=3,
        ema=ema,
        execution=Execution(step="graph" if captured else "eager", precision=precision),
        session=Session(RunState(directory, "fingerprint"), watcher or Watcher(), stop or StopSignal()),
    )


def fit(directory: Path, **settings: Any) -> tuple[FitResult, dict[str, Tensor]]:
    """Train, and return the last weights too."""
    run = make_fit(directory, **settings)
    return run.run(), run.model.state_dict()


def answer(indices: Tensor) -> TeacherAnswer:
    """Labels that have nothing to do with the images."""
    return TeacherAnswer(indices % NUM_CLASSES)


@pytest.mark.gpu
@pytest.mark.parametrize("inner_block", ["plain", "fused"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_a_captured_run_is_the_eager_one(tmp_path: Path, optimizer: str, inner_block: str) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "lr": 0.002, "inner_block": inner_block, "ema": 0.5}
    eager, weights = fit(tmp_path / "eager", captured=False, **settings)
    captured, same = fit(tmp_path / "captured", captured=True, **settings)
    for row, expected in zip(captured.curve, eager.curve, strict=True):
        assert row["lr"] == expected["lr"]
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_run_that_is_over_leaves_no_cycle(tmp_path: Path) -> None:
    """Its graphs keep a GPU's memory as long as it is there, and Python looks for cycles late."""
    make_cpu_fit(tmp_path)  # the first optimiser of a process leaves frames behind
    gc.collect()
    gc.disable()
    try:
        run = dataclasses.replace(make_cpu_fit(tmp_path), execution=Execution(step="graph"))
        assert isinstance(run.step, CapturedStep)
        model = weakref.ref(run.model)
        del run
        assert model() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@COMPILES
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_a_captured_run_with_compiled_passes_is_the_eager_plain_one(
    tmp_path: Path, precision: str, tolerance: float
) -> None:
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 0.002, "precision": precision}
    eager, _ = fit(tmp_path / "eager", captured=False, **settings)
    captured, _ = fit(tmp_path / "captured", captured=True, outer_block="fused", **settings)
    losses = [row["train_loss"] for row in eager.curve]
    assert [row["train_loss"] for row in captured.curve] == pytest.approx(losses, abs=tolerance)


@pytest.mark.gpu
@COMPILES
def test_a_captured_step_of_titn_is_few_launches(tmp_path: Path) -> None:
    blocks = {"inner_block": "fused", "outer_block": "fused"}
    run = make_fit(tmp_path, captured=True, precision="bf16", depth=12, batch_size=10, optimizer="adamw", **blocks)
    *first, last = run.data.batches(0, [share.indices for share in run._shares(torch.arange(50))])
    for batch in first:  # warms up, and captures
        run.step(batch)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        run.step(last)
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = [name for name in on_gpu if not name.startswith("Mem")]
    assert run.execution.step == "graph" and 100 < len(launches) <= MOST_LAUNCHES, Counter(launches).most_common(40)


@pytest.mark.gpu
def test_a_captured_run_has_the_stochastic_depth_and_the_decay_of_the_eager_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 0.002, "drop_path": 0.5, "decay": "matrices"}
    eager, _ = fit(tmp_path / "eager", captured=False, **settings)
    captured, _ = fit(tmp_path / "captured", captured=True, **settings)
    losses = [row["train_loss"] for row in eager.curve]
    assert [row["train_loss"] for row in captured.curve] == pytest.approx(losses, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_captured_run_goes_on_after_a_stop(tmp_path: Path, ema: float) -> None:
    whole, weights = fit(tmp_path / "whole", captured=True, ema=ema)
    stop = StopSignal()
    with pytest.raises(Interrupted):
        fit(tmp_path / "cut", captured=True, stop=stop, watcher=Watcher(stop, 18), ema=ema)
    resumed, same = fit(tmp_path / "cut", captured=True, ema=ema)
    assert [row["train_loss"] for row in resumed.curve] == pytest.approx(
        [row["train_loss"] for row in whole.curve], abs=1e-5
    )
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_steps_are_captured_while_another_thread_pins_memory(tmp_path: Path) -> None:
    ended, watcher = threading.Event(), Watcher()

    def pin() -> None:
        size = 0
        while not ended.is_set():
            size += 4096  # memory that is not in PyTorch's cache is pinned anew
            torch.empty(size, dtype=torch.uint8).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        run = make_fit(tmp_path, captured=True, watcher=watcher)
        run.run()
    finally:
        ended.set()
        thread.join()
    assert run.execution.step == "graph" and not any("eager" in message for message in watcher.warnings)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_no_step_waits_for_the_gpu(tmp_path: Path, captured: bool) -> None:
    run = make_fit(tmp_path, captured=captured, batch_size=10, ema=0.9)
    assert run.average is not None
    for epoch in range(2):  # the second is past warming up and capturing
        batches = run.data.batches(epoch, [share.indices for share in run._shares(torch.arange(50))])
        run.step(next(batches))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is called a prototype
            torch.cuda.set_sync_debug_mode("error" if epoch else "default")
        try:
            for step, batch in enumerate(batches):
                run.step(batch)
                run.average.update(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Graphs:
    """Stands in for CUDA's graphs: notes how steps are captured, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fail: bool) -> None:
        self.modes: list[str] = []
        self.streams: list[str] = []
        self._fail = fail
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
        monkeypatch.setattr(torch.cuda, "set_stream", self.streams.append)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr("pipeline.training.step._another_stream", contextlib.nullcontext)
        # Optimisers whose steps may be captured need a GPU.
        eager = lambda model, recipe, captured: build_optimizer(model, recipe)  # noqa: E731
        monkeypatch.setattr("pipeline.training.fit.build_optimizer", eager)

    @contextlib.contextmanager
    def capture(self, graph: object, capture_error_mode: str = "global") -> Iterator[None]:
        self.modes.append(capture_error_mode)
        if self._fail:  # before the step, which while it is captured computes nothing
            try:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
            except RuntimeError as error:  # and then the capture cannot be ended
                raise RuntimeError("CUDA error: capture was invalidated") from error
        yield


def on_cpu(directory: Path, **settings: Any) -> Fit:
    """A small run whose steps are captured by a stand-in."""
    run = make_cpu_fit(directory, batch_size=16, epochs=2, **settings)
    return dataclasses.replace(run, execution=dataclasses.replace(run.execution, step="graph"))


def test_another_thread_may_pin_memory_while_a_step_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, results = Graphs(monkeypatch, fail=False), (torch.tensor(2.0), torch.tensor(True))
    step = CapturedStep(lambda _: results, CUDA, pytest.fail)
    batch = Batch(*torch.zeros(3, 4), images=torch.zeros(4, 3, 8, 8))
    assert [float(step(batch)[0]) for _ in range(6)] == [2.0] * 6
    assert graphs.modes == ["thread_local"], "captured once, after warming up"


def test_where_a_step_cannot_be_captured_it_is_eager_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    eager = make_cpu_fit(tmp_path / "eager", batch_size=16, epochs=2)
    expected, weights = eager.run(), eager.model.state_dict()
    graphs, watcher = Graphs(monkeypatch, fail=True), Watcher()
    torch.manual_seed(7)
    run = on_cpu(tmp_path / "graph", watcher=watcher)
    result = run.run()
    reason = "CUDA error: operation not permitted when stream is capturing"
    assert watcher.warnings == [f"steps are eager: they cannot be captured in a CUDA graph here ({reason})"]
    assert run.execution.step == "eager" and set(graphs.modes) == {"thread_local"}
    assert graphs.streams == ["before"] * len(graphs.modes)
    assert result.curve == expected.curve
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())


def test_a_graph_asked_for_by_name_is_refused_where_a_step_cannot_be_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Graphs(monkeypatch, fail=True)
    with pytest.raises(UsageError, match=r"step: graph: a step cannot be captured here \(CUDA error: .*; use auto or"):
        on_cpu(tmp_path, step="graph").run()


def test_a_graph_is_refused_where_there_is_none() -> None:
    recipe = FitRecipe(epochs=1, batch_size=8, lr=0.1, step="graph")
    with pytest.raises(UsageError, match="step: graph: there are no CUDA graphs on cpu; use auto or eager"):
        Execution.of(recipe, CPU)
    with pytest.raises(UsageError, match="there are no CUDA graphs with 2 processes"):
        Execution.of(recipe, CUDA, Group(Ranks(0, 2, 0)))


def test_the_device_decides_what_a_recipe_leaves_open() -> None:
    recipe = StudentRecipe(model="titn", epochs=1, batch_size=1024, lr=0.1, precision="fp32")
    on_cpu = Execution.of(recipe, CPU, inner_block="c++")
    assert (on_cpu.step, on_cpu.micro_batch) == ("eager", 128)
    assert on_cpu.describe(CPU, 1024).endswith("; fp32; inner block c++; batch 1024 in parts of 128")
    assert on_cpu.describe(CPU, 64).endswith("; batch 64")
    assert on_cpu.describe(CPU, 64, 0.9995).endswith("; batch 64; EMA 0.9995")
    on_gpu = Execution.of(recipe, CUDA)
    assert (on_gpu.step, on_gpu.micro_batch) == ("graph", None)
    several = Execution.of(recipe, CUDA, Group(Ranks(0, 2, 0)))
    assert several.step == "eager"
