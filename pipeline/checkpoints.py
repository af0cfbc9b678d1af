"""Checkpoints: safetensors beside JSON, written whole or not at all, and the resumable state of a run under way.

No pickle is ever loaded. A checkpoint's JSON names the SHA-256 of its tensors, so a file that was cut, changed or
mixed up with another run's is refused.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import DataError, StorageError, UsageError
from pipeline.storage import read_bytes, read_json, sha256_file, write_atomic, write_json


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights and what they are.

    Attributes:
        path: The .safetensors file.
        meta: The JSON beside it: what the model is, how it was trained, what it reached.
        tensors: Name to tensor, on the CPU.
    """

    path: Path
    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def sha256(self) -> str:
        """SHA-256 of the .safetensors file."""
        return str(self.meta["sha256"])


def save_checkpoint(directory: Path, stem: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """Write `stem`.safetensors, then `stem`.json, which names the former's SHA-256.

    Args:
        directory: Made if it does not exist.
        stem: File name without suffix.
        tensors: What to save; copied to the CPU.
        meta: Plain JSON values.

    Returns:
        The SHA-256 of the .safetensors file.

    Raises:
        StorageError: A file cannot be written; the former ones are then unharmed or fail their SHA-256.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    write_atomic(directory / f"{stem}.safetensors", data)
    write_json(directory / f"{stem}.json", {**meta, "sha256": digest})
    return digest


def load_checkpoint(path: Path, *, stem: str = "best") -> Checkpoint:
    """Load a checkpoint and check its SHA-256.

    Args:
        path: A directory that a stage wrote, or a .safetensors file in it.
        stem: Which checkpoint of a directory.

    Raises:
        UsageError: The path does not exist.
        DataError: It holds no valid checkpoint.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such checkpoint; name a directory that a stage wrote, or a .safetensors file")
    file = path / f"{stem}.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise DataError(f"{file}: no checkpoint; name a directory that a stage wrote, or a .safetensors file")
    meta_file = file.with_suffix(".json")
    if not meta_file.is_file():
        raise DataError(f"{meta_file}: missing; a checkpoint is the .safetensors file and this JSON beside it")
    meta = read_json(meta_file)
    data = read_bytes(file)
    digest = hashlib.sha256(data).hexdigest()
    if not isinstance(meta, dict) or digest != meta.get("sha256"):
        raise DataError(f"{file}: SHA-256 {digest[:12]}... is not what {meta_file.name} says; run its stage again")
    return Checkpoint(file, meta, _read_tensors(data, file))


def read_meta(path: Path, *, stem: str = "best") -> dict[str, Any] | None:
    """Return the JSON of a directory's checkpoint without reading its weights; None where there is none.

    Raises:
        DataError: It is no checkpoint's JSON.
    """
    files = (path / f"{stem}.json", path / f"{stem}.safetensors")
    if not all(file.is_file() for file in files):
        return None
    meta = read_json(files[0])
    if not isinstance(meta, dict) or not isinstance(meta.get("sha256"), str):
        raise DataError(f"{files[0]}: names no SHA-256; run its stage again")
    return meta


def _read_tensors(data: bytes, file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: not a safetensors file ({reason}); run its stage again") from error


class RunState:
    """The resumable state of a run under way: the two newest checkpoints, outside DVC's outs.

    Digesting, writing and flushing a state takes longer than a copy of it, so a thread does it while the run goes on.

    Args:
        directory: Of this run alone.
        fingerprint: Of everything that decides the run's result; a state with another one is never resumed.

    Attributes:
        seconds: How long the last write took; None before the first.
    """

    _SLOTS = ("state-a", "state-b")

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._serial = 0
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._writing: Future[None] | None = None
        self.seconds: float | None = None

    def load(self) -> Checkpoint | None:
        """Return the newest state that is whole and of this run; None where there is none."""
        states = []
        for slot in self._SLOTS:
            try:
                state = load_checkpoint(self._directory / f"{slot}.safetensors")
            except (DataError, UsageError):
                continue
            if state.meta.get("fingerprint") == self._fingerprint:
                states.append(state)
        if not states:
            return None
        newest = max(states, key=lambda state: int(state.meta["serial"]))
        self._serial = int(newest.meta["serial"])
        return newest

    def peek(self) -> Mapping[str, Any] | None:
        """Return the JSON of the state that `load` would return, without loading it."""
        found = []
        for slot in self._SLOTS:
            with contextlib.suppress(DataError, StorageError):
                meta = read_meta(self._directory, stem=slot)
                if meta is not None and meta.get("fingerprint") == self._fingerprint:
                    found.append((int(meta["serial"]), slot, meta))
        for _, slot, meta in sorted(found, reverse=True):
            with contextlib.suppress(StorageError):
                if sha256_file(self._directory / f"{slot}.safetensors") == meta["sha256"]:
                    return meta
        return None

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Copy a state, and begin to write it over the older of the two.

        Args:
            tensors: On any device; they may change as soon as this returns.
            meta: Plain JSON values, likewise.

        Raises:
            StorageError: The state before this one could not be written; the one before that is unharmed.
        """
        self.wait()
        self._serial += 1
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        meta = copy.deepcopy({**meta, "fingerprint": self._fingerprint, "serial": self._serial})
        self._writing = self._writer.submit(self._write, self._SLOTS[self._serial % 2], copies, meta)

    def wait(self) -> None:
        """Return when the state saved last is safe.

        Raises:
            StorageError: It cannot be written; the one before is unharmed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, slot: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        began = time.monotonic()
        save_checkpoint(self._directory, slot, tensors, meta)
        self.seconds = time.monotonic() - began

    @property
    def last_good(self) -> Path:
        """Where `keep` writes."""
        return self._directory / "last-good.safetensors"

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the weights of a run that failed to `last_good`."""
        self.wait()
        save_checkpoint(self._directory, self.last_good.stem, tensors, {"fingerprint": self._fingerprint})

    def delete(self) -> None:
        """Remove the run's directory."""
        with contextlib.suppress(StorageError):
            self.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def fingerprint(**parts: Any) -> str:
    """Return the SHA-256 of the canonical JSON of what decides a run's result."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into a model of the same architecture, which may be on the device `meta`.

    Of such a model nothing is allocated before it has been seen to fit.

    Raises:
        DataError: Names, shapes or dtypes differ, or a value is not finite; the message names the first that does.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | checkpoint.tensors.keys()):
        if name not in own or name not in checkpoint.tensors:
            where = "the model" if name not in own else "the checkpoint"
            raise DataError(f"{checkpoint.path}: tensor {name} is not in {where}; it belongs to another model")
        found, expected = checkpoint.tensors[name], own[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise DataError(
                f"{checkpoint.path}: tensor {name} is {tuple(found.shape)} {found.dtype}, "
                f"the model's is {tuple(expected.shape)} {expected.dtype}"
            )
        if not found.isfinite().all():
            raise DataError(f"{checkpoint.path}: tensor {name} holds values that are not finite; run its stage again")
    if any(tensor.is_meta for tensor in own.values()):
        model.to_empty(device="cpu")
    model.load_state_dict(dict(checkpoint.tensors))
