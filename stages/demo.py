"""`pipeline demo CHECKPOINT`: a page, for this machine alone, that shows what a trained model sees in pictures."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from pipeline.config.recipes import CROP
from pipeline.data.decoding import shorter_side
from pipeline.data.images import read_image
from pipeline.errors import DataError, StorageError, UsageError, one_line, printable
from pipeline.inference.card import SCORES
from stages.predict import MAX_INPUT_BYTES, Prediction
from stages.shared.options import PATH, any_device_option, load_model, precision_option
from stages.shared.trained import Judged

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from pipeline.inference.classifier import Classifier
    from pipeline.models.students import Student

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
PAGE = Path(__file__).with_name("demo.html")
MAX_BYTES = 2**26  # a JPEG of MAX_PIXELS takes half of it
# From 0, dark blue, to 1, light yellow: five colours of matplotlib's `plasma`, in which reports show attention.
COLOURS = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], np.float64)


@click.command("demo")
@click.argument("checkpoint", type=PATH)
@click.option(
    "--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="Of 127.0.0.1; 0 takes a free one."
)
@click.option("--topk", default=5, show_default=True, type=click.IntRange(1), help="Classes to name, at most all.")
@any_device_option
@precision_option
def command(checkpoint: Path, port: int, topk: int, device: str | None, precision: str | None) -> None:
    """Show on a page of this machine what a model sees in pictures.

    CHECKPOINT is what `pipeline predict` takes: a directory that a stage or export wrote, or a file in it. Open the
    address that is printed, and drop, paste or choose pictures. The page shows the classes of the prediction and of
    each head, what the model saw, and where a student attended. Its answers are those of `pipeline predict`.

    Only this machine reaches the page, pictures stay here, and nothing is written. Ctrl-C ends it.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError("the demo needs Starlette and uvicorn; pip install 'titn-pipeline[demo]'") from error
    with listening(port) as listener:
        classifier = load_model(checkpoint, device, precision)
        with serving(Demo(classifier, topk), listener) as (address, served):
            click.echo(address)
            served.result()


class Demo:
    """A model and what the page is told of it.

    Args:
        classifier: The model; it is asked once, so that one that cannot answer is refused before a page is shown.
        topk: Classes to name, at most all.

    Attributes:
        about: Plain JSON values: what the model is.

    Raises:
        PipelineError: The model cannot answer, or a file beside it is damaged.
    """

    def __init__(self, classifier: Classifier, topk: int = 5) -> None:
        self._classifier, self._topk = classifier, topk
        self._student = _student(classifier)
        side, config = classifier.image_size, classifier.config
        heads = classifier.answer(np.zeros((1, side, side, 3), np.uint8)).heads
        judged = Judged(scores={}, split=None, metrics={})
        if classifier.file is not None:
            judged = Judged.of(config, classifier.file)
        self.about: dict[str, Any] = {
            "name": config.get("model"),
            "kind": config.get("kind"),
            "recipe": config.get("recipe"),
            "format": classifier.format,
            "precision": classifier.precision,
            "device": str(classifier.device),
            "classes": list(classifier.class_names),
            "heads": list(heads),
            "size": side,
            "resize": classifier.resize,
            "shorter_side": shorter_side(side) if classifier.resize == CROP else None,
            "scores": {key: judged.scores[key] for key in SCORES if _is_number(judged.scores.get(key))},
            "scores_split": judged.split,
            "attention": self._student is not None,
            "max_bytes": MAX_BYTES,
        }

    def answer(self, content: bytes) -> dict[str, Any]:
        """Answer to an image file as `pipeline predict --json` does.

        Args:
            content: The file's bytes.

        Returns:
            Plain JSON values: `top` and `heads`, as predict prints them; `notes`, what there is to say of the file;
            `saw`, the model's input; and `attention`, a picture of one pixel a patch for each map by its name, or None
            of a model that is no student. Pictures are data URLs of PNG files.

        Raises:
            DataError: It is no image, a damaged or too large one.
            NumericalError: A logit is not finite.
        """
        notes: list[str] = []
        # Pillow warns of damaged metadata, which does no harm, and of many pixels, which are refused as it is.
        with warnings.catch_warnings(action="ignore"):
            pixels = read_image(content, self._classifier.image_size, notes, self._classifier.resize)
        answer = self._classifier.answer(pixels[None])
        heads = {name: answer.top(self._topk, name)[0] for name in answer.heads}
        told = Prediction("", answer.top(self._topk)[0], heads).as_json()
        del told["path"]
        return {**told, "notes": notes, "saw": _data_url(pixels), "attention": self._attention(pixels)}

    def _attention(self, pixels: NDArray[np.uint8]) -> dict[str, str] | None:
        if self._student is None:
            return None
        from stages.reports.attention import attention_over

        maps = attention_over(self._student, self._classifier, pixels[None])
        return {name: _data_url(_coloured(shares[0] / shares[0].max())) for name, shares in maps.items()}


def application(demo: Demo, port: int, worker: ThreadPoolExecutor) -> ASGIApp:
    """Return the page and its two addresses, for requests that come from this machine's own pages alone.

    Args:
        demo: What answers.
        port: Where the page is served; other Host headers are refused, for another site's name may lead here
            (DNS rebinding).
        worker: Its one thread answers, one request after the other, so that the server never waits for the model.
    """
    text = PAGE.read_text(encoding="utf-8")
    hosts = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == 80 else set())
    headers = [(name.encode(), value.encode()) for name, value in _headers(text).items()]
    app = _routes(demo, text, worker)

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        why_not = _refusal(scope, hosts)
        await (app if why_not is None else _plain(403, why_not))(scope, receive, send_with_headers)

    return guarded


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """Take a port of this machine's own address.

    Args:
        port: Its number; 0 takes a free one.

    Raises:
        StorageError: It is in use, or not for this user.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        if os.name == "posix":  # on Windows it would share the port with whoever has it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()
        except OSError as error:
            raise StorageError(f"--port {port}: {error.strerror}; give another, or 0 for a free one") from error
        yield listener


@contextlib.contextmanager
def serving(demo: Demo, listener: socket.socket) -> Iterator[tuple[str, Future[None]]]:
    """Serve the page on a thread, until the block ends.

    In a thread uvicorn leaves the signals alone: they interrupt the main thread, as in every command.

    Args:
        demo: What answers.
        listener: Of `listening`; closed at the end.

    Yields:
        The page's address, and what ends when the server does.
    """
    import uvicorn

    port = listener.getsockname()[1]
    with ThreadPoolExecutor(1, "model") as worker, ThreadPoolExecutor(1, "server") as thread:
        config = uvicorn.Config(
            application(demo, port, worker),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        served = thread.submit(server.run, sockets=[listener])
        try:
            yield f"http://{HOST}:{port}/", served
        finally:
            server.should_exit = True


def _routes(demo: Demo, text: str, worker: ThreadPoolExecutor) -> Starlette:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    async def page(request: Request) -> Response:
        return HTMLResponse(text)

    async def model(request: Request) -> Response:
        return _json(demo.about)

    async def predict(request: Request) -> Response:
        try:
            content = await _read(request)
            if content is None:
                return _plain(413, f"more than {MAX_BYTES} bytes, the largest file that the demo takes")
            return _json(await asyncio.get_running_loop().run_in_executor(worker, demo.answer, content))
        except DataError as error:
            return _plain(422, str(error))
        except ClientDisconnect:
            return _plain(400, "the request ended early")
        except Exception as error:  # the page goes on; whoever started the demo reads why
            message = one_line(f"{type(error).__name__}: {' '.join(str(error).split())}")
            click.echo(message, err=True)
            return _plain(500, message)

    return Starlette(
        routes=[Route("/", page), Route("/model", model), Route("/predict", predict, methods=["POST"])],
    )


async def _read(request: Request) -> bytes | None:
    """Return a request's body; None if it has more than MAX_BYTES.

    What is too much is read and dropped, up to what `predict` would read: who is still sending hears no answer.
    """
    content, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BYTES:
            content += part
        else:
            content.clear()
        if size > MAX_INPUT_BYTES:
            break
    return bytes(content) if size <= MAX_BYTES else None


def _refusal(scope: Scope, hosts: set[str]) -> str | None:
    """Say why a request is not answered; None if it is."""
    from starlette.datastructures import Headers

    headers = Headers(scope=scope)
    host, origin = headers.get("host", ""), headers.get("origin")
    if host not in hosts:
        return f"the host {printable(host)!r} is not this page's; open http://{min(hosts)}/"
    # A browser names the page behind every POST; curl names none.
    if origin is not None and origin != f"http://{host}":
        return f"the page {printable(origin)!r} may not ask this model; open http://{host}/"
    return None


def _plain(status: int, text: str) -> Response:
    from starlette.responses import PlainTextResponse

    return PlainTextResponse(f"{text}\n", status)


def _json(value: Any) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(value), media_type="application/json")  # ASCII: a name may hold half a surrogate pair


@functools.cache
def _headers(page: str) -> dict[str, str]:
    """Return the headers of every response: nothing but the page's own script and style runs, and nobody frames it."""

    def digest(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    policy = {
        "default-src": "'self'",
        "script-src": digest("script"),
        "style-src": digest("style"),
        "img-src": "'self' data: blob:",
        **dict.fromkeys(("object-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
    }
    return {
        "content-security-policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
    }


def _student(classifier: Classifier) -> Student | None:
    """Return the model if it is one of the paper's students, whose attention can be shown."""
    from pipeline.models import PAPERS_STUDENTS
    from pipeline.models.students import STUDENTS, Student

    try:
        module = classifier.module
    except UsageError:  # an export's program
        return None
    return module if isinstance(module, Student) and type(module) in map(STUDENTS.get, PAPERS_STUDENTS) else None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _coloured(weights: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return weights `(R, C)` in [0, 1] as colours `(R, C, 3)` uint8."""
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(weights, stops, COLOURS[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _data_url(pixels: NDArray[np.uint8]) -> str:
    """Return pixels `(H, W, 3)` uint8 as the data URL of a PNG file."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
