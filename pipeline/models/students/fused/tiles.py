"""How the Triton kernels divide patches into tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Geometry(NamedTuple):
    """What a kernel is compiled for. A program computes a tile of patches at a time.

    Attributes:
        num_pixels: M.
        width: c.
        num_heads: Heads; the number divides c.
        hidden: Width of the MLP's hidden layer.
        spacing: Rows from one patch of a tile to the next, a power of two, at least M.
        rows: T, rows of a tile, a power of two, at least `spacing` and at least 16, which matrix units need.
        columns: C, columns of a tile, a power of two above c, at least 16.
        chunk: H, columns of the hidden layer that are computed at a time.
        num_chunks: Chunks of the hidden layer.
        precision: Of float32 products: "tf32", or "tf32x3".
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
        """Warps of a program: one for every 16 rows, so that none waits for another."""
        return self.rows // 16

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return self.rows // self.spacing


@functools.cache
def geometry(num_pixels: int, width: int, num_heads: int, hidden: int, precision: str) -> Geometry:
    """Lay out in tiles a geometry that `pipeline.models.students.fused.cuda.why_not` accepts."""
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
