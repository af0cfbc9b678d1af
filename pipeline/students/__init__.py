"""The students: small transformers, built by name from one geometry."""

from __future__ import annotations

import torch

from pipeline.errors import UsageError
from pipeline.students import inner_cpp
from pipeline.students.deit import DeiT
from pipeline.students.inner_blocks import InnerBlock
from pipeline.students.layers import Student
from pipeline.students.titn import TITN
from pipeline.students.tnt import TNT, NestedBlock, inner_weights
from pipeline.students.vit import ViT

STUDENTS: dict[str, type[Student]] = {"vit": ViT, "deit": DeiT, "tnt": TNT, "titn": TITN}
PIXEL_GEOMETRY = ("pixel_size", "pixel_width", "pixel_heads")
FUSED = {"cpu": "c++"}
"""Kind of device to the name of the fused inner block that it has."""

__all__ = ["STUDENTS", "TITN", "TNT", "DeiT", "Student", "ViT", "build_student", "use_inner_block"]


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


def use_inner_block(student: Student, request: str, device: torch.device) -> str:
    """Choose how a student's inner blocks are computed.

    Args:
        student: Changed in place; its parameters stay, its results but for rounding.
        request: `plain`, by PyTorch's own operations; `fused`; or `auto`, fused where that is
            available.
        device: Where the student runs.

    Returns:
        What runs: `c++`, `triton`, `plain`, `plain (why nothing else)`, or `none` where there are no inner blocks.

    Raises:
        UsageError: `fused` is asked for and not available.
    """
    blocks = [module for module in student.modules() if isinstance(module, NestedBlock)]
    why_not, fused = _fused(blocks[0], device) if blocks else ("the student has no inner blocks", None)
    if request == "fused" and why_not is not None:
        raise UsageError(f"inner_block: fused is not available here: {why_not}; use auto or plain")
    for block in blocks:
        block.fused = fused if request != "plain" and why_not is None else None
    if not blocks:
        return "none"
    if request == "plain":
        return "plain"
    return FUSED[device.type] if why_not is None else f"plain ({why_not})"


def _fused(block: NestedBlock, device: torch.device) -> tuple[str | None, InnerBlock | None]:
    """Return why there is no fused inner block of this geometry for a device, or None and the block."""
    if device.type not in FUSED:
        return f"there is none for {device.type}", None
    module = inner_cpp
    hidden = len(inner_weights(block.inner, block.pixel_norm).hidden_bias)
    geometry = (block.num_pixels, block.pixel_norm.normalized_shape[0], block.inner.attention.num_heads, hidden)
    return module.why_not(*geometry), module.inner_block
