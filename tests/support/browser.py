"""A page in a headless Chromium."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
OPTIONS += ("--disable-component-update", "--disable-sync")
# It reads commands from its descriptor 3 and answers on 4, which may be anything in this process.
MOVED = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def chromium(folder: Path) -> list[str]:
    """The command of a browser that keeps its files in a folder; skips the test where none is installed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    return [browser, *OPTIONS, f"--user-data-dir={folder / 'profile'}"]


def in_a_browser(page: Path, folder: Path) -> dict[str, Any]:
    """Open a copy of a page in a headless Chromium, and return what a script found in it."""
    browser = chromium(folder)
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
    browser += ["--window-size=1280,900", "--dump-dom", copy.as_uri()]
    done = subprocess.run(browser, capture_output=True, text=True, timeout=120, check=True)
    dumped = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert dumped, done.stderr
    shown: dict[str, Any] = json.loads(dumped[1])
    shown["fetched"] = [name for name in shown["fetched"] if not name.startswith("data:")]
    return shown


class Tab:
    """A page that is open, spoken to by Chromium's DevTools protocol.

    Args:
        into: Takes commands, JSON objects that end with a zero byte.
        out: Gives answers and events.
    """

    def __init__(self, into: IO[bytes], out: IO[bytes]) -> None:
        self._into, self._out, self._count, self._session = into, out, 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        command = {"id": self._count, "method": method, "params": parameters, **session}
        self._into.write(json.dumps(command).encode() + b"\0")
        self._into.flush()
        while (message := self._next()).get("id") != self._count:
            pass
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def evaluate(self, script: str) -> Any:
        """Run a script in the page, wait for its promise, and return the value."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def open(self, url: str) -> None:
        """Open a page, and wait until it is loaded."""
        self.call("Page.enable")
        self.call("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def _next(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self._out.read(1)) not in (b"\0", b""):
            content += byte
        assert content, "the browser has ended"
        message: dict[str, Any] = json.loads(content)
        return message


@contextlib.contextmanager
def open_tab(folder: Path, *options: str) -> Iterator[Tab]:
    """Start a headless Chromium, and yield a tab of it.

    Args:
        folder: For the browser's own files.
        options: Of its command line.
    """
    browser = [*chromium(folder), "--remote-debugging-pipe", *options]
    (to_read, into), (out, to_write) = os.pipe(), os.pipe()
    moved = [sys.executable, "-ISc", MOVED, str(to_read), str(to_write), *browser]
    with (folder / "chromium.log").open("wb") as log, os.fdopen(into, "wb") as writing, os.fdopen(out, "rb") as reading:
        process = subprocess.Popen(
            moved, pass_fds=(to_read, to_write), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        for ours in (to_read, to_write):
            os.close(ours)
        try:
            yield Tab(writing, reading)
        finally:
            process.terminate()
            process.wait(timeout=60)
