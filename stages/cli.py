"""The command line: `pipeline COMMAND`, or `python -m stages.cli COMMAND`.

Every command imports what it needs when it runs, so that `--help` is quick and the handlers of SIGINT and SIGTERM
stand before anything slow.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

import pipeline
from pipeline.errors import Interrupted, PipelineError, one_line
from stages.commands import data, export, labels, machine, reproduction, results, students, teachers, trained
from stages.shared.options import STOP

REPORT = click.Command("report", short_help="Write a page, tables and figures of what has been run.")
GROUPS: tuple[tuple[str, tuple[click.Command, ...]], ...] = (
    ("This machine", (machine.doctor,)),
    ("Data", (data.prepare,)),
    (
        "Stage one: teachers and labels",
        (teachers.teacher_select, teachers.teacher, teachers.select, teachers.label, labels.labels),
    ),
    ("Stage two: students", (students.distill,)),
    ("Trained models", (trained.predict, trained.bench, export.export)),
    ("Results", (results.evaluate, REPORT, results.models)),
    ("The paper's results", (reproduction.reproduce, reproduction.record)),
)


class GroupedCommands(click.Group):
    """A group that lists its commands by stage."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return a command; `report` is imported only now."""
        if name == REPORT.name:
            from stages.report import command

            return command
        return super().get_command(context, name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section of the help for each stage."""
        for title, commands in GROUPS:
            rows = [(command.name or "", command.get_short_help_str(90)) for command in commands]
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(cls=GroupedCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pipeline.__version__, prog_name="pipeline")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Distil CNN teachers into small transformers from cached labels (arXiv:2502.16762)."""


for _, commands in GROUPS:
    for command in commands:
        cli.add_command(command)


def main() -> None:
    """Run the command line and exit with the documented code."""
    code = 128
    try:
        STOP.install(is_rank="WORLD_SIZE" in os.environ)
        code = run(sys.argv[1:])
    except Interrupted as error:  # before the command began, or while its error was being told
        code = _tell_stop(error)
    finally:
        STOP.end()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line, turning whatever ends it into one line on standard error.

    Args:
        arguments: What follows the program's name.

    Returns:
        The documented exit code.
    """
    debug = "--debug" in arguments
    try:
        cli.main(list(arguments), standalone_mode=False)
        STOP.check()
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        click.UsageError(one_line(error.format_message()), getattr(error, "ctx", None)).show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except Interrupted as error:
        return _tell_stop(error)
    except PipelineError as error:
        if debug:
            traceback.print_exc()
        stop = _stop_behind(error)
        if stop is not None:
            return _tell_stop(stop)
        click.echo(one_line(f"Error: {error}"), err=True)
        return error.exit_code
    except BrokenPipeError:
        return 4
    except OSError as error:
        if debug:
            traceback.print_exc()
        where = error.filename or "reading or writing"
        click.echo(one_line(f"Error: {where}: {error.strerror or error}"), err=True)
        return 4
    except Exception as error:
        if debug:
            traceback.print_exc()
        if STOP.received is not None:  # which reached code that made another error of it
            return _tell_stop(STOP.error("stopped; run the same command again"))
        hint = "" if debug else "; --debug in front of the command shows where"
        click.echo(one_line(f"Error: {type(error).__name__}: {' '.join(str(error).split())}{hint}"), err=True)
        return 1
    return 0


def _stop_behind(error: BaseException) -> Interrupted | None:
    """Return the signal's exception of which code that catches every error has made another; None where there is none.

    So may code do that reads what others wrote, since decoders raise nearly anything on a damaged file.
    """
    cause = error.__cause__ or error.__context__
    if cause is None or isinstance(cause, Interrupted):
        return cause
    return _stop_behind(cause)


def _tell_stop(error: Interrupted) -> int:
    click.echo(str(error), err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
