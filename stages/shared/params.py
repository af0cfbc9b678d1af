"""params.yaml as commands read it: its models exist."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pipeline.config.params import Params, load_params
from pipeline.config.recipes import StudentRecipe, TeacherRecipe
from pipeline.errors import UsageError
from pipeline.models.own import is_own
from pipeline.system.storage import read_if_exists
from stages.shared.paths import PARAMS


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
    for recipe in params.recipes.values():
        for name, teacher in recipe.teachers.items():
            check_teacher_recipe(teacher, f"recipes.{recipe.name}.teachers.{name}")
        for name, student in recipe.students.items():
            check_model(student, f"recipes.{recipe.name}.students.{name}")


def check_teacher_recipe(teacher: TeacherRecipe, path: str) -> None:
    """Check that a teacher's model exists, and takes the recipe's weights and stem; a user's file is not run.

    Args:
        teacher: The recipe.
        path: Its key, for messages.

    Raises:
        UsageError: It does not.
    """
    from pipeline.models import TEACHERS

    # The eight need no look into torchvision, which takes a second to import.
    if teacher.model not in TEACHERS or teacher.stem != "default":
        from pipeline.models.teachers import check_teacher

        check_teacher(teacher.model, path, weights=teacher.weights, stem=teacher.stem)


def own_code(params: Params) -> frozenset[str]:
    """Return the user's functions, `FILE.py:FUNCTION`, that the recipes name: what may be run to build a model."""
    teachers = (teacher.model for recipe in params.recipes.values() for teacher in recipe.teachers.values())
    students = (student.model for recipe in params.recipes.values() for student in recipe.students.values())
    return frozenset(filter(is_own, (*teachers, *students)))


def own_code_here() -> frozenset[str]:
    """Return `own_code` of the params.yaml in the working directory; nothing where there is none.

    For commands that need no params.yaml: without a `.py:` in it, it is not looked at more closely.
    """
    return own_code(read_params(PARAMS)) if b".py:" in (read_if_exists(PARAMS) or b"") else frozenset()


def check_model(student: StudentRecipe, path: str, settings: Collection[str] = ()) -> None:
    """Check that a student's architecture exists and takes the recipe's arguments.

    Args:
        student: The recipe.
        path: Its key, for messages.
        settings: The fields that are set for this run alone; those of a recipe's `student` are for all of its students.

    Raises:
        UsageError: It does not.
    """
    from pipeline.models import PAPERS_STUDENTS

    if student.model in PAPERS_STUDENTS and not (student.arguments or settings):  # PyTorch takes seconds to import
        return
    from pipeline.models.students import GEOMETRY, check_arguments, check_student, recorded_arguments, takes_argument

    check_student(student.model, f"{path}.model")
    for key in settings:
        if key in GEOMETRY and not takes_argument(student.model, key):
            raise UsageError(f"--set {key}: {student.model} takes no such argument; leave it out")
    if student.drop_path and "drop_path" not in recorded_arguments(student.model):
        raise UsageError(
            f"{path}.drop_path: {student.drop_path:g}, but {student.model} takes no such argument; set it to 0, and "
            "give it its own in arguments, as timm's drop_path_rate"
        )
    check_arguments(student.model, student.arguments, f"{path}.arguments")
