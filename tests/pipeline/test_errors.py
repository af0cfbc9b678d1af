"""Text of users and files, made safe to print in one way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError, one_line, printable
from pipeline.system.text import markdown_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe 猫 😀 $HOME \\n <b>", "Größe 猫 😀 $HOME \\n <b>"),
        ("\x1b[31mred\x07\x7f\x9b2J", "\\x1b[31mred\\x07\\x7f\\x9b2J"),
        ("two\nlines\r\n\tand\u2028more", "two\\nlines\\r\\n\\tand\\u2028more"),
        ("evil\u202egnp.exe \u200b\ufeff\xa0", "evil\\u202egnp.exe \\u200b\\ufeff\\xa0"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"),
        (Path(os.fsdecode(b"a\xff/b\n.png")), "a\\xff/b\\n.png"),
        ("\ud800 \udc41", "\\ud800 \\udc41"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_act_upon_or_hide_is_escaped(text: str | Path, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_becomes_one_printable_line_of_unicode_once(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and shown.encode() and printable(shown) == shown if text else shown == ""
    assert (shown == text) == text.isprintable()


def test_markdown_escapes_what_is_left() -> None:
    assert markdown_text("a\n b|c\x1b<i>") == "a b\\|c\\\\x1b&lt;i>"


def test_a_message_is_one_line_of_bounded_length_whatever_it_quotes() -> None:
    line = one_line("key: " + "x\ny\x1b\udcff\u202e" * 10_000 + "; way out")
    assert line.isprintable() and len(line) < 20_000
    assert line.startswith("key: x\\ny\\x1b") and line.endswith("; way out")
    assert str(UsageError("a\nb")) == "a\\nb"
