"""Commands of the pipeline in this process, which is faster than starting one for each."""

from __future__ import annotations

import contextlib

import click
from click.testing import CliRunner

from pipeline.errors import PipelineError
from stages.cli import cli
from tests.support.project import Project


def invoke(project: Project, *arguments: str, code: int | None = 0) -> str:
    """Run a command, check its exit code (None allows any), and return its output and its error."""
    with contextlib.chdir(project.path):
        result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    error, text = result.exception, ""
    if error is None:
        exit_code = 0
    elif isinstance(error, PipelineError | click.ClickException):
        exit_code, text = 2 if isinstance(error, click.ClickException) else error.exit_code, str(error)
        assert "\n" not in text
    else:
        raise error
    assert code in (exit_code, None), f"exit {exit_code}, expected {code}\n{result.output}\n{text}"
    return result.output + text
