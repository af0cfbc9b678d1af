"""Steps replayed from CUDA graphs against eager steps, and which of them a recipe and a device get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.recipes import FitRecipe, StudentRecipe
from pipeline.errors import Interrupted, UsageError
from pipeline.labels.source import TeacherAnswer
from pipeline.losses import training_loss
from pipeline.models.students import build_student, use_inner_block
from pipeline.system.runtime import Ranks
from pipeline.system.stopping import StopSignal
from pipeline.training.batches import EvaluationData, TrainingData
from pipeline.training.checkpoints import RunState
from pipeline.training.distributed import Group
from pipeline.training.execution import Execution
from pipeline.training.fit import Fit, FitResult, Session
from pipeline.views.views import Views
from tests.pipeline.training.test_fit import MEAN, NUM_CLASSES, STD, VIEW_RECIPE, Watcher, images_and_labels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def make_fit(
    directory: Path,
    *,
    captured: bool,
    inner_block: str = "plain",
    watcher: Watcher | None = None,
    stop: StopSignal | None = None,
    ema: float = 0.0,
    **settings: Any,
) -> Fit:
    """A tiny TITN's run on the GPU, with a batch of another size at the end of every epoch."""
    torch.manual_seed(0)
    model = build_student("titn", num_classes=NUM_CLASSES, image_size=8, patch_size=4, width=48, depth=2).to(CUDA)
    use_inner_block(model, inner_block, CUDA)
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
        execution=Execution(step="graph" if captured else "eager"),
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
@pytest.mark.parametrize("captured", [False, True])
def test_no_step_waits_for_the_gpu(tmp_path: Path, captured: bool) -> None:
    run = make_fit(tmp_path, captured=captured, batch_size=10, ema=0.9)
    assert run.average is not None
    for epoch in range(2):  # the second is past warming up and capturing
        batches = run.data.batches(epoch, [share.indices for share in run._shares(torch.arange(50))])
        run.step(next(batches))
        torch.cuda.set_sync_debug_mode("error" if epoch else "default")
        try:
            for step, batch in enumerate(batches):
                run.step(batch)
                run.average.update(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


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
