"""The students: small transformers, built by name from one geometry."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.errors import UsageError
from pipeline.models.students.attention import attention_maps, attention_rollout
from pipeline.models.students.deit import DeiT
from pipeline.models.students.fused import cpu as inner_cpp
from pipeline.models.students.fused import cuda as inner_triton
from pipeline.models.students.fused.interface import InnerBlock
from pipeline.models.students.layers import Student
from pipeline.models.students.titn import TITN
from pipeline.models.students.tnt import TNT, NestedBlock
from pipeline.models.students.vit import ViT

STUDENTS: dict[str, type[Student]] = {"vit": ViT, "deit": DeiT, "tnt": TNT, "titn": TITN}
PIXEL_GEOMETRY = ("pixel_size", "pixel_width", "pixel_heads")
FUSED = {"cpu": ("c++", inner_cpp), "cuda": ("triton", inner_triton)}
"""Kind of device to its fused inner block: the name, and the module."""
TENSOR_CORES = (8, 0)
"""Least compute capability with the tf32 products that Triton's takes."""

__all__ = [
    "STUDENTS",
    "TITN",
    "TNT",
    "DeiT",
    "Student",
    "ViT",
    "attention_maps",
    "attention_rollout",
    "build_student",
    "use_inner_block",
]


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
    why_not, fused = None, None
    if request != "plain":
        why_not, fused = _find_fused(blocks, device)
    if request == "fused" and why_not is not None:
        raise UsageError(f"inner_block: fused is not available here: {why_not}; use auto or plain")
    for block in blocks:
        block.fused = fused
    if not blocks:
        return "none"
    return FUSED[device.type][0] if fused else f"plain ({why_not})" if why_not else "plain"


def _find_fused(blocks: Sequence[NestedBlock], device: torch.device) -> tuple[str | None, InnerBlock | None]:
    """Return why there is no fused inner block, or None and the block."""
    if not blocks:
        return "the student has no inner blocks", None
    if device.type not in FUSED:
        return f"there is none for {device.type}", None
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < TENSOR_CORES:
        return f"it needs a GPU of compute capability {TENSOR_CORES[0]}.{TENSOR_CORES[1]} or more", None
    _, module = FUSED[device.type]
    why_not = module.why_not(*blocks[0].inner_geometry)
    return why_not, None if why_not else module.inner_block
