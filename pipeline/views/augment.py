"""A view recipe's operations up to mixing, from draws to pixels, for whole uint8 batches.

Operations run in the order of the recipe's fields. Crop, flip, rotation and affine are one gather.

Source: arXiv:2502.16762 §3.4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.recipes import ViewRecipe
from pipeline.views import colour as imageops
from pipeline.views import draws, geometry, operations, randaugment, trivialaugment
from pipeline.views import policies as autoaugment

Draws = Mapping[str, NDArray[np.float64]]
Parameters = Mapping[str, NDArray[Any]]


class Policy(NamedTuple):
    """A way to choose operations for each image.

    Attributes:
        title: What people call it.
        draws: Name of its draws.
        num_draws: Their number for each sample.
        choose: From draws `(B, num_draws)`, height and width to what is done to B images.
    """

    title: str
    draws: str
    num_draws: int
    choose: Callable[[NDArray[np.float64], int, int], operations.Choice]


# By the value of the view recipe's `autoaugment`.
POLICIES = {
    "cifar10": Policy("AutoAugment", "autoaugment", autoaugment.NUM_DRAWS, autoaugment.choose),
    "randaugment": Policy("RandAugment", "randaugment", randaugment.NUM_DRAWS, randaugment.choose),
    "trivialaugment": Policy("TrivialAugment", "trivialaugment", trivialaugment.NUM_DRAWS, trivialaugment.choose),
}


def num_draws(recipe: ViewRecipe) -> dict[str, int]:
    """Tell what a recipe draws.

    Args:
        recipe: The view recipe.

    Returns:
        Name of the draws to their number for each sample; an operation left out draws nothing.
    """
    per_field = {
        "crop": 2,
        "flip": 1,
        "rotation": 1,
        "translate": 2,
        "scale": 1,
        "shear": 1,
        "brightness": 1,
        "contrast": 1,
    }
    fields = [field.name for field in dataclasses.fields(recipe) if field.name in per_field]
    drawn = {name: per_field[name] for name in fields if getattr(recipe, name)}
    if recipe.brightness and recipe.contrast:
        drawn["jitter-order"] = 1
    if recipe.autoaugment != "none":
        policy = POLICIES[recipe.autoaugment]
        drawn[policy.draws] = policy.num_draws
    if recipe.mixing != "none":
        drawn |= {"partner": 1, "lambda": 1}
    if recipe.mixing == "cutmix":
        drawn["box"] = 2
    return drawn


def parameters(own: Draws, recipe: ViewRecipe, height: int, width: int) -> dict[str, NDArray[Any]]:
    """Turn draws into what each operation does to each image.

    Args:
        own: Name of the draws to those of B samples, `(B, num_draws)` float64 in [0, 1).
        recipe: The view recipe.
        height: H, pixels.
        width: W, pixels.

    Returns:
        Of the operations that the recipe has: `crop` `(B, 2)` int64, pixels by which the frame moves down and right;
        `flip` `(B,)` bool; `rotation` `(B,)` degrees, counter-clockwise; `translate` `(B, 2)` int64, pixels right and
        down; `scale` `(B,)`; `shear` `(B,)` degrees along x; `brightness` and `contrast` `(B,)`, factors; where there
        are both, `brightness_first` `(B,)` bool. With a policy, of the P operations that it chooses (2; TrivialAugment
        1) `operations` `(B, P)` int64, indices into operations.OPERATIONS or operations.NO_OPERATION, and `magnitudes`
        `(B, P)` float64, signed, in the units of operations.magnitude; 0 where none is applied. With AutoAugment also
        `sub_policy` `(B,)` int64.
    """
    given = _plain_parameters(own, recipe, height, width)
    if recipe.autoaugment == "cifar10":
        given["sub_policy"] = autoaugment.sub_policies(own["autoaugment"])
    if recipe.autoaugment != "none":
        choice = _choose(own, recipe, height, width)
        given |= {"operations": choice.operations, "magnitudes": choice.magnitudes}
    return given


def _choose(own: Draws, recipe: ViewRecipe, height: int, width: int) -> operations.Choice:
    """Return what the recipe's policy does to each image."""
    policy = POLICIES[recipe.autoaugment]
    return policy.choose(own[policy.draws], height, width)


def _plain_parameters(own: Draws, recipe: ViewRecipe, height: int, width: int) -> dict[str, NDArray[Any]]:
    """Return what `parameters` does, without a policy's choice."""
    given: dict[str, NDArray[Any]] = {}
    if "crop" in own:
        given["crop"] = draws.integers(own["crop"], 2 * recipe.crop + 1) - recipe.crop
    if "flip" in own:
        given["flip"] = own["flip"][:, 0] < 0.5
    if "translate" in own:
        shift = draws.between(own["translate"], -recipe.translate, recipe.translate)
        given["translate"] = np.rint(shift * [width, height]).astype(np.int64)
    for name, middle, reach in (
        ("rotation", 0, recipe.rotation),
        ("scale", 1, recipe.scale),
        ("shear", 0, recipe.shear),
        ("brightness", 1, recipe.brightness),
        ("contrast", 1, recipe.contrast),
    ):
        if name in own:
            given[name] = draws.between(own[name][:, 0], middle - reach, middle + reach)
    if "jitter-order" in own:
        given["brightness_first"] = own["jitter-order"][:, 0] < 0.5
    return given


def augment(images: Tensor, own: Draws, recipe: ViewRecipe) -> Tensor:
    """Apply all operations but mixing.

    Args:
        images: `(B, 3, H, W)` uint8.
        own: Name of the draws to those of these samples, `(B, num_draws)` float64 in [0, 1).
        recipe: The view recipe.

    Returns:
        `(B, 3, H, W)` uint8.
    """
    height, width = images.shape[-2:]
    given = _plain_parameters(own, recipe, height, width)
    maps = _index_maps(given, height, width, images.device)
    if maps is not None:
        images = geometry.gather(images, maps)
    if recipe.brightness or recipe.contrast:
        images = _jitter(images, given)
    if recipe.autoaugment != "none":
        images = operations.apply(images, _choose(own, recipe, height, width))
    return images


def _index_maps(given: Parameters, height: int, width: int, device: torch.device) -> Tensor | None:
    """Crop, flip, rotation and affine as one index map for each sample, `(B, H, W)` int64; None without any."""
    stages: list[Tensor] = []
    if "crop" in given or "flip" in given:
        stages.append(_crop_flip_maps(given, height, width, device))
    if "rotation" in given:
        stages.append(geometry.rotation_maps(given["rotation"], height, width, device))
    if "translate" in given or "scale" in given or "shear" in given:
        stages.append(_affine_maps(given, height, width, device))
    return functools.reduce(geometry.compose, stages) if stages else None


def _crop_flip_maps(given: Parameters, height: int, width: int, device: torch.device) -> Tensor:
    """Random padded crop and left-right flip; either may be absent."""
    num_samples = len(next(iter(given.values())))
    offsets = given.get("crop", np.zeros((num_samples, 2), dtype=np.int64))
    flipped = given.get("flip", np.zeros(num_samples, dtype=np.bool_))
    return geometry.crop_flip_maps(
        torch.from_numpy(offsets).to(device), torch.from_numpy(flipped).to(device), height, width
    )


def _affine_maps(given: Parameters, height: int, width: int, device: torch.device) -> Tensor:
    """Random shift by whole pixels, scaling and shear along x, in one pass, as torchvision's RandomAffine."""
    num_samples = len(next(iter(given.values())))
    translate = given.get("translate", np.zeros((num_samples, 2), dtype=np.int64))
    scale = given.get("scale", np.ones(num_samples))
    shear = np.zeros((num_samples, 2))
    shear[:, 0] = given.get("shear", 0.0)
    return geometry.affine_maps(translate, scale, shear, height, width, device)


def _jitter(images: Tensor, given: Parameters) -> Tensor:
    """Random brightness and contrast in random order, as torchvision's ColorJitter."""
    device = images.device
    factors = {name: torch.from_numpy(given[name]).to(device) for name in ("brightness", "contrast") if name in given}
    if "contrast" not in given:
        return imageops.brightness(images, factors["brightness"])
    if "brightness" not in given:
        return imageops.contrast(images, factors["contrast"])
    brightness, contrast = factors["brightness"], factors["contrast"]
    first = torch.from_numpy(np.flatnonzero(given["brightness_first"])).to(device)
    last = torch.from_numpy(np.flatnonzero(~given["brightness_first"])).to(device)
    jittered = torch.empty_like(images)
    jittered[first] = imageops.contrast(imageops.brightness(images[first], brightness[first]), contrast[first])
    jittered[last] = imageops.brightness(imageops.contrast(images[last], contrast[last]), brightness[last])
    return jittered
