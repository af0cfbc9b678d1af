"""Commands of the pipeline in processes forked from one that has loaded torch, so that hundreds are affordable.

Each runs the command line's own `main` in a process of its own, which can be killed; only the interpreter's start and
the imports are shared.
"""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.fault_injection import Disk, Fault
from tests.support.project import Project, environment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.commands_loaded"])
SECONDS_UNTIL_HUNG = 300
HUNG = 124  # the exit code noted for a command that had to be killed because it did not end


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; minus the signal's number where one killed it.
        out: What it printed; empty where it was killed.
        err: As out, on standard error.
        calls: The calls that changed files below `data`, (name, path).
        audited: Those of them that the interpreter's audit saw, and whatever else it saw.
    """

    code: int
    out: str = ""
    err: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    audited: tuple[tuple[str, str], ...] = ()

    @property
    def views(self) -> set[int]:
        """The views whose parts it wrote."""
        parts = (re.search(r"/\.(\d{6,})\.part\.", path) for name, path in self.calls if name == "replace")
        return {int(part[1]) for part in parts if part}


class Command:
    """A running command.

    Args:
        folder: The project's folder.
        arguments: Of the command line.
        fault: The fault of its disk, if it has one.
        before: Called in its process before it begins.
        extra: Further variables of its environment.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        fault: Fault | None = None,
        before: Callable[[], None] | None = None,
        **extra: str,
    ) -> None:
        self._connection, theirs = CONTEXT.Pipe(duplex=False)
        variables = environment(**extra)
        self._process = CONTEXT.Process(
            target=_run, args=(theirs, folder, arguments, fault, before, variables), daemon=True
        )
        self._process.start()
        theirs.close()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def send(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self._process.is_alive():
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def wait(self, seconds: float) -> None:
        """Wait some seconds, or until it ends."""
        self._connection.poll(seconds)

    def finish(self) -> Ended:
        """Wait for its end; a command that hangs is killed and has the code HUNG."""
        # In waits of a second: a pause of the whole machine counts as one of them.
        if not any(self._connection.poll(1.0) for _ in range(SECONDS_UNTIL_HUNG)):
            self._process.kill()
            ended = Ended(HUNG)
        else:
            try:
                ended = self._connection.recv()
            except EOFError:
                self._process.join()
                ended = Ended(self._process.exitcode or 0)
        self._process.join()
        self._process.close()
        self._connection.close()
        return ended


def run(folder: Path, *arguments: str, **options: Any) -> Ended:
    """Run a command to its end."""
    return Command(folder, *arguments, **options).finish()


def teach(path: Path) -> Project:
    """Make a project with prepared data and a selected teacher."""
    project = Project.create(path, alone=True)
    for command in (("prepare",), ("teacher", "squeezenet1_1"), ("select", "--teachers", "squeezenet1_1")):
        ended = run(project.path, *command)
        assert ended.code == 0, ended.err
    return project


def _run(
    connection: Connection,
    folder: Path,
    arguments: tuple[str, ...],
    fault: Fault | None,
    before: Callable[[], None] | None,
    variables: dict[str, str],
) -> None:
    """What the forked process does."""
    from stages.cli import main

    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ["pipeline", *arguments]
    sys.stdout, sys.stderr = out, err = io.StringIO(), io.StringIO()
    disk = Disk(Path("data"), fault)
    disk.install()
    if before is not None:
        before()
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    connection.send(Ended(code, out.getvalue(), err.getvalue(), tuple(disk.calls), tuple(disk.audited)))
