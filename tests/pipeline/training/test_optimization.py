"""Optimisers and schedule against torch's own."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.recipes import FitRecipe
from pipeline.training.optimization import build_optimizer, learning_rate


def recipe(**settings: object) -> FitRecipe:
    return FitRecipe(**{"epochs": 4, "batch_size": 8, "lr": 0.1, **settings})  # type: ignore[arg-type]


def test_the_cosine_equals_torchs_scheduler() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    for step in range(12):
        assert learning_rate(recipe(), step, 3) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_warm_up_rises_linearly_to_the_peak() -> None:
    rates = [learning_rate(recipe(warmup_epochs=1.0), step, 4) for step in range(16)]
    assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert rates[4] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0.0


def test_a_constant_schedule_stays() -> None:
    assert {learning_rate(recipe(schedule="constant"), step, 3) for step in range(12)} == {0.1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_every_optimiser_takes_rate_momentum_and_decay(name: str, kind: type) -> None:
    settings = recipe(optimizer=name, momentum=0.8, weight_decay=0.01)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], settings)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, kind)
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.01)
    assert group.get("momentum", group.get("betas", [None])[0] if "betas" in group else None) == 0.8
