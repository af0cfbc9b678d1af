"""Optimisers and schedule against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.config.recipes import FitRecipe
from pipeline.models.students import build_student
from pipeline.models.students.foreign import ForeignStudent
from pipeline.models.teachers import ResizedInput
from pipeline.training.optimization import build_optimizer, decayed, learning_rate, set_learning_rate


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
    optimizer = build_optimizer(torch.nn.Linear(2, 2), settings)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, kind)
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.01)
    assert group.get("momentum", group.get("betas", [None])[0] if "betas" in group else None) == 0.8


def test_a_parameter_may_get_its_first_gradient_after_the_others() -> None:
    ours, theirs = (torch.nn.ParameterList([torch.ones(2), torch.ones(2)]) for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = build_optimizer(ours, recipe(optimizer="sgd", **settings)), torch.optim.SGD(theirs, **settings)
    for step in range(4):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            sum((parameter**2).sum() for parameter in list(parameters)[: 1 + step // 2]).backward()
            optimizer.step()
    torch.testing.assert_close(list(ours), list(theirs))
    assert ours[1][0] != 1


TOKENS = {
    "vit": ["class_token", "positions"],
    "deit": ["class_token", "distillation_token", "positions"],
    "tnt": ["embedding.positions", "patch_positions", "patch_tokens"],
    "titn": ["embedding.positions", "patch_positions", "patch_tokens"],
}


@pytest.mark.parametrize("name", TOKENS)
def test_norms_biases_tokens_and_positions_do_not_decay_with_matrices(name: str) -> None:
    student = build_student(name, num_classes=3, image_size=8, patch_size=4, width=12, depth=2, pixel_width=4)
    sizes = {key: parameter.ndim for key, parameter in student.named_parameters()}
    alone = sorted(sizes.keys() - decayed(student))
    assert [key for key in alone if sizes[key] > 1] == TOKENS[name]
    assert all(key.endswith("bias") or "norm" in key or ".0.weight" in key for key in alone if sizes[key] == 1)
    assert all(sizes[key] == 2 and key.endswith("weight") for key in decayed(student))
    optimizer = build_optimizer(student, recipe(decay="matrices", weight_decay=0.3))
    parameters = dict(student.named_parameters())
    for group, names, decay in zip(optimizer.param_groups, (decayed(student), alone), (0.3, 0.0), strict=True):
        assert group["weight_decay"] == decay
        assert {id(parameter) for parameter in group["params"]} == {id(parameters[key]) for key in names}
    assert len(build_optimizer(student, recipe()).param_groups) == 1


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "deit_tiny_distilled_patch16_224"])
def test_what_decays_of_timms_models_is_what_timm_says(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_weight_decay

    with torch.device("meta"):
        model = timm.create_model(name)
    without, with_decay = param_groups_weight_decay(
        model, 0.1, no_weight_decay_list=getattr(model, "no_weight_decay", set)()
    )
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in with_decay["params"]} == decayed(model) and not without[
        "weight_decay"
    ]


@pytest.mark.parametrize("wrap", [lambda module: ResizedInput(module, 32), ForeignStudent])
def test_what_a_model_names_within_another_does_not_decay(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    class Model(torch.nn.Sequential):
        def no_weight_decay(self) -> set[str]:
            return {"1.weight"}

    model = Model(torch.nn.Linear(2, 3), torch.nn.Linear(3, 3))
    assert decayed(model) == {"0.weight"} and decayed(wrap(model)) == {"module.0.weight"}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_by_hand_with_and_without_decay(name: str) -> None:
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]])), model.bias.copy_(torch.tensor([4.0]))
    optimizer = build_optimizer(model, recipe(optimizer=name, momentum=0.0, weight_decay=0.5, decay="matrices"))
    set_learning_rate(optimizer, 0.2)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 1.0]]), torch.tensor([2.0])
    optimizer.step()
    if name == "sgd":  # w - lr (g + decay w); the bias b - lr g
        weight, bias = [1.0 - 0.2 * (3.0 + 0.5 * 1.0), -2.0 - 0.2 * (1.0 - 0.5 * 2.0)], 4.0 - 0.2 * 2.0
    else:  # w (1 - lr decay) - lr g / |g|
        weight, bias = [1.0 * 0.9 - 0.2, -2.0 * 0.9 - 0.2], 4.0 - 0.2
    assert model.weight[0].tolist() == pytest.approx(weight, abs=1e-6)
    assert model.bias.item() == pytest.approx(bias, abs=1e-6)


def test_a_model_without_matrices_or_without_anything_else_has_one_group() -> None:
    settings = recipe(decay="matrices", weight_decay=0.5)
    [group] = build_optimizer(torch.nn.LayerNorm(3), settings).param_groups
    assert group["weight_decay"] == 0.0
    [group] = build_optimizer(torch.nn.Linear(2, 2, bias=False), settings).param_groups
    assert group["weight_decay"] == 0.5


def test_both_groups_follow_a_learning_rate_that_is_a_tensor() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), recipe(decay="matrices"), captured=True)
    for loaded in (False, True):
        if loaded:
            optimizer.load_state_dict(optimizer.state_dict())
        rates = [group["lr"] for group in optimizer.param_groups]
        set_learning_rate(optimizer, 0.25)
        assert [rate.item() for rate in rates] == [0.25, 0.25], "in place, where a CUDA graph reads it"
        assert [id(group["lr"]) for group in optimizer.param_groups] == [id(rate) for rate in rates]
        set_learning_rate(optimizer, 0.5)
