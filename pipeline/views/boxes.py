"""Boxes of random area and aspect ratio: what a resized crop keeps, and what erasing blackens.

Convention: boxes are left, top, right and bottom in pixels, the last two exclusive; sizes are width and height.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.views import draws

NUM_ATTEMPTS = 10
ERASED = {"scale": (0.02, 0.33), "ratio": (0.3, 3.3)}

Draw = Callable[[str, int], NDArray[np.float64]]
"""Returns the draws of all N samples, `(N, number)` float64 in [0, 1), by their name and number."""


def crop_boxes(draw: Draw, sizes: NDArray[np.int64], spans: Mapping[str, Sequence[float]]) -> NDArray[np.int64]:
    """Draw the boxes of resized crops.

    Args:
        draw: Makes the draws.
        sizes: `(N, 2)`, of the images.
        spans: `scale`, the lowest and highest share of the area; `ratio`, those of the width by the height.

    Returns:
        `(N, 4)` int64, each inside of its image, of one pixel at least.

    Source: torchvision's `RandomResizedCrop.get_params`: 10 attempts, then the middle.
    """

    def fits(sides: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (sides > 0) & (sides <= size)

    boxes, rest = _draw(draw, "resized crop", sizes, spans, np.arange(len(sizes)), fits)
    low, high = spans["ratio"]
    width, height = sizes[rest].T
    narrow, wide = width / height < low, width / height > high
    middle = np.stack(
        [np.where(wide, np.rint(height * high), width), np.where(narrow, np.rint(width / low), height)], axis=1
    ).astype(np.int64)
    start = (sizes[rest] - middle) // 2
    boxes[rest] = np.concatenate([start, start + middle], axis=1)
    return boxes


def erased_boxes(draw: Draw, probability: float, height: int, width: int) -> NDArray[np.int64]:
    """Draw the boxes that become black, `(N, 4)` int64 inside of the frame; an empty one where nothing is erased.

    Source: torchvision's `RandomErasing.get_params`: 10 attempts, then nothing. Its ratio is the height by the width.
    """
    chosen = draw("erasing", 1)[:, 0] < probability
    sizes = np.broadcast_to(np.array([height, width]), (len(chosen), 2))
    boxes, _ = _draw(draw, "erasing", sizes, ERASED, np.flatnonzero(chosen), lambda sides, size: sides < size)
    return boxes[:, [1, 0, 3, 2]]


def _draw(
    draw: Draw,
    name: str,
    sizes: NDArray[np.int64],
    spans: Mapping[str, Sequence[float]],
    rows: NDArray[np.int64],
    fits: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw boxes for some rows: `(N, 4)`, zeros for all others, and the rows for which no attempt fitted.

    An attempt's draws are made when it comes, for most samples need but one.
    """
    boxes = np.zeros((len(sizes), 4), dtype=np.int64)
    low, high = np.log(spans["ratio"])
    place = draw(f"{name}, place", 2)
    for attempt in range(NUM_ATTEMPTS):
        if not len(rows):
            break
        size, uniform = sizes[rows].astype(np.int64), draw(f"{name}, attempt {attempt}", 2)[rows]
        area = size.prod(axis=1) * draws.between(uniform[:, 0], *spans["scale"])
        aspect = np.exp(draws.between(uniform[:, 1], low, high))
        sides = np.rint(np.sqrt(np.stack([area * aspect, area / aspect], axis=1))).astype(np.int64)
        accepted = fits(sides, size).all(axis=1)
        fitted, sides = rows[accepted], sides[accepted]
        start = draws.integers(place[fitted], size[accepted] - sides + 1)
        boxes[fitted] = np.concatenate([start, start + sides], axis=1)
        rows = rows[~accepted]
    return boxes, rows


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return where the boxes, `(B, 4)` int64, are: `(B, 1, H, W)` uint8, all bits set inside, none outside.

    Choosing by bits vectorises; torch.where on broadcast bytes is 20 times slower.
    """
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    in_columns, in_rows = (x >= left) & (x < right), (y >= top) & (y < bottom)
    return (in_rows[:, None, :, None] & in_columns[:, None, None, :]).view(torch.uint8).neg_()
