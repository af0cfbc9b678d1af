"""A view recipe's operations up to mixing, from draws to pixels, for whole uint8 batches.

Operations run in the order of the recipe's fields. Crop, flip, rotation and affine are one gather.

Source: arXiv:2502.16762 §3.4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import autoaugment, draws, geometry, imageops
from pipeline.recipes import ViewRecipe

Draws = Mapping[str, NDArray[np.float64]]


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
        "autoaugment": autoaugment.NUM_DRAWS,
    }
    fields = [field.name for field in dataclasses.fields(recipe) if field.name in per_field]
    drawn = {name: per_field[name] for name in fields if getattr(recipe, name) not in (0, False, "none")}
    if recipe.brightness and recipe.contrast:
        drawn["jitter-order"] = 1
    if recipe.mixing != "none":
        drawn |= {"partner": 1, "lambda": 1}
    if recipe.mixing == "cutmix":
        drawn["box"] = 2
    return drawn


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
    maps = _index_maps(own, recipe, height, width, images.device)
    if maps is not None:
        images = geometry.gather(images, maps)
    if recipe.brightness or recipe.contrast:
        images = _jitter(images, own, recipe)
    if recipe.autoaugment == "cifar10":
        images = autoaugment.apply(images, own["autoaugment"])
    return images


def _index_maps(own: Draws, recipe: ViewRecipe, height: int, width: int, device: torch.device) -> Tensor | None:
    """Crop, flip, rotation and affine as one index map for each sample, `(B, H, W)` int64; None without any."""
    stages: list[Tensor] = []
    if recipe.crop or recipe.flip:
        stages.append(_crop_flip_maps(own, recipe.crop, height, width, device))
    if recipe.rotation:
        angles = draws.between(own["rotation"][:, 0], -recipe.rotation, recipe.rotation)
        stages.append(geometry.rotation_maps(angles, height, width, device))
    if recipe.translate or recipe.scale or recipe.shear:
        stages.append(_affine_maps(own, recipe, height, width, device))
    return functools.reduce(geometry.compose, stages) if stages else None


def _crop_flip_maps(own: Draws, padding: int, height: int, width: int, device: torch.device) -> Tensor:
    """Random padded crop and left-right flip; either may be absent from the draws."""
    num_samples = len(next(iter(own.values())))
    offsets = np.zeros((num_samples, 2), dtype=np.int64)
    flipped = np.zeros(num_samples, dtype=np.bool_)
    if "crop" in own:
        offsets = draws.integers(own["crop"], 2 * padding + 1) - padding
    if "flip" in own:
        flipped = own["flip"][:, 0] < 0.5
    return geometry.crop_flip_maps(
        torch.from_numpy(offsets).to(device), torch.from_numpy(flipped).to(device), height, width
    )


def _affine_maps(own: Draws, recipe: ViewRecipe, height: int, width: int, device: torch.device) -> Tensor:
    """Random shift by whole pixels, scaling and shear along x, in one pass, as torchvision's RandomAffine."""
    num_samples = len(next(iter(own.values())))
    translate = np.zeros((num_samples, 2), dtype=np.int64)
    scale = np.ones(num_samples)
    shear = np.zeros((num_samples, 2))
    if "translate" in own:
        shift = draws.between(own["translate"], -recipe.translate, recipe.translate)
        translate = np.rint(shift * [width, height]).astype(np.int64)
    if "scale" in own:
        scale = draws.between(own["scale"][:, 0], 1 - recipe.scale, 1 + recipe.scale)
    if "shear" in own:
        shear[:, 0] = draws.between(own["shear"][:, 0], -recipe.shear, recipe.shear)
    return geometry.affine_maps(translate, scale, shear, height, width, device)


def _jitter(images: Tensor, own: Draws, recipe: ViewRecipe) -> Tensor:
    """Random brightness and contrast in random order, as torchvision's ColorJitter."""
    device = images.device

    def factors(name: str, strength: float) -> Tensor:
        values = draws.between(own[name][:, 0], 1 - strength, 1 + strength)
        return torch.from_numpy(values).to(device)

    if not recipe.contrast:
        return imageops.brightness(images, factors("brightness", recipe.brightness))
    if not recipe.brightness:
        return imageops.contrast(images, factors("contrast", recipe.contrast))
    brightness = factors("brightness", recipe.brightness)
    contrast = factors("contrast", recipe.contrast)
    brightness_first = own["jitter-order"][:, 0] < 0.5
    first = torch.from_numpy(np.flatnonzero(brightness_first)).to(device)
    last = torch.from_numpy(np.flatnonzero(~brightness_first)).to(device)
    jittered = torch.empty_like(images)
    jittered[first] = imageops.contrast(imageops.brightness(images[first], brightness[first]), contrast[first])
    jittered[last] = imageops.brightness(imageops.contrast(images[last], contrast[last]), brightness[last])
    return jittered
