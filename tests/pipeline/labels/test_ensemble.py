"""Several teachers that answer as one: the mean of their probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import NumericalError
from pipeline.labels.teacher import Ensemble, Teacher, label_view
from tests.pipeline.labels.test_teacher import MEAN, NUM_CLASSES, NUM_SAMPLES, STD, make_teacher, make_views

IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


class Fixed(nn.Module):
    """Gives every image the same logits."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def fixed(*probabilities: float) -> Teacher:
    return Teacher(Fixed(*(math.log(value) + 7 for value in probabilities)), MEAN, STD, "fp32", batch_size=4)


def test_the_probability_is_the_mean_and_the_label_its_argmax() -> None:
    ensemble = Ensemble([fixed(0.5, 0.3, 0.2), fixed(0.1, 0.3, 0.6), fixed(0.24, 0.66, 0.1)])
    expected = torch.tensor([0.28, 0.42, 0.30])
    logits = ensemble.logits(ensemble.normalize(IMAGES))
    torch.testing.assert_close(logits.exp(), expected.expand(2, 3))
    torch.testing.assert_close(logits, expected.log().expand(2, 3))
    answers = ensemble.answers([IMAGES], topk=2)
    assert answers.labels.tolist() == [1, 1], "of the members none but the last says so"
    assert answers.classes is not None and answers.classes.tolist() == [[1, 2]] * 2
    assert answers.probabilities is not None and np.allclose(answers.probabilities, [[0.42, 0.3]] * 2, atol=2**-11)


def test_each_member_normalises_the_images_itself() -> None:
    module = make_teacher().module
    first, second = (Teacher(module, mean, STD, "fp32", 16) for mean in (MEAN, (0.1, 0.2, 0.3)))
    views = make_views()
    batch = views.batch(1, torch.arange(NUM_SAMPLES)).images
    shares = [teacher.logits(teacher.normalize(batch)).softmax(1) for teacher in (first, second)]
    kept = label_view(Ensemble([first, second]), views, 1, NUM_CLASSES)
    expected, order = ((shares[0] + shares[1]) / 2).sort(1, descending=True)
    assert kept.classes is not None and np.array_equal(kept.classes, order.numpy())
    assert kept.probabilities is not None and np.allclose(kept.probabilities, expected.numpy(), atol=2**-11)


def test_a_member_beside_itself_changes_no_label() -> None:
    teacher, views = make_teacher(), make_views()
    both = label_view(Ensemble([teacher, teacher]), views, 2)
    assert np.array_equal(both.labels, label_view(teacher, views, 2).labels)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_member_whose_logit_is_not_finite_is_not_outvoted(poison: float) -> None:
    broken = Teacher(Fixed(1.0, poison, 0.0), MEAN, STD, "fp32", 4)
    with pytest.raises(NumericalError, match="not finite"):
        Ensemble([fixed(0.5, 0.3, 0.2), broken]).answers([IMAGES])


def test_it_runs_in_batches_that_every_member_can_take() -> None:
    assert Ensemble([make_teacher(16), make_teacher(7)]).batch_size == 7
