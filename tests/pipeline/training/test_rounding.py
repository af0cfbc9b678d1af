"""Weights that are rounded to bfloat16 at once, against autocast, which rounds each where it is used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.models.students import STUDENTS, build_student
from pipeline.training.step import rounded_at_once


@pytest.mark.parametrize("name", STUDENTS)
def test_results_and_gradients_are_those_of_autocast(name: str) -> None:
    torch.manual_seed(0)
    model = build_student(name, num_classes=3, image_size=8, patch_size=4, width=48, depth=2)
    assert len(model.rounded) == 2 * (5 if model.has_pixels else 4)
    outcomes = []
    for forward in (model, rounded_at_once(model)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = forward(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(head.float().square().sum() for head in heads).backward()
        outcomes.append([*heads, *(parameter.grad for parameter in model.parameters())])
    for ours, expected in zip(*reversed(outcomes), strict=True):
        assert ours is not None and ours.dtype == expected.dtype and torch.equal(ours, expected)


def test_a_model_that_names_no_weights_or_is_compiled_is_called_as_it_is() -> None:
    model, student = nn.Linear(2, 2), build_student("vit", num_classes=3, depth=1)
    assert rounded_at_once(model) is model
    assert rounded_at_once(student) is not student
    student.compile()
    assert rounded_at_once(student) is student
