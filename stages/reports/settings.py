"""Table 1: the students' settings and parameters, known before anything is run."""

from __future__ import annotations

import torch

from pipeline.config.recipes import Recipe, StudentRecipe
from pipeline.models.counting import num_parameters
from pipeline.models.students import STUDENTS, build_student
from pipeline.report import paper
from pipeline.report.tables import Table, difference, number
from stages.distill import student_recipe
from stages.shared.runs import student_arguments

SETTINGS = ("image_size", "width", "pixel_width", "patch_size", "pixel_size", "depth")  # Table 1's order
NUM_CLASSES = 100  # of the data set that the paper counts parameters on


def settings_table(recipe: Recipe) -> Table:
    """Return Table 1 of a recipe's students, with their parameters at the paper's 100 classes."""
    columns = ["student", "image size", "patch dimension", "pixel dimension", "patch size", "pixel size", "depth"]
    columns += ["parameters, M", "paper: Table 1", "Table 1: difference", "paper: Table 3", "Table 3: difference"]
    rows = [_row(recipe, name, student_recipe(recipe, name, {})) for name in recipe.students]
    note = f"Sizes in pixels; the paper's setting follows in brackets where it is another. Parameters at {NUM_CLASSES} "
    note += (
        "classes, as the paper counts them. Its Tables 1 and 3 disagree on ViT and DeiT; ours are built after Table 3."
    )
    optional = ("image size", "depth", "Table 1: difference", "paper: Table 1", "pixel size", "pixel dimension")
    return Table("Table 1. Settings and parameters of the students", columns, rows, note, optional)


def distilled_students(recipe: Recipe) -> list[str]:
    """Return the names of a recipe's students that have a distillation head."""
    return [name for name in recipe.students if STUDENTS[student_recipe(recipe, name, {}).model].has_distillation_head]


def _row(recipe: Recipe, name: str, student: StudentRecipe) -> list[str]:
    image_size = recipe.dataset.image_size
    arguments = student_arguments(student, num_classes=NUM_CLASSES, image_size=image_size)
    with torch.device("meta"):
        count = num_parameters(build_student(student.model, **arguments)) / 1e6
    reported = paper.SETTINGS.get(name)
    without = () if STUDENTS[student.model].has_pixels else ("pixel_width", "pixel_size")
    settings = [
        _setting(
            None if key in without else image_size if key == "image_size" else getattr(student, key),
            getattr(reported, key, None),
        )
        for key in SETTINGS
    ]
    table1 = reported.parameters if reported else None
    table3 = paper.COSTS[name].parameters if name in paper.COSTS else None
    figures = [
        number(count),
        *(cell for value in (table1, table3) for cell in (number(value), difference(count, value))),
    ]
    return [name, *settings, *figures]


def _setting(ours: int | None, theirs: int | None) -> str:
    if ours is None:
        return "-"
    return str(ours) if theirs in (None, ours) else f"{ours} ({theirs})"
