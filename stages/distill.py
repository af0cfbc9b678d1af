"""`pipeline distill --student NAME`: train a student against the cached labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from pipeline.config.params import override
from pipeline.config.recipes import MAX_VIEWS, Recipe, StudentRecipe, deciding_values
from pipeline.errors import UsageError
from pipeline.models.students import STUDENTS, build_student, check_arguments, use_inner_block
from pipeline.report.tables import spread
from pipeline.system.storage import read_json
from pipeline.training.execution import Execution
from stages.shared import options
from stages.shared.context import Context
from stages.shared.fitting import carry_out, make_views, up_to_date
from stages.shared.runs import Run, describe, place, student_arguments
from stages.shared.teacher_labels import Distillation, TeacherSource, require_distillation_head, soft_name


def student_recipe(recipe: Recipe, name: str, settings: Mapping[str, str]) -> StudentRecipe:
    """Return a student's recipe.

    Raises:
        UsageError: The recipe has no such student, there is no such architecture or view recipe, or `soft` is set
            for a student without a distillation head.
    """
    if name not in recipe.students:
        raise UsageError(f"--student {name}: not in recipe {recipe.name}; choose from {', '.join(recipe.students)}")
    student = override(recipe.students[name], settings, f"students.{name}")
    if student.model not in STUDENTS:
        raise UsageError(f"students.{name}.model: {student.model!r} is no student; choose from {', '.join(STUDENTS)}")
    check_arguments(student.model, student.arguments, f"students.{name}.arguments")
    if student.views not in recipe.views:
        raise UsageError(f"students.{name}.views: {student.views!r}; choose from {', '.join(recipe.views)}")
    if student.soft:
        require_distillation_head(soft_name(student, name, given="soft" in settings), name, student)
    return student


def distilled_recipe(
    recipe: Recipe, name: str, distillation: Distillation, settings: Mapping[str, str]
) -> StudentRecipe:
    """Return a student's recipe under a command's changes to distillation.

    Raises:
        UsageError: See `student_recipe`; or the changes do not go together with the recipe.
    """
    student = student_recipe(recipe, name, settings)
    distillation.check(name, student)
    # Without a teacher nothing is learned from it, softly or not.
    return dataclasses.replace(student, soft=0.0) if distillation.labels == "none" else student


def distill(
    context: Context,
    name: str,
    *,
    labels: str = "cached",
    teacher: Path | None = None,
    confidence: bool = False,
    num_views: int | None = None,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    fresh: bool = False,
    dry_run: bool = False,
) -> Path:
    """Train a student unless its result is up to date.

    Args:
        context: The command's setting.
        name: A student of the recipe.
        labels: `cached`; or a control, whose outputs go to data/runs: `none` trains both heads on the ground truth,
            `online` asks the teacher at every step.
        teacher: The checkpoint that `online` asks.
        confidence: Weigh each sample's distillation term by the teacher's probability of its label.
        num_views: Train on the first of the views only. Such runs go to data/runs too.
        settings: Fields of the student's recipe to replace, `soft` among them; such a run goes to data/runs.
        seed: Of initialisation and order; one that is not 0 goes to data/runs.
        fresh: Whether to start over.
        dry_run: Whether only to say what would be done, and why.

    Returns:
        The directory of the outputs.

    Raises:
        UsageError: A name or option that does not exist, or options that do not go together.
        DataError: Prepared data or labels are missing, do not belong together, or hold less than is asked for.
    """
    soft_given = settings is not None and "soft" in settings
    distillation = Distillation(
        labels=labels, teacher=teacher, soft_given=soft_given, confidence=confidence, num_views=num_views
    )
    with context.joined() as group:
        run, source = plan_student(context, name, distillation, settings=settings, seed=seed)
        if dry_run:
            context.say(f"{run.name}: {run.state(fresh=fresh).text}")
            return run.out
        if up_to_date(context, run, group, fresh=fresh):
            return run.out
        device, dataset, recipe = context.device, context.dataset(), source.recipe
        views = make_views(context, dataset, recipe.views)
        teaching = source.open(context, views)
        torch.manual_seed(seed)
        model = build_student(recipe.model, **run.description["arguments"]).to(device)
        inner_block = use_inner_block(model, recipe.inner_block, device)
        execution = Execution.of(recipe, device, group, inner_block=inner_block)
        carry_out(
            context, run, model, dataset=dataset, views=views, execution=execution, teaching=teaching, fresh=fresh
        )
    return run.out


def plan_student(
    context: Context,
    name: str,
    distillation: Distillation | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
) -> tuple[Run, TeacherSource]:
    """Return what training a student means, its recipe, inputs and outputs, and where its teacher labels come from.

    Raises:
        UsageError: See `distilled_recipe`.
        DataError: See `distill`.
    """
    distillation, settings = distillation or Distillation(), settings or {}
    recipe = distilled_recipe(context.recipe, name, distillation, settings)
    dataset, paths, view_recipe = context.dataset(), context.paths, context.recipe.views[recipe.views]
    source = TeacherSource.find(context, name, recipe, distillation)
    others = {key: value for key, value in settings.items() if key != "soft"}
    differs = {**distillation.differences(context.recipe, name, recipe), **others}
    if distillation.num_views is not None:
        view_recipe = dataclasses.replace(view_recipe, count=distillation.num_views)
    inputs: dict[str, Any] = {"views": deciding_values(view_recipe), "labels": distillation.labels}
    inputs["teacher"] = source.digest
    if recipe.soft:
        inputs["topk"] = source.cache.topk if source.cache else None
    if distillation.confidence:
        inputs["confidence"] = True
    out, work, stage = place(paths, f"students/{name}", name, differs, seed, paths.student(name), f"student@{name}")
    arguments = student_arguments(recipe, num_classes=dataset.num_classes, image_size=dataset.image_size)
    run = Run(
        name=name,
        out=out,
        work=work,
        stage=stage,
        description=describe(dataset, context.recipe.name, kind="student", model=recipe.model, arguments=arguments),
        recipe=recipe,
        seed=seed,
        inputs=inputs,
        differs=differs,
        num_views=view_recipe.count,
        soft=recipe.soft or None,
        confidence=distillation.confidence,
        keep_last=True,
    )
    return run, source


@click.command("distill")
@click.option("--student", required=True, help="A student of the recipe, as titn.")
@options.recipe_option
@options.device_option
@options.training_options
@click.option(
    "--labels",
    type=click.Choice(["cached", "none", "online"]),
    default="cached",
    show_default=True,
    help="none and online are controls; they go to data/runs.",
)
@click.option("--teacher", type=options.PATH, help="The checkpoint that --labels online asks.")
@click.option(
    "--soft",
    type=options.FiniteFloat(0.0, 1000.0),
    metavar="T",
    help="Learn from the teacher's probabilities at temperature T; 0 from its label alone.",
)
@click.option("--confidence", is_flag=True, help="Weigh the samples by the teacher's probability of its label.")
@click.option("--seeds", metavar="A,B,...", help="Train with each of these seeds, and say mean and standard deviation.")
@click.option("--views", "num_views", type=click.IntRange(1, MAX_VIEWS), help="Train on the first views only.")
@options.time_limit_option
@options.dry_run_option
def command(
    student: str,
    recipe: str | None,
    device: str | None,
    fresh: bool,
    seed: int,
    settings: tuple[str, ...],
    labels: str,
    teacher: Path | None,
    soft: float | None,
    confidence: bool,
    num_views: int | None,
    seeds: str | None,
    dry_run: bool,
) -> None:
    """Train a student against the cached labels."""
    if teacher is not None:
        options.require_exists(teacher)
    several = options.parse_seeds(seeds)
    if several and click.get_current_context().get_parameter_source("seed") is not ParameterSource.DEFAULT:
        raise UsageError(f"--seed {seed} --seeds {seeds}: give one of them")
    context = options.open_context(recipe, device)
    results = []
    with context.joined() if several else nullcontext():  # torchrun's ranks meet once for all seeds
        for this_seed in several or (seed,):
            out = distill(
                context,
                student,
                labels=labels,
                teacher=teacher,
                confidence=confidence,
                num_views=num_views,
                settings=options.parse_settings(settings, soft=soft),
                seed=this_seed,
                fresh=fresh,
                dry_run=dry_run,
            )
            if dry_run:
                continue
            results.append(read_json(out / "metrics.json"))
            best, last, test = (results[-1][key] for key in ("best", "last", "test"))
            context.say(
                f"{out}: best top-1 {best['top1']:.2f} % in epoch {best['epoch']}, "
                f"last {last['top1']:.2f} %, test {test['top1']:.2f} %"
            )
    if several and not dry_run:
        best, last, test = (spread([one[key]["top1"] for one in results]) for key in ("best", "last", "test"))
        context.say(
            f"{student}, seeds {seeds}, mean ± standard deviation (number): "
            f"top-1 % of the best epochs {best}, of the last {last}, on test {test}"
        )
    context.end()
