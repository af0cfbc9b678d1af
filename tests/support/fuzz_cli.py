"""Bad values for every option and argument of every command, found by walking the command line itself."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import torch

from pipeline.errors import MAX_LINE
from stages.cli import cli, run
from tests.support.project import Project
from tests.support.tally import Tally
from tests.support.time_limit import Hung, time_limit

torch.set_num_threads(1)  # torch is loaded before any time is measured
SECONDS_UNTIL_HUNG = 60
WRONG_USAGE, BAD_INPUT = frozenset({2}), frozenset({2, 3, 4})
SOME_BAD = BAD_INPUT | {1}  # of several files: each is named, the others are answered
UNEXPECTED = "--debug in front of the command shows where"  # how the line of an unforeseen error ends

TEXTS = (
    "", " ", "\n", "x\ny", "x\r", "\t", "\x1b[31mred", "é", "😀" * 50, "\udcff", "\u202e", "x" * 5000, "../..", "/",
    "no-such", "-1",
    "nan", "None", "{}", "[", "%s%n", "{0}", "$(touch executed)", ",", "a,a", "a,,b", "=", "=1", "*", "*a", "1e3",
    "0x10", "'", '"',
)  # fmt: skip
SETTINGS = (
    "epochs=", "epochs=x", "epochs=1=2", "epochs=-1", "epochs=1.5", "epochs=true", "epochs=1e3",
    "epochs=" + "9" * 5000, "epochs=[1]", "epochs={a: 1}", "epochs=" + "[" * 5000,
    "epochs=" + "- " * 5000,
    "epochs=*a", "epochs=&a [*a]", "epochs=!!python/object/apply:os.mkdir [executed]", "epochs=\x00", "epochs=\udcff",
    "epochs=\u2028", "epochs='", "epochs=1\n2", "epochs=3 # x\nlr: 1", "lr=nan", "lr=.nan", "lr=inf",
    "lr=101.0",
    "lr=" + "9" * 29, "lr=1.0e+400", "no_such=1", "Epochs=1", " epochs=1", "optimizer=lion", "optimizer=",
    "optimizer=[]",
    "a\nb=1", "batch_size=0", "batch_size=99999999", "precision=fp16", "precision=null", "weights=null",
)  # fmt: skip
INTEGERS = ("", " ", "x", "1.5", "1e3", "nan", "inf", "0x10", "\n", "½", "--", "9" * 5000, "1\n2")
FLOATS = ("", " ", "x", "nan", "NaN", "inf", "-inf", "1e999", "1,5", "0x1", "\n", "½")
PATHS = (
    "", "no-such", "no-such/best.safetensors", "no\nsuch", "\udcff", "é", "x" * 300, "a/" * 3000, ".", "..", "/",
    "params.yaml",
    "params.yaml/x", "/dev/null", "/dev/full", "pipe", "pipe/x", "loop", "loop/x", "empty-folder", "/proc/self/mem",
    "a.safetensors",
    "a.h5", "a.png", "text.safetensors", "\x1b[31m", "~", "$HOME", "file:///etc/passwd", "http://x/y", "s3://x/y", "-",
)  # fmt: skip
DESTINATIONS = (
    "",
    "params.yaml",
    "params.yaml/x",
    "/dev/null",
    "/dev/null/x",
    "loop",
    "loop/x",
    "pipe",
    "x" * 300,
    "a/" * 3000,
)
VARIABLES = (
    {"RANK": "x"}, {"RANK": "1"}, {"RANK": "-1"}, {"RANK": ""}, {"RANK": "½"}, {"RANK": "9" * 5000},
    {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "x"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"},
)  # fmt: skip
USUAL = {
    "student": "deit", "name": "squeezenet1_1", "checkpoint": "data/smoke/teacher", "out": "exported",
    "file": "data/smoke/labels/default.h5", "images": "a.png",
}  # fmt: skip


class Case(NamedTuple):
    """A command line, and the exit codes that are right for it."""

    arguments: tuple[str, ...]
    codes: frozenset[int]
    variables: Mapping[str, str] = {}


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def cases() -> list[Case]:
    """List every bad value of every parameter of every command."""
    generated = [
        Case(arguments, WRONG_USAGE)
        for arguments in [("no-such",), ("no\nsuch",), ("--no-such",), ("--x\ny",), ("\udcff",)]
    ]
    generated += [
        Case(("--debug=1", "models"), WRONG_USAGE),
        Case(("",), WRONG_USAGE),
        Case(("labels", "no\nsuch"), WRONG_USAGE),
    ]
    for words, command in commands():
        for parameter in command.params:
            generated += [_at_the_doctors(case) for case in _cases_of(words, command, parameter)]
        usual = _usual(command)
        generated += [
            Case((*words, *usual, extra), WRONG_USAGE) for extra in ("--no-such", "--x\ny=1", "--recipe", "-x")
        ]
        if not any(parameter.nargs == -1 for parameter in command.params):
            generated.append(Case((*words, *usual, "one", "too\nmany", "arguments"), WRONG_USAGE))
        if any(parameter.required for parameter in command.params):
            generated.append(Case(words, WRONG_USAGE))
        if any(parameter.name == "recipe" for parameter in command.params):
            generated += [_at_the_doctors(Case((*words, *usual), WRONG_USAGE, variables)) for variables in VARIABLES]
    return generated


def _at_the_doctors(case: Case) -> Case:
    """Allow `doctor` its own exit code 1 where there is no project."""
    return case._replace(codes=case.codes | {1}) if case.arguments[0] == "doctor" else case


def _usual(command: click.Command, but: click.Parameter | None = None) -> list[str]:
    """Return a value for each parameter that a command needs."""
    arguments = []
    for parameter in command.params:
        if parameter.required and parameter is not but:
            kind = parameter.type
            value = (
                kind.choices[0]
                if isinstance(kind, click.Choice)
                else USUAL.get(parameter.name or "", "data/smoke/teacher")
            )
            arguments += [str(value)] if isinstance(parameter, click.Argument) else [parameter.opts[0], str(value)]
    return arguments


def _cases_of(words: tuple[str, ...], command: click.Command, parameter: click.Parameter) -> list[Case]:
    usual, name = _usual(command, parameter), parameter.opts[0]
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return [Case((*words, *usual, f"{name}={value}"), WRONG_USAGE) for value in ("", "1", "x\ny")]
    values, codes = _bad_values(parameter)
    if isinstance(parameter, click.Argument):
        return [Case((*words, *usual, "--", value), codes) for value in values]
    generated = [Case((*words, *usual, name, value), codes) for value in values]
    if values and not parameter.multiple:
        generated.append(Case((*words, *usual, name, "1", name, values[0]), codes))
    return [*generated, Case((*words, *usual, name), WRONG_USAGE)]


def _bad_values(parameter: click.Parameter) -> tuple[list[str], frozenset[int]]:
    kind: Any = parameter.type
    if parameter.name in ("csv_file", "predictions"):  # any file would be written
        return [path for path in DESTINATIONS if path != "params.yaml"], BAD_INPUT
    if isinstance(kind, click.Path):
        if parameter.name == "directory":  # any other name is a new project's folder
            addresses = ["file:///etc/passwd", "http://x/y", "s3://x/y"]
            return [*(path for path in DESTINATIONS if "params" not in path), *addresses], BAD_INPUT
        return list(DESTINATIONS if parameter.name == "out" else PATHS), BAD_INPUT
    if parameter.nargs == -1:
        return [path for path in PATHS if path not in ("", ".", "..", "/")], SOME_BAD
    if isinstance(kind, click.Choice):
        return [*TEXTS, str(kind.choices[0]).upper() + "?", ",".join(map(str, kind.choices)) + ","], WRONG_USAGE
    if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        values = [*(INTEGERS if isinstance(kind, click.types.IntParamType) else FLOATS)]
        low, high = getattr(kind, "min", None), getattr(kind, "max", None)
        values += [] if low is None else [str(low - 1), str(low - 10**20)]
        values += [] if high is None else [str(high + 1), str(high + 10**20)]
        return values, WRONG_USAGE
    if parameter.name in ("license", "label_name", "teacher_labels"):  # any identifier is one
        return [text for text in TEXTS if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", text)], WRONG_USAGE
    return [*TEXTS, *(SETTINGS if parameter.name == "settings" else ())], WRONG_USAGE


def odd_files(folder: Path) -> None:
    """Make what PATHS and DESTINATIONS name."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "empty-folder").mkdir()
    for name in ("a.safetensors", "a.h5", "a.png"):
        (folder / name).touch()
    (folder / "text.safetensors").write_text("text\n" * 1000)


def fuzz_cli(project: Project, chosen: list[Case]) -> Tally:
    """Run command lines: each must end soon with its code and one line, having written nothing."""
    tally = Tally()
    before = _state(project.path)
    for case in chosen:
        code, _, wrong = judge(project.path, case)
        after = _state(project.path)
        if after != before:
            wrong.append(f"wrote: {sorted(name for name, _ in set(after.items()) ^ set(before.items()))[:3]}")
            before = after
        tally.counts["cases"] += 1
        tally.counts[f"exit {code}"] += 1
        tally.note(f"{[argument[:60] for argument in case.arguments]} {dict(case.variables)}"[:300], wrong)
    return tally


class Verdict(NamedTuple):
    """What came of a command line: its exit code, what it printed on standard output, and what was wrong with it."""

    code: int
    out: str
    wrong: list[str]


def judge(folder: Path, case: Case) -> Verdict:
    """Run one command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, case.variables),
        mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO())),
    ):
        try:
            with time_limit(SECONDS_UNTIL_HUNG):
                code = run(case.arguments)
        except Hung:
            return Verdict(124, "", ["hung"])
        except BaseException as error:
            return Verdict(1, "", [f"raised: {error!r}"[:300]])
    wrong = [] if code in case.codes else [f"exit {code} instead of {sorted(case.codes)}: {err.getvalue()[-300:]!r}"]
    lines = [line for line in err.getvalue().splitlines() if line.strip() and not line.startswith(("Usage:", "Try "))]
    told = lines[-1:] if code == 1 else lines
    right = [line for line in told if line.isprintable() and 12 < len(line) < MAX_LINE + 50]
    if code and (len(right) != 1 or right != told):
        wrong.append(f"message: {[line[:200] for line in lines[:3]]}")
    if UNEXPECTED in err.getvalue() or re.search(r"Traceback", err.getvalue() + out.getvalue()):
        wrong.append(f"unexpected: {err.getvalue()[-300:]!r}")
    return Verdict(code, out.getvalue(), wrong)


def sample(count: int, rng: random.Random) -> list[Case]:
    """Choose some of all cases."""
    every = cases()
    return every if count >= len(every) else rng.sample(every, count)


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    files = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        # Locks stay where they once were held. What prepare has read of a refused folder spares it the next try.
        if path.suffix != ".lock" and path.name != "prepare.json" and not path.is_dir():
            files[str(path)] = (stat.st_size, stat.st_mtime_ns)
    return files
