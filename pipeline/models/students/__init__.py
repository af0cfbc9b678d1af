"""The students: small transformers, built by name from a shared geometry and arguments of their own.

To add a student, write one file here, one line in STUDENTS and one recipe in params.yaml. Models of timm and those that
a user's function builds need neither, see pipeline.models.students.foreign.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from pipeline.errors import UsageError
from pipeline.models import PAPERS_STUDENTS
from pipeline.models.network import decide_in_fp32
from pipeline.models.students.attention import attention_maps, attention_rollout, outer_blocks
from pipeline.models.students.deit import DeiT
from pipeline.models.students.foreign import (
    build_foreign,
    check_foreign,
    check_foreign_arguments,
    is_foreign,
    num_heads,
)
from pipeline.models.students.fused import cuda as inner_triton
from pipeline.models.students.fused import guard, outer_cuda
from pipeline.models.students.fused import inner as inner_cpp
from pipeline.models.students.fused import outer as outer_cpp
from pipeline.models.students.fused.interface import InnerBlock
from pipeline.models.students.fused.passes import Passes
from pipeline.models.students.layers import EncoderBlock, Student
from pipeline.models.students.titn import TITN
from pipeline.models.students.tnt import TNT, NestedBlock
from pipeline.models.students.vit import ViT

STUDENTS: dict[str, type[Student]] = {"vit": ViT, "deit": DeiT, "tnt": TNT, "titn": TITN}
GEOMETRY = ("patch_size", "pixel_size", "width", "depth", "num_heads", "pixel_width", "pixel_heads")
"""The arguments that are fields of every student's recipe."""
SHARED_ARGUMENTS = ("num_classes", "image_size", *GEOMETRY, "drop_path")
"""The arguments offered to every student; it gets those that its constructor takes."""
MAX_ARGUMENT = 1_000_000
"""Largest absolute value of a student's own argument."""
FUSED = {"cpu": ("c++", inner_cpp), "cuda": ("triton", inner_triton)}
"""Kind of device to the name and the module of its fused inner block."""
FUSED_OUTER: dict[str, tuple[str, ModuleType]] = {"cpu": ("c++", outer_cpp), "cuda": ("torch.compile", outer_cuda)}
"""The same of its fused passes of outer blocks."""
SLOW_TO_START = ("cuda",)
"""Kinds of devices whose passes every process prepares anew, for seconds, so that only training is worth it."""
TENSOR_CORES = (8, 0)
"""Least compute capability of a GPU with the tf32 products that the Triton kernels use."""

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
    "check_arguments",
    "check_student",
    "has_distillation_head",
    "is_foreign",
    "recorded_arguments",
    "use_inner_block",
    "use_outer_block",
]


def build_student(name: str, **arguments: Any) -> Student:
    """Build a student from shared arguments, of which it gets those that its constructor takes, and from its own.

    Args:
        name: A key of STUDENTS, `timm/NAME`, or `FILE.py:FUNCTION`, which is run.
        arguments: `num_classes`, any other of SHARED_ARGUMENTS, and the student's own.

    Returns:
        The student, randomly initialised from PyTorch's global generator. In evaluation mode its logits are float32
        under autocast too.

    Raises:
        UsageError: The name is unknown, the geometry does not divide evenly, or the constructor fails.
        TypeError: An argument is neither the constructor's nor in SHARED_ARGUMENTS.
    """
    if is_foreign(name):
        return _deciding_in_fp32(build_foreign(name, **arguments))
    takes = _constructor(name)
    arguments = {key: value for key, value in arguments.items() if key in takes or key not in SHARED_ARGUMENTS}
    try:
        return _deciding_in_fp32(STUDENTS[name](**arguments))
    except (ArithmeticError, RuntimeError, ValueError) as error:  # PyTorch's, of sizes that cannot be
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UsageError(f"model {name} cannot be built with {given}: {' '.join(str(error).split())}") from error


def _deciding_in_fp32(student: Student) -> Student:
    for layer in student.logit_layers:
        decide_in_fp32(layer)
    return student


def has_distillation_head(name: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether a student has a head for the teacher's labels.

    Of a key of STUDENTS it is known; any other is built and tried on a batch, once a process.

    Args:
        name: See `build_student`.
        arguments: Likewise, as a checkpoint records them.

    Raises:
        UsageError: It cannot be built, or does not give the logits of one head or of two.
    """
    return num_heads(name, arguments) == 2 if is_foreign(name) else STUDENTS[name].has_distillation_head


def check_student(name: str, path: str) -> None:
    """Check that a student exists, without building it.

    Args:
        name: See `build_student`.
        path: Its key, for messages.

    Raises:
        UsageError: It does not.
    """
    if is_foreign(name):
        check_foreign(name, path)
    elif name not in STUDENTS:
        raise UsageError(
            f"{path}: {name!r} is no student; choose from {', '.join(STUDENTS)}, or write timm/NAME or FILE.py:FUNCTION"
        )


def recorded_arguments(name: str) -> tuple[str, ...]:
    """Return which of SHARED_ARGUMENTS a student's checkpoint names.

    Raises:
        UsageError: The name is unknown.
    """
    if is_foreign(name):
        return "num_classes", "image_size"
    takes = _constructor(name)
    # The paper's have always named the whole geometry, with what the constructor does not take.
    return tuple(key for key in SHARED_ARGUMENTS if key in takes or name in PAPERS_STUDENTS)


def takes_argument(name: str, argument: str) -> bool:
    """Return whether a student's constructor is given one of SHARED_ARGUMENTS and uses it.

    Raises:
        UsageError: The name is unknown.
    """
    return argument in ("num_classes", "image_size") if is_foreign(name) else argument in _constructor(name)


def check_arguments(name: str, arguments: Mapping[str, Any], path: str) -> None:
    """Check a student's own arguments: those that its constructor takes beside SHARED_ARGUMENTS.

    Those of timm's models and of a user's function are known only to them.

    Args:
        name: See `build_student`.
        arguments: From a recipe or a checkpoint.
        path: Their key, for messages.

    Raises:
        UsageError: An argument is unknown or of another type, or one without a default is missing; the message names
            the key, the value and what is allowed.
    """
    for key, value in arguments.items():
        if type(value) in (int, float) and not abs(value) <= MAX_ARGUMENT:
            raise UsageError(f"{path}.{key}: {value!r} is out of range; allowed is up to {MAX_ARGUMENT:,} either way")
    if is_foreign(name):
        check_foreign_arguments(name, arguments, path)
        return
    takes = {key: parameter for key, parameter in _constructor(name).items() if key not in SHARED_ARGUMENTS}
    types = typing.get_type_hints(STUDENTS[name].__init__)
    allowed = f"allowed are {', '.join(takes)}" if takes else f"{name} has none of its own"
    for key, value in arguments.items():
        if key in SHARED_ARGUMENTS:
            raise UsageError(f"{path}.{key}: {value!r} does not belong there; {key} is given beside arguments")
        if key not in takes:
            raise UsageError(f"{path}.{key}: {value!r}, but {name} takes no such argument; {allowed}")
        possible = typing.get_args(types[key]) or (types[key],)
        if type(value) not in possible and not (type(value) is int and float in possible):
            raise UsageError(
                f"{path}.{key}: {value!r} is not of the type {' or '.join(kind.__name__ for kind in possible)}"
            )
    for key, parameter in takes.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise UsageError(f"{path}.{key}: missing; {name} needs it")


def _constructor(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the keyword arguments of a student's constructor."""
    if name not in STUDENTS:
        raise UsageError(f"model {name!r} is not a student; choose one of {', '.join(STUDENTS)}")
    return inspect.signature(STUDENTS[name]).parameters


def use_inner_block(
    student: Student,
    request: str,
    device: torch.device,
    *,
    precision: str = "fp32",
    training: bool = True,
    agree: Callable[[str | None], str | None] = lambda why_not: why_not,
) -> str:
    """Choose how a student's inner blocks are computed.

    A fused block is compared with the plain one first, see pipeline.models.students.fused.guard.

    Args:
        student: Changed in place. Its parameters stay; its results change by rounding alone.
        request: `plain`, by PyTorch's own operations; `fused`; or `auto`, fused where that is available.
        device: Where the student runs.
        precision: With which it runs, `fp32` or `bf16`.
        training: Whether gradients will be computed.
        agree: Given why the block is not fused here, or None, it returns why it is not on any rank.

    Returns:
        What runs: `c++`, `triton`, `plain`, `plain (why not fused)`, or `none` without inner blocks.

    Raises:
        UsageError: `fused` is asked for and not available, or trying it has left the process without its GPU.
    """
    blocks = [module for module in student.modules() if isinstance(module, NestedBlock)]
    why_not, fused = None, None
    if request != "plain" and (blocks or request == "fused"):
        why_not, fused = _find_fused(blocks, device, precision, training)
        why_not = _decide("inner_block", request, agree(why_not))
    for block in blocks:
        block.fused, block.fused_on = None if why_not else fused, device.type
    return _what_runs(blocks, why_not, FUSED[device.type][0] if fused else "plain")


def use_outer_block(
    student: Student,
    request: str,
    device: torch.device,
    *,
    precision: str = "fp32",
    training: bool = True,
    compiled: bool = False,
    agree: Callable[[str | None], str | None] = lambda why_not: why_not,
) -> str:
    """Choose how the blocks between a student's patches compute what is between their products.

    A fused block is compared with the plain one first, as in `use_inner_block`.

    Args:
        student: Changed in place. Its parameters stay; its results change by rounding alone.
        request: `plain`, by PyTorch's own operations; `fused`, in passes of our own; or `auto`, fused where that is
            available, and on a GPU only in training.
        device: Where the student runs.
        precision: With which it runs, `fp32` or `bf16`.
        training: Whether gradients will be computed.
        compiled: Whether torch.compile prepares the student, which joins the plain operations itself.
        agree: Given why the block is not fused here, or None, it returns why it is not on any rank.

    Returns:
        What runs: `c++`, `torch.compile`, `plain`, `plain (why not fused)`, or `none` without such blocks.

    Raises:
        UsageError: `fused` is asked for and not available.
    """
    blocks = outer_blocks(student)
    if request == "auto" and not _suits_outer(blocks, device, training, compiled):
        request = "plain"
    why_not, passes = None, None
    if request != "plain" and (blocks or request == "fused"):
        why_not, passes = _find_passes(blocks, device, precision, training, compiled)
        why_not = _decide("outer_block", request, agree(why_not))
    for block in blocks:
        block.passes, block.passes_on = None if why_not else passes, device.type
    return _what_runs(blocks, why_not, FUSED_OUTER[device.type][0] if passes else "plain")


def _suits_outer(blocks: Sequence[EncoderBlock], device: torch.device, training: bool, compiled: bool) -> bool:
    """Tell whether fused passes are for such a run at all; that they are not is no fault of the machine's."""
    if compiled or device.type not in FUSED_OUTER or (device.type in SLOW_TO_START and not training):
        return False
    _, module = FUSED_OUTER[device.type]
    return not blocks or module.misfit(*blocks[0].geometry) is None


def _decide(field: str, request: str, why_not: str | None) -> str | None:
    """Return why a block is not fused, unless it was asked for by name."""
    if request == "fused" and why_not is not None:
        raise UsageError(f"{field}: fused is not available here: {why_not}; use auto or plain")
    return why_not


def _what_runs(blocks: Sequence[object], why_not: str | None, chosen: str) -> str:
    if not blocks:
        return "none"
    return f"plain ({why_not})" if why_not else chosen


def _find_passes(
    blocks: Sequence[EncoderBlock], device: torch.device, precision: str, training: bool, compiled: bool
) -> tuple[str | None, Passes | None]:
    """Return why there are no fused passes that can be relied on, or None, and the passes."""
    if not blocks:
        return "the student is none of ours", None
    if compiled:
        return "torch.compile, which the recipe asks for, joins operations itself", None
    if device.type not in FUSED_OUTER:
        return f"there is none for {device.type}", None
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU", None
    _, module = FUSED_OUTER[device.type]
    why_not = module.why_not(*blocks[0].geometry) or guard.why_not_outer(
        module.PASSES, blocks[0], device, precision=precision, training=training, explain=module.explain
    )
    return why_not, None if why_not else module.PASSES


def _find_fused(
    blocks: Sequence[NestedBlock], device: torch.device, precision: str, training: bool
) -> tuple[str | None, InnerBlock | None]:
    """Return why there is no fused inner block that can be relied on, or None, and the block."""
    if not blocks:
        return "the student has no inner blocks", None
    if device.type not in FUSED:
        return f"there is none for {device.type}", None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "there is no GPU", None
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if torch.cuda.get_device_capability(device) < TENSOR_CORES:
            return f"it needs a GPU of compute capability {TENSOR_CORES[0]}.{TENSOR_CORES[1]} or more", None
    _, module = FUSED[device.type]
    geometry = blocks[0].inner_geometry
    why_not = module.why_not(*geometry) or guard.why_not_inner(
        module.inner_block,
        blocks[0],
        device,
        precision=precision,
        training=training,
        num_patches=module.num_checked(device, *geometry),
        explain=module.explain,
    )
    return why_not, None if why_not else module.inner_block
