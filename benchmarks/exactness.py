"""The fused inner block and PyTorch's modules against float64, on this device: `python -m benchmarks.exactness`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from torch import nn

from benchmarks.measure import ROOT, Row, begin, option_parser
from pipeline.config.params import load_params
from pipeline.config.recipes import StudentRecipe
from pipeline.models.students import FUSED, STUDENTS, build_student
from pipeline.models.students.fused import guard
from pipeline.models.students.tnt import NestedBlock
from stages.shared.runs import student_arguments

PRODUCTS = {("cuda", "bf16"): "tf32", ("cuda", "fp32"): "three tf32"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison; its rows are errors, not times."""
    options = option_parser(__doc__).parse_args(arguments)
    report = begin("Exactness", options)
    report.extra |= {"left_out": {}, "not_finite": []}
    if options.device.type not in FUSED:
        raise SystemExit(f"--device {options.device}: has no fused inner block; take {' or '.join(FUSED)}")
    for name, block in list(geometries())[: 1 if options.quick else None]:
        for precision in ("bf16", "fp32"):
            module = FUSED[options.device.type][1]
            why_not = module.why_not(*block.inner_geometry)
            if why_not is not None:
                report.extra["left_out"][name] = why_not
                continue
            for row in compare(name, block, precision, options):
                if math.isfinite(row.ours):
                    report.rows.append(row)
                else:
                    report.extra["not_finite"].append(row.what)
            report.write(options.json)  # the next one may end the process
    report.finish(Console(), options.json)
    if report.extra["not_finite"]:
        raise SystemExit(f"not finite: {'; '.join(report.extra['not_finite'])}")


def geometries() -> Iterator[tuple[str, NestedBlock]]:
    """Yield a block of each inner geometry that a student of params.yaml has, and its name, TITN's first."""
    seen = set()
    recipes = load_params(ROOT / "params.yaml").recipes
    for recipe in [recipes["cifar100"], *recipes.values()]:
        for name, student in recipe.students.items():
            if student.model not in STUDENTS or not STUDENTS[student.model].has_pixels:
                continue
            geometry = student.patch_size // student.pixel_size, student.pixel_width, student.pixel_heads
            if geometry not in seen:
                seen.add(geometry)
                block = _block(student, recipe.dataset.image_size)
                tokens, width, heads, hidden = block.inner_geometry
                yield (
                    f"{name} of {recipe.name}: {tokens} tokens of width {width}, {heads} heads, {hidden} hidden",
                    block,
                )


def compare(name: str, block: NestedBlock, precision: str, options: argparse.Namespace) -> list[Row]:
    """Compare a block's results and gradients with the guard's bound: MARGIN times the modules' error."""
    module = FUSED[options.device.type][1]
    errors = guard.compare_inner(
        module.inner_block,
        block,
        options.device,
        precision=precision,
        training=True,
        num_patches=module.num_checked(options.device, *block.inner_geometry),
    )
    products = PRODUCTS.get((options.device.type, precision), "fp32")
    rows = []
    for what, found in errors.items():
        bound = guard.MARGIN * found.plain + guard.SLACK
        rows.append(
            Row(
                what=f"{name}; {precision}, {what}",
                ours=found.fused,
                peer=bound,
                peer_name="the guard's bound",
                unit="of the largest value",
                ratio=bound / max(found.fused, torch.finfo(torch.float64).tiny),
                goal=1.0,
                spread={},
                details={"plain": found.plain, "products": products},
            )
        )
    return rows


def _block(student: StudentRecipe, image_size: int) -> NestedBlock:
    torch.manual_seed(0)
    arguments = student_arguments(student, num_classes=2, image_size=image_size)
    model: nn.Module = build_student(student.model, **{**arguments, "depth": 1})
    return next(module for module in model.modules() if isinstance(module, NestedBlock))


if __name__ == "__main__":
    main()
