"""Geometric operations on whole uint8 batches, equal bit for bit to Pillow's on each image.

Every operation is an index map, so that several compose into one and pixels are moved once.

Convention: x runs right and y down, in pixels; pixel (x, y) covers [x, x + 1) x [y, y + 1); what lies outside of the
frame is black. An index map holds, for every pixel of the result, 1 + y * W + x of the pixel it copies, or 0 for black.
Matrices are Pillow's (a, b, c, d, e, f): the result's (x, y) copies the pixel at (ax + by + c, dx + ey + f). `height`
and `width` are H and W, pixels; `device` is where the maps are made.

Matrices are float64 on the CPU; everything after is integer arithmetic, so that every device gives the same pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.views.parcel import Later, Parcel

FIXED_POINT_ONE = 65536.0


def gather(images: Tensor, index_maps: Tensor) -> Tensor:
    """Copy each pixel from where an index map says.

    Args:
        images: `(B, C, H, W)` uint8.
        index_maps: `(B, H, W)` int64 in [0, H * W]; 0 is black. B may be 1: one map for all images.

    Returns:
        `(B, C, H, W)` uint8.
    """
    # The black pixel that 0 finds, in front of each channel.
    pixels = torch.nn.functional.pad(images.flatten(2), (1, 0))
    indices = index_maps.flatten(1)[:, None].expand(images.shape[0], images.shape[1], -1)
    return pixels.gather(2, indices).reshape(images.shape)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Return the index maps of the operation `first` followed by `second`; all are `(B, H, W)` int64."""
    reached = torch.nn.functional.pad(first.flatten(1), (1, 0))
    return reached.gather(1, second.flatten(1)).reshape(second.shape)


def crop_flip_maps(offsets: Tensor, flipped: Tensor, height: int, width: int) -> Tensor:
    """Shift the frame over the images, then flip left-right where asked: padded crop and flip.

    Args:
        offsets: `(B, 2)` int64, how far the frame moves down and right, pixels; a crop at (top, left) of images padded
            by p is the offset (top - p, left - p).
        flipped: `(B,)` bool.
        height: H, pixels.
        width: W, pixels.

    Returns:
        Index maps `(B, H, W)` int64.

    Source: arXiv:2502.16762 §3.4; torchvision's `crop` of `pad`, then `hflip`.
    """
    x = torch.arange(width, device=offsets.device)
    rows = torch.arange(height, device=offsets.device) + offsets[:, :1]
    columns = torch.where(flipped[:, None], width - 1 - x, x) + offsets[:, 1:]
    return _product_maps(rows, columns)


def rotation_matrices(angles: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Return the matrices of rotations about the centre, `(B, 6)` float64; `angles` `(B,)` degrees, counter-clockwise.

    Source: `PIL.Image.Image.rotate`. Its shortcuts at multiples of 90 degrees give what these matrices give.
    """
    radians = -np.radians(np.mod(angles, 360.0))
    # Rounded as by Pillow, or sin(180 degrees) = 1e-16 would hide that the matrix is axis-aligned.
    cosine, sine = np.round(np.cos(radians), 15), np.round(np.sin(radians), 15)
    center_x, center_y = width / 2, height / 2
    shift_x = cosine * -center_x + sine * -center_y + 0.0 + center_x
    shift_y = -sine * -center_x + cosine * -center_y + 0.0 + center_y
    return np.stack([cosine, sine, shift_x, -sine, cosine, shift_y], axis=1)


def affine_matrices(
    translate: NDArray[np.int64],
    scale: NDArray[np.float64],
    shear: NDArray[np.float64],
    center: tuple[float, float],
) -> NDArray[np.float64]:
    """Build the matrices of scaling and shearing about a centre, followed by a translation.

    Args:
        translate: `(B, 2)` pixels, right and down.
        scale: `(B,)` above 0; 2 doubles the size.
        shear: `(B, 2)` degrees, along x and along y.
        center: (x, y) of the point that stays, pixels.

    Returns:
        `(B, 6)` float64, in torchvision's order of operations, so that they round alike.

    Source: `torchvision.transforms.functional._get_inverse_affine_matrix` with angle 0, and its `affine`.
    """
    shear_x, shear_y = np.radians(shear).T
    cosine, sine, tangent = np.cos(shear_y), np.sin(shear_y), np.tan(shear_x)
    a = cosine / cosine / scale
    b = cosine * tangent / cosine / scale
    d = sine / cosine / scale
    e = (sine * tangent / cosine + 1.0) / scale
    shift_x, shift_y = -center[0] - translate[:, 0], -center[1] - translate[:, 1]
    c = e * shift_x + b * shift_y + center[0]
    f = d * shift_x + a * shift_y + center[1]
    return np.stack([e, b, c, d, a, f], axis=1)


def index_maps(matrices: NDArray[np.float64], height: int, width: int, device: torch.device) -> Tensor:
    """Turn matrices, `(B, 6)` float64, into index maps, `(B, H, W)` int64 in [0, H * W], by Pillow's arithmetic."""
    parcel = Parcel(device)
    maps = plan_index_maps(matrices, height, width, parcel)
    parcel.send()
    return maps()


def plan_index_maps(matrices: NDArray[np.float64], height: int, width: int, parcel: Parcel) -> Later:
    """Prepare what `index_maps` does; the maps can be made when the parcel has been sent.

    Source: Pillow's `ImagingTransformAffine` (Geometry.c) with nearest-neighbour resampling: axis-aligned
        matrices accumulate doubles, all others 16.16 fixed point.
    Differs: Pillow leaves fixed point where a corner maps beyond 32,768 pixels; the integers here stay wide enough.
    """
    axis_aligned = (matrices[:, 1] == 0) & (matrices[:, 3] == 0)
    if axis_aligned.all():
        return _plan_axis_aligned_maps(matrices, height, width, parcel)
    if not axis_aligned.any():
        return _plan_fixed_point_maps(matrices, height, width, parcel)
    parts = []
    for chosen, plan in ((axis_aligned, _plan_axis_aligned_maps), (~axis_aligned, _plan_fixed_point_maps)):
        parts.append((parcel.add(np.flatnonzero(chosen)), plan(matrices[chosen], height, width, parcel)))

    def make() -> Tensor:
        maps = torch.empty((len(matrices), height, width), dtype=torch.int64, device=parcel.device)
        for rows, part in parts:
            maps.index_copy_(0, rows(), part())
        return maps

    return make


def _plan_axis_aligned_maps(matrices: NDArray[np.float64], height: int, width: int, parcel: Parcel) -> Later:
    """Prepare index maps of matrices that do not mix the axes, `(B, H, W)` int64."""
    a, _, c, _, e, f = matrices.T
    columns, rows = _accumulate(c + a * 0.5, a, width), _accumulate(f + e * 0.5, e, height)
    rows_later, columns_later = parcel.add(rows), parcel.add(columns)
    return lambda: _product_maps(rows_later(), columns_later())


def _accumulate(start: NDArray[np.float64], step: NDArray[np.float64], num_steps: int) -> NDArray[np.int64]:
    """Source coordinates along one axis, `(B, num_steps)` int64; Pillow adds the steps up one by one."""
    terms = np.broadcast_to(step[:, None], (len(step), num_steps)).copy()
    terms[:, 0] = start
    return np.floor(np.cumsum(terms, axis=1)).astype(np.int64)


def _plan_fixed_point_maps(matrices: NDArray[np.float64], height: int, width: int, parcel: Parcel) -> Later:
    """Prepare index maps in 16.16 fixed point, `(B, H, W)` int64."""
    a, b, c, d, e, f = matrices.T
    coefficients = np.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5])
    fixed = np.floor(coefficients * FIXED_POINT_ONE + 0.5).astype(np.int64)
    # Half the width is nearly twice as fast, and enough for all but extreme scales.
    fits = np.abs(fixed).max(initial=0) * (height + width + 1) < 2**31
    later = parcel.add(fixed.astype(np.int32 if fits else np.int64))
    return lambda: _fixed_point_maps(later(), height, width)


def _fixed_point_maps(fixed: Tensor, height: int, width: int) -> Tensor:
    """Index maps of coefficients `(6, B)`, int32 or int64, in units of 1 / FIXED_POINT_ONE."""
    a0, a1, a2, a3, a4, a5 = fixed[:, :, None, None]
    x = torch.arange(width, device=fixed.device, dtype=a0.dtype)
    y = torch.arange(height, device=fixed.device, dtype=a0.dtype)[:, None]
    columns = (x * a0 + (y * a1 + a2)) >> 16
    rows = (x * a3 + (y * a4 + a5)) >> 16
    inside = ((columns | rows) >= 0) & (columns < width) & (rows < height)
    return torch.where(inside, rows * width + columns + 1, _constant(0, rows)).long()


def _product_maps(rows: Tensor, columns: Tensor) -> Tensor:
    """Index maps `(B, H, W)` of source rows `(B, H)` and columns `(B, W)`, which may lie outside."""
    height, width = rows.shape[1], columns.shape[1]
    outside = _constant(-height * width - 1, rows)
    starts = torch.where((rows >= 0) & (rows < height), rows * width + 1, outside)
    ends = torch.where((columns >= 0) & (columns < width), columns, outside)
    return (starts[:, :, None] + ends[:, None, :]).clamp_(min=0)


def _constant(value: int, like: Tensor) -> Tensor:
    """Return a scalar made on the device of a tensor, of its dtype; torch.where waits for a GPU to copy a number."""
    return torch.full((), value, dtype=like.dtype, device=like.device)
