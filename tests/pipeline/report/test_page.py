"""The report's page and its Markdown: their content, and that they refer to nothing outside."""

from __future__ import annotations

import base64
import html.parser
import re
import struct
import zlib

from pipeline.report.page import Missing, Section, file_names, to_html, to_markdown
from pipeline.report.tables import Figure, Table

HOSTILE = '</script><script>alert("|`1`|")</script> & *x* [y](http://e.org) \x00\x1b \ud800'
LONG = Table("Table 2. Long", ("class", "top-1 %", "paper: top-1 %", "top-1 %: difference", "confused with"), [
    (f"class {index}", "97.00 ± 1.00 (3)", "98.00", "-1.00", f"class {index + 1}") for index in range(100)
], "the conditions")  # fmt: skip


def png(width: int = 3, height: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + b"\x7f" * width for _ in range(height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


SECTIONS = [
    Section("What was run", [LONG, Table("Table 2. Again", ("a", "b"), [("x", "not run")])], "A paragraph."),
    Section(HOSTILE, [
        Table(f"T {HOSTILE}", (HOSTILE, "b"), [(HOSTILE, HOSTILE)], HOSTILE),
        Figure("figure-6", f"Figure 6. {HOSTILE}", png(), HOSTILE, HOSTILE),
        Missing("Figure 7. On CIFAR-10", "not run", "pipeline distill --student <x>"),
    ]),
]  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Collects a page's tags, and its text by the tag around it."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "every element is closed in its turn"

    def handle_data(self, data: str) -> None:
        self.text.append((self._open[-1] if self._open else "", data))

    def values(self, tag: str, key: str) -> list[str | None]:
        return [attributes[key] for name, attributes in self.tags if name == tag and key in attributes]


def test_every_cell_and_text_is_shown_as_it_is() -> None:
    page = Reader(to_html("Title", "Lead", SECTIONS))
    shown = [text for _, text in page.text]
    hostile = '</script><script>alert("|`1`|")</script> & *x* [y](http://e.org) \\x00\\x1b \\ud800'
    assert shown.count(hostile) == 7, "contents and section, table's heading, two cells, two notes"
    assert page.values("img", "alt") == [hostile]
    assert "script" not in {tag for tag, _ in page.tags}
    cells = [text for tag, text in page.text if tag in ("td", "th")]
    assert all(cell in cells for row in LONG.rows for cell in row)
    assert ("code", "pipeline distill --student <x>") in page.text


def test_nothing_outside_the_page_is_referred_to() -> None:
    page = Reader(to_html("Title", "Lead", SECTIONS))
    references = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(value and value.startswith(("data:image/png;base64,", "#")) for value in references)
    style = next(text for tag, text in page.text if tag == "style")
    assert "url(" not in style and "@import" not in style
    assert not {"link", "script", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    (source,) = page.values("img", "src")
    assert source and base64.b64decode(source.partition(",")[2]) == png()


def test_the_contents_lead_to_every_section_and_item() -> None:
    page = Reader(to_html("Title", "Lead", SECTIONS))
    ids = [value for _, attributes in page.tags for key, value in attributes.items() if key == "id"]
    links = [str(value).removeprefix("#") for value in page.values("a", "href")]
    assert sorted(links) == sorted(map(str, ids)) and len(set(ids)) == len(ids) == 7
    assert {"table-2", "table-2-2", "figure-6", "figure-7"} <= set(ids)


def test_the_verdict_comes_before_the_contents_in_a_box_and_pictures_are_at_most_720_pixels_wide() -> None:
    page = to_html("Title", "Lead", SECTIONS).decode()
    places = [page.index(part) for part in ("<p>Lead</p>", 'id="section-1"', 'id="table-2"', "<nav", 'id="section-2"')]
    assert places == sorted(places)
    style = re.sub(r"\s+", " ", page)
    assert "#section-1 > article:first-of-type { padding: 1rem 1.25rem; border: 2px solid" in style
    assert "img { display: block; width: 720px; max-width: 100%;" in style


def test_ours_the_papers_and_the_difference_have_one_heading() -> None:
    page = to_html("Title", "Lead", SECTIONS).decode()
    assert '<th scope="colgroup" colspan="3" class="group"><span class="kept">top-1</span> %</th>' in page
    assert '<tr><th scope="col">ours</th><th scope="col">paper</th><th scope="col">difference</th></tr>' in page


def test_names_of_files_are_plain_and_distinct() -> None:
    titles = [
        "Table 3. A",
        "Table 3, continued. B",
        "Figure 5 in figures. C",
        "../../etc",
        "\n",
        "Worst classes: 5",
        "-",
    ]
    names = file_names([Missing(title, "") for title in titles])
    assert names == ["table-3", "table-3-continued", "figure-5-in-figures", "etc", "item", "worst-classes-5", "item-2"]


def test_markdown_escapes_what_would_be_markup() -> None:
    text = to_markdown("Title", "Lead", SECTIONS, pictures="figures").decode()
    assert "<script" not in text and "\\[y\\](http" in text and "\\*x\\*" in text
    assert "](figures/figure-6.png)" in text
    assert "not run: `pipeline distill --student <x>`" in text
    rows = [line for line in text.splitlines() if line.startswith("| class ") and "±" in line]
    assert len(rows) == 100 and all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
