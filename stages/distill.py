"""`pipeline distill --student NAME`: train a student against the cached labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline.config.params import override
from pipeline.config.recipes import MAX_VIEWS, Recipe, StudentRecipe, deciding_values
from pipeline.errors import UsageError
from pipeline.models.own import code_sha256
from pipeline.report.tables import spread
from pipeline.training.checkpoints import read_meta
from pipeline.training.manifest import read_json_checked
from stages.reports.conditions import why_apart
from stages.reports.runs import FinishedRun, pools
from stages.shared import options
from stages.shared.context import Context
from stages.shared.params import check_model
from stages.shared.places import NUM_DIGITS
from stages.shared.runs import Run, student_arguments
from stages.shared.teacher_labels import Distillation, TeacherSource, require_distillation_head, soft_name

RECIPES_OWN = Distillation()


def student_recipe(recipe: Recipe, name: str, settings: Mapping[str, str]) -> StudentRecipe:
    """Return a student's recipe.

    Raises:
        UsageError: The recipe has no such student, there is no such architecture or view recipe, or `soft` is set
            for a student without a distillation head.
    """
    if name not in recipe.students:
        raise UsageError(f"--student {name}: not in recipe {recipe.name}; choose from {', '.join(recipe.students)}")
    student = override(recipe.students[name], settings, f"students.{name}")
    check_model(student, f"students.{name}", settings)
    if student.views not in recipe.views:
        raise UsageError(f"students.{name}.views: {student.views!r}; choose from {', '.join(recipe.views)}")
    if student.soft:
        require_distillation_head(soft_name(student, name, given="soft" in settings), name, student)
    return student


def distill(
    context: Context, name: str, distillation: Distillation = RECIPES_OWN, *, seed: int = 0, fresh: bool = False
) -> Path:
    """Train a student unless its result is up to date.

    Args:
        context: The command's setting.
        name: A student of the recipe.
        distillation: What differs from the recipe.
        seed: Of initialisation and order; the outputs of any but 0 go to data/runs.
        fresh: Whether to start over.

    Returns:
        The directory of the outputs.

    Raises:
        UsageError: A name or option does not exist, or options do not go together.
        DataError: Prepared data or labels are missing, do not belong together, or hold less than is asked for.
    """
    import torch

    from pipeline.models.students import build_student, use_inner_block, use_outer_block
    from pipeline.system.runtime import resolve_precision
    from pipeline.training.distributed import has_batch_norm
    from pipeline.training.execution import Execution
    from stages.shared.fitting import carry_out, make_views, require_same_run, up_to_date

    with context.joined() as group:
        run, source = plan_student(context, name, distillation, seed=seed)
        clean = None if source.cache is None else source.cache.clean_digest
        require_same_run(group, run, fresh=fresh, clean_sha256=clean)
        if up_to_date(context, run, group, fresh=fresh):
            return run.out
        device, dataset, recipe = context.device, context.dataset(), source.recipe
        views = make_views(context, dataset, recipe.views)
        teaching = source.open(context, views)
        torch.manual_seed(seed)
        model = build_student(recipe.model, **run.description["arguments"]).to(device)
        how: dict[str, Any] = {"precision": resolve_precision(recipe.precision, device), "agree": group.first_reason}
        blocks: dict[str, Any] = {
            "inner_block": use_inner_block(model, recipe.inner_block, device, **how),
            "outer_block": use_outer_block(model, recipe.outer_block, device, compiled=recipe.compile, **how),
        }
        execution = Execution.of(recipe, device, group, **blocks, whole=has_batch_norm(model))
        carry_out(
            context, run, model, dataset=dataset, views=views, execution=execution, teaching=teaching, fresh=fresh
        )
    return run.out


def plan_student(
    context: Context, name: str, distillation: Distillation = RECIPES_OWN, *, seed: int = 0
) -> tuple[Run, TeacherSource]:
    """Return a student's run and where its teacher labels come from; with the arguments and errors of `distill`."""
    recipe = student_recipe(context.recipe, name, distillation.settings)
    distillation.check(name, recipe)
    if distillation.labels == "none":  # nothing is learned from a teacher, softly or not
        recipe = dataclasses.replace(recipe, soft=0.0)
    dataset, view_recipe = context.dataset(), context.recipe.views[recipe.views]
    arguments = student_arguments(recipe, num_classes=dataset.num_classes, image_size=dataset.image_size)
    source = TeacherSource.find(context, name, recipe, distillation, arguments)
    differs = distillation.differences(context.recipe, name, recipe)
    selected = read_meta(context.paths.winner) if distillation.teacher is not None else None
    if distillation.teacher is not None and (selected is None or selected["sha256"] != source.digest):
        differs["teacher"] = str(source.digest)[:NUM_DIGITS]
    if distillation.num_views is not None:
        view_recipe = dataclasses.replace(view_recipe, count=distillation.num_views)
    inputs: dict[str, Any] = {"views": deciding_values(view_recipe), "labels": distillation.labels}
    inputs["teacher"] = source.digest
    if distillation.teacher_labels is not None:
        inputs["teacher_labels"] = distillation.teacher_labels
    if recipe.soft:
        inputs["topk"] = source.cache.topk if source.cache else None
    if distillation.confidence:
        inputs["confidence"] = True
    if (code := code_sha256(recipe.model)) is not None:
        inputs["code_sha256"] = code
    run = Run.of(
        dataset, context.recipe.name, "student", name, recipe, seed, differs, model=recipe.model, arguments=arguments,
        inputs=inputs, num_views=view_recipe.count, soft=recipe.soft or None, confidence=distillation.confidence,
        keep_last=True, project=context.project,
        labels_sha256=source.labels_sha256(view_recipe.count),
    )  # fmt: skip
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
@click.option("--teacher-labels", metavar="NAME", help="Learn from this label file, as `label --as` named it.")
@click.option("--teacher", type=options.EXISTING, help="The teacher, for --labels online.")
@click.option(
    "--soft",
    type=options.FiniteFloat(0.0, 1000.0),
    metavar="T",
    help="Learn from the teacher's probabilities at temperature T; 0 from its label alone.",
)
@click.option("--confidence", is_flag=True, help="Weigh the samples by the teacher's probability of its label.")
@click.option(
    "--seeds", type=options.parse_seeds, metavar="A,B,...",
    help="Train with each of these seeds, and say mean and standard deviation.",
)  # fmt: skip
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
    soft: float | None,
    seeds: tuple[int, ...] | None,
    dry_run: bool,
    **changes: Any,
) -> None:
    """Train a student against the cached labels."""
    listed = ",".join(map(str, seeds or ()))
    if seeds and click.get_current_context().get_parameter_source("seed") is not ParameterSource.DEFAULT:
        raise UsageError(f"--seed {seed} --seeds {listed}: give one of them")
    context, several = options.open_context(recipe, device), seeds or (seed,)
    distillation = Distillation(settings=options.parse_settings(settings, soft=soft), **changes)

    def plan(this_seed: int) -> Run:
        return plan_student(context, student, distillation, seed=this_seed)[0]

    results, finished = [], []
    with context.joined():  # torchrun's ranks meet once for all seeds
        if dry_run:
            for this_seed in several:
                context.say(f"{student}: {plan(this_seed).state(fresh=fresh).text}")
            return
        later = [plan(this_seed).epochs_to_train(fresh=fresh) for this_seed in several[1:]]
        for this_seed in context.in_turn("seed", several, later):
            out = distill(context, student, distillation, seed=this_seed, fresh=fresh)
            if not context.ranks.is_main:  # its machine may have no outputs
                continue
            results.append(read_json_checked(out / "metrics.json"))
            finished.append(FinishedRun.read(out))
            best, last, test = (results[-1][key] for key in ("best", "last", "test"))
            context.say(
                f"{out}: best {results[-1]['evaluated_on']} top-1 {best['top1']:.2f} % in epoch {best['epoch']}, "
                f"last {last['top1']:.2f} %, test {test['top1']:.2f} %"
            )
    alike = pools(run for run in finished if run is not None) if seeds else []
    for group in alike:  # several where a result of before was judged by other rules, or computed otherwise
        best, last, test = (spread([run.metrics[key]["top1"] for run in group]) for key in ("best", "last", "test"))
        split = group[0].metrics["evaluated_on"]
        why = "" if group is alike[0] else f" (apart from the first: {why_apart(alike[0][0], group[0])})"
        context.say(
            f"{student}, seeds {','.join(str(run.seed) for run in group)}, mean ± standard deviation (number): "
            f"{split} top-1 % of the best epochs {best}, of the last {last}, on test {test}{why}"
        )
    context.end()
