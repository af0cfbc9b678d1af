"""Hints that name a command name the recipe too."""

from __future__ import annotations

import re

WITH_RECIPE = ("distill", "doctor", "evaluate", "label", "prepare", "report", "select", "teacher", "teacher-select")
"""The commands that work on params.yaml's own recipe where they are given none."""
_HINT = re.compile(rf"`pipeline ({'|'.join(WITH_RECIPE)})(?= |`)(?![^`]*--recipe)")


def with_recipe(message: str, recipe: str) -> str:
    """Add `--recipe` to the commands in backticks of a message that lack it, as the library's do: it knows no recipe.

    Args:
        message: For people.
        recipe: The recipe that the command works on.
    """
    return _HINT.sub(rf"`pipeline \1 --recipe {recipe}", message)
