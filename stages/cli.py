"""The command line: `pipeline COMMAND`, or `python -m stages.cli COMMAND`.

Every command imports what it needs when it runs, so that `--help` is quick and the handlers of SIGINT and SIGTERM
stand before anything slow.
"""

from __future__ import annotations

import os
import sys
import traceback

import click

import pipeline
from pipeline.errors import Interrupted, PipelineError
from stages.commands import data, export, labels, machine, results, students, teachers, trained
from stages.options import STOP

GROUPS: tuple[tuple[str, tuple[click.Command, ...]], ...] = (
    ("This machine", (machine.doctor,)),
    ("Data", (data.prepare,)),
    (
        "Stage one: teachers and labels",
        (teachers.teacher_select, teachers.teacher, teachers.select, teachers.label, labels.labels),
    ),
    ("Stage two: students", (students.distill,)),
    ("Trained models", (trained.predict, trained.bench, export.export)),
    ("Results", (results.evaluate, results.report, results.models)),
)


class GroupedCommands(click.Group):
    """A group that lists its commands by stage."""

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
    STOP.install(is_rank="WORLD_SIZE" in os.environ)
    debug = "--debug" in sys.argv[1:]
    try:
        cli.main(standalone_mode=False)
        code = 0
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except Interrupted as error:
        click.echo(str(error), err=True)
        code = error.exit_code
    except PipelineError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        code = 4
    except OSError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"Error: {error.filename or 'reading or writing'}: {error.strerror or error}", err=True)
        code = 4
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "" if debug else "; --debug in front of the command shows where"
        click.echo(f"Error: {type(error).__name__}: {' '.join(str(error).split())}{hint}", err=True)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
