"""Fused blocks and PyTorch's modules against float64, on this device: `python -m benchmarks.exactness`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from rich.console import Console
from torch import nn

from benchmarks.measure import ROOT, Report, Row, begin, option_parser
from pipeline.config.params import load_params
from pipeline.config.recipes import StudentRecipe
from pipeline.models.students import FUSED, FUSED_OUTER, STUDENTS, build_student
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
            errors = guard.compare_inner(
                module.inner_block,
                block,
                options.device,
                precision=precision,
                training=True,
                num_patches=module.num_checked(options.device, *block.inner_geometry),
            )
            products = PRODUCTS.get((options.device.type, precision), "fp32")
            add(report, f"{name}; {precision}", errors, options, products=products)
    name, block = next(geometries())
    for precision in ("bf16", "fp32"):
        passes = FUSED_OUTER[options.device.type][1].PASSES
        errors = guard.compare_outer(passes, block.outer, options.device, precision=precision, training=True)
        what = f"{name.partition(':')[0]}: outer block; {precision}"
        add(report, what, errors, options, products=precision)
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


def add(
    report: Report, what: str, errors: Mapping[str, guard.Errors], options: argparse.Namespace, *, products: str
) -> None:
    """Add the errors of a block's results and gradients beside the guard's bound: MARGIN times the modules' error."""
    for part, found in errors.items():
        if not math.isfinite(found.fused):
            report.extra["not_finite"].append(f"{what}, {part}")
            continue
        bound = guard.MARGIN * found.plain + guard.SLACK
        report.rows.append(
            Row(
                what=f"{what}, {part}",
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
    report.write(options.json)  # the next one may end the process


def _block(student: StudentRecipe, image_size: int) -> NestedBlock:
    torch.manual_seed(0)
    arguments = student_arguments(student, num_classes=2, image_size=image_size)
    model: nn.Module = build_student(student.model, **{**arguments, "depth": 1})
    return next(module for module in model.modules() if isinstance(module, NestedBlock))


if __name__ == "__main__":
    main()
