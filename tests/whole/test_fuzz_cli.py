"""Every option and argument of every command given bad values: the documented code, one line, nothing written."""

from __future__ import annotations

import random
from pathlib import Path

import click
import pytest

from tests.support.fuzz_cli import Case, cases, commands, fuzz_cli, judge, odd_files, sample
from tests.support.project import Project
from tests.support.untrained import untrained

ALL = 10**6


@pytest.fixture(params=["nothing", "params.yaml", "a teacher"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Project:
    """A folder without a project, one with nothing run, and one with data and a teacher."""
    path = tmp_path / "project"
    if request.param == "a teacher":
        untrained(path)
    elif request.param == "params.yaml":
        Project.create(path)
    else:
        path.mkdir()
    odd_files(path)
    return Project(path)


@pytest.mark.parametrize("count", [40, pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_bad_value_is_refused_by_its_code_in_one_line_and_nothing_is_written(project: Project, count: int) -> None:
    tally = fuzz_cli(project, sample(count, random.Random(count)))
    assert tally.wrong == []


def test_every_parameter_of_every_command_is_given_bad_values() -> None:
    given = [case.arguments for case in cases()]
    for words, command in commands():
        mine = [arguments for arguments in given if arguments[: len(words)] == words]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert any(argument.startswith(parameter.opts[0]) for line in mine for argument in line), (
                    words,
                    parameter.name,
                )
            else:
                assert any("--" in line for line in mine), (words, parameter.name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report", "--out", ""), "an empty path"),
        (("report", "--recipe", ""), "no such recipe"),
        (("prepare", "--recipe", "a\nb"), "--recipe a\\nb"),
        (("distill", "--student", "deit", "--device", ""), "--device"),
        (("distill", "--student", "deit", "--device", "meta"), "--device meta"),
        (("labels", "verify", "params.yaml", "--margin", "nan"), "not a finite number"),
        (("select", "--teachers", "vgg17"), "choose from densenet121"),
        (("select", "--teachers", "x" * 300), "choose from densenet121"),
        (("init", "http://x/y"), "http:/x/y: an address; name a folder"),
        (("label", "--teacher", "nowhere"), "nowhere"),
        (("teacher", "vgg16", "--set", "epochs=" + "9" * 5000), "more than 30 digits"),
        (("models", "--x\ny"), "--x\\ny"),
    ],
)
def test_a_bad_value_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    from stages.cli import run

    project = Project.create(tmp_path)
    assert judge(project.path, Case(arguments, frozenset({2}))).wrong == []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.path)
        assert run(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_named_pipe_is_no_label_file(tmp_path: Path) -> None:
    odd_files(tmp_path)
    assert judge(tmp_path, Case(("labels", "inspect", "pipe"), frozenset({3, 4}))).wrong == []
