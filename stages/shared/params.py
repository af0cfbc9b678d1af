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
    params = load_params(path)
    check_models(params)
    return params


def check_models(params: Params) -> None:
    """Check that every recipe's teachers and students can be built.

    Raises:
        UsageError: A name is wrong, or a student does not take its arguments.
    """
    from pipeline.models import TEACHERS

    for recipe in params.recipes.values():
        for name in recipe.teachers:
            if name not in TEACHERS:
                where = f"recipes.{recipe.name}.teachers.{name}"
                raise UsageError(f"{where}: {name!r} is no teacher; choose from {', '.join(TEACHERS)}")
        for name, student in recipe.students.items():
            check_model(student, f"recipes.{recipe.name}.students.{name}")


def check_model(student: StudentRecipe, path: str) -> None:
    """Check that a student's architecture exists and takes the recipe's arguments.

    Args:
        student: The recipe.
        path: Its key, for messages.

    Raises:
        UsageError: It does not.
    """
    from pipeline.models.students import STUDENTS, check_arguments

    if student.model not in STUDENTS:
        raise UsageError(f"{path}.model: {student.model!r} is no student; choose from {', '.join(STUDENTS)}")
    check_arguments(student.model, student.arguments, f"{path}.arguments")
