"""Soft distillation, marginal smoothing and confidence, against torch and hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from pipeline.labels.teacher import top_classes
from pipeline.losses import Targets, hybrid_loss, marginal_smoothing, soft_divergence

HALVES = torch.zeros(1, 2)  # logits of the probabilities 1/2, 1/2
FIFTHS = torch.tensor([[0.8, 0.2]])
Y1, Y2, LAM = torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([0.75, 0.5])
CLASS = torch.tensor([[math.log(2.0), 0.0], [0.0, math.log(3.0)]])
DIST = torch.tensor([[0.3, -0.2], [1.0, 0.5]])


def random_logits(num: int = 12, num_classes: int = 10, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(num, num_classes, generator=torch.Generator().manual_seed(0))


def test_the_divergence_at_temperature_2_by_hand() -> None:
    # q is proportional to the square roots of 4/5 and 1/5, so 2/3 and 1/3.
    expected = 2**2 * (2 / 3 * math.log((2 / 3) / (1 / 2)) + 1 / 3 * math.log((1 / 3) / (1 / 2)))
    assert soft_divergence(HALVES, FIFTHS, 2.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 20.0])
def test_the_divergence_is_torchs_between_tempered_logits(temperature: float) -> None:
    teacher, student = random_logits(), random_logits(scale=1.0).flip(0)
    ours = soft_divergence(student, teacher.softmax(1), temperature).mean()
    theirs = functional.kl_div(
        (student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(ours, temperature**2 * theirs, rtol=1e-4, atol=1e-6)


def test_a_student_that_says_what_the_teacher_says_has_no_loss() -> None:
    logits = random_logits()
    assert soft_divergence(logits, logits.softmax(1), 3.0).abs().max() < 1e-5


def test_its_gradient_is_that_of_the_cross_entropy_and_does_not_shrink_with_the_temperature() -> None:
    student, teacher = random_logits().requires_grad_(), random_logits().flip(0).softmax(1)
    for temperature in (1.0, 4.0):
        [gradient] = torch.autograd.grad(soft_divergence(student, teacher, temperature).sum(), student)
        tempered = teacher.pow(1 / temperature)
        q = tempered / tempered.sum(1, keepdim=True)
        torch.testing.assert_close(gradient, temperature * ((student / temperature).softmax(1) - q).detach())


def test_a_certain_teacher_at_temperature_1_is_hard_distillation() -> None:
    labels, logits = torch.tensor([3, 0, 9]), random_logits(3)
    certain = functional.one_hot(labels, 10).float()
    for temperature in (1.0, 0.5, 2.0):  # no temperature makes a certain teacher doubt
        ours = soft_divergence(logits, certain, temperature)
        theirs = temperature**2 * functional.cross_entropy(logits / temperature, labels, reduction="none")
        torch.testing.assert_close(ours, theirs)
    soft, hard = (
        hybrid_loss((logits, logits), Targets(labels, labels, torch.ones(3), teacher)) for teacher in (certain, labels)
    )
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
def test_probabilities_of_0_give_finite_losses_and_gradients(temperature: float) -> None:
    student = torch.tensor([[40.0, -40.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, 0.0], [6e-8, 0.5, 0.5]])
    loss = soft_divergence(student, teacher, temperature)
    [gradient] = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_the_rest_is_spread_evenly_over_the_other_classes() -> None:
    full = marginal_smoothing(torch.tensor([[2, 0], [3, 1]]), torch.tensor([[0.5, 0.25], [1.0, 0.0]]), 4)
    expected = torch.tensor([[0.25, 0.125, 0.5, 0.125], [0.0, 0.0, 0.0, 1.0]])
    torch.testing.assert_close(full, expected)
    [one] = marginal_smoothing(torch.tensor([[1]]), torch.tensor([[0.7]]), 4)
    torch.testing.assert_close(one, torch.tensor([0.1, 0.7, 0.1, 0.1]))


def test_probabilities_that_rounding_made_sum_to_more_than_1_are_normalised() -> None:
    kept = torch.tensor([[0.9, 0.1001]])
    full = marginal_smoothing(torch.tensor([[0, 1]]), kept, 3)
    torch.testing.assert_close(full, torch.tensor([[0.9, 0.1001, 0.0]]) / 1.0001)


def test_keeping_every_class_is_the_teachers_own_distribution() -> None:
    logits = random_logits(200, 10)
    classes, kept = top_classes(logits, 10)
    torch.testing.assert_close(marginal_smoothing(classes, kept, 10), logits.softmax(1))
    halves = marginal_smoothing(classes, kept.half(), 10)  # as stored
    torch.testing.assert_close(halves, logits.softmax(1), rtol=2**-10, atol=2**-24)


def test_any_k_leaves_distributions_that_keep_the_kept() -> None:
    logits = random_logits(50, 30)
    for topk in (1, 2, 29, 30):
        classes, kept = top_classes(logits, topk)
        full = marginal_smoothing(classes, kept.half(), 30)
        torch.testing.assert_close(full.sum(1), torch.ones(50))
        torch.testing.assert_close(full.gather(1, classes), kept, rtol=2e-3, atol=1e-6)
        assert full.dtype == torch.float32 and (full >= 0).all()


def test_the_soft_hybrid_loss_weighs_both_terms_by_alpha() -> None:
    teacher = torch.tensor([[0.8, 0.2], [0.5, 0.5]])
    truth = hybrid_loss((CLASS, DIST), Targets(Y1, Y2, LAM, teacher), alpha=0.0, temperature=2.0)
    soft = hybrid_loss((CLASS, DIST), Targets(Y1, Y2, LAM, teacher), alpha=1.0, temperature=2.0)
    torch.testing.assert_close(soft, soft_divergence(DIST, teacher, 2.0).mean())
    both = hybrid_loss((CLASS, DIST), Targets(Y1, Y2, LAM, teacher), alpha=0.3, temperature=2.0)
    torch.testing.assert_close(both, 0.7 * truth + 0.3 * soft)


def test_confidence_weighs_the_samples_and_leaves_alpha_its_meaning() -> None:
    labels = torch.tensor([0, 1])
    terms = functional.cross_entropy(DIST, labels, reduction="none")
    loss = hybrid_loss((CLASS, DIST), Targets(Y1, Y2, LAM, labels, torch.tensor([0.9, 0.3])), alpha=1.0)
    assert loss.item() == pytest.approx((1.5 * terms[0].item() + 0.5 * terms[1].item()) / 2, rel=1e-6)
    for teacher in (labels, torch.tensor([[0.8, 0.2], [0.5, 0.5]])):
        plain = hybrid_loss((CLASS, DIST), Targets(Y1, Y2, LAM, teacher), temperature=2.0)
        confident = Targets(Y1, Y2, LAM, teacher, torch.full((2,), 0.4))
        alike = hybrid_loss((CLASS, DIST), confident, temperature=2.0)
        torch.testing.assert_close(alike, plain)


def test_a_temperature_does_not_touch_hard_labels() -> None:
    hot, cold = (hybrid_loss((CLASS, DIST), Targets(Y1, Y2, LAM, Y1), temperature=value) for value in (4.0, 1.0))
    assert torch.equal(hot, cold)


def test_the_soft_loss_is_computed_in_float32_from_bf16_logits() -> None:
    targets = Targets(Y1, Y2, LAM, torch.full((2, 2), 0.5))
    loss = hybrid_loss((CLASS.bfloat16(), DIST.bfloat16()), targets, temperature=2.0)
    assert loss.dtype == torch.float32
    expected = hybrid_loss((CLASS, DIST), targets, temperature=2.0)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-2)
