"""The report as one self-contained HTML page, and as Markdown with its pictures in files."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.errors import printable
from pipeline.report.tables import Figure, Table
from pipeline.system.text import markdown_text


@dataclass(frozen=True)
class Missing:
    """A table or figure that the report cannot show.

    Attributes:
        title: Of the table or figure.
        why: In a few words, such as `not run`.
        command: The command that makes it, if any.
    """

    title: str
    why: str
    command: str = ""


Item = Table | Figure | Missing


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: One line.
        items: Tables and figures, in order.
        text: A paragraph above them.
    """

    title: str
    items: Sequence[Item]
    text: str = ""


def file_names(items: Iterable[Item]) -> list[str]:
    """Return a name without suffix for each item, usable in files and links: `table-3` of `Table 3. ...`.

    Names are distinct; a figure has its own.
    """
    names: list[str] = []
    for item in items:
        numbered = re.match(r"((?:Table|Figure) \d+(?:, continued|\b in figures)?)[.:]", item.title)
        words = item.name if isinstance(item, Figure) else numbered[1] if numbered else item.title
        base = "-".join(re.findall(r"[a-z0-9]+", words.lower()))[:60].strip("-") or "item"
        name, count = base, 1
        while name in names:
            count += 1
            name = f"{base}-{count}"
        names.append(name)
    return names


def to_html(title: str, lead: str, sections: Sequence[Section]) -> bytes:
    """Return a self-contained, printable page: pictures inline, no scripts, no external references.

    Args:
        title: Of the page.
        lead: One paragraph below it.
        sections: Each with a line in the table of contents, which follows the first. The first one's first item, the
            page's verdict, stands in a box.
    """
    names = iter(file_names(item for section in sections for item in section.items))
    contents: list[str] = []
    bodies: list[str] = []
    for index, section in enumerate(sections, 1):
        entries = [(next(names), item) for item in section.items]
        first = {item.title: name for name, item in reversed(entries)}  # a figure's table has its title
        lines = "".join(f'<li><a href="#{name}">{_text(heading)}</a></li>' for heading, name in reversed(first.items()))
        contents.append(f'<li><a href="#section-{index}">{_text(section.title)}</a><ul>{lines}</ul></li>')
        body = "".join(_item(name, item) for name, item in entries)
        text = f"<p>{_text(section.text)}</p>" if section.text else ""
        bodies.append(f'<section id="section-{index}"><h2>{_text(section.title)}</h2>{text}{body}</section>')
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<header><h1>{_text(title)}</h1><p>{_text(lead)}</p></header><main>{''.join(bodies[:1])}"
        f'<nav aria-label="Contents"><h2>Contents</h2><ol>{"".join(contents)}</ol></nav>'
        f"{''.join(bodies[1:])}</main></body></html>\n"
    )
    return page.encode("utf-8", "backslashreplace")


def to_markdown(title: str, lead: str, sections: Sequence[Section], *, pictures: str) -> bytes:
    """Return the report as GitHub Markdown.

    Args:
        title: Of the report.
        lead: One paragraph below it.
        sections: Its parts.
        pictures: Folder of the PNG files, relative to the Markdown file.
    """
    names = iter(file_names(item for section in sections for item in section.items))
    parts = [f"# {markdown_text(title)}\n", f"{markdown_text(lead)}\n"]
    for section in sections:
        parts += [f"{text}\n" for text in (f"## {markdown_text(section.title)}", markdown_text(section.text)) if text]
        for item in section.items:
            name, heading = next(names), f"### {markdown_text(item.title)}\n"
            if isinstance(item, Table):
                parts.append(item.to_markdown(level=3))
            elif isinstance(item, Figure):
                parts += [heading, f"![{markdown_text(item.alt)}]({pictures}/{name}.png)\n"]
                parts += [f"{markdown_text(item.note)}\n"] if item.note else []
            else:
                command = f": `{item.command}`" if item.command else ""
                parts += [heading, f"{markdown_text(item.why)}{command}\n"]
    return "\n".join(parts).encode("utf-8", "backslashreplace")


def _item(name: str, item: Item) -> str:
    heading = f"<h3>{_text(item.title)}</h3>"
    if isinstance(item, Missing):
        command = f": <code>{_text(item.command)}</code>" if item.command else ""
        return f'<article class="missing" id="{name}">{heading}<p>{_text(item.why)}{command}</p></article>'
    note = f'<p class="note">{_text(item.note)}</p>' if item.note else ""
    if isinstance(item, Table):
        short = " short" if len(item.rows) <= MOST_ROWS_KEPT_TOGETHER else ""
        return f'<article class="table{short}" id="{name}">{heading}{_table(item)}{note}</article>'
    source = base64.b64encode(item.png).decode()
    picture = f'<img src="data:image/png;base64,{source}" alt="{_text(item.alt)}">'
    tall = " tall" if _is_tall(item.png) else ""
    return f'<article class="figure{tall}" id="{name}">{heading}{picture}{note}</article>'


def _is_tall(png: bytes) -> bool:
    """Tell from the PNG's header whether a picture is higher than wide."""
    return int.from_bytes(png[20:24], "big") > int.from_bytes(png[16:20], "big")


def _table(table: Table) -> str:
    """Return the table; one wider than the page scrolls within its frame."""
    classes = [_column_class([row[index] for row in table.rows]) for index in range(len(table.columns))]
    rows = "".join(_row(row, classes) for row in table.rows)
    return (
        f'<div class="wide" role="region" aria-label="{_text(table.title)}" tabindex="0">'
        f"<table><thead>{_head(table.columns, classes)}</thead><tbody>{rows}</tbody></table></div>"
    )


def _head(columns: Sequence[str], classes: Sequence[str]) -> str:
    """Return the headings; `x`, `paper: x` and `x: difference` share one heading above them."""
    upper, lower = "", ""
    index = 0
    while index < len(columns):
        name = columns[index]
        if list(columns[index + 1 : index + 3]) == [f"paper: {name}", f"{name}: difference"]:
            upper += f'<th scope="colgroup" colspan="3" class="group">{_heading(name)}</th>'
            lower += "".join(f'<th scope="col">{word}</th>' for word in ("ours", "paper", "difference"))
            index += 3
        else:
            upper += f'<th scope="col" rowspan="ROWS"{classes[index]}>{_heading(name)}</th>'
            index += 1
    head = f"<tr>{upper}</tr>" + (f"<tr>{lower}</tr>" if lower else "")
    return head.replace('rowspan="ROWS"', 'rowspan="2"' if lower else "")


def _heading(text: str) -> str:
    """Return a heading that breaks between words only: `top-1` stays in one piece."""
    return re.sub(r"(\S*-\S*)", r'<span class="kept">\1</span>', _text(text))


def _row(cells: Sequence[str], classes: Sequence[str]) -> str:
    kept = ' class="kept"' if len(cells[0]) <= LONGEST_NAME_ON_A_LINE else ""
    first = f'<th scope="row"{kept}>{_text(cells[0])}</th>'
    rest = (
        f"<td{kind if kind or cell not in EMPTY else NONE}>{_text(cell)}</td>"
        for cell, kind in zip(cells[1:], classes[1:], strict=True)
    )
    return f"<tr>{first}{''.join(rest)}</tr>"


def _column_class(cells: Iterable[str]) -> str:
    """Return the class attribute of a column of words (aligned left, may break); none for a column of numbers."""
    known = [cell for cell in cells if cell not in EMPTY]
    return "" if all(FIGURE.fullmatch(cell) for cell in known) else ' class="words"'


def _text(text: str) -> str:
    """Return text for HTML, also within quotes."""
    return html.escape(printable(" ".join(text.split())))


LONGEST_NAME_ON_A_LINE = 30
MOST_ROWS_KEPT_TOGETHER = 15  # of a table on paper
EMPTY, NONE = ("-", "not run"), ' class="none"'
FIGURE = re.compile(r"[-+]?[\d.,]+( ± [\d.]+ \(\d+\)| \([\d.]+\)| to [-+]?[\d.]+)?%?|[\d, ]+of \d+|")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 80rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 2px solid #1a1a1a; }
h3 { font-size: 1.05rem; margin: 0 0 .5rem; }
h1, h2, h3, p, th, td { unicode-bidi: isolate; overflow-wrap: break-word; }
p { max-width: 50rem; margin: .5rem 0; }
nav { margin: 1.5rem 0; padding: .75rem 1rem; background: #f5f5f5; }
nav h2 { font-size: 1rem; margin: 0; border: 0; }
nav ol { margin: .25rem 0; padding-left: 1.5rem; columns: 2 20rem; }
nav ol > li { break-inside: avoid; margin-bottom: .4rem; }
nav ul { padding-left: 1rem; font-size: .875rem; list-style: none; }
a { color: #0b4f8a; }
article { margin: 1.75rem 0; }
article.missing { padding: .6rem 1rem; border: 1px dashed #767676; }
article.missing p { margin: 0; }
#section-1 > article:first-of-type { padding: 1rem 1.25rem; border: 2px solid #1a1a1a; border-radius: 4px; }
code { font: .875em/1.4 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
img { display: block; width: 720px; max-width: 100%; height: auto; margin: .5rem 0; }
.note { font-size: .8125rem; color: #444; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .8125rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; vertical-align: top; border-bottom: 1px solid #d4d4d4; }
thead th { vertical-align: bottom; border-bottom: 1.5px solid #1a1a1a; }
thead th.group { text-align: center; border-bottom: 1px solid #767676; }
tbody th { font-weight: 600; }
tr:first-child > th:first-child, tbody th { text-align: left; max-width: 18rem; position: sticky; left: 0;
  background: #fff; }
td { white-space: nowrap; }
tbody th.kept, span.kept { white-space: nowrap; }
th.words, td.words { text-align: left; white-space: normal; }
td.words { max-width: 22rem; }
td.none { color: #666; font-style: italic; }
@media (max-width: 40rem) {
  body { padding: 1rem .75rem; }
  tr:first-child > th:first-child, tbody th { max-width: 7.5rem; }
  tbody th.kept { white-space: normal; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  article.figure, article.missing, article.short, tr { break-inside: avoid; }
  article.figure img { width: auto; max-height: 140mm; }
  @page upright { size: A4 portrait; margin: 12mm; }
  @supports (page: upright) { article.tall, h2:has(+ .tall) { page: upright; } article.tall img { max-height: 225mm; } }
  .wide { overflow: visible; }
  .note { font-size: 7.5pt; max-width: none; break-before: avoid; }
  thead { display: table-header-group; }
  table { font-size: 7pt; width: 100%; }
  th, td { padding: 1.5pt 2.5pt; }
  tr:first-child > th:first-child, tbody th { position: static; }
}
"""
