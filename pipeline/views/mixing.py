"""CutMix and MixUp of whole uint8 batches, in integers; the table MIXINGS in which a recipe finds them; partners.

Convention: lambda is the share of the first image; x runs right and y down, in pixels; `height` is H, `width` W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.recipes import ViewRecipe
from pipeline.views import draws
from pipeline.views.boxes import inside
from pipeline.views.colour import to_bytes
from pipeline.views.parcel import one_by_one

Draws = Mapping[str, NDArray[np.float64]]
MIXUP_STEPS = 65536


def beta_quantile(uniform: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Turn uniform numbers into those of Beta(alpha, alpha): sin^2(pi u / 2) for 1/2, u itself for 1.

    Args:
        uniform: `(B,)` float64 in [0, 1).
        alpha: Above 0.

    Returns:
        `(B,)` float64 in [0, 1]; for other alphas multiples of 1 / MIXUP_STEPS.
    """
    if alpha == 0.5:
        quantile: NDArray[np.float64] = np.sin(np.pi / 2 * uniform) ** 2
        return quantile
    return uniform if alpha == 1.0 else np.searchsorted(_beta_table(alpha), uniform, side="right") / MIXUP_STEPS


@functools.lru_cache(maxsize=8)
def _beta_table(alpha: float) -> NDArray[np.float64]:
    """Return where the quantile of Beta(alpha, alpha), rounded to 1 / MIXUP_STEPS, rises, `(MIXUP_STEPS,)` ascending.

    That is the distribution function in the middle between two steps. Up to 1/2 it is the sum of positive terms in
    x^a (1 - x)^a (1 + x (2a) / (a + 1) + x^2 (2a) (2a + 1) / ((a + 1) (a + 2)) + ...), scaled to 1/2 at 1/2.

    Source: the incomplete beta function's power series, DLMF 8.17.8.
    """
    x = np.append((np.arange(MIXUP_STEPS // 2) + 0.5) / MIXUP_STEPS, 0.5)
    term, total, number = np.ones_like(x), np.ones_like(x), 0
    while term[-1] > 1e-17 * total[-1]:  # the last converges last
        term *= x * ((2 * alpha + number) / (alpha + 1 + number))
        total, number = total + term, number + 1
    below = (x * (1 - x)) ** alpha * total
    half = 0.5 * below[:-1] / below[-1]
    return np.concatenate([half, 1 - half[::-1]])


def cutmix_boxes(
    lambda_uniform: NDArray[np.float64],
    center_uniform: NDArray[np.float64],
    height: int,
    width: int,
    alpha: float = 0.5,
) -> NDArray[np.int64]:
    """Draw the boxes that the partner's pixels fill.

    Lambda comes from Beta(alpha, alpha), and the box's side is sqrt(1 - lambda) of the frame's: for 1/2 this is
    cos(pi u / 2).

    Args:
        lambda_uniform: `(B,)` float64 in [0, 1).
        center_uniform: `(B, 2)` float64 in [0, 1): the centre's x and y as a share of the frame.
        height: H, pixels.
        width: W, pixels.
        alpha: Of the beta distribution.

    Returns:
        `(B, 4)` int64: left, top, right and bottom, the last two exclusive, clipped to the frame.

    Source: arXiv:1905.04899 §3.1 and its published code; arXiv:2502.16762 §3.4.
    """
    is_half = alpha == 0.5
    side = np.cos(np.pi / 2 * lambda_uniform) if is_half else np.sqrt(1 - beta_quantile(lambda_uniform, alpha))
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
    if not one_by_one(images):
        return images ^ ((images ^ partners) & inside(boxes, *images.shape[-2:]))
    mixed = images.clone()
    for image, partner, (left, top, right, bottom) in zip(mixed, partners, boxes.tolist(), strict=True):
        image[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return mixed


def mixup_shares(lambda_uniform: NDArray[np.float64], alpha: float = 0.5) -> NDArray[np.int32]:
    """Draw the first images' shares from Beta(alpha, alpha), as `cutmix_boxes` does.

    Args:
        lambda_uniform: `(B,)` float64 in [0, 1).
        alpha: Of the beta distribution.

    Returns:
        `(B,)` int32 in [0, MIXUP_STEPS], in units of 1 / MIXUP_STEPS.

    Source: arXiv:1710.09412 §2; arXiv:2502.16762 §4.2 ("TITN (MixUp)").
    """
    shares: NDArray[np.int32] = np.rint(beta_quantile(lambda_uniform, alpha) * MIXUP_STEPS).astype(np.int32)
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
    mixed = torch.empty_like(images)
    size = 1 if one_by_one(images) else max(1, len(images))
    weight = (shares.float() / MIXUP_STEPS).reshape(-1, 1, 1, 1)
    # All products and sums have at most 24 bits, so that float32 holds them exactly.
    for part in range(0, len(images), size):
        first, second = images[part : part + size].float(), partners[part : part + size].float()
        mixed[part : part + size] = to_bytes(torch.lerp(second, first, weight[part : part + size]).add_(0.5))
    return mixed


def mix_either(images: Tensor, partners: Tensor, amounts: Tensor) -> Tensor:
    """Apply MixUp, then CutMix; of each sample one of them changes nothing.

    Args:
        images: `(B, 3, H, W)` uint8.
        partners: `(B, 3, H, W)` uint8.
        amounts: `(B, 5)` int64: CutMix's box, empty for MixUp; MixUp's share, MIXUP_STEPS for CutMix.

    Returns:
        The mixed images, `(B, 3, H, W)` uint8.
    """
    return cutmix(mixup(images, partners, amounts[:, 4].int()), partners, amounts[:, :4])


class Mixing(NamedTuple):
    """A way to mix each image with a partner.

    Attributes:
        draws: The number of draws per sample by name, beside `partner`, `lambda` and `mixing`.
        amounts: Takes boxes `(B, 4)` int64 and shares `(B,)` int32; returns the last argument of `mix`.
        mix: Takes images and partners, `(B, 3, H, W)` uint8, and amounts. Returns the mixed images.
    """

    draws: Mapping[str, int]
    amounts: Callable[[NDArray[np.int64], NDArray[np.int32]], NDArray[Any]]
    mix: Callable[[Tensor, Tensor, Tensor], Tensor]


# By the value of the view recipe's `mixing`.
MIXINGS = {
    "cutmix": Mixing({"box": 2}, lambda boxes, _: boxes, cutmix),
    "mixup": Mixing({}, lambda _, shares: shares, mixup),
    "both": Mixing({"box": 2, "switch": 1}, lambda boxes, shares: np.column_stack([boxes, shares]), mix_either),
}
KINDS = ("none", "cutmix", "mixup")
"""How a sample may be mixed."""


def num_draws(recipe: ViewRecipe) -> dict[str, int]:
    """Return the number of draws per sample by name; a recipe without mixing draws nothing."""
    if recipe.mixing == "none":
        return {}
    chance = {"mixing": 1} if recipe.mixing_probability < 1 else {}
    return {"partner": 1, "lambda": 1, **MIXINGS[recipe.mixing].draws, **chance}


def kinds(uniform: Draws, recipe: ViewRecipe) -> NDArray[np.int64]:
    """Return how each of B samples is mixed, `(B,)` int64, indices into KINDS, from the draws by name."""
    if recipe.mixing == "both":
        chosen = np.where(uniform["switch"][:, 0] < 0.5, KINDS.index("cutmix"), KINDS.index("mixup"))
    else:
        chosen = np.full(len(uniform["lambda"]), KINDS.index(recipe.mixing))
    return np.where(uniform["mixing"][:, 0] < recipe.mixing_probability, chosen, 0) if "mixing" in uniform else chosen


def draw(uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Turn the draws of B samples by name into the last argument of the mixing's `mix`, and lambda.

    Lambda is `(B,)` float32 in [0, 1], the share of the first image; 1 for a sample that is not mixed.
    """
    kind, mixing, lambda_uniform = kinds(uniform, recipe), MIXINGS[recipe.mixing], uniform["lambda"][:, 0]
    boxes = np.zeros((len(kind), 4), dtype=np.int64)
    shares = np.full(len(kind), MIXUP_STEPS, dtype=np.int32)
    if (by_box := kind == KINDS.index("cutmix")).any():
        place = uniform["box"][by_box]
        boxes[by_box] = cutmix_boxes(lambda_uniform[by_box], place, height, width, recipe.cutmix_alpha)
    if (by_share := kind == KINDS.index("mixup")).any():
        shares[by_share] = mixup_shares(lambda_uniform[by_share], recipe.mixup_alpha)
    # One of the factors is 1.
    return mixing.amounts(boxes, shares), cutmix_lambda(boxes, height, width) * mixup_lambda(shares)


def partners(uniform: Draws, recipe: ViewRecipe) -> NDArray[np.int64]:
    """Return whom each of all N samples of a view would mix with, `(N,)` int64, from their draws by name.

    Pairs are neighbours in the order of the draws; of an odd number the last sample is its own partner.
    """
    drawn = uniform["partner"][:, 0]
    if recipe.partner == "uniform":
        return draws.integers(drawn, len(drawn))
    order, paired = np.argsort(drawn, kind="stable"), np.empty(len(drawn), dtype=np.int64)
    even = len(order) // 2 * 2
    paired[order] = np.concatenate([order[:even].reshape(-1, 2)[:, ::-1].reshape(-1), order[even:]])
    return paired


def by_pairs(keys: NDArray[Any], paired: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return the order of N samples by their keys, in which the samples of a pair are neighbours.

    Args:
        keys: `(N,)`, of which a pair has that of its lower index.
        paired: `(N,)` int64, the partners; None where there are no pairs.

    Returns:
        `(N,)` int64. One that is its own partner is the last, so that pairs begin at even places.
    """
    if paired is None:
        return np.argsort(keys, kind="stable")
    samples = np.arange(len(keys))
    return np.lexsort((keys[np.minimum(samples, paired)], paired == samples))
