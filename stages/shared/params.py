"""params.yaml as commands read it: its models exist."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.params import Params, load_params
from pipeline.config.recipes import StudentRecipe
from pipeline.errors import UsageError


def read_params(path: Path) -> Params:
    """Load params.yaml, and check that every recipe's teachers and students can be built.

    Raises:
        UsageError: The file or a name in it is wrong.
    """
    from pipeline.models import TEACHERS

    params = load_params(path)
    for recipe in params.recipes.values():
        for name in recipe.teachers:
            if name not in TEACHERS:
                where = f"recipes.{recipe.name}.teachers.{name}"
                raise UsageError(f"{where}: {name!r} is no teacher; choose from {', '.join(TEACHERS)}")
        for name, student in recipe.students.items():
            check_model(student, f"recipes.{recipe.name}.students.{name}")
    return params


def check_model(student: StudentRecipe, path: str) -> None:
    """Check that a student's architecture exists and takes the recipe's arguments.

    Args:
        student: The recipe.
        path: Its key, for messages.

    Raises:
        UsageError: It does not.
    """
    from pipeline.models.students import check_arguments, check_student, recorded_arguments

    check_student(student.model, f"{path}.model")
    if student.drop_path and "drop_path" not in recorded_arguments(student.model):
        raise UsageError(
            f"{path}.drop_path: {student.drop_path:g}, but {student.model} takes no such argument; set it to 0, and "
            "give it its own in arguments, as timm's drop_path_rate"
        )
    check_arguments(student.model, student.arguments, f"{path}.arguments")
