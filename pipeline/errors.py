"""The errors a user can cause, each with the exit code of the command line.

Every message is one line that names the key, the value and the way out.
"""

from __future__ import annotations

import os

MAX_LINE = 2000


class PipelineError(Exception):
    """An error that ends a command with one line and `exit_code`, never with a traceback.

    Args:
        message: May quote user input and files; `one_line` makes it safe.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UsageError(PipelineError):
    """Wrong usage or configuration: an unknown name, a value out of range, a path that does not exist."""

    exit_code = 2


class DataError(PipelineError):
    """Bad data or a bad artefact: it exists and is not valid, is stale, or belongs to something else."""

    exit_code = 3


class StorageError(PipelineError):
    """Reading or writing failed: a full disk, missing rights, a lock held by another run."""

    exit_code = 4


class NumericalError(PipelineError):
    """A loss, gradient norm or logit that is not finite."""

    exit_code = 5


class Interrupted(PipelineError):
    """The run was asked to stop (SIGINT, SIGTERM, its time limit); its state has been saved.

    Args:
        message: The line shown to the user.
        exit_code: 128 plus the signal's number, or 75 at the time limit.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(text: str) -> str:
    """Return a text made safe by `printable`, without its middle if it has more than MAX_LINE characters."""
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
    return printable(text)


def printable(text: str | os.PathLike[str]) -> str:
    r"""Return a text or a path as one line that any terminal, JSON file or page can hold.

    Terminal escapes, line breaks, invisible characters and those that change the direction of text are escaped as in
    Python; a file name's bytes that are not UTF-8 as `\xff`. Markdown and HTML need their own escaping after it.
    """
    line = os.fspath(text)
    if line.isprintable():  # a million names are
        return line

    def escaped(char: str) -> str:
        is_byte = "\udc80" <= char <= "\udcff"  # see os.fsdecode
        return f"\\x{ord(char) - 0xDC00:02x}" if is_byte else repr(char)[1:-1]

    return "".join(char if char.isprintable() else escaped(char) for char in line)
