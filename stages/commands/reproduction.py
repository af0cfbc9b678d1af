"""Commands that run the paper's tables and figures, and keep what came of them."""

from __future__ import annotations

from pathlib import Path

import click

from stages.shared.options import (
    PATH,
    device_option,
    dry_run_option,
    open_context,
    parse_seeds,
    require_exists,
    time_limit_option,
)
from stages.shared.paths import RECORDS

records_option = click.option(
    "--out", type=PATH, default=RECORDS, show_default=True, help="The file of records; the curves go beside it."
)


@click.command()
@click.option("--table", type=int, help="Of the paper, 1 to 6.")
@click.option("--figure", type=int, help="Of the paper, 4 to 8.")
@click.option(
    "--ablation",
    type=click.Choice(["labels", "views"]),
    help="Labels cached, none, online; or 1, 2, 5 and all views. The paper has neither.",
)
@click.option("--recipe", help="A recipe in place of the paper's; all of it without --table, --figure, --ablation.")
@click.option("--student", help="Train this student alone, on the teacher it needs; titn for --ablation if left out.")
@click.option("--seeds", metavar="A,B,...", help="Of the students, one after another; 0 where left out.")
@device_option
@click.option("--download", is_flag=True, help="Download data that are not there to data/raw.")
@records_option
@time_limit_option
@dry_run_option
def reproduce(
    table: int | None,
    figure: int | None,
    ablation: str | None,
    recipe: str | None,
    student: str | None,
    seeds: str | None,
    device: str | None,
    download: bool,
    out: Path,
    dry_run: bool,
) -> None:
    """Run whatever the paper's tables and figures still lack.

    Without a choice all of them, the most telling first. What is done costs nothing; what was stopped goes on. Each
    finished run leaves a line in results/runs.jsonl, and its curve in results/curves.
    """
    several = parse_seeds(seeds) or (0,)
    context = open_context(recipe, device)
    from stages.reproduce import reproduce as run
    from stages.reproduction.plan import Choice

    choice = Choice(table=table, figure=figure, ablation=ablation, recipe=recipe, student=student, seeds=several)
    run(context, choice, out=out, download=download, dry_run=dry_run)


@click.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=PATH)
@records_option
def record(directories: tuple[Path, ...], out: Path) -> None:
    """Keep finished runs as lines of results/runs.jsonl.

    DIR is what `teacher` or `distill` wrote, as data/cifar100/students/titn. A run that is there already is left as it
    is.
    """
    from stages.record import record as run

    for directory in directories:
        require_exists(directory)
    run(click.echo, directories, out)
