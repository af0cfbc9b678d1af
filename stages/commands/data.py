"""Commands that make data sets."""

from __future__ import annotations

from pathlib import Path

import click

from stages.shared.options import PATH, dry_run_option, open_context, recipe_option


@click.command()
@recipe_option
@click.option("--download", is_flag=True, help="Download what is missing to data/raw.")
@click.option("--from", "folder", type=PATH, help="Take the images from this folder.")
@click.option("--skip-bad", is_flag=True, help="Leave corrupt, empty and oversized files out.")
@dry_run_option
def prepare(recipe: str | None, download: bool, folder: Path | None, skip_bad: bool, dry_run: bool) -> None:
    """Turn a data set into one file of uint8 images."""
    context = open_context(recipe)
    paths = context.paths
    if dry_run:
        from stages.dry_run import plan_prepare

        for line in plan_prepare(context.recipe, paths, folder=folder, download=download, skip_bad=skip_bad):
            context.say(line)
        return
    from stages.prepare import prepare as run

    summary = run(
        context.recipe, out=paths.prepared, raw=paths.raw, folder=folder, download=download, skip_bad=skip_bad
    )
    counts = ", ".join(f"{count} {split}" for split, count in summary.num_samples.items())
    context.say(f"{paths.dataset}: {counts} images of {len(summary.class_names)} classes, SHA-256 {summary.sha256}")
    if summary.num_skipped:
        context.say(f"skipped {summary.num_skipped} bad files; {paths.prepared / 'summary.json'} names them")
    context.changed("prepare")
    context.end()
