"""A page in a headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def in_a_browser(page: Path, folder: Path) -> dict[str, Any]:
    """Open a copy of a page in a headless Chromium, and return what a script found in it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    probe = """<script>addEventListener("load", () => {
      const all = (query) => [...document.querySelectorAll(query)];
      const found = {
        pictures: all("img").map((one) => one.naturalWidth),
        rows: Object.fromEntries(all("article.table").map((one) => [one.id, one.querySelector("tbody").rows.length])),
        cells: all("table").map((one) => Math.min(...[...one.tBodies[0].rows].map((row) => row.cells.length))),
        fetched: performance.getEntriesByType("resource").map((one) => one.name),
        wider: document.documentElement.scrollWidth - innerWidth,
      };
      const out = document.createElement("pre");
      out.id = "found"; out.textContent = JSON.stringify(found); document.body.append(out);
    });</script>"""
    text, number = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    assert number == 1, "the page forbids scripts; the copy does not"
    copy = folder / "copy.html"
    copy.write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    options += ["--window-size=1280,900", "--dump-dom", copy.as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120, check=True)
    dumped = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert dumped, done.stderr
    shown: dict[str, Any] = json.loads(dumped[1])
    shown["fetched"] = [name for name in shown["fetched"] if not name.startswith("data:")]
    return shown
