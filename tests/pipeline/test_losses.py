"""Equations 8 to 10 against torch and hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from pipeline.config.recipes import StudentRecipe, TeacherRecipe
from pipeline.losses import (
    Targets,
    hybrid_loss,
    mixed_cross_entropy,
    objective,
    probabilities,
    training_loss,
    undistilled_loss,
)

LOGITS = torch.tensor([[math.log(2.0), 0.0], [0.0, math.log(3.0)]])  # probabilities 2/3, 1/3 and 1/4, 3/4
OTHER = torch.tensor([[0.0, 0.0], [math.log(4.0), 0.0]])  # 1/2, 1/2 and 4/5, 1/5
Y1, Y2 = torch.tensor([0, 1]), torch.tensor([1, 1])
LAM = torch.tensor([0.75, 0.5])
YT = torch.tensor([0, 1])
MIXED, DISTILLED = Targets(Y1, Y2, LAM), Targets(Y1, Y2, LAM, YT)
# 0.75 CE(0) + 0.25 CE(1) for the first, CE(1) for the second.
CM = (0.75 * math.log(3 / 2) + 0.25 * math.log(3) + math.log(4 / 3)) / 2
CE_DIST = (math.log(2) + math.log(5)) / 2


def test_the_mixed_loss_is_equation_9() -> None:
    assert mixed_cross_entropy(LOGITS, MIXED).item() == pytest.approx(CM, rel=1e-6)


def test_without_mixing_it_is_the_plain_cross_entropy() -> None:
    loss = mixed_cross_entropy(LOGITS, Targets(Y1, Y2, torch.ones(2)), label_smoothing=0.1)
    torch.testing.assert_close(loss, functional.cross_entropy(LOGITS, Y1, label_smoothing=0.1))


def test_swapping_image_and_partner_swaps_lambda() -> None:
    swapped = mixed_cross_entropy(LOGITS, Targets(Y2, Y1, 1.0 - LAM))
    torch.testing.assert_close(mixed_cross_entropy(LOGITS, MIXED), swapped)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_hybrid_loss_is_equation_10(alpha: float) -> None:
    loss = hybrid_loss((LOGITS, OTHER), DISTILLED, alpha=alpha)
    assert loss.item() == pytest.approx((1 - alpha) * CM + alpha * CE_DIST, rel=1e-6)


def test_the_teachers_label_is_not_smoothed() -> None:
    loss = hybrid_loss((LOGITS, OTHER), DISTILLED, alpha=1.0, label_smoothing=0.5)
    assert loss.item() == pytest.approx(CE_DIST, rel=1e-6)


def test_without_a_teacher_both_heads_learn_the_truth() -> None:
    loss = undistilled_loss((LOGITS, OTHER), MIXED, alpha=0.5)
    first, second = (mixed_cross_entropy(head, MIXED) for head in (LOGITS, OTHER))
    torch.testing.assert_close(loss, 0.5 * first + 0.5 * second)


def test_heads_and_teacher_choose_the_equation() -> None:
    settings = {"alpha": 0.3, "label_smoothing": 0.1}
    one = mixed_cross_entropy(LOGITS, MIXED, label_smoothing=0.1)
    assert training_loss(LOGITS, MIXED, **settings) == one
    assert training_loss(LOGITS, DISTILLED, **settings) == one, "a single head does not learn from the teacher"
    heads = (LOGITS, OTHER)
    assert training_loss(heads, MIXED, **settings) == undistilled_loss(heads, MIXED, **settings)
    assert training_loss(heads, DISTILLED, **settings) == hybrid_loss(heads, DISTILLED, **settings)


@pytest.mark.parametrize("soft", [0.0, 3.0])
def test_a_recipe_gives_its_loss_the_weights(soft: float) -> None:
    common = {"epochs": 1, "batch_size": 2, "lr": 0.1, "label_smoothing": 0.2}
    heads, targets = (LOGITS, OTHER), Targets(Y1, Y2, LAM, OTHER.softmax(1))
    expected = hybrid_loss(heads, targets, alpha=0.7, label_smoothing=0.2, temperature=soft or 1.0)
    assert objective(StudentRecipe(model="titn", alpha=0.7, soft=soft, **common))(heads, targets) == expected
    truth = mixed_cross_entropy(LOGITS, MIXED, label_smoothing=0.2)
    assert objective(TeacherRecipe(**common))(LOGITS, MIXED) == truth


def test_the_prediction_is_the_mean_of_both_softmax_outputs() -> None:
    expected = torch.tensor([[(2 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2], [(1 / 4 + 4 / 5) / 2, (3 / 4 + 1 / 5) / 2]])
    torch.testing.assert_close(probabilities((LOGITS, OTHER)), expected)
    torch.testing.assert_close(probabilities(LOGITS), LOGITS.softmax(1))


def test_losses_are_computed_in_float32_from_bf16_logits() -> None:
    loss = hybrid_loss((LOGITS.bfloat16(), OTHER.bfloat16()), DISTILLED)
    assert loss.dtype == torch.float32
