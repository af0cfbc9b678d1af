"""Checkpoints: safetensors beside JSON, written whole or not at all, and the resumable state of a run under way.

No pickle is ever loaded. A checkpoint's JSON names the SHA-256 of its tensors, so a file that was cut, changed or
mixed up with another run's is refused.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from pipeline.errors import DataError, StorageError, UsageError
from pipeline.system.canonical import is_whole, seal
from pipeline.system.storage import read_bytes, sha256_file, to_json, write_atomic
from pipeline.training.manifest import check_digest, read_json_checked

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights and what they are.

    Attributes:
        path: The .safetensors file.
        meta: The JSON beside it: the model, its training and its scores.
        tensors: Name to tensor, on the CPU.
    """

    path: Path
    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def files(self) -> tuple[Path, Path]:
        """Its two files, the weights first."""
        return self.path, self.path.with_suffix(".json")

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
        StorageError: A file cannot be written; the earlier ones are then intact or fail their SHA-256.
    """
    files, digest = checkpoint_files(stem, tensors, meta)
    for name, data in files.items():
        write_atomic(directory / name, data)
    return digest


def checkpoint_files(
    stem: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, sealed: bool = False
) -> tuple[dict[str, bytes], str]:
    """Return what `save_checkpoint` writes, as content by file name, and the SHA-256 of the tensors' file.

    Args:
        stem: File name without suffix.
        tensors: What to save; copied to the CPU.
        meta: Plain JSON values.
        sealed: Whether the JSON gets a digest of its own, see pipeline.system.canonical.seal.
    """
    data = _to_bytes({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    content = {**meta, "sha256": digest}
    return {f"{stem}.safetensors": data, f"{stem}.json": to_json(seal(content) if sealed else content)}, digest


def load_checkpoint(path: Path, *, stem: str = "best") -> Checkpoint:
    """Load a checkpoint and check its SHA-256.

    Args:
        path: A directory that a stage wrote, or a .safetensors file in it.
        stem: Which checkpoint of a directory.

    Raises:
        UsageError: The path does not exist.
        DataError: It holds no valid checkpoint.
    """
    file, meta, data = _read_files(path, stem)
    return Checkpoint(file, meta, _read_tensors(data, file))


def read_weights(path: Path) -> tuple[Path, bytes]:
    """Return the .safetensors file of a checkpoint and its content, checked as `load_checkpoint` does, without PyTorch.

    Arguments and errors are the same.
    """
    file, _, data = _read_files(path, "best")
    with _telling_damage(file):
        safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    return file, data


def _read_files(path: Path, stem: str) -> tuple[Path, dict[str, Any], bytes]:
    """Return the .safetensors file, the JSON beside it and the file's content, which has the SHA-256 that is there."""
    if not path.exists():
        raise UsageError(f"{path}: no such checkpoint; name a directory that a stage wrote, or a .safetensors file")
    file = path / f"{stem}.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise DataError(f"{file}: no checkpoint; name a directory that a stage wrote, or a .safetensors file")
    meta_file = file.with_suffix(".json")
    if not meta_file.is_file():
        raise DataError(f"{meta_file}: missing; a checkpoint is the .safetensors file and this JSON beside it")
    meta = read_json_checked(meta_file)
    data = read_bytes(file)
    digest = hashlib.sha256(data).hexdigest()
    check_digest(file, digest)
    if not isinstance(meta, dict) or digest != meta.get("sha256"):
        raise DataError(f"{file}: SHA-256 {digest[:12]}... is not what {meta_file.name} says; run its stage again")
    return file, meta, data


def read_meta(path: Path, *, stem: str = "best") -> dict[str, Any] | None:
    """Return the JSON of a directory's checkpoint without reading its weights; None where there is none.

    Raises:
        DataError: It is no checkpoint's JSON.
    """
    files = (path / f"{stem}.json", path / f"{stem}.safetensors")
    if not all(file.is_file() for file in files):
        return None
    meta = read_json_checked(files[0])
    if not isinstance(meta, dict) or not isinstance(meta.get("sha256"), str):
        raise DataError(f"{files[0]}: names no SHA-256; run its stage again")
    return meta


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _read_tensors(data: bytes, file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    with _telling_damage(file):
        return load(data)


@contextlib.contextmanager
def _telling_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: not a safetensors file ({reason}); run its stage again") from error


@dataclass(frozen=True)
class SavedState(Checkpoint):
    """A run's state as it was saved.

    Attributes:
        best: The best epoch's weights, on the CPU; empty before the first epoch's end.
    """

    best: Mapping[str, Tensor]


class RunState:
    """The resumable state of a run under way: the two newest, outside DVC's outs.

    Its directory holds
      - state-a.safetensors, state-b.safetensors and the JSON beside each, which names the SHA-256 of its tensors and,
        as `best`, that of the best epoch's weights (null before there are any);
      - best-<12 digits>.safetensors, the best epoch's weights, named after their SHA-256: never changed, written before
        a state that names them, deleted once neither state does;
      - last-good.safetensors and its JSON, once numbers that are not finite have ended the run.
    A state is valid if its tensors and the best that it names have their SHA-256, and its JSON its seal, which states
    of older versions lack. It is tied to no machine: a directory copied to the same place elsewhere, or a state's two
    files with their best, is resumed there.

    A thread digests, writes and flushes a copy of the state while the run goes on, because copying is faster.

    Args:
        directory: Used by this run alone.
        fingerprint: Digest of the settings and inputs that decide the run's result; a state with another one is never
            resumed.
        labels_sha256: Digest of the labels that the run learns from; a state of other labels is never resumed, but for
            those of older versions, which do not name it. None where it learns from none.

    Attributes:
        is_fresh: Whether the run began over although a result stood, which the states say too: it goes on before that
            result counts again.
        seconds: How long the last write took; None before the first.
        damaged: The states, by name, that `load` or `peek` found damaged; a kill in a write leaves such a one too.
    """

    _SLOTS = ("state-a", "state-b")

    def __init__(self, directory: Path, fingerprint: str, labels_sha256: str | None = None) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._labels = labels_sha256
        self._serial = 0
        # The best that is on disk, and its SHA-256.
        self._best: tuple[Mapping[str, Tensor], str] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._writing: Future[None] | None = None
        self.is_fresh = False
        self.seconds: float | None = None
        self.damaged: list[str] = []

    def load(self) -> SavedState | None:
        """Return this run's newest valid state; None where there is none.

        Raises:
            DataError: See `require_whole`.
        """
        for slot, meta in self._newest_first():
            with self._noting_damage(slot):
                state = load_checkpoint(self._directory / f"{slot}.safetensors")
                best = self._load_best(meta["best"])
                self._serial, self.is_fresh = int(meta["serial"]), bool(meta.get("fresh"))
                return SavedState(state.path, state.meta, state.tensors, best)
        self.require_whole()
        return None

    def peek(self) -> Mapping[str, Any] | None:
        """Return the JSON of the state that `load` would return, without loading it; None where there is none."""
        for slot, meta in self._newest_first():
            with self._noting_damage(slot):
                files = {self._directory / f"{slot}.safetensors": meta["sha256"]}
                if meta["best"] is not None:
                    files[self._best_file(meta["best"])] = meta["best"]
                for file, digest in files.items():
                    if sha256_file(file) != digest:
                        raise DataError(f"{file}: its SHA-256 is not {digest}")
                return meta
        return None

    @property
    def begins_anew(self) -> bool:
        """Whether there is a state of a run that is fresh, see `is_fresh`; the JSON tells, whole or not."""
        return any(meta.get("fresh") for _, meta in self._newest_first())

    def require_whole(self) -> None:
        """Raise a DataError that names the states which `load` or `peek` has found damaged, for it returned none.

        Starting over would cost what they hold, so the user decides.
        """
        if self.damaged:
            raise DataError(
                f"{self._directory}: {', '.join(self.damaged)} damaged, and no other state of this run is there; copy "
                "the files again if they come from another machine, else --fresh starts over"
            )

    @contextlib.contextmanager
    def _noting_damage(self, slot: str) -> Iterator[None]:
        """Note a state as damaged where its files cannot be read, or are not what its JSON says."""
        try:
            yield
        except (DataError, StorageError, UsageError):
            self.damaged.append(slot)

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], best: Mapping[str, Tensor]) -> None:
        """Copy a state, and begin to write it over the older of the two.

        Args:
            tensors: On any device; they may change as soon as this returns.
            meta: Plain JSON values, likewise.
            best: The best epoch's weights, on the CPU, which never change: the same object is written once. Empty
                before there are any.

        Raises:
            StorageError: The state before this one could not be written; the one before that is unharmed.
        """
        self.wait()
        self._serial += 1
        from pipeline.views.parcel import fetch

        copies = dict(zip(tensors, fetch([*tensors.values()]), strict=True))
        own: dict[str, Any] = {} if self._labels is None else {"labels_sha256": self._labels}
        own |= {"fresh": True} if self.is_fresh else {}
        meta = copy.deepcopy({**meta, **own, "fingerprint": self._fingerprint, "serial": self._serial})
        self._writing = self._writer.submit(self._write, self._SLOTS[self._serial % 2], copies, meta, best)

    def wait(self) -> None:
        """Wait until the last saved state is on disk.

        Raises:
            StorageError: It cannot be written; the one before is unharmed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self, slot: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], best: Mapping[str, Tensor]
    ) -> None:
        began = time.monotonic()
        files, _ = checkpoint_files(slot, tensors, {**meta, "best": self._write_best(best)}, sealed=True)
        for name, data in files.items():
            write_atomic(self._directory / name, data)
        self._remove_unnamed()
        self.seconds = time.monotonic() - began

    def _write_best(self, best: Mapping[str, Tensor]) -> str | None:
        """Write the best epoch's weights unless they are there, and return their SHA-256."""
        if not best:
            return None
        if self._best is None or self._best[0] is not best:
            data = _to_bytes(best)
            digest = hashlib.sha256(data).hexdigest()
            write_atomic(self._best_file(digest), data)
            self._best = best, digest
        return self._best[1]

    def _load_best(self, digest: str | None) -> Mapping[str, Tensor]:
        """Load the best epoch's weights that a state names; DataError or StorageError if they are wrong or missing."""
        if digest is None:
            return {}
        file = self._best_file(digest)
        data = read_bytes(file)
        if hashlib.sha256(data).hexdigest() != digest:
            raise DataError(f"{file}: its SHA-256 is not {digest}")
        self._best = _read_tensors(data, file), digest
        return self._best[0]

    def _best_file(self, digest: str) -> Path:
        return self._directory / f"best-{digest[:12]}.safetensors"

    def _newest_first(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the slots with a state of this run, as their JSON says, and that JSON; note what is damaged."""
        self.damaged = []
        states = [(slot, meta) for slot, meta in self._states() if self._is_of_this_run(meta)]
        return sorted(states, key=lambda state: int(state[1]["serial"]), reverse=True)

    def _is_of_this_run(self, meta: Mapping[str, Any]) -> bool:
        is_other = self._labels is not None and meta.get("labels_sha256", self._labels) != self._labels
        return bool(meta["fingerprint"] == self._fingerprint) and not is_other

    def _states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the slots with a state of any run, as their JSON says, and that JSON."""
        for slot in self._SLOTS:
            with self._noting_damage(slot):
                meta = read_meta(self._directory, stem=slot)
                if meta is not None and not is_whole(meta):
                    raise DataError(f"{slot}: its JSON was changed")
                if meta is not None and {"fingerprint", "serial", "best"} <= meta.keys():
                    yield slot, meta

    def _remove_unnamed(self) -> None:
        """Remove earlier bests that no state names, and temporary files of killed writers."""
        named = {self._best_file(meta["best"]) for _, meta in self._states() if meta["best"] is not None}
        for file in {*self._directory.glob("best-*.safetensors"), *self._directory.glob(".*.tmp")} - named:
            with contextlib.suppress(OSError):
                file.unlink()

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


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into a model of the same architecture.

    The model may be on the device `meta`: then its memory is allocated once the checkpoint is known to fit.

    Raises:
        DataError: Names, shapes or dtypes differ, or a value is not finite; the message names the first that does.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | checkpoint.tensors.keys()):
        if name not in expected or name not in checkpoint.tensors:
            where = "the model" if name not in expected else "the checkpoint"
            raise DataError(f"{checkpoint.path}: tensor {name} is not in {where}; it belongs to another model")
        saved, tensor = checkpoint.tensors[name], expected[name]
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise DataError(
                f"{checkpoint.path}: tensor {name} is {tuple(saved.shape)} {saved.dtype}, "
                f"the model's is {tuple(tensor.shape)} {tensor.dtype}"
            )
        if not saved.isfinite().all():
            raise DataError(f"{checkpoint.path}: tensor {name} holds values that are not finite; run its stage again")
    if any(tensor.is_meta for tensor in expected.values()):  # emptying it on the CPU instead would import SymPy
        model.load_state_dict({name: tensor.clone() for name, tensor in checkpoint.tensors.items()}, assign=True)
    else:
        model.load_state_dict(dict(checkpoint.tensors))
