"""How the Triton kernels divide a problem into tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Geometry(NamedTuple):
    """What a kernel is compiled for. A program computes a tile of patches at a time.

    Attributes:
        num_pixels: M.
        width: c.
        num_heads: Heads; they divide c.
        hidden: Width of the MLP's hidden layer.
        spacing: Rows from one patch of a tile to the next, a power of two not below M.
        rows: T, rows of a tile, a power of two not below `spacing` nor 16, the least that matrix units take.
        columns: C, columns of a tile, a power of two above c and not below 16.
        chunk: H, columns of the hidden layer that are computed at a time.
        num_chunks: How often that is.
        precision: What products make of float32: "tf32", or "tf32x3".
    """

    num_pixels: int
    width: int
    num_heads: int
    hidden: int
    spacing: int
    rows: int
    columns: int
    chunk: int
    num_chunks: int
    precision: str

    @property
    def num_warps(self) -> int:
        """Warps of a program: one for every 16 rows, that it may compute without waiting for others."""
        return self.rows // 16

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return self.rows // self.spacing


@functools.cache
def geometry(num_pixels: int, width: int, num_heads: int, hidden: int, precision: str) -> Geometry:
    """Choose how a geometry that `why_not` has nothing against is laid out in tiles."""
    spacing = _power_of_two(num_pixels)
    return Geometry(
        num_pixels=num_pixels,
        width=width,
        num_heads=num_heads,
        hidden=hidden,
        spacing=spacing,
        rows=max(16, spacing),
        columns=max(16, _power_of_two(width + 1)),
        chunk=16,
        num_chunks=-(-hidden // 16),
        precision=precision,
    )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
