"""Images that are damaged, odd, or made to do harm: the right pixels, or the file named with a reason."""

from __future__ import annotations

import contextlib
import io
import random
import resource
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from pipeline.config.recipes import RESIZES, SQUEEZE
from pipeline.data.images import read_image
from pipeline.errors import DataError
from tests.support.tally import Tally
from tests.support.time_limit import Hung, time_limit

SECONDS_UNTIL_HUNG = 60
SIDE = 8
SPARE_BYTES = 1280 * 2**20  # an image of MAX_PIXELS, its colours over white, and both again
EXECUTING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")


class Whole(NamedTuple):
    """A whole image file, and the pixels that it shows."""

    name: str
    data: bytes
    pixels: np.ndarray[Any, Any]


class Started:
    """Notes what the interpreter's audit says of started programs, for as long as it is watched."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._is_watching = False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_watching and event in EXECUTING:
            self.events.append(f"{event} {arguments!r}"[:200])

    def __enter__(self) -> Started:
        self.events.clear()
        self._is_watching = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_watching = False


STARTED = Started()


def originals() -> list[Whole]:
    """Write whole images of every format and mode that is read, some with metadata."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    grey, deep = rgb[..., 0], rng.integers(0, 65536, (SIDE, SIDE), np.uint16)
    colour, alpha = Image.fromarray(rgb), Image.fromarray(np.dstack([rgb, grey]))
    palette = colour.quantize(16)
    exif = Image.Exif()
    exif[0x010E] = "x" * 40_000  # a long description
    turned = Image.Exif()
    turned[0x0112] = 5
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "y" * 1000, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    more = {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE))]}
    written: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("rgb.png", colour, {}), ("grey.png", Image.fromarray(grey), {}), ("deep.png", Image.fromarray(deep), {}),
        ("alpha.png", alpha, {}), ("palette.png", palette, {}), ("hole.png", palette, {"transparency": 3}),
        ("glass.png", palette, {"transparency": bytes(range(0, 256, 16))}),
        ("bits.png", Image.fromarray(grey).convert("1"), {}),
        ("moving.png", colour, more), ("exif.png", colour, {"exif": exif}), ("text.png", colour, {"pnginfo": text}),
        ("profile.png", colour, {"icc_profile": profile}), ("rgb.jpg", colour, {}),
        ("exif.jpg", colour, {"exif": exif}),
        ("profile.jpg", colour, {"icc_profile": profile}), ("cmyk.jpg", colour.convert("CMYK"), {}),
        ("waves.jpg", colour, {"progressive": True}), ("halves.jpg", colour, {"subsampling": "4:2:0"}),
        ("turned.jpg", colour, {"exif": turned}), ("turned-waves.jpg", colour, {"exif": turned, "progressive": True}),
        ("grey.jpg", Image.fromarray(grey), {}), ("rgb.webp", colour, {"lossless": True}),
        ("alpha.webp", alpha, {"lossless": True}),
        ("moving.webp", colour, {**more, "lossless": True}), ("lossy.webp", colour, {}), ("rgb.bmp", colour, {}),
        ("palette.bmp", palette, {}), ("rgb.ppm", colour, {}), ("grey.pgm", Image.fromarray(grey), {}),
        ("deep.pgm", Image.fromarray(deep.astype(np.int32)), {}),  # which every Pillow writes
        ("rgb.tif", colour, {}), ("deep.tif", Image.fromarray(deep), {}),
        ("moving.tif", colour, {**more, "compression": "tiff_lzw"}),
    ]  # fmt: skip
    wholes = []
    for name, image, options in written:
        stream = io.BytesIO()
        form = {"jpg": "JPEG", "pgm": "PPM", "tif": "TIFF"}.get(
            name.rpartition(".")[2], name.rpartition(".")[2].upper()
        )
        image.save(stream, form, **options)
        wholes.append(Whole(name, stream.getvalue(), expected(name, rgb, grey, deep, stream.getvalue())))
    return wholes


def expected(name: str, rgb: Any, grey: Any, deep: Any, data: bytes) -> np.ndarray[Any, Any]:
    """Return the pixels of an original: those it was made of where the format keeps them, else as Pillow reads it."""
    kind, suffix = name.split(".")
    if kind == "deep":
        return np.repeat(np.round(deep / 257).astype(np.uint8)[..., None], 3, axis=2)
    if suffix in ("png", "webp", "bmp", "ppm", "pgm", "tif") and kind in (
        "rgb",
        "grey",
        "moving",
        "exif",
        "text",
        "profile",
    ):
        return np.repeat(grey[..., None], 3, axis=2) if kind == "grey" else rgb
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if kind in ("alpha", "hole", "glass"):
            image = image.convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
        return np.asarray(image.convert("RGB"))


def chunk(kind: bytes, data: bytes) -> bytes:
    """Write a chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """Write a PNG that claims a size and holds a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def jpeg(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    """Write a JPEG of one colour."""
    stream = io.BytesIO()
    Image.new(mode, (width, height), "white" if mode == "RGB" else 0).save(stream, "JPEG", **options)
    return stream.getvalue()


def claiming(data: bytes, width: int, height: int) -> bytes:
    """Let a JPEG's frame claim another size than its scans have."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpegs() -> dict[str, bytes]:
    """JPEGs that are cut, or claim or repeat so much that decoding them would take minutes or gigabytes."""
    plain, waves = jpeg(8, 8), jpeg(1500, 1500, progressive=True)
    scan, end = waves[waves.rindex(b"\xff\xda") : -2], waves[-2:]
    segment = b"\xff\xe1" + struct.pack(">H", 1000) + b"Exif\0\0" + bytes(992)
    small, waved = jpeg(64, 64), jpeg(64, 64, progressive=True)
    return {
        "jpeg-scans": waves[:-2] + 1000 * scan + end, "jpeg-cmyk": claiming(jpeg(64, 64, "CMYK"), 8001, 8000),
        "jpeg-segments": plain[:2] + 600 * segment + plain[2:],
        "jpeg-comments": plain[:2] + 100_000 * b"\xff\xfe\0\2" + plain[2:],
        "jpeg-large": claiming(small, 65_535, 65_535), "jpeg-none": claiming(small, 0, 64),
        "jpeg-cut": small[: len(small) * 3 // 4], "jpeg-waves-cut": waved[:-2],
    }  # fmt: skip


def unfinished() -> dict[str, bytes]:
    """JPEGs with fewer scans than they claim and a proper end, of which libjpeg leaves the rest grey."""
    plain, waves = jpeg(64, 64), jpeg(64, 64, progressive=True)
    return {
        "large.jpg": claiming(plain, 3000, 2000), "large-waves.jpg": claiming(waves, 2000, 2000),
        "thin.jpg": claiming(waves, 100, 65_535), "flat.jpg": claiming(plain, 65_535, 100),
    }  # fmt: skip


def disguises() -> dict[str, bytes]:
    """Files that are no image that may be read, each to be refused."""
    small = Image.new("RGB", (SIDE, SIDE), "red")
    foreign = {}
    for form in (
        "GIF",
        "EPS",
        "PDF",
        "ICO",
        "TGA",
        "PCX",
        "SGI",
        "JPEG2000",
        "DDS",
        "ICNS",
        "XBM",
        "MSP",
        "SPIDER",
        "IM",
    ):
        stream = io.BytesIO()
        mode = {"XBM": "1", "MSP": "1", "SPIDER": "F"}.get(form, "RGB")
        small.convert(mode).save(stream, form)
        foreign[form.lower()] = stream.getvalue()
    post_script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(executed) (w) file closefile showpage\n%%EOF\n"
    return {
        **foreign, "eps-binary": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32,
        len(post_script)) + bytes(20) + post_script,
        "ps": post_script, "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "html": b"<html><script>1</script></html>",
        "text": b"no image\n", "shell": b"#!/bin/sh\ntouch executed\n", "wmf": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "fli": b"\x00\x01\x00\x00\x11\xaf",
        "zip": b"PK\x03\x04" + bytes(100), "gzip": b"\x1f\x8b\x08" + bytes(100), "elf": b"\x7fELF" + bytes(100),
        "zeros": bytes(10_000),
        "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "empty": b"", "byte": b"\x89",
        "bomb": bomb(50_000, 50_000), "bomb-high": bomb(1, 2**31 - 1), "bomb-wide": bomb(2**31 - 1, 1),
        "bomb-16": bomb(9000, 9000, 16, 6),
        "bomb-thin": bomb(1, 60_000_000, 1, 0), "bomb-flat": bomb(60_000_000, 1, 1, 0), "bomb-none": bomb(0, 0),
        "bomb-zero": bomb(0, 5), "bomb-depth": bomb(8, 8, 7), "bomb-colour": bomb(8, 8, 8, 9),
        "bomb-ppm": b"P6 100000 100000 255\n", "bomb-pbm": b"P1 99999999999 1\n", "bomb-minus": b"P6 -8 8 255\n",
        "float": b"Pf 8 8 -1.0\n",
        "bomb-bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 1, 1, 0, 0),
        "bomb-webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(8),
        "bomb-text": bomb(8, 8, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
        "bomb-profile": bomb(8, 8, extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
        "big-pixels": bomb(8001, 8000), "ppm-0": b"P6 8 8 0\n", "ppm-65536": b"P6 8 8 65536\n",
        "ppm-long": b"P6 " + b"#" * 10**6,
        **jpegs(),
        "jpeg-head": b"\xff\xd8\xff\xe0\x00\x10JFIF\0", "jpeg-only": b"\xff\xd8", "png-only": b"\x89PNG\r\n\x1a\n",
    }  # fmt: skip


def damaged(whole: Whole, others: list[Whole], rng: random.Random) -> bytes:
    """Cut, flip, grow, zero, repeat, or exchange some bytes."""
    data, other = whole.data, rng.choice(others).data
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 16, 100))
    number = rng.choice((0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1))
    head = rng.randrange(min(len(data), 64))
    makers: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        lambda: data[:head] + bytes([data[head] ^ 1 << rng.randrange(8)]) + data[head + 1 :],
        lambda: data[:at] + bytes(length) + data[at + length :],
        lambda: data[:at] + data[at + length :],
        lambda: data[:at] + rng.randbytes(length) + data[at:],
        lambda: data[:head] + struct.pack(rng.choice("<>") + "I", number) + data[head + 4 :],
        lambda: data[:at] + other[at:],
        lambda: data + rng.randbytes(length),
        lambda: mended(data, rng),
    ]
    return rng.choice(makers)()


def mended(data: bytes, rng: random.Random) -> bytes:
    """Change bytes of a PNG's chunk and mend its checksum, so that the damage reaches the decoder."""
    if not data.startswith(b"\x89PNG"):
        at = rng.randrange(len(data))
        return data[:at] + rng.randbytes(3) + data[at + 3 :]
    chunks, at = [], 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    index = rng.randrange(len(chunks))
    kind, body = chunks[index]
    where = rng.randrange(len(body) + 1)
    chunks[index] = (kind, body[:where] + rng.randbytes(rng.choice((0, 1, 4))) + body[where + rng.choice((0, 1, 4)) :])
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), chunks[rng.randrange(len(chunks))])
    return data[:8] + b"".join(chunk(*parts) for parts in chunks)


class Case(NamedTuple):
    """A file to read. `pixels` is None where it must be refused; a damaged file may show others."""

    name: str
    data: bytes
    pixels: np.ndarray[Any, Any] | None
    is_whole: bool = False


def cases(count: int, rng: random.Random) -> Iterator[Case]:
    """Yield whole images and disguises, then damaged images."""
    wholes, hidden = originals(), disguises()
    yield from (Case(*original, is_whole=True) for original in wholes)
    yield from (Case(f"{kind}.{suffix}", data, None) for kind, data in hidden.items() for suffix in ("png", "jpg"))
    rest = unfinished()
    yield from (Case(f"unfinished-{name}", data, wholes[0].pixels) for name, data in rest.items())
    for _ in range(count - len(wholes) - 2 * len(hidden) - len(rest)):
        whole = rng.choice(wholes)
        yield Case(f"damaged-{whole.name}", damaged(whole, wholes, rng), whole.pixels)


def fuzz_images(folder: Path, count: int, rng: random.Random) -> Tally:
    """Read images: each gives pixels, or a DataError of one line; no program is started, little memory is claimed."""
    tally = Tally()
    for number, case in enumerate(cases(count, rng)):
        verdict, wrong = judge(folder / case.name, case, SQUEEZE if case.is_whole else RESIZES[number % 2])
        tally.counts["cases"] += 1
        tally.counts[verdict] += 1
        tally.counts["whole" if case.is_whole else "disguised" if case.pixels is None else "damaged"] += 1
        tally.note(f"case {number}, {case.name}", wrong)
    return tally


def judge(path: Path, case: Case, resize: str) -> tuple[str, list[str]]:
    """Read one image under a resize rule; return what became of it and what was wrong with that."""
    path.write_bytes(case.data)
    try:
        with STARTED as started, time_limit(SECONDS_UNTIL_HUNG), little_memory():
            image = read_image(path, SIDE, resize=resize)
    except DataError as error:
        message = str(error)
        wrong = [f"refused: {error}"] if case.is_whole else []
        wrong += [] if message.isprintable() and 4 < len(message) < 300 else [f"message: {message[:200]!r}"]
        wrong += ["memory: not enough"] if "MemoryError" in message else []
        return "refused", [*wrong, *(f"executed: {event}" for event in started.events)]
    except Hung:
        return "refused", ["hung"]
    except Exception as error:
        return "refused", [f"raised: {error!r}"[:300]]
    finally:
        path.unlink()
    wrong = [f"executed: {event}" for event in started.events]
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        wrong.append(f"shape: {image.shape} {image.dtype}")
    if case.pixels is None:
        wrong.append("accepted: what is no image")
    elif case.is_whole and not np.array_equal(image, case.pixels):
        wrong.append("pixels: of a whole image are wrong")
    return "read", wrong


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let this process take SPARE_BYTES more than it has."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    former = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)
