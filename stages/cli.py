"""The command line: `pipeline COMMAND`, or `python -m stages.cli COMMAND`.

A command's module is imported when the command is called, and imports PyTorch inside the functions that need it, so
that --help and the completion of names and options are quick and the handlers of signals stand before anything slow.
"""

from __future__ import annotations

import gc
import importlib
import io
import os
import select
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

import pipeline
from pipeline.errors import Interrupted, PipelineError, StorageError, one_line
from pipeline.system.home import lend_caches
from stages.shared.code import ROOT, WAY_OUT, other_code
from stages.shared.hints import with_recipe
from stages.shared.options import STOP

LESS_MEMORY = (
    "a student takes less with `micro_batch: 256`, labels with a smaller `label.batch_size`, a teacher with a smaller "
    "`batch_size`; docs/devices.md says more"
)

# A command's name, the module below stages/ that defines it as `command`, and one line of help.
TABLE: dict[str, tuple[tuple[str, str, str], ...]] = {
    "This machine": (
        ("init", "init", "Write a new project's params.yaml, dvc.yaml, .dvcignore and README.md."),
        ("doctor", "doctor.diagnosis", "Check whether a full run can work here, and estimate its disk and memory."),
        ("clean", "clean", "Free the disk space of finished results' second names."),
    ),
    "Data": (
        ("prepare", "prepare", "Turn images into a data set that the other commands read, unless that is up to date."),
    ),
    "Stage one: teachers and labels": (
        ("teacher-select", "teacher_select", "Do all of stage one: prepare, train what is missing, select, label."),
        ("teacher", "teacher", "Fine-tune and evaluate one candidate teacher."),
        ("select", "selection", "Compare the candidates and copy the winner."),
        ("label", "label", "Label every view of the training set with a teacher."),
        ("labels", "labels", "Look into a label file, or replay its teacher."),
    ),
    "Stage two: students": (("distill", "distill", "Train a student against the cached labels."),),
    "Trained models": (
        ("predict", "predict", "Name the classes of images, by a student or a teacher."),
        ("demo", "demo", "Show on a page of this machine what a model sees in pictures."),
        ("bench", "bench", "Show what models cost and how fast they answer here."),
        ("export", "export", "Write a trained model as ONNX, TorchScript or safetensors, with a model card."),
    ),
    "Results": (
        ("evaluate", "evaluate", "Score a checkpoint on a recipe's data, or on any folder's."),
        ("report", "report", "Write a page, tables and figures of what has been run."),
        ("models", "models", "List students and teachers with their parameters and costs."),
    ),
    "The paper's results": (
        ("reproduce", "reproduce", "Run whatever the paper's tables and figures still lack."),
        ("record", "record", "Keep finished runs as lines of results/runs.jsonl."),
    ),
}
ROWS = {name: (module, line) for rows in TABLE.values() for name, module, line in rows}
# These commands, and any with these options, are called for what they print.
PRINTING = {"doctor", "labels", "predict", "bench", "evaluate", "models"}
PRINTING_OPTIONS = {"--json", "--dry-run"}


class Commands(Mapping[str, click.Command]):
    """The table's commands by name; a command is imported when it is taken out."""

    def __getitem__(self, name: str) -> click.Command:
        command: click.Command = importlib.import_module(f"stages.{ROWS[name][0]}").command
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(ROWS)

    def __len__(self) -> int:
        return len(ROWS)


class TableGroup(click.Group):
    """A group that shows and completes its commands from the table, importing none of them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, commands=Commands())  # type: ignore[arg-type]  # a mapping that nobody writes to

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section of the help for each stage."""
        for title, rows in TABLE.items():
            with formatter.section(title):
                formatter.write_dl([(name, line) for name, _, line in rows])

    def invoke(self, context: click.Context) -> Any:
        """Run a command; the hints of its error name the recipe, which `open_context` notes."""
        try:
            return super().invoke(context)
        except PipelineError as error:
            if isinstance(context.obj, str):
                error.args = (with_recipe(str(error), context.obj),)
            raise

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name, or one of this group's options."""
        names = [CompletionItem(name, help=line) for name, (_, line) in ROWS.items() if name.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, context, incomplete)]


@click.group(cls=TableGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pipeline.__version__, prog_name="pipeline")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Distil CNN teachers into small transformers from cached labels (arXiv:2502.16762)."""


class Output(io.FileIO):
    """Standard output or error that is dropped once it cannot be written, so that a training does not end with it.

    A reader goes away, the disk of a log fills up, a terminal is closed.

    Args:
        descriptor: The stream's; it stays open.
        must_arrive: Whether the first failure ends the command: silently where the reader has gone, as it may.
    """

    def __init__(self, descriptor: int, *, must_arrive: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._must_arrive, self._is_lost = must_arrive, False

    def write(self, data: Any, /) -> int:
        """Write some bytes, and return how many."""
        try:
            while not self._is_lost:
                if (written := super().write(data)) is not None:
                    return written
                select.select([], [self], [])  # somebody made it non-blocking, which printing does not expect
        except OSError as error:
            self._is_lost = True
            if self._must_arrive and isinstance(error, BrokenPipeError):
                raise SystemExit(StorageError.exit_code) from error
            if self._must_arrive:
                raise StorageError(f"cannot write standard output: {error.strerror}; run again") from error
        return memoryview(data).nbytes

    @classmethod
    def replace_streams(cls, arguments: Sequence[str]) -> None:
        """Put one in the place of each standard stream, for a command line; streams that are no files stay.

        What the stream's encoding cannot write is escaped.
        """
        command = next((word for word in arguments if not word.startswith("-")), None)
        is_printing = command in PRINTING or not PRINTING_OPTIONS.isdisjoint(arguments)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if not isinstance(stream, io.TextIOWrapper):
                continue
            errors = "backslashreplace"  # for a name in Chinese, or `±`
            try:
                if sys.platform == "win32":  # whose consoles are no files
                    raise io.UnsupportedOperation
                raw = cls(stream.fileno(), must_arrive=is_printing and name == "stdout")
            except io.UnsupportedOperation:
                stream.reconfigure(errors=errors)
                continue
            buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
            text = io.TextIOWrapper(
                buffer,
                stream.encoding,
                errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, text)


def main() -> None:
    """Run the command line and exit with the documented code."""
    code, arguments = 128, sys.argv[1:]
    try:
        STOP.install(is_rank="WORLD_SIZE" in os.environ)
        Output.replace_streams(arguments)
        _settle()
        code = run(arguments)
    except Interrupted as error:  # before the command began, or while its error was being told
        code = _tell_stop(error)
    except OSError as error:  # before the command began
        code = StorageError.exit_code
        click.echo(one_line(f"Error: {_reason(error)}"), err=True)
    finally:
        STOP.end()
    gc.freeze()  # or the interpreter's last collection walks through all of PyTorch, which takes a second or two
    sys.exit(code)


def _settle() -> None:
    """Make the command independent of a home directory, and say whose code runs."""
    lend_caches()
    if (here := other_code()) is not None and os.environ.get("RANK", "0") == "0":
        click.echo(one_line(f"the code in {ROOT} runs, not that in {here}; {WAY_OUT}"), err=True)


def run(arguments: Sequence[str]) -> int:
    """Run one command line, turning whatever ends it into one line on standard error.

    Args:
        arguments: What follows the program's name.

    Returns:
        The documented exit code.
    """
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
        return _tell_stop(error, arguments)
    except Exception as error:
        debug = "--debug" in arguments
        if debug:
            traceback.print_exc()
        if isinstance(error, PipelineError):
            if stop := _stop_behind(error):
                return _tell_stop(stop, arguments)
            message, code = str(error), error.exit_code
        elif isinstance(error, OSError):
            message, code = _reason(error), StorageError.exit_code
        elif STOP.received is not None:  # a signal came, and the code it reached made another error of it
            return _tell_stop(STOP.error("stopped; run the same command again"), arguments)
        elif (asked := _out_of_memory(error)) is not None:
            message, code = f"{asked}; {LESS_MEMORY}", 1
        else:
            hint = "" if debug else "; --debug in front of the command shows where"
            message, code = f"{type(error).__name__}: {' '.join(str(error).split())}{hint}", 1
        click.echo(one_line(f"Error: {message}"), err=True)
        return code
    return 0


def _stop_behind(error: BaseException) -> Interrupted | None:
    """Return the signal's exception that an error hides; None where there is none.

    A decoder raises nearly anything on a damaged file, so what reads one turns every error into its own, this too.
    """
    cause = error.__cause__ or error.__context__
    if cause is None or isinstance(cause, Interrupted):
        return cause
    return _stop_behind(cause)


def _out_of_memory(error: BaseException) -> str | None:
    """Return how much more memory of the GPU was asked for, in PyTorch's words; None of another error."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    return ". ".join(" ".join(str(error).split()).split(". ")[:2]).rstrip(".") or "out of the device's memory"


def _reason(error: OSError) -> str:
    return f"{error.filename or 'reading or writing'}: {error.strerror or error}"


def _tell_stop(error: Interrupted, arguments: Sequence[str] = ()) -> int:
    # With it the command would start over: what it had not come to stays as it was.
    how = "the same command without --fresh" if "--fresh" in arguments else "the same command again"
    click.echo(str(error).replace("the same command again", how), err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
