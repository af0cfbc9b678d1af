"""Scores of classes against hand arithmetic and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pipeline.training.metrics import ClassScores, class_scores, worst_first


def test_a_small_matrix_by_hand() -> None:
    confusion = torch.tensor([[3, 1, 0, 0], [2, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    targets, predictions = confusion.nonzero().repeat_interleave(confusion[confusion > 0], dim=0).flip(0).unbind(1)
    scores = class_scores(targets, predictions, ("a", "b", "c", "d"))
    assert scores == [
        ClassScores("a", 4, 0.75, 0.6, pytest.approx(6 / 9), "b", 1),
        ClassScores("b", 5, 0.2, 0.5, pytest.approx(2 / 7), "a", 2),
        ClassScores("c", 0, None, 0.0, 0.0, None, 0),
        ClassScores("d", 0, None, None, None, None, 0),
    ]
    assert [score.name for score in worst_first(scores)] == ["b", "a", "c", "d"]


def test_a_random_matrix_as_by_scikit_learn() -> None:
    draws = np.random.default_rng(0).integers(0, 12, (2, 900))
    targets, predictions = torch.from_numpy(draws)
    scores = class_scores(targets, predictions, tuple(map(str, range(12))))
    expected = precision_recall_fscore_support(draws[0], draws[1])
    for key, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [getattr(score, key) for score in scores] == pytest.approx(values.tolist()), key
    confusion = confusion_matrix(*draws)
    np.fill_diagonal(confusion, 0)
    assert [(score.confused_with, score.num_confused) for score in scores] == [
        (str(row.argmax()), row.max()) for row in confusion
    ], "of equals the first"
    ranked = [score.recall for score in worst_first(scores)]
    assert all(recall is not None for recall in ranked) and ranked == sorted(ranked, key=lambda recall: recall or 0.0)
