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
from pipeline.config.recipes import MAX_VIEWS, Recipe, StudentRecipe
from pipeline.data.datasets import Dataset
from pipeline.errors import UsageError
from pipeline.losses import Outputs, hybrid_loss, mixed_cross_entropy, undistilled_loss
from pipeline.models.students import STUDENTS, build_student, use_inner_block
from pipeline.report.tables import spread
from pipeline.system.storage import read_json
from pipeline.training.batches import Batch, TrainingData
from pipeline.training.step import Objective
from stages.shared.context import Context
from stages.shared.execution import execution
from stages.shared.fitting import carry_out, make_views, up_to_date
from stages.shared.options import (
    PATH,
    FiniteFloat,
    device_option,
    dry_run_option,
    open_context,
    parse_seeds,
    parse_settings,
    recipe_option,
    require_exists,
    time_limit_option,
    training_options,
)
from stages.shared.runs import Run, describe, place, plan_run, student_arguments
from stages.shared.teacher_labels import Distillation, TeacherSource, require_distillation_head, soft_name

CPU_MICRO_BATCH = 128


def student_recipe(recipe: Recipe, name: str, settings: Mapping[str, str]) -> StudentRecipe:
    """Return a student's recipe.

    Raises:
        UsageError: The recipe has no such student, the student no such architecture, or that no head for `soft`.
    """
    if name not in recipe.students:
        raise UsageError(f"--student {name}: not in recipe {recipe.name}; choose from {', '.join(recipe.students)}")
    own = override(recipe.students[name], settings, f"students.{name}")
    if own.model not in STUDENTS:
        raise UsageError(f"students.{name}.model: {own.model!r} is no student; choose from {', '.join(STUDENTS)}")
    if own.views not in recipe.views:
        raise UsageError(f"students.{name}.views: {own.views!r}; choose from {', '.join(recipe.views)}")
    if own.soft:
        require_distillation_head(soft_name(own, name, given="soft" in settings), name, own)
    return own


def distilled_recipe(
    recipe: Recipe, name: str, distillation: Distillation, settings: Mapping[str, str]
) -> StudentRecipe:
    """Return a student's recipe as it follows from what the student learns from its teacher.

    Raises:
        UsageError: As of `student_recipe`, or the two do not go together.
    """
    own = student_recipe(recipe, name, settings)
    distillation.check(name, own)
    # Without a teacher there is nothing to learn from, softly or not.
    return dataclasses.replace(own, soft=0.0) if distillation.labels == "none" else own


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
        labels: `cached`; or a control that goes to data/runs: `none` trains both heads on the ground truth, `online`
            asks the teacher at every step.
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
    settings = settings or {}
    distillation = Distillation(
        labels=labels, teacher=teacher, soft_given="soft" in settings, confidence=confidence, num_views=num_views
    )
    recipe = distilled_recipe(context.recipe, name, distillation, settings)
    with context.joined() as group:
        device, dataset = context.device, context.dataset()
        source = TeacherSource(context, dataset, name, recipe, distillation)
        run = plan_student(context, dataset, name, recipe, source, distillation, settings=settings, seed=seed)
        if dry_run:
            context.say(plan_run(run, fresh=fresh))
            return run.out
        if up_to_date(context, run, group, fresh=fresh):
            return run.out
        source.ask(context, dataset)
        run = dataclasses.replace(run, teacher=source.teacher)
        views = make_views(context, dataset, recipe.views)
        source.check(views)
        torch.manual_seed(seed)
        model = build_student(recipe.model, **run.description["arguments"]).to(device)
        inner_block = use_inner_block(model, recipe.inner_block, device)
        carry_out(
            context,
            run,
            group,
            model=model,
            dataset=dataset,
            data=TrainingData(views, dataset.mean, dataset.std, run.num_views, source.teacher_labels(device)),
            clean=source.clean,
            objective=student_objective(recipe, distilled=source.is_distilled),
            how=execution(recipe, device, group, micro_batch=micro_batch_on(device, recipe), inner_block=inner_block),
            ema=recipe.ema,
            fresh=fresh,
        )
    return run.out


def micro_batch_on(device: torch.device, recipe: StudentRecipe) -> int | None:
    """Return the samples that go through a student at once on a device; None is all of a batch."""
    if recipe.micro_batch:
        return recipe.micro_batch
    return CPU_MICRO_BATCH if device.type == "cpu" else None


def plan_student(
    context: Context,
    dataset: Dataset,
    name: str,
    recipe: StudentRecipe,
    source: TeacherSource,
    distillation: Distillation,
    *,
    settings: Mapping[str, str],
    seed: int,
) -> Run:
    """Say what training a student means: its recipe, inputs and outputs."""
    paths, view_recipe = context.paths, context.recipe.views[recipe.views]
    others = {key: value for key, value in settings.items() if key != "soft"}
    differs = {**distillation.differences(context.recipe, name, recipe), **others}
    if distillation.num_views is not None:
        view_recipe = dataclasses.replace(view_recipe, count=distillation.num_views)
    inputs: dict[str, Any] = {"views": dataclasses.asdict(view_recipe), "labels": distillation.labels}
    inputs["teacher"] = source.digest
    if recipe.soft:
        inputs["topk"] = source.cache.topk if source.cache else None
    if distillation.confidence:
        inputs["confidence"] = True
    out, work, stage = place(paths, f"students/{name}", name, differs, seed, paths.student(name), f"student@{name}")
    arguments = student_arguments(recipe, num_classes=dataset.num_classes, image_size=dataset.image_size)
    return Run(
        name=name,
        out=out,
        work=work,
        stage=stage,
        description=describe(dataset, context.recipe.name, kind="student", model=recipe.model, arguments=arguments),
        recipe=recipe,
        seed=seed,
        inputs=inputs,
        differs=differs,
        teacher=source.teacher,
        is_distilled=source.is_distilled,
        num_views=view_recipe.count,
        soft=recipe.soft or None,
        confidence=distillation.confidence,
        keep_last=True,
    )


def student_objective(recipe: StudentRecipe, *, distilled: bool) -> Objective:
    """Return loss (10) for two heads with a teacher, its control without one, or loss (9) for one head.

    Args:
        recipe: The student's; its `soft` is the temperature where the teacher's labels are distributions.
        distilled: Whether there is a teacher.
    """

    def objective(outputs: Outputs, batch: Batch) -> torch.Tensor:
        mixed = (batch.labels, batch.partner_labels, batch.lam)
        if not isinstance(outputs, tuple):
            return mixed_cross_entropy(outputs, *mixed, label_smoothing=recipe.label_smoothing)
        alpha, smoothing = recipe.alpha, recipe.label_smoothing
        if not distilled:
            return undistilled_loss(outputs, *mixed, alpha=alpha, label_smoothing=smoothing)
        assert batch.teacher_labels is not None
        return hybrid_loss(
            outputs,
            *mixed,
            batch.teacher_labels,
            alpha=alpha,
            label_smoothing=smoothing,
            temperature=recipe.soft or 1.0,
            confidence=batch.confidence,
            mean_confidence=batch.mean_confidence,
        )

    return objective


@click.command("distill")
@click.option("--student", required=True, help="A student of the recipe, as titn.")
@recipe_option
@device_option
@training_options
@click.option(
    "--labels",
    type=click.Choice(["cached", "none", "online"]),
    default="cached",
    show_default=True,
    help="none and online are controls; they go to data/runs.",
)
@click.option("--teacher", type=PATH, help="The checkpoint that --labels online asks.")
@click.option(
    "--soft",
    type=FiniteFloat(0.0, 1000.0),
    metavar="T",
    help="Learn from the teacher's probabilities at temperature T; 0 from its label alone.",
)
@click.option("--confidence", is_flag=True, help="Weigh the samples by the teacher's probability of its label.")
@click.option("--seeds", metavar="A,B,...", help="Train with each of these seeds, and say mean and standard deviation.")
@click.option("--views", "num_views", type=click.IntRange(1, MAX_VIEWS), help="Train on the first views only.")
@time_limit_option
@dry_run_option
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
        require_exists(teacher)
    several = parse_seeds(seeds)
    if several and click.get_current_context().get_parameter_source("seed") is not ParameterSource.DEFAULT:
        raise UsageError(f"--seed {seed} --seeds {seeds}: give one of them")
    context = open_context(recipe, device)
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
                settings=parse_settings(settings, soft=soft),
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
