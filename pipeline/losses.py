"""The paper's losses, equations 8 to 10, and the prediction of one or two heads.

A model's outputs are either one tensor of logits, or a pair (class head, distillation head).

Source: arXiv:2502.16762 §3.5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

Outputs = Tensor | tuple[Tensor, Tensor]


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the mean of lambda CE(p, y1) + (1 - lambda) CE(p, y2).

    Args:
        logits: `(B, K)` float.
        labels: `(B,)` int64, y1, the labels of the images.
        partner_labels: `(B,)` int64, y2, the labels of their CutMix or MixUp partners.
        lam: `(B,)` float32 in [0, 1], the share of the image that is left. All 1 without mixing, which makes this
            the plain cross-entropy of equation 8.
        label_smoothing: Weight of the uniform distribution in both targets.

    Returns:
        A float32 scalar.

    Source: arXiv:2502.16762 Eq. 9.
    Differs: lambda is drawn per sample, not once per batch, so it weighs each sample's own terms.
    """
    logits = logits.float()
    own = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    partner = functional.cross_entropy(logits, partner_labels, reduction="none", label_smoothing=label_smoothing)
    return (lam * own + (1.0 - lam) * partner).mean()


def hybrid_loss(
    outputs: tuple[Tensor, Tensor],
    labels: Tensor,
    partner_labels: Tensor,
    lam: Tensor,
    teacher_labels: Tensor,
    *,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return (1 - alpha) CM(p_cls; y1, y2, lambda) + alpha CE(p_dist, y_t), hard distillation.

    Args:
        outputs: Logits of the class head and of the distillation head, `(B, K)` float each.
        labels: `(B,)` int64, y1.
        partner_labels: `(B,)` int64, y2.
        lam: `(B,)` float32 in [0, 1].
        teacher_labels: `(B,)` int64, y_t, the argmax of the teacher's logits on the same mixed view.
        alpha: Weight of the distillation term.
        label_smoothing: Of the ground-truth term only; the teacher's label is used as it is.

    Returns:
        A float32 scalar.

    Source: arXiv:2502.16762 Eq. 10.
    """
    class_logits, distillation_logits = outputs
    truth = mixed_cross_entropy(class_logits, labels, partner_labels, lam, label_smoothing=label_smoothing)
    distillation = functional.cross_entropy(distillation_logits.float(), teacher_labels)
    return (1.0 - alpha) * truth + alpha * distillation


def undistilled_loss(
    outputs: tuple[Tensor, Tensor],
    labels: Tensor,
    partner_labels: Tensor,
    lam: Tensor,
    *,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the hybrid loss of a two-headed model without a teacher: both heads learn the ground truth.

    The control of distillation: the same network, data and weights of the two heads, only y_t is replaced by
    (y1, y2, lambda). Leaving the second head out would leave it untrained, and the prediction averages both.

    Args:
        outputs: Logits of the class head and of the distillation head, `(B, K)` float each.
        labels: `(B,)` int64, y1.
        partner_labels: `(B,)` int64, y2.
        lam: `(B,)` float32 in [0, 1].
        alpha: Weight of the distillation head.
        label_smoothing: Of both terms.
    """
    terms = [
        mixed_cross_entropy(logits, labels, partner_labels, lam, label_smoothing=label_smoothing) for logits in outputs
    ]
    return (1.0 - alpha) * terms[0] + alpha * terms[1]


def probabilities(outputs: Outputs) -> Tensor:
    """Return the class probabilities `(B, K)` float32 of one head, or the mean of both heads' softmax.

    Source: chosen, DeiT's convention (arXiv:2012.12877 §5); the paper is silent.
    """
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([head.float().softmax(dim=-1) for head in heads]).mean(dim=0)
