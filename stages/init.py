"""`pipeline init [DIR]`: a new project's files, from the installed package."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from pipeline.errors import UsageError, printable
from pipeline.system.storage import write_together
from stages.shared.options import FilePath
from stages.shared.paths import DATA, PARAMS, PROJECT, STAGES

README = """\
# A project of titn-pipeline

`params.yaml` holds the settings: a recipe for each data set, at its top the one that commands take. Results: `data/`.

    pipeline doctor                                          # what works here
    pipeline prepare --recipe folder-small --from my-images  # my-images/<class>/*, or my-images/train/<class>/*
    pipeline teacher-select --recipe folder-small            # stage one: teachers and their labels
    pipeline distill --recipe folder-small --student titn    # stage two
    git init && dvc init && dvc repro                        # or both stages of the recipe at the top, with DVC
DVC does not see a new version of the package: `dvc repro --force` runs everything again.
"""
DVC_IGNORE = """\
__pycache__/
/data/raw
/data/work
/data/**/log.jsonl
/data/*/labels/*@*
"""
# What the clone's dvc.yaml says of itself that is not so in a project.
OTHERWISE = {
    '; see README.md, "How it works".': ".",
    "Each stage depends on the code that decides its result, and on its own part of params.yaml alone.": (
        "Each stage depends on its own part of params.yaml alone; the code is the installed package's."
    ),
}
_DEPS = re.compile(r"^( *)deps: \[(.*?)\]\n", re.MULTILINE | re.DOTALL)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # in a path // is /; C: is a disk
_WIDTH = 120


@click.command("init")
@click.argument("directory", metavar="[DIR]", required=False, default=".", type=FilePath())
def command(directory: Path) -> None:
    """Write a new project's params.yaml, dvc.yaml, .dvcignore and README.md.

    DIR is made where it is missing; by default it is this folder. A file that is there is never overwritten. `data/`
    gets a .gitignore, so that git does not take results.
    """
    init(directory)
    click.echo(f"{printable(directory)}: {', '.join(sorted(str(name) for name in project_files()))}")
    steps = [] if directory == Path() else [f"cd {shlex.quote(printable(directory))}"]
    if not (directory / ".git").exists():
        steps.append("git init")
    click.echo(
        f"next, for DVC: {' && '.join([*steps, 'dvc init', 'dvc repro'])}; `pipeline doctor` says what works here"
    )


def init(directory: Path) -> None:
    """Write a new project's files.

    Args:
        directory: The project's folder, made if missing.

    Raises:
        UsageError: One of the files is there, but for README.md, or `directory` is a file; nothing is written then.
        StorageError: Writing failed.
    """
    if _ADDRESS.match(directory.as_posix()):
        raise UsageError(f"{printable(directory)}: an address; name a folder")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: a file; name a new folder")
    files = {directory / name: content for name, content in project_files().items()}
    there = [str(path) for path in files if path.exists() or path.is_symlink()]
    if str(directory / "README.md") in there:  # a repository has its own, and no command reads it
        there.remove(str(directory / "README.md"))
        del files[directory / "README.md"]
    if there:
        raise UsageError(f"{', '.join(there)}: there already, and never overwritten; move away, or name another folder")
    write_together(files)


def project_files() -> dict[Path, bytes]:
    """Return the files of a new project, by their paths below its folder."""
    texts = {
        Path("README.md"): README,
        Path(".dvcignore"): DVC_IGNORE,
        DATA / ".gitignore": "*\n!.gitignore\n",
        Path("dvc.yaml"): without_code(STAGES.read_text(encoding="utf-8")),
        PARAMS: (PROJECT / PARAMS).read_text(encoding="utf-8"),
    }
    return {path: text.encode() for path, text in texts.items()}


def without_code(text: str) -> str:
    """Return dvc.yaml without the dependencies on code, which a project outside a clone has no files of.

    Args:
        text: The clone's: what is data has quotes there, since its path names the recipe.
    """

    def data_alone(match: re.Match[str]) -> str:
        indent, data = match[1], re.findall(r'"[^"]+"', match[2])
        line = f"{indent}deps: [{', '.join(data)}]\n"
        if len(line) > _WIDTH:
            line = f"{indent}deps: [\n{indent}  " + f",\n{indent}  ".join(data) + f",\n{indent}]\n"
        return line if data else ""

    text = _DEPS.sub(data_alone, text)
    for here, there in OTHERWISE.items():
        text = text.replace(here, there)
    return text
