"""The size of a run's state, with the models of the paper's own size."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from pipeline.config.recipes import StudentRecipe
from pipeline.models.students import build_student
from pipeline.training.checkpoints import RunState
from pipeline.training.distributed import ALONE
from pipeline.training.optimization import build_optimizer
from pipeline.training.resuming import FitResult, Progress, load_progress, moments, save_progress

MEGABYTE = 1_000_000


def test_a_state_of_titn_under_sgd_is_smaller_than_48_mb_and_its_best_than_24(tmp_path: Path) -> None:
    recipe = StudentRecipe(model="titn", epochs=1, batch_size=1024, lr=0.1)
    model = build_student("titn", num_classes=100)
    optimizer = build_optimizer(model, recipe)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.step()
    result = FitResult([{"epoch": 1, "top1": 1.0}], best, 1)
    loss_sum = torch.zeros((), dtype=torch.float64)
    state = RunState(tmp_path, "f")
    save_progress(state, Progress(loss_sum, epoch=1, step=3, result=result), model, optimizer, ALONE)
    state.wait()
    sizes = {file.name.split("-")[0]: file.stat().st_size for file in tmp_path.glob("*.safetensors")}
    assert sizes.keys() == {"state", "best"}
    assert 46 * MEGABYTE < sizes["state"] < 48 * MEGABYTE and 23 * MEGABYTE < sizes["best"] < 24 * MEGABYTE

    other, progress = copy.deepcopy(model), Progress(loss_sum)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other_optimizer = build_optimizer(other, recipe)
    load_progress(RunState(tmp_path, "f"), progress, other, other_optimizer, ALONE)
    assert (progress.epoch, progress.step, progress.result.best_epoch) == (1, 3, 1)
    weights = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor) and torch.equal(progress.result.best[name], best[name])
    momenta, expected = moments(other_optimizer), moments(optimizer)
    assert momenta.keys() == expected.keys() and all(momenta[name].equal(expected[name]) for name in expected)
