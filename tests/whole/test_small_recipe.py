"""The recipe `folder-small` compresses: its students cost less than each of its teachers."""

from __future__ import annotations

import torch

from pipeline.config.params import load_params
from pipeline.models.counting import flops_per_image
from pipeline.models.students import build_student
from pipeline.models.teachers import build_teacher
from stages.shared.runs import student_arguments
from tests.support.project import ROOT


def test_each_student_costs_less_than_each_teacher() -> None:
    recipe = load_params(ROOT / "params.yaml").recipes["folder-small"]
    size = recipe.dataset.image_size
    with torch.device("meta"):
        teachers = [flops_per_image(build_teacher(name, num_classes=10), size) for name in recipe.teachers]
        students = [
            flops_per_image(build_student(one.model, **student_arguments(one, num_classes=10, image_size=size)), size)
            for one in recipe.students.values()
        ]
    assert len(students) == 4 and max(students) < min(teachers)
