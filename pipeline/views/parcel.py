"""Host arrays that go to a device together, and tensors that come back together.

Augmentations are planned on the host and carried out on the device, and need dozens of small arrays for it: orders,
offsets, matrices, magnitudes. Each copy from ordinary memory makes the host wait for the GPU. So the arrays of a batch
are first collected, packed into one piece of pinned memory, and copied once, without waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PACKED = ("cuda",)
"""Kinds of devices that arrays are packed for; on a CPU nothing is copied."""
ALIGNMENT = 16
"""Bytes; an array starts at a multiple of them."""
MAX_FETCHED = 2**28
"""Bytes that are packed on a device at once to come back together; a larger tensor comes alone."""

LARGE_PIXELS = 64 * 64
"""Images of as many or more are worked on one by one where that is faster, see `one_by_one`."""

Later = Callable[[], Tensor]
"""Returns a tensor once its parcel has been sent."""


class Parcel:
    """Arrays for a device: added while work is planned, sent once, then used.

    Args:
        device: Where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._arrays: list[NDArray[Any]] = []
        self._tensors: list[Tensor] = []

    def add(self, array: NDArray[Any]) -> Later:
        """Add an array, of a dtype that PyTorch has and of any shape; return what gives its tensor after `send`."""
        place = len(self._arrays)
        self._arrays.append(array)
        return lambda: self._tensors[place]

    def send(self) -> None:
        """Copy all arrays to the device; nothing can be added afterwards."""
        if self.device.type in PACKED and self._arrays:
            self._tensors = self._send_packed()
        else:
            self._tensors = [torch.from_numpy(array).to(self.device) for array in self._arrays]

    def _send_packed(self) -> list[Tensor]:
        starts = [0, *itertools.accumulate(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in self._arrays)]
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # each thread has its own current GPU, by default the first
                # PyTorch gives pinned memory to another only when the copies from it have ended.
                packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
        else:
            packed = torch.empty(starts[-1], dtype=torch.uint8)
        for start, array in zip(starts, self._arrays, strict=False):
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            packed.numpy()[start : start + array.nbytes] = content
        return _unpack(packed.to(self.device, non_blocking=True), starts, self._arrays)


def one_by_one(images: Tensor) -> bool:
    """Return whether a loop over images `(B, C, H, W)` is faster than operations on all: large ones on a CPU.

    Then a call costs less than the passes over memory that it saves. Pixels are the same either way.
    """
    return images.device.type == "cpu" and images.shape[-2] * images.shape[-1] >= LARGE_PIXELS


def send(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    """Copy arrays to a device at once, without waiting for it."""
    parcel = Parcel(device)
    later = [parcel.add(array) for array in arrays]
    parcel.send()
    return [take() for take in later]


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host, where each has memory of its own; a GPU is waited for once for all that fit together.

    Args:
        tensors: Of any dtypes and shapes; some may be on the host.
    """
    fetched = {at: tensor.detach().to("cpu", copy=True) for at, tensor in enumerate(tensors) if not _is_packed(tensor)}
    pieces: list[list[int]] = []
    size = 0
    for at in (at for at in range(len(tensors)) if at not in fetched):
        size += tensors[at].nbytes
        if not pieces or size > MAX_FETCHED:
            pieces.append([])
            size = tensors[at].nbytes
        pieces[-1].append(at)
    for together in pieces:
        fetched |= _fetch_packed(tensors, together)
    return [fetched[at] for at in range(len(tensors))]


def _is_packed(tensor: Tensor) -> bool:
    return tensor.device.type in PACKED


def _fetch_packed(tensors: Sequence[Tensor], together: Sequence[int]) -> dict[int, Tensor]:
    """Return copies of some tensors by their places, fetched as one piece."""
    parts = [tensors[at].detach().contiguous().reshape(-1).view(torch.uint8) for at in together]
    pieces = torch.split(torch.cat(parts).cpu(), [len(part) for part in parts])
    # Cloned, because a piece begins at any byte.
    return {
        at: piece.clone().view(tensors[at].dtype).view(tensors[at].shape)
        for at, piece in zip(together, pieces, strict=True)
    }


def _unpack(packed: Tensor, starts: Sequence[int], arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
    """Return tensors of the dtypes and shapes of arrays that lie in `packed`, `(bytes,)` uint8, from `starts` on."""
    tensors = []
    for start, array in zip(starts, arrays, strict=False):
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        tensors.append(packed[start : start + array.nbytes].view(dtype).view(array.shape))
    return tensors
