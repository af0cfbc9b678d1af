"""The table of commands agrees with the commands, and importing it imports none of them."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from stages.cli import ROWS, TABLE, cli
from tests.support.project import environment

SHORT_HELP = 90  # characters that fit beside a command's name
# Commands whose own --help must not wait for torch.
QUICK = ("clean", "doctor", "labels", "label", "prepare", "record", "selection")


@pytest.mark.parametrize("name", ROWS)
def test_a_command_is_called_and_described_as_the_table_says(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.name == name
    assert ROWS[name][1] == command.get_short_help_str(SHORT_HELP)


def test_importing_the_table_or_a_quick_command_imports_no_torch() -> None:
    others = [f"stages.{module.partition(':')[0]}" for module, _ in ROWS.values()]
    program = f"""
import sys
import stages.cli
from click.testing import CliRunner
assert CliRunner().invoke(stages.cli.cli, ["--help"]).exit_code == 0
assert not set({others!r}) & set(sys.modules), "a command is imported"
for name in {QUICK!r}:
    __import__(f"stages.{{name}}")
    assert "torch" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)


def test_names_are_completed_from_the_table() -> None:
    def complete(*arguments: str, incomplete: str = "") -> list[str]:
        completer = ShellComplete(cli, {}, "pipeline", "_PIPELINE_COMPLETE")
        return [item.value for item in completer.get_completions(list(arguments), incomplete)]

    assert complete() == [name for rows in TABLE.values() for name, _, _ in rows]
    assert complete(incomplete="la") == ["label", "labels"]
    assert "--debug" in complete(incomplete="--")
    assert complete("labels", incomplete="in") == ["inspect"]


def test_a_mistyped_name_is_told_the_one_it_resembles() -> None:
    with pytest.raises(click.UsageError, match="No such command 'distil'") as error:
        cli.main(["distil"], standalone_mode=False)
    assert "distill" in str(error.value.format_message())
