"""The paper's losses, equations 8 to 10, soft distillation beside the hard one, and the prediction of one or two heads.

A model's outputs are either one tensor of logits, or a pair (class head, distillation head). `objective` gives the loss
that a recipe trains with, and `training_loss` chooses the equation.

Source: arXiv:2502.16762 §3.5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config.recipes import FitRecipe, StudentRecipe

Outputs = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Targets:
    """The targets of a batch of views.

    Attributes:
        labels: `(B,)` int64, y1, the labels of the images.
        partner_labels: `(B,)` int64, y2, the labels of their CutMix or MixUp partners.
        lam: `(B,)` float32 in [0, 1], lambda, the share of the image that mixing leaves.
        teacher_labels: `(B,)` int64, y_t, the teacher's labels of the same views; or `(B, C)` float32, its
            distributions; None without a teacher.
        confidence: `(B,)` float32, the teacher's probability of its label; None gives all samples equal weight.
        mean_confidence: Mean of `confidence` over the step, a float32 scalar; None takes the mean of these samples.
    """

    labels: Tensor
    partner_labels: Tensor
    lam: Tensor
    teacher_labels: Tensor | None = None
    confidence: Tensor | None = None
    mean_confidence: Tensor | None = None


def objective(recipe: FitRecipe) -> Callable[[Outputs, Targets], Tensor]:
    """Return the loss that a teacher's or a student's recipe trains with, see `training_loss`."""
    loss = functools.partial(training_loss, label_smoothing=recipe.label_smoothing)
    if isinstance(recipe, StudentRecipe):
        loss = functools.partial(loss, alpha=recipe.alpha, temperature=recipe.soft or 1.0)
    return loss


def training_loss(
    outputs: Outputs, targets: Targets, *, alpha: float = 0.5, label_smoothing: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Return equation 9 for one head, equation 10 for two heads, or its control for two heads without a teacher.

    Args:
        outputs: One or two heads' logits, `(B, K)` float each.
        targets: Of the same samples. A single head never learns from the teacher's labels.
        alpha: Weight of the distillation head.
        label_smoothing: Of the ground truth.
        temperature: T, where the teacher's labels are distributions.

    Returns:
        A float32 scalar, the mean over the samples.

    Source: arXiv:2502.16762 Eq. 9, 10.
    """
    if not isinstance(outputs, tuple):
        return mixed_cross_entropy(outputs, targets, label_smoothing=label_smoothing)
    if targets.teacher_labels is None:
        return undistilled_loss(outputs, targets, alpha=alpha, label_smoothing=label_smoothing)
    return hybrid_loss(outputs, targets, alpha=alpha, label_smoothing=label_smoothing, temperature=temperature)


def mixed_cross_entropy(logits: Tensor, targets: Targets, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean of lambda CE(p, y1) + (1 - lambda) CE(p, y2).

    Without mixing lambda is 1 everywhere, and this is the plain cross-entropy of equation 8.

    Args:
        logits: `(B, K)` float.
        targets: Of the same samples; y1, y2 and lambda.
        label_smoothing: Weight of the uniform distribution in both targets.

    Returns:
        A float32 scalar.

    Source: arXiv:2502.16762 Eq. 9.
    Differs: lambda is drawn for each sample, not once for the batch.
    """
    lam = targets.lam
    cross_entropy = functools.partial(
        functional.cross_entropy, logits.float(), reduction="none", label_smoothing=label_smoothing
    )
    return (lam * cross_entropy(targets.labels) + (1.0 - lam) * cross_entropy(targets.partner_labels)).mean()


def hybrid_loss(
    outputs: tuple[Tensor, Tensor],
    targets: Targets,
    *,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return (1 - alpha) CM(p_cls; y1, y2, lambda) + alpha D(p_dist, y_t).

    D is the cross-entropy with the teacher's labels (hard distillation), or T^2 KL(q || p) with its distributions at
    temperature T (soft distillation, see `soft_divergence`). Where the targets have a confidence, it weighs the samples
    in D. The weights are divided by their mean over the step, so that alpha keeps its meaning.

    Args:
        outputs: Logits of the class head and of the distillation head, `(B, K)` float each.
        targets: Of the same samples, with the teacher's labels.
        alpha: Weight of the distillation term.
        label_smoothing: Of the ground-truth term only; the teacher's label is used as it is.
        temperature: T, of distributions only.

    Returns:
        A float32 scalar.

    Source: arXiv:2502.16762 Eq. 10; soft, arXiv:1503.02531 §2. The weights are ours.
    """
    class_logits, distillation_logits = outputs
    teacher_labels, confidence, mean = targets.teacher_labels, targets.confidence, targets.mean_confidence
    assert teacher_labels is not None, "no teacher"
    truth = mixed_cross_entropy(class_logits, targets, label_smoothing=label_smoothing)
    if teacher_labels.ndim == 2:
        terms = soft_divergence(distillation_logits, teacher_labels, temperature)
    else:
        terms = functional.cross_entropy(distillation_logits.float(), teacher_labels, reduction="none")
    if confidence is not None:
        terms = confidence / (confidence.mean() if mean is None else mean) * terms
    return (1.0 - alpha) * truth + alpha * terms.mean()


def undistilled_loss(
    outputs: tuple[Tensor, Tensor], targets: Targets, *, alpha: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """Return the hybrid loss of a two-headed model without a teacher: both heads learn the ground truth.

    This is the control of distillation: it differs from `hybrid_loss` only by (y1, y2, lambda) in place of y_t. The
    distillation head has to learn too, because the prediction is the mean of both. Label smoothing acts on both terms.
    """
    truth, second = (mixed_cross_entropy(logits, targets, label_smoothing=label_smoothing) for logits in outputs)
    return (1.0 - alpha) * truth + alpha * second


def soft_divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(q || softmax(logits / T)) of each sample, q_i proportional to p_i^(1/T).

    Args:
        logits: `(B, C)` float.
        teacher: `(B, C)` float32 in [0, 1], p, the teacher's distributions at temperature 1; their sum does not matter.
        temperature: T, above 0. As p is a softmax of logits, q is the softmax of those logits divided by T.

    Returns:
        `(B,)` float32. T^2 keeps the gradient's size as T grows.

    Source: arXiv:1503.02531 §2.
    Differs: the divergence in place of the cross-entropy, which is larger by q's entropy and has the same gradient.
    """
    # A probability of 0 has the logarithm -inf, which softmax turns into 0 again, and kl_div takes 0 log 0 for 0.
    targets = (teacher.log() / temperature).softmax(dim=1)
    student = (logits.float() / temperature).log_softmax(dim=1)
    return temperature**2 * functional.kl_div(student, targets, reduction="none").sum(dim=1)


def marginal_smoothing(classes: Tensor, probabilities: Tensor, num_classes: int) -> Tensor:
    """Return a teacher's distributions from its most probable classes: the others share the rest evenly.

    Args:
        classes: `(B, K)` int64 in [0, C), distinct in each row.
        probabilities: `(B, K)` float16 or float32 in [0, 1], of those classes among all C.
        num_classes: C.

    Returns:
        `(B, C)` float32, rows of sum 1. The C - K other classes share 1 minus the sum of the K probabilities evenly;
        with K = C the rows are the teacher's rounded distributions. Float16 rounds a probability above 0.9998 to 1 and
        so loses the other classes, also at high temperatures.

    Source: arXiv:2112.01528 §3.2, "marginal smoothing".
    Differs: rows are normalised, because rounded probabilities may sum to a little more than 1.
    """
    kept = probabilities.float()
    num_others = num_classes - kept.shape[1]
    rest = (1.0 - kept.sum(dim=1, keepdim=True)).clamp(min=0.0) / max(num_others, 1)
    full = rest.expand(-1, num_classes).scatter(1, classes, kept)
    return full / full.sum(dim=1, keepdim=True)


def probabilities(outputs: Outputs) -> Tensor:
    """Return the class probabilities `(B, K)` float32 of one head, or the mean of both heads' softmax.

    Source: chosen, DeiT's convention (arXiv:2012.12877 §5); the paper is silent.
    """
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([head.float().softmax(dim=-1) for head in heads]).mean(dim=0)
