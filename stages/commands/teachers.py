"""Commands of stage one."""

from __future__ import annotations

from pathlib import Path

import click

from stages.shared.options import (
    PATH,
    device_option,
    dry_run_option,
    open_context,
    parse_keep,
    parse_settings,
    parse_views,
    recipe_option,
    require_exists,
    split_names,
    time_limit_option,
    training_options,
)


@click.command()
@click.argument("name")
@recipe_option
@device_option
@training_options
@time_limit_option
@dry_run_option
def teacher(
    name: str,
    recipe: str | None,
    device: str | None,
    fresh: bool,
    seed: int,
    settings: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Fine-tune and evaluate one candidate teacher."""
    context = open_context(recipe, device)
    from stages.teacher import teacher_recipe, train_teacher

    teacher_recipe(context.recipe, name)
    train_teacher(context, name, settings=parse_settings(settings), seed=seed, fresh=fresh, dry_run=dry_run)
    context.end()


@click.command()
@recipe_option
@click.option("--teachers", help="Candidates, separated by commas; `teachers` of params.yaml where left out.")
def select(recipe: str | None, teachers: str | None) -> None:
    """Compare the candidates and copy the winner."""
    from stages.reports.tables import candidates_table
    from stages.selection import select as run

    context = open_context(recipe)
    comparison = run(context, split_names(teachers))
    context.show(candidates_table(context, comparison))
    context.say(f"selected {comparison['winner']} by {comparison['by']}")
    context.end()


@click.command()
@recipe_option
@device_option
@click.option("--view-recipe", default="default", show_default=True, help="A view recipe of the recipe.")
@click.option("--teacher", type=PATH, help="A checkpoint; the selected teacher where left out.")
@click.option("--fresh", is_flag=True, help="Label every view again.")
@click.option("--keep", metavar="argmax|topk=K", help="Keep the K most probable classes too; the recipe's if left out.")
@click.option("--views", metavar="A:B", help="Label the views A to B - 1 alone; :B and A: leave out 0 and the last.")
@time_limit_option
@dry_run_option
def label(
    recipe: str | None,
    device: str | None,
    view_recipe: str,
    teacher: Path | None,
    fresh: bool,
    keep: str | None,
    views: str | None,
    dry_run: bool,
) -> None:
    """Label every view of the training set with a teacher."""
    topk, part = parse_keep(keep), parse_views(views)
    if teacher is not None:
        require_exists(teacher)
    context = open_context(recipe, device)
    if dry_run:
        from stages.dry_run import plan_labels

        planned = plan_labels(context, view_recipe, teacher=teacher, fresh=fresh, keep=topk, part=part)
        context.say(planned.text)
        return
    from stages.label import label as run

    run(context, view_recipe, teacher=teacher, fresh=fresh, keep=topk, part=part)
    context.end()


@click.command("teacher-select")
@recipe_option
@device_option
@click.option("--teachers", help="Candidates, separated by commas; `teachers` of params.yaml where left out.")
@click.option("--optimizers", help="Train the winner with each of these too (Figure 5), separated by commas.")
@click.option("--fresh", is_flag=True, help="Train and label everything again.")
@time_limit_option
@dry_run_option
def teacher_select(
    recipe: str | None,
    device: str | None,
    teachers: str | None,
    optimizers: str | None,
    fresh: bool,
    dry_run: bool,
) -> None:
    """Do all of stage one: prepare, train what is missing, select, label."""
    from stages.teacher_select import plan
    from stages.teacher_select import teacher_select as run

    context = open_context(recipe, device)
    names, sweep = split_names(teachers), split_names(optimizers) or ()
    if dry_run:
        for line in plan(context, names, sweep, fresh=fresh):
            context.say(line)
        return
    for table in run(context, teachers=names, optimizers=sweep, fresh=fresh):
        context.show(table)
    context.end()
