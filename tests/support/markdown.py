"""The blocks of code in the project's pages, so that tests run what a reader would."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.project import ROOT

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    """The text of a page, by its path in the project."""
    return (ROOT / name).read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [content for tag, content in _BLOCK.findall(text) if tag == language]


def commands(text: str) -> list[str]:
    """The lines of all sh blocks without their comments, continued lines joined."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split(" # ")[0].split()) for line in lines if line.strip() and not line.startswith("#")]


def links(text: str) -> list[str]:
    """The relative targets of a page's links, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.split("#")[0] for target in targets if "://" not in target and not target.startswith("#")]


def pages() -> list[Path]:
    """Every page of the project that is written by hand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
