"""Scores against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, top_k_accuracy_score
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.losses import probabilities
from pipeline.training.metrics import Meter, class_scores, count_scores
from pipeline.training.standing import standing


@settings(max_examples=60)
@given(
    num_classes=st.integers(2, 12),
    num_samples=st.integers(1, 80),
    seed=st.integers(0, 2**31 - 1),
    heads=st.booleans(),
)
def test_scores_equal_scikit_learns(num_classes: int, num_samples: int, seed: int, heads: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, num_samples, num_classes, generator=generator)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    outputs = (first, second) if heads else first
    meter = Meter(num_classes, torch.device("cpu"))
    for part in torch.arange(num_samples).split(17):
        meter.add((first[part], second[part]) if heads else first[part], labels[part])
    scores = meter.scores()

    likely = probabilities(outputs)
    predicted = likely.argmax(1)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    assert scores.top1 == pytest.approx(100 * accuracy_score(labels, predicted))
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((precision, recall, f1))
    assert scores.loss == pytest.approx(functional.nll_loss(likely.log(), labels).item(), rel=1e-5)
    assert scores.class_top1 == pytest.approx(100 * accuracy_score(labels, first.argmax(1)))
    if heads:
        assert scores.distillation_top1 == pytest.approx(100 * accuracy_score(labels, second.argmax(1)))
    else:
        assert scores.distillation_top1 is None
    if num_classes > 5:
        top5 = top_k_accuracy_score(labels, likely, k=5, labels=range(num_classes))
        assert scores.top5 == pytest.approx(100 * top5)
    else:
        assert scores.top5 == 100.0


def test_agreement_counts_predictions_equal_to_the_teachers_labels() -> None:
    meter = Meter(3, torch.device("cpu"))
    meter.add(torch.eye(3), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0]))
    assert meter.scores().agreement == pytest.approx(200 / 3)
    assert meter.scores().top1 == pytest.approx(100 / 3)


def test_agreement_is_none_without_a_teacher() -> None:
    meter = Meter(3, torch.device("cpu"))
    meter.add(torch.eye(3), torch.tensor([0, 1, 2]))
    assert meter.scores().agreement is None


def test_a_class_that_is_never_predicted_counts_zero_precision() -> None:
    """Two images of each of two classes, all taken for the first."""
    counts = torch.tensor([[2, 0], [2, 2], [4, 0]])
    assert count_scores(counts) == pytest.approx((50.0, 0.25, 0.5, 1 / 3))


def matrix_scores(confusion: Tensor) -> tuple[float, ...]:
    """The scores from a confusion matrix, as the meter made them before: float64, in this order of operations."""
    counts = confusion.double()
    hits, targets, predictions = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    present = (targets + predictions) > 0
    macro = (hits / predictions.clamp_min(1.0), hits / targets.clamp_min(1.0))
    macro += (2.0 * hits / (targets + predictions).clamp_min(1.0),)
    return 100.0 * float(hits.sum() / counts.sum()), *(float(values[present].mean()) for values in macro)


def test_scores_are_those_of_the_confusion_matrix_to_the_last_digit() -> None:
    generator, num_classes = torch.Generator().manual_seed(0), 700
    for _ in range(3):
        logits = torch.randn(1500, num_classes, generator=generator)
        labels = torch.randint(num_classes - 50, (1500,), generator=generator)  # some classes have no images
        logits[torch.arange(1500), labels] += 3
        meter = Meter(num_classes, torch.device("cpu"))
        for part in torch.arange(1500).split(256):
            meter.add(logits[part], labels[part])
        cells = labels * num_classes + probabilities(logits).argmax(1)
        scores = meter.scores()
        expected = matrix_scores(cells.bincount(minlength=num_classes**2).view(num_classes, num_classes))
        assert (scores.top1, scores.precision, scores.recall, scores.f1) == expected


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.size = max(self.size, *sizes, 0)
        return result


def test_memory_grows_with_the_classes_not_with_their_square() -> None:
    num_classes, batch = 60_000, 4
    with Largest() as largest:
        meter = Meter(num_classes, torch.device("cpu"))
        meter.add(torch.zeros(batch, num_classes), torch.full((batch,), num_classes - 1))
        assert meter.scores().top1 == 0.0
        class_scores(torch.full((batch,), num_classes - 1), torch.arange(batch), tuple(map(str, range(num_classes))))
    assert largest.size <= batch * num_classes


def test_of_equal_classes_the_lower_comes_first() -> None:
    meter = Meter(7, torch.device("cpu"))
    meter.add(torch.zeros(7, 7), torch.arange(7))
    scores = meter.scores()
    assert (scores.top1, scores.top5) == (pytest.approx(100 / 7), pytest.approx(500 / 7))


def test_what_stands_higher_has_the_better_metric_then_the_lower_loss() -> None:
    row = {"top1": 50.0, "f1": 0.4, "loss": 1.0}
    assert standing(row, "top1") == (50.0, -1.0) == standing({**row, "f1": 0.1}, "top1")
    assert standing({**row, "loss": 0.9}, "top1") > standing(row, "top1") > standing({**row, "top1": 49.0}, "top1")
    assert standing({**row, "top1": math.nan}, "top1") < standing({**row, "top1": 0.0}, "top1")
    assert standing({"top1": 50.0}, "top1") < standing(row, "top1"), "a loss that is not there"
