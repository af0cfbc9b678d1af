"""`pipeline clean`: free the disk space of what is kept beside the results themselves."""

from __future__ import annotations

import click

from stages.shared import kept
from stages.shared.options import open_context
from stages.shared.paths import Paths


@click.command("clean")
@click.option("--recipe", help="A recipe of params.yaml; default: every recipe.")
@click.option("--kept", "remove_kept", is_flag=True, help="Remove the second names of finished results.")
def command(recipe: str | None, remove_kept: bool) -> None:
    """Free the disk space of finished results' second names.

    Without an option it says how much that is. The results themselves stay, but DVC can then delete them for good.
    """
    from stages.doctor.software import size_text

    context = open_context(recipe)
    where = Paths.kept_of_all() if recipe is None else context.paths.kept
    space = kept.remove(recipe) if remove_kept else kept.space(recipe)
    what = f"{where}: {space.count} kept result{'' if space.count == 1 else 's'} of {size_text(space.total)}"
    if remove_kept:
        context.say(f"{what} removed; {size_text(space.own)} are free now, the rest is in use under other names")
    elif space.count:
        name = "" if recipe is None else f" --recipe {recipe}"
        context.say(f"{what}; `pipeline clean --kept{name}` frees {size_text(space.own)} of it")
    else:
        context.say(f"{what}: nothing to free")
