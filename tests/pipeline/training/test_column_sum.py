"""VGG's first linear layer trained as its column sum, against the plain step in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.recipes import FitRecipe
from pipeline.errors import Interrupted
from pipeline.losses import training_loss
from pipeline.models.folding import fold
from pipeline.models.teachers import ResizedInput, repeated_pooling
from pipeline.system.stopping import StopSignal
from pipeline.training.batches import Batch
from pipeline.training.column_sum import ColumnSum, published
from pipeline.training.optimization import build_optimizer, learning_rate, set_learning_rate
from pipeline.training.step import train_step
from tests.pipeline.training.test_fit import NUM_CLASSES, SIZE, Watcher, make_fit
from tests.support.vgg import small_vgg

LAYER = "classifier.0.weight"
STEPS = 12
DECAYING = {"lr": 0.05, "weight_decay": 0.3, "warmup_epochs": 1.0, "clip": 0.5}


def teacher(dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    model = small_vgg(NUM_CLASSES, size=SIZE, dropout=dropout)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def summed(model: nn.Module, size: int = SIZE) -> nn.Module:
    repeated = repeated_pooling(model, size)
    assert repeated is not None
    repeated.see_once(ColumnSum(repeated.layer, repeated.copies))
    return model


def in_float64(outputs: Any, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch.labels)


def train(model: nn.Module, recipe: FitRecipe) -> list[float]:
    """Do a few steps in float64, and return the losses."""
    optimizer, losses = build_optimizer(model, recipe), []
    for step in range(STEPS):
        torch.manual_seed(step)
        labels = torch.randint(NUM_CLASSES, (8,))
        images = torch.randn(8, 3, SIZE, SIZE, dtype=torch.float64)
        batch = Batch(labels, labels, torch.ones(8), None, images=images)
        set_learning_rate(optimizer, learning_rate(recipe, step, STEPS // recipe.epochs))
        loss, _ = train_step(model, batch, in_float64, optimizer, clip=recipe.clip, precision="fp32")
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("sgd", 0.0), ("adamw", 0.8)])
def test_steps_of_the_sum_are_those_of_the_columns(optimizer: str, momentum: float, decay: str) -> None:
    recipe = FitRecipe(epochs=3, batch_size=8, optimizer=optimizer, momentum=momentum, decay=decay, **DECAYING)  # type: ignore[arg-type]
    plain = teacher().double()
    started = copy.deepcopy(plain.state_dict()[LAYER])
    light = summed(copy.deepcopy(plain))
    losses = train(plain, recipe)
    assert train(light, recipe) == pytest.approx(losses, rel=1e-6)
    expected, ours = plain.state_dict(), published(light)
    assert expected.keys() == ours.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    # What the columns differ by has decayed, by far more than this test's tolerance, and is no rounding.
    left = [columns.unflatten(1, (-1, 49)) for columns in (started, expected[LAYER])]
    left = [columns - columns.mean(2, keepdim=True) for columns in left]
    share = (left[1] / left[0]).median().item()
    assert 0.6 < share < 0.97 and (left[1] - share * left[0]).abs().max() < 1e-6
    assert share == pytest.approx(light.get_submodule("classifier.0").rest_weight.item(), abs=1e-9)


def test_clipping_sees_the_norm_of_all_columns() -> None:
    models = [teacher(dropout=0.0).double(), summed(teacher(dropout=0.0).double())]
    norms = []
    for model in models:
        images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        model(images.double()).square().sum().backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-12)


def test_a_checkpoint_is_loaded_into_the_layer_and_the_layer_into_a_sum() -> None:
    plain = teacher()
    light = summed(copy.deepcopy(plain))
    again = summed(teacher())
    before = plain.state_dict()
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    again.load_state_dict(published(light))
    plain.load_state_dict(published(again))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, before[name])
    images = torch.randn(4, 3, SIZE, SIZE)
    torch.testing.assert_close(light.eval()(images), plain.eval()(images))
    torch.testing.assert_close(fold(plain, SIZE)[0](images), plain(images))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(light(images).float(), plain(images).float(), rtol=0.05, atol=0.05)


def test_only_a_pooling_that_repeats_one_value_is_dropped() -> None:
    model = teacher()
    layer = model.get_submodule("classifier.0")
    for found in (repeated_pooling(model, SIZE), repeated_pooling(ResizedInput(model, SIZE), 4 * SIZE)):
        assert found is not None and (found.vgg, found.layer, found.copies) == (model, layer, 49)
    assert all(module.training for module in model.modules()) and model.features[1].num_batches_tracked == 0
    assert repeated_pooling(model, 2 * SIZE) is None, "the map is 2x2"
    assert repeated_pooling(nn.Sequential(model), SIZE) is None
    assert repeated_pooling(summed(model), SIZE) is None, "there is nothing left to drop"


def run(directory: Path, stop_at: int | None = None) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(7)
    stop = StopSignal()
    given: dict[str, Any] = {"watcher": Watcher(stop, stop_at), "stop": stop, "optimizer": "adamw", "weight_decay": 0.3}
    fit = make_fit(directory, model=summed(teacher()), lr=0.01, **given)
    try:
        best = fit.run().best
    except Interrupted:
        fit.session.state.wait()
        return {}, fit
    return {**fit.model.state_dict(), **{f"best.{name}": tensor for name, tensor in best.items()}}, fit


def test_a_run_that_was_stopped_ends_with_equal_weights(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    assert run(tmp_path / "cut", stop_at=6)[0] == {}
    state = tmp_path / "cut/state-b.json"
    assert '"column_sums"' in state.read_text(), "by which a state of the plain way is told from it"
    resumed, fit = run(tmp_path / "cut")
    assert fit.session.watcher.began == (1, 2)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert whole[f"best.{LAYER}"].shape == (16, 8 * 49)


def test_a_moving_average_of_the_sum_is_that_of_the_columns(tmp_path: Path) -> None:
    averages = []
    for model in (teacher(0.0), summed(teacher(0.0))):
        fit = make_fit(tmp_path, model=model, weight_decay=0.3, epochs=2, ema=0.9)
        fit.run()
        averages.append(published(model))
    for name, tensor in averages[0].items():
        torch.testing.assert_close(averages[1][name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16_bn", "vgg19"])
def test_a_teachers_checkpoint_is_torchvisions(name: str) -> None:
    import torchvision

    from pipeline.models.teachers import build_teacher

    light = summed(build_teacher(name, num_classes=10), 32)
    optimizer = build_optimizer(light, FitRecipe(epochs=1, batch_size=2, optimizer="adamw", lr=0.001))
    labels = torch.tensor([1, 2])
    batch = Batch(labels, labels, torch.ones(2), None, images=torch.randn(2, 3, 32, 32))
    train_step(light, batch, training_loss, optimizer, clip=1.0, precision="fp32")
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, num_classes=10)
    theirs.load_state_dict(published(light), assign=True)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(theirs.eval()(images), light.eval()(images), rtol=1e-4, atol=1e-4)
