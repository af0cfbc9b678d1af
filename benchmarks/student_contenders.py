"""The contenders of `benchmarks.students`: their settings, and the steps and passes that are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import steps, training
from benchmarks.measure import Report
from benchmarks.student_peers import PEERS
from benchmarks.synthetic import NUM_CLASSES, SIZE
from pipeline.config.recipes import StudentRecipe
from pipeline.errors import UsageError
from pipeline.losses import objective
from pipeline.models.students import FUSED_OUTER, STUDENTS, Student, build_student, use_inner_block, use_outer_block
from pipeline.training.batches import Batch
from pipeline.training.execution import Execution
from pipeline.training.optimization import build_optimizer
from stages.shared.runs import student_arguments

TRAINING, FORWARD = "training step", "forward"
EAGER, COMPILED, GRAPHS, CAPTURED = "eager", "compiled", "compiled with CUDA graphs", "captured"


@dataclass(frozen=True)
class Contender:
    """A model and how it runs, in plain values, so that another process can build it too.

    Attributes:
        model: One of our students, or a key of PEERS.
        precision: `fp32`, or `bf16` for bfloat16 autocast.
        run_as: EAGER, COMPILED or GRAPHS; ours on CUDA also CAPTURED, as training runs there.
        blocks: Of ours, whether they are `plain` or `fused`; None of all others. Those of a compiled one are fused
            inside patches alone.
        kind: What runs for it: `plain`, `c++`, `triton`.
    """

    model: str
    precision: str
    run_as: str = EAGER
    blocks: str | None = None
    kind: str | None = None

    @property
    def name(self) -> str:
        """Model and setting, as the tables name them."""
        return " ".join(part for part in (self.model, self.kind, self.precision, self.run_as) if part)

    @property
    def is_ours(self) -> bool:
        """Whether it is one of this project's students."""
        return self.model in STUDENTS


def recipe(student: str, depth: int | None = None) -> StudentRecipe:
    """Return a student's recipe of cifar100, with `depth` blocks where given."""
    student_recipe = training.recipe().students[student]
    return student_recipe if depth is None else dataclasses.replace(student_recipe, depth=depth)


def contenders(
    student: str, report: Report, device: torch.device, *, depth: int | None, compiled: bool
) -> list[Contender]:
    """Return a student's own settings and its peers', ours first.

    Peers that are not installed, and a fused inner block that is not available, are named in the report.

    Args:
        student: A key of STUDENTS.
        report: Receives what is missing.
        device: Where they run.
        depth: Blocks; None takes the recipe's.
        compiled: Whether they are compiled too.
    """
    ways = [EAGER, *([COMPILED] if compiled else []), *([GRAPHS] if compiled and device.type == "cuda" else [])]
    kinds = block_kinds(student, report, device, depth)
    versions: list[dict[str, Any]]
    versions = [{"model": student, "blocks": request, "kind": kind} for request, kind in kinds.items()]
    versions += [{"model": name} for name, peer in PEERS.items() if student in peer.beside and report.has(peer.package)]
    return [
        Contender(**version, precision=precision, run_as=way)
        for version in versions
        for way in [*ways, *([CAPTURED] if device.type == "cuda" and version["model"] in STUDENTS else [])]
        for precision in ("fp32", "bf16")
        if way != COMPILED or version.get("blocks") != "fused" or STUDENTS[student].has_pixels
    ]


def block_kinds(student: str, report: Report, device: torch.device, depth: int | None) -> dict[str, str]:
    """Map `plain`, and `fused` where the device can serve it, to the kind that runs."""
    kinds, use = {"plain": "plain"}, use_inner_block if STUDENTS[student].has_pixels else use_outer_block
    if device.type in FUSED_OUTER or STUDENTS[student].has_pixels:
        try:
            kinds["fused"] = use(_student(student, depth).to(device), "fused", device)
        except UsageError as error:
            report.extra.setdefault("left_out", {})[f"{student} fused"] = str(error)
    return kinds


def build(contender: Contender, device: torch.device, *, student: str, depth: int | None) -> nn.Module:
    """Build a contender's model on the device, compiled where it says so.

    Args:
        contender: Who.
        device: Where it runs.
        student: Our student whose geometry a peer takes.
        depth: Blocks; None takes the recipe's.
    """
    torch.manual_seed(0)
    if contender.is_ours:
        network = _student(contender.model, depth).to(device)
        if contender.blocks == "fused":
            compiled = contender.run_as != EAGER
            use_inner_block(network, "auto", device, precision=contender.precision)
            use_outer_block(network, "auto", device, precision=contender.precision, compiled=compiled)
        model: nn.Module = network
    else:
        model = PEERS[contender.model].build(recipe(student, depth)).to(device)
    if contender.run_as in (COMPILED, GRAPHS):
        model.compile(dynamic=False, mode="reduce-overhead" if contender.run_as == GRAPHS else None)
    return model


def turn(
    contender: Contender, batch: Batch, operation: str, *, student: str, depth: int | None
) -> Callable[[], object]:
    """Return one turn of a contender.

    Args:
        contender: Who.
        batch: See benchmarks.steps.synthetic_batch; its device is the contender's.
        operation: TRAINING or FORWARD.
        student: Our student whose geometry, optimiser and loss it takes.
        depth: Blocks; None takes the recipe's.
    """
    model, precision = build(contender, batch.images.device, student=student, depth=depth), contender.precision
    if operation == FORWARD:
        return steps.forward_pass(model.eval(), batch, precision=precision)
    student_recipe = recipe(student, depth)
    captured = contender.run_as == CAPTURED
    optimizer = steps.at_rest(build_optimizer(model.train(), student_recipe, captured=captured))
    if not contender.is_ours:
        return steps.plain_step(model, batch, optimizer=optimizer, precision=precision)
    return steps.our_step(
        model,
        batch,
        recipe=student_recipe,
        objective=objective(student_recipe),
        optimizer=optimizer,
        precision=precision,
        micro_batch=Execution.of(student_recipe, batch.images.device).micro_batch,
        captured=captured,
    )


def _student(name: str, depth: int | None) -> Student:
    arguments = student_arguments(recipe(name, depth), num_classes=NUM_CLASSES, image_size=SIZE)
    return build_student(name, **arguments)
