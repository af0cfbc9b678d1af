"""Equations 8 to 10 against torch and hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from pipeline.losses import hybrid_loss, mixed_cross_entropy, probabilities, undistilled_loss

LOGITS = torch.tensor([[math.log(2.0), 0.0], [0.0, math.log(3.0)]])  # probabilities 2/3, 1/3 and 1/4, 3/4
OTHER = torch.tensor([[0.0, 0.0], [math.log(4.0), 0.0]])  # 1/2, 1/2 and 4/5, 1/5
Y1, Y2 = torch.tensor([0, 1]), torch.tensor([1, 1])
LAM = torch.tensor([0.75, 0.5])
YT = torch.tensor([0, 1])
# 0.75 CE(0) + 0.25 CE(1) for the first, CE(1) for the second.
CM = (0.75 * math.log(3 / 2) + 0.25 * math.log(3) + math.log(4 / 3)) / 2
CE_DIST = (math.log(2) + math.log(5)) / 2


def test_the_mixed_loss_is_equation_9() -> None:
    assert mixed_cross_entropy(LOGITS, Y1, Y2, LAM).item() == pytest.approx(CM, rel=1e-6)


def test_without_mixing_it_is_the_plain_cross_entropy() -> None:
    loss = mixed_cross_entropy(LOGITS, Y1, Y2, torch.ones(2), label_smoothing=0.1)
    torch.testing.assert_close(loss, functional.cross_entropy(LOGITS, Y1, label_smoothing=0.1))


def test_swapping_image_and_partner_swaps_lambda() -> None:
    torch.testing.assert_close(mixed_cross_entropy(LOGITS, Y1, Y2, LAM), mixed_cross_entropy(LOGITS, Y2, Y1, 1.0 - LAM))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_hybrid_loss_is_equation_10(alpha: float) -> None:
    loss = hybrid_loss((LOGITS, OTHER), Y1, Y2, LAM, YT, alpha=alpha)
    assert loss.item() == pytest.approx((1 - alpha) * CM + alpha * CE_DIST, rel=1e-6)


def test_the_teachers_label_is_not_smoothed() -> None:
    loss = hybrid_loss((LOGITS, OTHER), Y1, Y2, LAM, YT, alpha=1.0, label_smoothing=0.5)
    assert loss.item() == pytest.approx(CE_DIST, rel=1e-6)


def test_without_a_teacher_both_heads_learn_the_truth() -> None:
    loss = undistilled_loss((LOGITS, OTHER), Y1, Y2, LAM, alpha=0.5)
    own, second = (mixed_cross_entropy(head, Y1, Y2, LAM) for head in (LOGITS, OTHER))
    torch.testing.assert_close(loss, 0.5 * own + 0.5 * second)


def test_the_prediction_is_the_mean_of_both_softmax_outputs() -> None:
    expected = torch.tensor([[(2 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2], [(1 / 4 + 4 / 5) / 2, (3 / 4 + 1 / 5) / 2]])
    torch.testing.assert_close(probabilities((LOGITS, OTHER)), expected)
    torch.testing.assert_close(probabilities(LOGITS), LOGITS.softmax(1))


def test_losses_are_computed_in_float32_from_bf16_logits() -> None:
    loss = hybrid_loss((LOGITS.bfloat16(), OTHER.bfloat16()), Y1, Y2, LAM, YT)
    assert loss.dtype == torch.float32
