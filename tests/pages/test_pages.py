"""Every page of the project: its links lead somewhere, its commands and options exist; README stays short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from stages.cli import cli
from tests.support.markdown import blocks, commands, links, pages
from tests.support.project import ROOT

README, *DOCS = pages()
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "results/README.md")]
PAGES = [README, *DOCS, *OTHERS]
IDS = [str(path.relative_to(ROOT)) for path in PAGES]


def said(text: str) -> set[str]:
    """The `pipeline` commands of a page, in blocks and within lines."""
    inline = re.findall(r"`(pipeline [^`]+)`", text)
    stopped = (re.split(r" [#&|>] ", line)[0] for line in [*commands(text), *inline])
    lines = (re.sub(r"^.*-m stages\.cli ", "pipeline ", line) for line in stopped)
    return {line for line in lines if line.startswith("pipeline ")}


def check(line: str) -> None:
    """Refuse a command or an option that the command line does not have."""
    words = shlex.split(line)[1:]
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        names = [word for word in words if not word.startswith("-")]
        if not names:
            break
        named = command.get_command(context, names[0])
        # A word in capitals stands for any command.
        if named is None and names[0].isupper():
            return
        assert named is not None, f"{line}: there is no command {names[0]}"
        words.remove(names[0])
        command = named
    known = {name for parameter in command.get_params(context) for name in parameter.opts}
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in known, f"{line}: there is no option {word}"


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_links_lead_to_files(path: Path) -> None:
    for target in links(path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_links_to_a_part_of_a_page_lead_to_a_heading(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", path.read_text()):
        page = (path.parent / target) if target else path
        assert anchor in headings(page.read_text()), f"{target}#{anchor}"


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_commands_and_options_exist(path: Path) -> None:
    for line in said(path.read_text()):
        check(line)


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    for line in ("pipeline explain data", "pipeline labels repair", "pipeline distill --teachers x"):
        assert said(f"```sh\n{line}\n```\n") == said(f"see `{line}`") == {line}
        with pytest.raises(AssertionError, match="there is no"):
            check(line)


def test_the_readme_names_every_page() -> None:
    for path in [*DOCS, *OTHERS]:
        assert str(path.relative_to(ROOT)) in README.read_text()


def test_a_stranger_finishes_the_readme() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 170
    assert lines.index("## Your own images") < 80
    ten = next(block for block in blocks(README.read_text(), "sh") if "doctor" in block)
    assert len(ten.splitlines()) == 10
