"""Checkpoints and prepared data that are damaged, or made to do harm: refused in one line, and never executed."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from PIL import Image

from tests.support.fuzz_cli import Case as Line
from tests.support.fuzz_cli import judge as judge_line
from tests.support.project import Project
from tests.support.tally import Tally

REFUSED = frozenset({2, 3})
RIGHT = frozenset({0, 3})
FOLDER = "hostile"
COMMANDS = {
    "evaluate": ("evaluate", FOLDER),
    "predict": ("predict", FOLDER, "good.png"),
    "export": ("export", FOLDER, "--format", "safetensors", "--out", "exported"),
    "bench": ("bench", FOLDER, "--rounds", "1", "--batch-sizes", "1"),
    "label": ("label", "--teacher", FOLDER),
    "distill": ("distill", "--student", "deit", "--labels", "online", "--teacher", FOLDER),
}
QUICKLY = ("evaluate", "predict")
SLOWLY = ("label", "distill", "export", "bench")
NUMBERS = (0, 1, 7, 8, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 10**9, 2**63, 10**30, 0.5, -0.5, 1e300, "", "x", "titn", "squeezenet1_1",
    "student", "teacher",
    "\ud800", "x" * 10_000, "a\nb", "../../etc/passwd", "__import__('os').mkdir('executed')", [], [1], [[]],
    ["0"] * 10, {}, {"a": 1},
    {"num_classes": 10, "weights": "executed.pt"}, [0.5, 0.5, 0.5], [0.5, 0.5], [0.0, 0.0, 0.0], ["a", "b", "c"],
    [1, 2, 3], [1e300] * 3, {"precision": "fp8"}, {"precision": []},
)  # fmt: skip
TEXTS = (
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\x00", b"\xff", b"\xef\xbb\xbf{}", b"{}", b'{"sha256": 1}',
    b'{"a": NaN}', b"[" * 100_000,
    b'{"a":' * 50_000, b"9" * 10_000, b'{"a": 1, "a": 2}', b'{"a": Infinity}', b'{"sha256": "' + b"0" * 64 + b'"}',
    b" " * 10**6,
)  # fmt: skip


class Files(NamedTuple):
    """A checkpoint, as two files."""

    tensors: bytes
    meta: dict[str, Any] | bytes


class Executes:
    """What makes a directory where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("executed",)


def read_files(folder: Path) -> Files:
    """Read a whole checkpoint."""
    return Files((folder / "best.safetensors").read_bytes(), json.loads((folder / "best.json").read_text()))


def write_files(folder: Path, files: Files) -> None:
    """Write one; `ensure_ascii` keeps lone surrogates."""
    meta = files.meta if isinstance(files.meta, bytes) else json.dumps(files.meta).encode()
    (folder / "best.safetensors").write_bytes(files.tensors)
    (folder / "best.json").write_bytes(meta)


def sealed(tensors: bytes, meta: dict[str, Any]) -> Files:
    """Return files whose SHA-256 is right."""
    return Files(tensors, {**meta, "sha256": hashlib.sha256(tensors).hexdigest()})


def flipped(files: Files, rng: random.Random) -> Files:
    """Change one bit of either file, or cut, grow or exchange what is in it."""
    meta = json.dumps(files.meta).encode()
    header = 8 + struct.unpack("<Q", files.tensors[:8])[0]
    data = files.tensors
    region = rng.choice([range(8), range(8, header), range(header, len(data)), range(len(data))])
    at = rng.choice(region)
    if rng.random() < 0.3:
        at = rng.randrange(len(meta))
        return Files(data, meta[:at] + bytes([meta[at] ^ 1 << rng.randrange(8)]) + meta[at + 1 :])
    change = rng.randrange(6)
    if change == 0:
        return Files(data[:at], files.meta)
    if change == 1:
        return Files(data + rng.randbytes(rng.randrange(1, 100)), files.meta)
    if change == 2:
        return Files(data, meta[: rng.randrange(len(meta))])
    return Files(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], files.meta)


def with_header(files: Files, rng: random.Random) -> Files:
    """Forge the header of the tensors, under a right SHA-256."""
    assert isinstance(files.meta, dict)
    size = struct.unpack("<Q", files.tensors[:8])[0]
    header, rest = json.loads(files.tensors[8 : 8 + size]), files.tensors[8 + size :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    change = rng.randrange(9)
    if change == 0:
        entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "X", "", 1, None])
    elif change == 1:
        entry["shape"] = rng.choice(
            [[], [0], [-1], [2**62, 2**62], [1, *entry["shape"]], entry["shape"][::-1], "x", None, [1.5]]
        )
    elif change == 2:
        entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
    elif change == 3:
        header[rng.choice(["x", "", "a\nb", "__metadata__", "\x00", "é"])] = header.pop(name)
    elif change == 4:
        del header[name]
    elif change == 5:
        header["__metadata__"] = rng.choice([{}, {"a": "b"}, {"a": 1}, [], "x", None])
    elif change == 6:
        header["more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(rest), len(rest) + 4]}
        rest += bytes(4)
    text = json.dumps(header).encode()
    if change == 7:
        text = text[: rng.randrange(len(text))]
    length = len(text) if change != 8 else rng.choice(NUMBERS)
    return sealed(struct.pack("<Q", length) + text + rest, files.meta)


def with_tensors(files: Files, rng: random.Random) -> Files:
    """Store other tensors, under a right SHA-256."""
    assert isinstance(files.meta, dict)
    tensors = safetensors.torch.load(files.tensors)
    name = rng.choice(list(tensors))
    old = tensors[name]
    new = rng.choice(
        [
            lambda: old.double(),
            lambda: old.bfloat16(),
            lambda: old.flatten()[:-1].clone(),
            lambda: old[None].clone(),
            lambda: torch.full_like(old, float("nan")),
            lambda: torch.where(torch.arange(old.numel()).reshape(old.shape) == 0, float("inf"), old),
            lambda: torch.zeros(0),
            lambda: torch.ones(1, dtype=torch.int8),
            lambda: torch.full((3, 3), 7.0),
        ]
    )()
    tensors[rng.choice([name, f"{name}.x", "x\ny"])] = new
    if rng.random() < 0.3:
        del tensors[rng.choice([key for key in tensors if key != name] or [name])]
    return sealed(safetensors.torch.save(tensors), files.meta)


def with_meta(files: Files, rng: random.Random) -> Files:
    """Write other JSON beside the tensors, whose SHA-256 stays right."""
    assert isinstance(files.meta, dict)
    meta = copy.deepcopy(files.meta)
    nodes = [meta, meta["arguments"], meta["arguments"], meta["training"]]
    node = rng.choice(nodes)
    key = rng.choice(
        [
            *(
                ["kind", "model", "arguments", "class_names", "image_size", "mean", "std", "training"]
                if node is meta
                else node
            )
        ]
    )
    if rng.random() < 0.2:
        node.pop(key, None)
    else:
        node[key] = rng.choice(VALUES)
    if rng.random() < 0.2 and isinstance(meta.get("arguments"), dict):
        meta["arguments"][rng.choice(["depth", "width", "image_size", "weights", "x", "mlp_ratio"])] = rng.choice(
            VALUES
        )
    return Files(files.tensors, meta)


def other_text(files: Files, rng: random.Random) -> Files:
    """Write something else than JSON, or than tensors."""
    assert isinstance(files.meta, dict)
    if rng.random() < 0.5:
        return Files(files.tensors, rng.choice(TEXTS))
    return sealed(rng.choice([*TEXTS, rng.randbytes(100), *pickles()]), files.meta)


def pickles() -> list[bytes]:
    """Return what runs code where it is unpickled: a pickle, PyTorch's zip of one, and its older format."""
    whole, older = io.BytesIO(), io.BytesIO()
    torch.save({"weight": Executes()}, whole)
    torch.save({"weight": Executes()}, older, _use_new_zipfile_serialization=False)
    return [pickle.dumps(Executes()), whole.getvalue(), older.getvalue()]


KINDS = (flipped, flipped, with_header, with_tensors, with_meta, with_meta, other_text)


def fuzz_checkpoints(project: Project, count: int, rng: random.Random) -> Tally:
    """Give a command hostile checkpoints: each must be refused, or be as good as the one it was made from."""
    tally, files = Tally(), read_files(project.data / "teacher")
    folder = project.path / FOLDER
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(project.path / "good.png")
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        command = rng.choice(SLOWLY if number % 10 == 9 else QUICKLY)
        changed = kind(files, rng)
        write_files(folder, changed)
        code, _, wrong = judge_line(project.path, Line(COMMANDS[command], REFUSED | {0}))
        shutil.rmtree(project.data / "runs", ignore_errors=True)  # or the next teacher of these weights teaches nothing
        if code == 0 and not _is_harmless(changed, files):
            wrong.append("accepted: what it should not")
        wrong += ["executed: a pickle ran"] if (project.path / "executed").exists() else []
        tally.counts["cases"] += 1
        tally.counts["accepted" if code == 0 else "refused"] += 1
        tally.counts[kind.__name__] += 1
        tally.note(f"case {number}, {kind.__name__}, {command}", wrong)
    shutil.rmtree(folder)
    return tally


def _is_harmless(changed: Files, files: Files) -> bool:
    """Whether the tensors are the same, or differ in nothing but the header's spelling,
    and the JSON builds the same model."""
    if changed.tensors != files.tensors:
        loaded, expected = (safetensors.torch.load(checkpoint.tensors) for checkpoint in (changed, files))
        if loaded.keys() != expected.keys() or any(not torch.equal(loaded[key], expected[key]) for key in expected):
            return False
    meta = json.loads(changed.meta) if isinstance(changed.meta, bytes) else changed.meta
    assert isinstance(files.meta, dict)
    # Mean and standard deviation are taken as they are; a model may have been trained with any.
    keys = ("kind", "model", "class_names", "image_size")
    same = all(meta[key] == files.meta[key] for key in keys)
    return same and meta["arguments"]["num_classes"] == files.meta["arguments"]["num_classes"]


def fuzz_prepared(project: Project, count: int, rng: random.Random) -> Tally:
    """Damage the prepared data: a command refuses it, or goes on with the same pixels and labels."""
    tally = Tally()
    whole = {path: path.read_bytes() for path in sorted((project.data / "prepared").iterdir())}
    summary = project.data / "prepared/summary.json"
    data = [path for path in whole if path != summary]
    line = ("evaluate", "data/smoke/teacher", "--json")
    expected = judge_line(project.path, Line(line, frozenset({0}))).out
    for number in range(count):
        path = summary if number % 4 == 3 else data[number % len(data)]
        path.write_bytes(_damaged(whole[path], rng, is_json=path == summary))
        code, out, wrong = judge_line(project.path, Line(line, RIGHT))
        if code == 0 and out != expected:
            wrong.append("accepted: other scores")
        path.write_bytes(whole[path])
        tally.counts["cases"] += 1
        tally.counts["accepted" if code == 0 else "refused"] += 1
        tally.counts[path.name] += 1
        tally.note(f"case {number}, {path.name}", wrong)
    return tally


def _damaged(data: bytes, rng: random.Random, *, is_json: bool) -> bytes:
    """Flip a bit, most often in what is not pixels, or cut, zero, grow or replace some bytes."""
    meta = range(min(len(data), 4096))
    at = rng.choice(meta) if rng.random() < 0.6 else rng.randrange(len(data))
    at = rng.randrange(max(0, len(data) - 4096), len(data)) if rng.random() < 0.3 else at
    length = rng.choice((1, 2, 4, 8, 100))
    number = rng.choice(NUMBERS).to_bytes(8, "little")[: min(length, 8)]
    choices = [
        lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        lambda: data[:at] + number + data[at + len(number) :],
        lambda: data[:at],
        lambda: data[:at] + bytes(length) + data[at + length :],
        lambda: data[:at] + rng.randbytes(length) + data[at:],
    ]
    if is_json:
        choices += [
            lambda: rng.choice(TEXTS),
            lambda: rng.choice([b'{"settings": 1}', b'{"settings": {}}', b'{"settings": null}']),
        ]
    return rng.choice(choices)()
