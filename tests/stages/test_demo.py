"""`pipeline demo`: the page answers as `predict` does, and only this machine's own page is answered."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from pipeline.errors import printable
from pipeline.inference.classifier import Classifier
from pipeline.inference.loading import build_model, load
from pipeline.models.students import attention_maps
from pipeline.training.checkpoints import save_checkpoint
from pipeline.views.views import normalize
from stages import demo
from stages.demo import Demo, listening, serving
from tests.support import commands
from tests.support.browser import open_tab
from tests.support.in_process import invoke
from tests.support.project import Project, checked

CLASSES = ("<img src=x onerror=alert(1)>", "café", "猫", "=SUM(1+1)", "\u202eright to left", "\ud800 half")
SIDE = 16


def save(folder: Path, model: str, kind: str = "student", **extra: Any) -> Path:
    """Save an untrained model's checkpoint."""
    arguments: dict[str, Any] = {"num_classes": len(CLASSES)}
    if kind == "student":
        sizes = {"patch_size": 8, "pixel_size": 2, "width": 48, "depth": 2, "num_heads": 3}
        arguments |= {"image_size": SIDE, **sizes, "pixel_width": 12, "pixel_heads": 2}
    side = SIDE if kind == "student" else 32
    meta = {
        "kind": kind, "model": model, "arguments": arguments, "class_names": list(CLASSES), "image_size": side,
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "training": {"precision": "fp32"}, "recipe": "photos",
        "scores": {"top1": 87.5, "loss": 0.5, "f1": "high"}, "evaluated_on": "val", **extra,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(folder, "best", build_model(kind, model, arguments).state_dict(), meta)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A folder with three checkpoints and some pictures."""
    folder, draws = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    save(folder / "titn", "titn")
    save(folder / "vit", "vit")
    save(folder / "squeezenet1_1", "squeezenet1_1", kind="teacher")
    photo = Image.fromarray(draws.integers(0, 256, (40, 60, 3), np.uint8))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    photo.save(folder / "turned.jpg", exif=turned)
    photo.putalpha(128)
    photo.save(folder / "glass.png")
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save(folder / "unused.tif")
    return Project(folder)


@pytest.fixture(scope="module")
def titn(place: Project) -> Classifier:
    return load(place.path / "titn")


@contextlib.contextmanager
def served(classifier: Classifier) -> Iterator[str]:
    with listening(0) as listener, serving(Demo(classifier), listener) as (address, _):
        yield address


@pytest.fixture(scope="module")
def page(titn: Classifier) -> Iterator[str]:
    """The address of TITN's page."""
    with served(titn) as address:
        yield address


def ask(address: str, data: Any = None, method: str | None = None, **headers: str) -> tuple[int, str, Any]:
    """Send a request; return status, body and headers."""
    request = urllib.request.Request(address, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def predicted(place: Project, model: str, picture: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(invoke(place, "predict", model, picture, "--json").splitlines()[0])
    return told


def pixels(url: str) -> Any:
    """Read a picture of an answer."""
    kind, _, content = url.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.mark.parametrize("picture", ["turned.jpg", "glass.png"])
def test_an_answer_is_that_of_predict_and_shows_the_models_input(
    place: Project, titn: Classifier, page: str, picture: str
) -> None:
    status, body, headers = ask(f"{page}predict", (place.path / picture).read_bytes())
    assert (status, headers["content-type"]) == (200, "application/json")
    answer, expected = json.loads(body), predicted(place, "titn", picture)
    assert {key: answer[key] for key in ("top", "heads")} == {key: expected[key] for key in ("top", "heads")}
    assert list(answer["heads"]) == ["class", "distillation"] and len(answer["top"]) == 5
    seen = titn.transform(place.path / picture).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels(answer["saw"]), seen)


def test_attention_is_coloured_by_the_shares_of_the_largest(place: Project, titn: Classifier, page: str) -> None:
    answer = json.loads(ask(f"{page}predict", (place.path / "glass.png").read_bytes())[1])
    images = titn.transform(place.path / "glass.png")[None]
    maps = attention_maps(titn.module, normalize(images, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))  # type: ignore[arg-type]
    last = maps[0, -1].mean(dim=0)  # class token, four patches, distillation token
    assert len(answer["attention"]) == 4
    colours = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)])
    for name, token in (("class token, last block", 0), ("distillation token, last block", 5)):
        shares = last[token, 1:5] / last[token, 1:5].max()
        expected = [
            [np.interp(share, np.arange(5) / 4, colours[:, channel]) for channel in range(3)] for share in shares
        ]
        np.testing.assert_allclose(pixels(answer["attention"][name]).reshape(4, 3), expected, atol=0.51)


def test_a_student_with_one_head_has_half_the_maps_and_other_models_have_none(place: Project) -> None:
    content = (place.path / "glass.png").read_bytes()
    vit = Demo(load(place.path / "vit")).answer(content)
    assert list(vit["attention"]) == ["class token, last block", "class token, rollout"]
    assert vit["heads"] == {"class": vit["top"]} == predicted(place, "vit", "glass.png")["heads"]
    teacher = Demo(load(place.path / "squeezenet1_1"))
    assert teacher.about["attention"] is False
    answer = teacher.answer(content)
    assert answer["attention"] is None and answer["top"] == predicted(place, "squeezenet1_1", "glass.png")["top"]


def test_the_model_says_what_it_is(page: str) -> None:
    status, body, _ = ask(f"{page}model")
    about = json.loads(body, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert status == 200 and about["classes"] == list(CLASSES)
    assert (about["name"], about["kind"], about["size"], about["heads"]) == ("titn", "student", SIDE, [*about["heads"]])
    assert (about["scores"], about["scores_split"]) == ({"top1": 87.5}, "val")
    assert (about["resize"], about["shorter_side"]) == ("squeeze", None)


def test_a_model_of_cropped_images_says_what_it_sees(tmp_path: Path) -> None:
    about = Demo(load(save(tmp_path, "vit", resize="crop"))).about
    assert (about["resize"], about["size"], about["shorter_side"]) == ("crop", 16, 18)  # int(16 / 0.875)


def test_what_there_is_to_say_of_a_picture_is_said(place: Project, page: str) -> None:
    answer = json.loads(ask(f"{page}predict", (place.path / "unused.tif").read_bytes())[1])
    assert answer["notes"] == ["alpha is 0 everywhere, and ignored"]


def hostile() -> dict[str, tuple[bytes, str]]:
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(whole, "PNG")
    return {
        "empty": (b"", "empty"),
        "text": (b"<script>alert(1)</script>", "not an image of a known format"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        "cut": (whole.getvalue()[:90], "cannot be read: "),
        "many pixels": (b"P6 9000 9000 255\n", "9000 x 9000 pixels, more than 64000000"),
        "bomb": (b"P6 900000 900000 255\n", "more than 64000000 pixels"),
    }


@pytest.mark.parametrize("name", hostile())
def test_a_file_that_is_no_picture_is_refused_in_a_line(page: str, name: str) -> None:
    content, reason = hostile()[name]
    status, body, headers = ask(f"{page}predict", content, "POST")
    assert status == 422 and body.startswith(reason) and body.count("\n") == 1
    assert headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_file_is_refused(page: str, monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    monkeypatch.setattr(demo, "MAX_BYTES", 1000)
    parts = [bytes(4000)] * 500  # more than sockets buffer
    status, body, _ = ask(f"{page}predict", iter(parts) if chunked else b"".join(parts), "POST")
    assert status == 413 and body.startswith("more than 1000 bytes")
    assert ask(f"{page}predict", bytes(1000), "POST")[0] == 422


def test_only_the_pages_own_names_are_answered(page: str) -> None:
    port = page.rstrip("/").rpartition(":")[2]
    assert ask(page, Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", f"127.0.0.1.evil.example:{port}"):
        status, body, headers = ask(page, Host=host)
        assert status == 403 and host in body and page in body and headers["x-content-type-options"] == "nosniff"
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    with contextlib.closing(connection):
        connection.putrequest("GET", "/model", skip_host=True)
        connection.endheaders()
        assert connection.getresponse().status in (400, 403)


def test_other_pages_may_not_ask(place: Project, page: str) -> None:
    content, origin = (place.path / "glass.png").read_bytes(), page.rstrip("/")
    assert ask(f"{page}predict", content, Origin=origin)[0] == 200
    for other in ("http://evil.example", "null", origin.replace("http", "https"), f"{origin}0", "http://127.0.0.1"):
        status, body, _ = ask(f"{page}predict", content, Origin=other)
        assert status == 403 and other in body


def test_every_response_forbids_what_the_page_does_not_need(page: str) -> None:
    seen = {}
    for method, address, status in (
        ("GET", "", 200), ("HEAD", "", 200), ("GET", "model", 200), ("GET", "predict", 405), ("POST", "", 405),
        ("PUT", "predict", 405), ("GET", "other", 404), ("GET", "../demo.py", 404), ("POST", "predict", 422),
    ):  # fmt: skip
        got, _, headers = ask(page + address, b"" if method in ("POST", "PUT") else None, method)
        assert got == status, (method, address)
        policy = headers["content-security-policy"]
        assert "default-src 'self';" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
        assert "access-control-allow-origin" not in headers
        seen[method, address] = headers["content-type"]
    assert seen["GET", ""].startswith("text/html")
    assert seen["GET", "other"].startswith("text/plain") and seen["GET", "predict"].startswith("text/plain")


def test_the_page_needs_no_other_file() -> None:
    text = demo.PAGE.read_text(encoding="utf-8")
    assert text.count("<script>") == text.count("<style>") == 1
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|<script |<link (?!rel=.icon)| on\w+=", text
    )
    assert set(re.findall(r"https?://[^\s'\"]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_pictures_are_answered_one_at_a_time_and_the_page_meanwhile(
    titn: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, under_way, most = threading.Event(), 0, 0

    def slowly(self: Demo, content: bytes) -> dict[str, Any]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        assert go.wait(60)
        under_way -= 1
        return {"content": content.decode()}

    monkeypatch.setattr(Demo, "answer", slowly)
    answers: list[str] = []
    with served(titn) as address:
        threads = [
            threading.Thread(target=lambda name=name: answers.append(ask(f"{address}predict", name)[1]))  # type: ignore[misc]
            for name in (b"one", b"two")
        ]
        for thread in threads:
            thread.start()
        for _ in range(3):
            assert ask(f"{address}model")[0] == 200
        go.set()
        for thread in threads:
            thread.join()
    assert sorted(answers) == ['{"content": "one"}', '{"content": "two"}'] and most == 1


def test_what_the_model_fails_at_is_said_and_the_page_goes_on(
    titn: Classifier, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(self: Demo, content: bytes) -> dict[str, Any]:
        raise RuntimeError("out of memory\nat length")

    monkeypatch.setattr(Demo, "answer", failing)
    with served(titn) as address:
        assert ask(f"{address}predict", b"x")[:2] == (500, "RuntimeError: out of memory at length\n")
        assert ask(address)[0] == 200
    assert capsys.readouterr().err == "RuntimeError: out of memory at length\n"


def test_the_command_prints_its_address_and_ends_with_ctrl_c(place: Project) -> None:
    with listening(0) as listener:
        port = listener.getsockname()[1]
        assert listener.getsockname()[0] == "127.0.0.1"
        refused = invoke(place, "demo", "titn", "--port", str(port), code=4)
        assert re.search(rf"--port {port}: Address already in use; .* 0 for a free one", refused)
    command = commands.Command(place.path, "demo", "titn", "--port", str(port))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):  # which a browser keeps open too
        for _ in range(600):
            try:
                connection.request("GET", "/model")
            except OSError:
                connection.close()
                time.sleep(0.05)
            else:
                assert connection.getresponse().status == 200
                break
        command.send(signal.SIGINT)
        ended = command.finish()
    checked(ended.code, ended.out, ended.err, 130)
    assert ended.out == f"http://127.0.0.1:{port}/\n" and ended.err.startswith("stopped by SIGINT")


def test_a_model_that_is_not_there_and_a_missing_extra_are_one_line(
    place: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing: no such model" in invoke(place, "demo", "nothing", "--port", "0", code=2)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'titn-pipeline[demo]'" in invoke(place, "demo", "titn", code=2)


def test_only_this_machines_own_address_is_answered(page: str) -> None:
    port = int(page.rstrip("/").rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(5)
        other.connect(("127.0.0.2", port))  # of this machine too, and answered by what listens on 0.0.0.0


DROP = """(async () => {
  const fetched = [], alerts = [];
  window.alert = (text) => alerts.push(text);
  const files = FILES.map(([name, text]) => new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
  const send = (kind, key, some) => {
    const data = new DataTransfer();
    for (const file of some) data.items.add(file);
    document.querySelector("main").dispatchEvent(new kind(key[0], { [key[1]]: data, bubbles: true, cancelable: true }));
  };
  send(DragEvent, ["drop", "dataTransfer"], files.slice(0, 2));
  send(ClipboardEvent, ["paste", "clipboardData"], files.slice(2));
  while (document.querySelector("[aria-busy]")) await new Promise((resolve) => setTimeout(resolve, 20));
  send(ClipboardEvent, ["paste", "clipboardData"], []);
  await Promise.all([...document.images].map((one) => one.decode().catch(() => {})));
  const text = (card, query) => [...card.querySelectorAll(query)].map((one) => one.textContent);
  return {
    name: document.querySelector("h1").textContent, facts: text(document, "#facts li"), alerts,
    cards: [...document.querySelectorAll("article")].map((card) => ({
      file: text(card, "h2")[0], best: text(card, ".verdict bdi")[0], problem: text(card, ".problem")[0],
      names: text(card, ".heads bdi"), heads: text(card, ".heads h3"),
      percents: text(card, ".percent"), markup: card.querySelectorAll("bdi *").length,
      bars: [...card.querySelectorAll(".fill")].map((one) => one.offsetWidth / one.parentElement.offsetWidth),
      sizes: [...card.querySelectorAll("img")].map((one) => one.naturalWidth),
      hidden: card.querySelector(".attention")?.hidden,
    })),
    problem: document.getElementById("problem").textContent, status: document.getElementById("status").textContent,
    wider: document.documentElement.scrollWidth - innerWidth,
    fetched: performance.getEntriesByType("resource").map((one) => one.name),
  };
})()"""


@pytest.mark.browser
def test_a_dropped_picture_shows_the_answer_of_predict(place: Project, page: str, tmp_path: Path) -> None:
    contents = {
        "<b>glass.png": (place.path / "glass.png").read_bytes(),
        "bad.png": b"not a picture",
        "turned.jpg": (place.path / "turned.jpg").read_bytes(),
    }
    files = json.dumps([[name, base64.b64encode(content).decode()] for name, content in contents.items()])
    with open_tab(tmp_path) as tab:
        tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
        tab.open(page)
        shown = tab.evaluate(DROP.replace("FILES", files))
    assert shown["name"] == "titn · photos" and "top-1 87.50 % on val" in shown["facts"]
    turned, glass, bad = shown["cards"]
    assert (bad["file"], bad["problem"]) == ("bad.png", "not an image of a known format")
    for card, name, picture in ((turned, "turned.jpg", "turned.jpg"), (glass, "<b>glass.png", "glass.png")):
        expected = predicted(place, "titn", picture)
        rows = [*expected["top"], *expected["heads"]["class"], *expected["heads"]["distillation"]]
        assert (card["file"], card["best"]) == (name, card["names"][0])
        assert card["names"] == [printable(row["class"]) for row in rows]
        assert card["heads"] == ["Prediction", "Class head", "Distillation head"]
        assert card["percents"] == [f"{100 * row['probability']:.2f} %" for row in rows]
        np.testing.assert_allclose(card["bars"], [row["probability"] for row in rows], atol=0.02)
        assert card["markup"] == 0 and card["hidden"] is False
    assert glass["sizes"] == [60, 2, SIDE] and turned["sizes"] == [40, 2, SIDE]
    assert shown["alerts"] == [] and "no picture" in shown["problem"] and shown["status"].startswith("turned.jpg: ")
    assert shown["wider"] <= 0
    assert {re.sub(r"^(data|blob):.*", r"\1", name) for name in shown["fetched"]} <= {
        f"{page}model", f"{page}predict", "data", "blob",
    }  # fmt: skip


LAID = """[...document.querySelectorAll("article")].map((card) => {
  const [over, original] = [".attention", ".original"].map((one) => card.querySelector(one).getBoundingClientRect());
  const shares = [(over.left - original.left) / original.width, (over.top - original.top) / original.height];
  return [...shares, over.width / original.width, over.height / original.height];
})"""


@pytest.mark.browser
def test_attention_lies_over_what_the_model_saw(place: Project, titn: Classifier, tmp_path: Path) -> None:
    cropping = load(save(tmp_path / "crop", "titn", resize="crop"))
    names = ("glass.png", "turned.jpg", "unused.tif")  # 60 x 40, 40 x 60, and one that the browser cannot show
    contents = [[name, base64.b64encode((place.path / name).read_bytes()).decode()] for name in names]
    laid, said = [], []
    with open_tab(tmp_path) as tab:
        for classifier in (titn, cropping):
            with served(classifier) as address:
                tab.open(address)
                cards = tab.evaluate(DROP.replace("FILES", json.dumps(contents)))["cards"]
                by_name = zip([card["file"] for card in cards], tab.evaluate(LAID), strict=True)
                laid.append(dict(by_name))
                said.append(tab.evaluate("document.getElementById('resized').textContent"))
    whole, side = [0.0, 0.0, 1.0, 1.0], 16 / 18  # of the shorter side
    longer = side * 40 / 60
    expected = {
        "glass.png": [(1 - longer) / 2, (1 - side) / 2, longer, side],
        "turned.jpg": [(1 - side) / 2, (1 - longer) / 2, side, longer],
        "unused.tif": whole,
    }
    for found, shares in zip(laid, (dict.fromkeys(names, whole), expected), strict=True):
        for name in names:
            np.testing.assert_allclose(found[name], shares[name], atol=0.01, err_msg=name)
    assert said[0] == "resized to the model\u2019s square without keeping its shape"
    assert "shorter side has 18 pixels" in said[1] and "16 × 16 in the middle" in said[1]
