"""The students: small transformers, built by name from one geometry."""

from __future__ import annotations

from pipeline.errors import UsageError
from pipeline.students.deit import DeiT
from pipeline.students.layers import Student
from pipeline.students.titn import TITN
from pipeline.students.tnt import TNT
from pipeline.students.vit import ViT

STUDENTS: dict[str, type[Student]] = {"vit": ViT, "deit": DeiT, "tnt": TNT, "titn": TITN}
PIXEL_GEOMETRY = ("pixel_size", "pixel_width", "pixel_heads")

__all__ = ["STUDENTS", "TITN", "TNT", "DeiT", "Student", "ViT", "build_student"]


def build_student(name: str, **geometry: int) -> Student:
    """Build a student from the full geometry, of which it takes what it has.

    Args:
        name: A key of STUDENTS.
        geometry: `num_classes`, and any other arguments of the constructors. Those of the inner path are
            dropped for students without one.

    Returns:
        The student, randomly initialised from PyTorch's global generator.

    Raises:
        UsageError: Where the name is unknown or the geometry does not divide evenly.
    """
    if name not in STUDENTS:
        raise UsageError(f"model {name!r} is not a student; choose one of {', '.join(STUDENTS)}")
    student = STUDENTS[name]
    if not student.has_pixels:
        geometry = {key: value for key, value in geometry.items() if key not in PIXEL_GEOMETRY}
    return student(**geometry)
