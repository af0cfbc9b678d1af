"""`pipeline teacher NAME`: fine-tune and evaluate one candidate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.config.params import override
from pipeline.config.recipes import Recipe, TeacherRecipe, deciding_values
from pipeline.errors import UsageError
from pipeline.system.storage import sha256_file
from stages.shared import options
from stages.shared.context import Context
from stages.shared.params import check_teacher_recipe
from stages.shared.places import settings_as_written
from stages.shared.runs import Run, teacher_description

if TYPE_CHECKING:
    from torch import nn


def teacher_recipe(recipe: Recipe, name: str, settings: Mapping[str, str] | None = None) -> TeacherRecipe:
    """Return a candidate's recipe, with fields replaced.

    Raises:
        UsageError: The recipe has no such teacher, or it has no such field, or a value is not allowed.
    """
    if name not in recipe.teachers:
        raise UsageError(f"teacher {name}: not in recipe {recipe.name}; choose from {', '.join(recipe.teachers)}")
    teacher = override(recipe.teachers[name], settings or {}, f"teachers.{name}")
    if settings:
        check_teacher_recipe(teacher, f"teachers.{name}")
    return teacher


def train_teacher(
    context: Context,
    name: str,
    *,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    fresh: bool = False,
) -> Path:
    """Fine-tune one candidate unless its result is up to date.

    Args:
        context: The command's setting.
        name: The teacher's name.
        settings: Fields of the teacher's recipe to replace; such a run goes to data/runs.
        seed: Of initialisation and order; one that is not 0 goes to data/runs too.
        fresh: Whether to start over.

    Returns:
        The directory of the outputs.
    """
    import torch

    from pipeline.models.teachers import build_teacher, repeated_pooling, require_size
    from pipeline.training.checkpoints import RunState
    from pipeline.training.column_sum import SUMMABLE, ColumnSum
    from pipeline.training.execution import Execution
    from stages.shared.fitting import carry_out, make_views, require_same_run, up_to_date

    with context.joined() as group:
        run = plan_teacher(context, name, settings=settings, seed=seed)
        require_same_run(group, run, fresh=fresh)
        if up_to_date(context, run, group, fresh=fresh):
            return run.out
        device, dataset = context.device, context.dataset()
        views = make_views(context, dataset, "default", key="teacher")
        recipe = run.recipe
        assert isinstance(recipe, TeacherRecipe)

        def build() -> nn.Module:
            torch.manual_seed(seed)
            architecture, arguments = run.description["model"], run.description["arguments"]
            teacher = build_teacher(architecture, weights=recipe.weights, finished=recipe.epochs == 0, **arguments)
            size, num_classes = dataset.image_size, dataset.num_classes
            require_size(teacher, architecture, num_classes=num_classes, image_size=size)
            return teacher

        def began_plain() -> bool:
            """Tell whether an older version was stopped in this run: its state has moments of every column."""
            saved = None if fresh else RunState(run.work, run.fingerprint).peek()
            return saved is not None and "column_sums" not in saved

        model = group.main_first(build)
        repeated = repeated_pooling(model, dataset.image_size) if recipe.epochs else None
        column_sum = repeated is not None and recipe.optimizer in SUMMABLE and not group.on_main(began_plain)
        if repeated is not None and column_sum:
            repeated.see_once(ColumnSum(repeated.layer, repeated.copies))
        model.to(device).to(memory_format=torch.channels_last)
        execution = Execution.of(recipe, device, group, column_sum=column_sum)
        carry_out(context, run, model, dataset=dataset, views=views, execution=execution, fresh=fresh)
    return run.out


def plan_teacher(context: Context, name: str, *, settings: Mapping[str, str] | None = None, seed: int = 0) -> Run:
    """Return a candidate's run, with the arguments of `train_teacher`."""
    from pipeline.models.own import code_sha256

    recipe = teacher_recipe(context.recipe, name, settings)
    dataset = context.dataset()
    built = teacher_description(dataset, recipe, name)
    views = deciding_values(context.recipe.views["default"], but=("count",))
    inputs = {"views": views, "metric": context.recipe.select.by}
    if recipe.weights not in ("imagenet", "none") and Path(recipe.weights).is_file():
        inputs["weights_sha256"] = sha256_file(Path(recipe.weights))
    if (code := code_sha256(built["model"])) is not None:
        inputs["code_sha256"] = code
    differs = settings_as_written(recipe, settings or {})
    return Run.of(
        dataset, context.recipe.name, "teacher", name, recipe, seed, differs, inputs=inputs,
        metric=context.recipe.select.by, project=context.project, **built,
    )  # fmt: skip


@click.command("teacher")
@click.argument("name")
@options.recipe_option
@options.device_option
@options.training_options
@options.time_limit_option
@options.dry_run_option
def command(
    name: str,
    recipe: str | None,
    device: str | None,
    fresh: bool,
    seed: int,
    settings: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Fine-tune and evaluate one candidate teacher."""
    context, changes = options.open_context(recipe, device), options.parse_settings(settings)
    if dry_run:
        context.say(f"{name}: {plan_teacher(context, name, settings=changes, seed=seed).state(fresh=fresh).text}")
        return
    train_teacher(context, name, settings=changes, seed=seed, fresh=fresh)
    context.end()
