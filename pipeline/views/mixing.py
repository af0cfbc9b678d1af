"""CutMix and MixUp of whole uint8 batches, in integers, and the table MIXINGS in which a recipe finds them.

Convention: lambda is the share of the first image; x runs right and y down, in pixels; `height` is H, `width` W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.views import draws

MIXUP_STEPS = 65536


def cutmix_boxes(
    lambda_uniform: NDArray[np.float64], center_uniform: NDArray[np.float64], height: int, width: int
) -> NDArray[np.int64]:
    """Draw the boxes that the partner's pixels fill.

    Lambda comes from Beta(1/2, 1/2), whose quantile function is sin^2(pi u / 2), so that the box's side is
    cos(pi u / 2) of the frame's.

    Args:
        lambda_uniform: `(B,)` float64 in [0, 1).
        center_uniform: `(B, 2)` float64 in [0, 1): the centre's x and y as a share of the frame.
        height: H, pixels.
        width: W, pixels.

    Returns:
        `(B, 4)` int64: left, top, right and bottom, the last two exclusive, clipped to the frame.

    Source: arXiv:1905.04899 §3.1 and its published code; arXiv:2502.16762 §3.4.
    """
    side = np.cos(np.pi / 2 * lambda_uniform)
    half = np.stack([(width * side).astype(np.int64) // 2, (height * side).astype(np.int64) // 2], axis=1)
    center = np.stack(
        [draws.integers(center_uniform[:, 0], width), draws.integers(center_uniform[:, 1], height)], axis=1
    )
    return np.concatenate([center - half, center + half], axis=1).clip(0, [width, height, width, height])


def cutmix_lambda(boxes: NDArray[np.int64], height: int, width: int) -> NDArray[np.float32]:
    """Return the share of the pixels outside of the boxes, `(B, 4)` int64: lambda, `(B,)` float32 in [0, 1].

    Source: arXiv:2502.16762 Eq. 9; the box after it is clipped.
    """
    num_first = height * width - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (num_first / (height * width)).astype(np.float32)


def cutmix(images: Tensor, partners: Tensor, boxes: Tensor) -> Tensor:
    """Fill a box of each image with the same box of its partner.

    Args:
        images: `(B, 3, H, W)` uint8.
        partners: `(B, 3, H, W)` uint8.
        boxes: `(B, 4)` int64: left, top, right and bottom, inside of the frame.

    Returns:
        The mixed images, `(B, 3, H, W)` uint8.

    Source: arXiv:1905.04899 §3.1; arXiv:2502.16762 §3.4.
    """
    height, width = images.shape[-2:]
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)
    in_columns, in_rows = (x >= left) & (x < right), (y >= top) & (y < bottom)
    # All bits set inside of the box: choosing by bits vectorises, torch.where on broadcast bytes is 20 times slower.
    inside = (in_rows[:, None, :, None] & in_columns[:, None, None, :]).view(torch.uint8).neg_()
    return images ^ ((images ^ partners) & inside)


def mixup_shares(lambda_uniform: NDArray[np.float64]) -> NDArray[np.int32]:
    """Draw the first images' shares from Beta(1/2, 1/2), as `cutmix_boxes` does.

    Args:
        lambda_uniform: `(B,)` float64 in [0, 1).

    Returns:
        `(B,)` int32 in [0, MIXUP_STEPS], in units of 1 / MIXUP_STEPS.

    Source: arXiv:1710.09412 §2; arXiv:2502.16762 §4.2 ("TITN (MixUp)").
    """
    shares: NDArray[np.int32] = np.rint(np.sin(np.pi / 2 * lambda_uniform) ** 2 * MIXUP_STEPS).astype(np.int32)
    return shares


def mixup_lambda(shares: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return shares as lambda, `(B,)` float32 in [0, 1]."""
    return shares.astype(np.float32) / np.float32(MIXUP_STEPS)


def mixup(images: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Average each image with its partner.

    Args:
        images: `(B, 3, H, W)` uint8.
        partners: `(B, 3, H, W)` uint8.
        shares: `(B,)` int32 in [0, MIXUP_STEPS], the first images' share.

    Returns:
        The mixed images, `(B, 3, H, W)` uint8, rounded half up.

    Source: arXiv:1710.09412 Eq. 1; arXiv:2502.16762 §4.2 ("TITN (MixUp)").
    Differs: lambda is a multiple of 1/65536 and the mixed image is uint8, so that every device gives the same.
    """
    weight = shares.reshape(-1, 1, 1, 1)
    mixed = (weight * images + (MIXUP_STEPS - weight) * partners + MIXUP_STEPS // 2) >> 16
    return mixed.to(torch.uint8)


class Mixing(NamedTuple):
    """A way to mix each image with a partner.

    Attributes:
        draws: The number of draws per sample by name, beside `partner` and `lambda`.
        draw: Takes the draws of B samples by name, height and width. Returns the last argument of `mix` and lambda,
            `(B,)` float32 in [0, 1].
        mix: Takes images and partners, `(B, 3, H, W)` uint8, and the result of `draw`. Returns the mixed images.
    """

    draws: Mapping[str, int]
    draw: Callable[[Mapping[str, NDArray[np.float64]], int, int], tuple[NDArray[Any], NDArray[np.float32]]]
    mix: Callable[[Tensor, Tensor, Tensor], Tensor]


def _draw_cutmix(
    uniform: Mapping[str, NDArray[np.float64]], height: int, width: int
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    boxes = cutmix_boxes(uniform["lambda"][:, 0], uniform["box"], height, width)
    return boxes, cutmix_lambda(boxes, height, width)


def _draw_mixup(
    uniform: Mapping[str, NDArray[np.float64]], height: int, width: int
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    shares = mixup_shares(uniform["lambda"][:, 0])
    return shares, mixup_lambda(shares)


# By the value of the view recipe's `mixing`.
MIXINGS = {"cutmix": Mixing({"box": 2}, _draw_cutmix, cutmix), "mixup": Mixing({}, _draw_mixup, mixup)}


def num_draws(name: str) -> dict[str, int]:
    """Return a mixing's number of draws per sample by name; `none` draws nothing."""
    return {"partner": 1, "lambda": 1, **MIXINGS[name].draws} if name != "none" else {}
