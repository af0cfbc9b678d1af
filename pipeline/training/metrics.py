"""Top-1, top-5, macro precision, recall and F1 from counts of each class, and agreement with the teacher.

Top-1, top-5 and agreement are percentages, macro precision, recall and F1 lie in [0, 1], as in the paper's tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.losses import Outputs, probabilities
from pipeline.training.distributed import Group
from pipeline.views.parcel import fetch


@dataclass(frozen=True)
class Scores:
    """A model's scores on one split.

    Attributes:
        top1: Percentage of images whose most probable class is the target.
        top5: Percentage of images whose target is among the five most probable classes (all where K <= 5).
        precision: Macro precision in [0, 1]; a class that is never predicted counts 0.
        recall: Macro recall in [0, 1].
        f1: Macro F1 in [0, 1], the mean of the classes' F1.
        loss: Mean cross-entropy of the predicted probabilities, nats.
        agreement: Percentage of images on which the prediction equals the teacher's label; None without a teacher.
        class_top1: Top-1 percentage of the class head alone.
        distillation_top1: Top-1 percentage of the distillation head alone; None where there is none.
    """

    top1: float
    top5: float
    precision: float
    recall: float
    f1: float
    loss: float
    agreement: float | None
    class_top1: float
    distillation_top1: float | None


@dataclass
class Meter:
    """Adds up batches on their device; nothing is synchronised before `scores`.

    Args:
        num_classes: K.
        device: Where the outputs are.
    """

    num_classes: int
    device: torch.device
    counts: Tensor = field(init=False)
    """`(3, K)` int64: each class's hits, targets and predictions."""

    def __post_init__(self) -> None:
        self.counts = torch.zeros(3, self.num_classes, dtype=torch.int64, device=self.device)
        self._top5, self._agreed, self._class_hits, self._distillation_hits = (
            torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(4)
        )
        # Apple's GPUs have no float64.
        loss_dtype = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        self._loss = torch.zeros((), dtype=loss_dtype, device=self.device)
        self._has_teacher = self._has_two_heads = False

    def add(self, outputs: Outputs, labels: Tensor, teacher_labels: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            outputs: One or two heads' logits, `(B, K)` float each.
            labels: `(B,)` int64 targets.
            teacher_labels: `(B,)` int64, the teacher's labels of the same clean images.
        """
        class_logits, distillation_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        self._class_hits += (class_logits.argmax(dim=1) == labels).sum()
        if distillation_logits is not None:
            self._has_two_heads = True
            self._distillation_hits += (distillation_logits.argmax(dim=1) == labels).sum()
        likely = probabilities(outputs)
        predicted = likely.argmax(dim=1)
        hits, once = predicted == labels, torch.ones_like(labels)
        for row, classes, numbers in zip(
            self.counts, (labels, labels, predicted), (hits.long(), once, once), strict=True
        ):
            row.index_add_(0, classes, numbers)
        target = likely.gather(1, labels[:, None])
        is_lower = torch.arange(self.num_classes, device=self.device) < labels[:, None]
        # Of equal classes the lower comes first, as in argmax; topk would choose any.
        self._top5 += (((likely > target) | ((likely == target) & is_lower)).sum(dim=1) < 5).sum()
        loss = functional.nll_loss(likely.clamp_min(1e-38).log(), labels, reduction="sum")
        self._loss += loss.to(self._loss.dtype)
        if teacher_labels is not None:
            self._has_teacher = True
            self._agreed += (predicted == teacher_labels).sum()

    def reduce(self, group: Group) -> None:
        """Add up the counts of all ranks."""
        if group.is_alone:
            return
        known = torch.tensor([self._has_teacher, self._has_two_heads], dtype=torch.int64, device=self.device)
        self._has_teacher, self._has_two_heads = (value > 0 for value in group.max_(known).tolist())
        group.sum_(self.counts, self._top5, self._agreed, self._class_hits, self._distillation_hits, self._loss)

    @property
    def supports(self) -> Tensor:
        """`(K,)` int64, the images of each class."""
        return self.counts[1]

    def scores(self) -> Scores:
        """Return the scores of everything counted so far."""
        counted = [self.counts, self._top5, self._agreed, self._class_hits, self._distillation_hits, self._loss]
        counts, top5, agreed, class_hits, distillation_hits, loss = fetch(counted)
        total = int(counts[1].sum())
        top1, precision, recall, f1 = count_scores(counts)

        def percent(count: Tensor) -> float:
            return 100.0 * int(count) / total

        return Scores(
            top1=top1,
            top5=percent(top5),
            precision=precision,
            recall=recall,
            f1=f1,
            loss=float(loss) / total,
            agreement=percent(agreed) if self._has_teacher else None,
            class_top1=percent(class_hits),
            distillation_top1=percent(distillation_hits) if self._has_two_heads else None,
        )


def is_chance(recall: float, num_classes: int) -> bool:
    """Tell whether a model answers no better than one that gives every image the same class, whose recall is 1 / K.

    Top-1 cannot tell: where 95 % of the images are of one class, that model has 95 %.

    Args:
        recall: Macro recall in [0, 1].
        num_classes: Classes K of the images that were scored; nothing can be told of one alone.
    """
    return num_classes > 1 and recall <= (1 + 1e-9) / num_classes


def count_scores(counts: Tensor) -> tuple[float, float, float, float]:
    """Return top-1 in percent and macro precision, recall and F1 in [0, 1].

    Args:
        counts: `(3, K)` int64, each class's hits, targets and predictions. Classes that are neither a target nor
            predicted are left out of the means, as scikit-learn does.
    """
    hits, targets, predictions = counts.cpu().double()
    present = (targets + predictions) > 0
    precision = hits / predictions.clamp_min(1.0)
    recall = hits / targets.clamp_min(1.0)
    f1 = 2.0 * hits / (targets + predictions).clamp_min(1.0)
    return (
        100.0 * float(hits.sum() / targets.sum()),
        float(precision[present].mean()),
        float(recall[present].mean()),
        float(f1[present].mean()),
    )


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class.

    Attributes:
        name: Of the class.
        support: Number of its images.
        recall: Share of its images that are predicted correctly, in [0, 1], the class's accuracy; None without images.
        precision: Share of its predictions that are correct, in [0, 1]; None where it is never predicted.
        f1: Harmonic mean of both, in [0, 1], 0 where one is 0; None without images and predictions.
        confused_with: The most frequent wrong prediction for its images, the first of equals; None without one.
        num_confused: How often it occurs.
    """

    name: str
    support: int
    recall: float | None
    precision: float | None
    f1: float | None
    confused_with: str | None
    num_confused: int


def class_scores(targets: Tensor, predictions: Tensor, class_names: tuple[str, ...]) -> list[ClassScores]:
    """Return the scores of every class, in the order of their labels.

    Args:
        targets: `(N,)` int64 in [0, K).
        predictions: `(N,)` int64 in [0, K), of the same images.
        class_names: K names.
    """
    num_classes, is_hit = len(class_names), targets == predictions
    hits, supports, predicted_counts = (
        classes.bincount(minlength=num_classes).tolist() for classes in (targets[is_hit], targets, predictions)
    )
    pairs = torch.stack([targets, predictions], dim=1)[~is_hit]
    pairs, numbers = pairs.unique(dim=0, return_counts=True)  # type: ignore[no-untyped-call]
    confused: dict[int, tuple[int, int]] = {}  # class: its most frequent wrong prediction, and how often
    for (target, other), number in zip(pairs.tolist(), numbers.tolist(), strict=True):
        if number > confused.get(target, (0, 0))[1]:  # pairs ascend: of equals the first stays
            confused[target] = other, number
    scores = []
    for label, name in enumerate(class_names):
        hit, support, predicted = hits[label], supports[label], predicted_counts[label]
        other, num_confused = confused.get(label, (None, 0))
        scores.append(
            ClassScores(
                name=name,
                support=support,
                recall=hit / support if support else None,
                precision=hit / predicted if predicted else None,
                f1=2 * hit / (support + predicted) if support + predicted else None,
                confused_with=None if other is None else class_names[other],
                num_confused=num_confused,
            )
        )
    return scores


def worst_first(scores: list[ClassScores]) -> list[ClassScores]:
    """Return classes by ascending recall, then F1; those without images come last."""
    return sorted(scores, key=lambda score: (math.inf if score.recall is None else score.recall, score.f1 or 0.0))
