"""Crop, flip and the operations of a policy on a CPU, one image after another, in C++: per_image.cpp.

The pixels are those of pipeline.views.operations and pipeline.views.geometry, which work on whole batches everywhere
else.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.system.compiling import TWO_ROUNDINGS, NotAvailable, load_library
from pipeline.views.operations import OperationChoice

_loading = threading.Lock()


def why_not() -> str | None:
    """Say in a phrase why there is no library here; None if there is. See pipeline.views.guard."""
    library = _library()
    return str(library) if isinstance(library, NotAvailable) else None


def apply_operations(images: Tensor, choice: OperationChoice) -> Tensor:
    """Apply the operations chosen for each image, in place; safe in several threads, on other images each.

    Args:
        images: `(B, 3, H, W)` uint8 on the CPU.
        choice: For these B images of H x W pixels.

    Returns:
        `images`, or a contiguous copy where they are not.
    """
    table, places = choice.table, ctypes.c_int64(choice.rows.shape[1])
    return _work("apply_operations", images, choice.rows, places, table.operations, table.magnitudes, table.matrices)


def crop_flip(images: Tensor, offsets: NDArray[np.int64], flipped: NDArray[np.bool_]) -> Tensor:
    """Crop and flip each image, in place, as pipeline.views.geometry.crop_flip_maps says.

    Args:
        images: `(B, 3, H, W)` uint8 on the CPU.
        offsets: `(B, 2)`, how far the frame moves down and right, pixels.
        flipped: `(B,)`.

    Returns:
        `images`, or a contiguous copy where they are not.
    """
    return _work("crop_flip_images", images, offsets, flipped)


def channels_first(images: Tensor, made: Tensor) -> None:
    """Write images `(B, H, W, 3)` as `(B, 3, H, W)` into `made`, which is contiguous; both are uint8 on the CPU."""
    assert made.is_contiguous(), "a copy would be written to"
    _work("channels_first", made, images.numpy())


def _work(name: str, images: Tensor, *arguments: NDArray[Any] | ctypes.c_int64) -> Tensor:
    """Call a function of the library on images and arrays."""
    library, images = _library(), images.contiguous()
    assert not isinstance(library, NotAvailable), str(library)
    count, _, height, width = images.shape
    arrays = [np.ascontiguousarray(one) if isinstance(one, np.ndarray) else one for one in arguments]
    passed = [one.ctypes.data_as(ctypes.c_void_p) if isinstance(one, np.ndarray) else one for one in arrays]
    sizes = (ctypes.c_int64(size) for size in (count, height, width))
    if getattr(library, name)(ctypes.c_void_p(images.data_ptr()), *sizes, *passed):
        raise MemoryError(f"no memory for a copy of an image of {height} x {width} pixels")
    return images


def _library() -> ctypes.CDLL | NotAvailable:
    """Return the library, or why there is none; threads wait for the one that compiles it."""
    with _loading:
        return _load()


@functools.cache
def _load() -> ctypes.CDLL | NotAvailable:
    try:
        return load_library(Path(__file__).with_name("per_image.cpp"), TWO_ROUNDINGS)
    except NotAvailable as error:
        return error
