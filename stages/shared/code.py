"""Whose code runs: an editable install of one clone is what `pipeline` runs in another clone too."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pipeline

ROOT = Path(pipeline.__file__).resolve().parents[1]
"""The folder of the code that runs."""
WAY_OUT = "`pip install -e .` installs this one; `python -m stages.cli` runs it without"


def other_code() -> Path | None:
    """Return this folder if it has code of its own, which is not what runs; else None."""
    with contextlib.suppress(OSError):  # this folder is gone, or may not be searched
        here = Path.cwd()
        is_clone = (here / "pipeline" / "__init__.py").is_file() and (here / "stages" / "cli.py").is_file()
        return here if is_clone and here.resolve() != ROOT else None
    return None
