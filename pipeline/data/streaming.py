"""Images that are not on the device: they stay in RAM or in a file, and batches of them go to the device.

A batch is gathered by a thread while the device works on the one before it; on a GPU it is pinned there and copied
without waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.arrays import Images, chunks
from pipeline.system.threads import prefetch

CPU = torch.device("cpu")


class HostImages:
    """Images on the host, for work on a device.

    Args:
        images: `(N, H, W, 3)` uint8, in RAM or in a file.
        device: Where batches go.
    """

    def __init__(self, images: Images, device: torch.device) -> None:
        self._images = images
        self.device = device

    def __len__(self) -> int:
        """Return N."""
        return len(self._images)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, 3, H, W)`, as they would be on the device."""
        num_samples, height, width, num_channels = self._images.shape
        return num_samples, num_channels, height, width

    @property
    def sizes(self) -> NDArray[np.int32] | None:
        """`(N, 2)`, width and height of encoded images, pixels; None of images that have one size."""
        return getattr(self._images, "sizes", None)

    def read(self, rows: NDArray[np.int64], boxes: NDArray[np.int64] | None = None) -> Tensor:
        """Gather images on the host; safe in several threads.

        Args:
            rows: `(B,)` int64 in [0, N), in any order.
            boxes: `(B, 4)` int64, of images that have `sizes`: what of each becomes the square, see
                pipeline.data.encoded. None gives the evaluation pixels.

        Returns:
            `(B, H, W, 3)` uint8, pinned where the device is a GPU.
        """
        source: Any = self._images
        images = torch.from_numpy(source[rows] if boxes is None else source.read(rows, boxes))
        if self.device.type != "cuda":
            return images
        # Each thread has its own current GPU, by default the first.
        with torch.cuda.device(self.device):
            return images.pin_memory()

    def place(self, images: Tensor) -> Tensor:
        """Copy what `read` gathered to the device, as `(B, 3, H, W)`."""
        if self.device.type == "cpu":  # NumPy's copy takes half the time
            return torch.from_numpy(np.ascontiguousarray(images.numpy().transpose(0, 3, 1, 2)))
        return images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous()


def place_images(images: Images, device: torch.device = CPU, max_bytes: int | None = None) -> Tensor | HostImages:
    """Put images on a device, unless they are too many for it.

    Args:
        images: `(N, H, W, 3)` uint8.
        device: The device.
        max_bytes: Images of more bytes stay on the host; None places any number.

    Returns:
        `(N, 3, H, W)` uint8 on the device, or the images for streaming.
    """
    if max_bytes is not None and images.nbytes > max_bytes:
        return HostImages(images, device)
    num_samples, height, width, num_channels = images.shape
    placed, start = torch.empty((num_samples, num_channels, height, width), dtype=torch.uint8, device=device), 0
    for chunk in chunks(images):
        # Copied, because PyTorch does not accept read-only memory.
        placed[start : start + len(chunk)] = torch.from_numpy(chunk.copy()).to(device).permute(0, 3, 1, 2)
        start += len(chunk)
    return placed


def in_batches(
    images: Tensor | HostImages, batch_size: int, share: slice | None = None
) -> Generator[Tensor, None, None]:
    """Yield images in order, `(B, 3, H, W)` uint8 each, on their device; the next batch is read ahead.

    Args:
        images: The images of a split.
        batch_size: B; the last batch has what is left.
        share: A part of them, from a start to a stop; None takes all.
    """
    start, stop = (0, len(images)) if share is None else (share.start, share.stop)
    bounds = range(start, stop, batch_size)
    if isinstance(images, Tensor):
        yield from (images[first : min(first + batch_size, stop)] for first in bounds)
        return
    parts = [np.arange(first, min(first + batch_size, stop)) for first in bounds]
    with contextlib.closing(prefetch(parts, images.read)) as read:
        for batch in read:
            yield images.place(batch)
