"""AutoAugment's policy for CIFAR-10 on whole uint8 batches.

Results equal torchvision's on each image as a PIL image, bit for bit. Samples are sorted by operation, not by
sub-policy, so that each operation sees one slice of the batch: magnitudes are per-sample arguments, and the few
geometric instances that the policy can draw are index maps made once for an image size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import draws, geometry, imageops

NUM_BINS = 10
NUM_DRAWS = 5

# (operation, probability, magnitude bin or None) twice for each sub-policy. Kept here rather than read from
# torchvision, so that the views of a recipe are the same whichever version is installed.
CIFAR10_POLICY = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)

# What a colour operation does with the magnitude of each sample, `(B,)` float64.
COLOUR_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": lambda images, magnitudes: imageops.brightness(images, 1.0 + magnitudes),
    "Color": lambda images, magnitudes: imageops.color(images, 1.0 + magnitudes),
    "Contrast": lambda images, magnitudes: imageops.contrast(images, 1.0 + magnitudes),
    "Sharpness": lambda images, magnitudes: imageops.sharpness(images, 1.0 + magnitudes),
    "Posterize": imageops.posterize,
    "Solarize": imageops.solarize,
    "AutoContrast": lambda images, _: imageops.autocontrast(images),
    "Equalize": lambda images, _: imageops.equalize(images),
    "Invert": lambda images, _: imageops.invert(images),
}
GEOMETRIC_OPERATIONS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
UNSIGNED_OPERATIONS = ("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")
OPERATIONS = (*GEOMETRIC_OPERATIONS, *COLOUR_OPERATIONS)
NO_OPERATION = -1


class Choice(NamedTuple):
    """What AutoAugment does to each of B images.

    Attributes:
        sub_policies: `(B,)` int64, indices into CIFAR10_POLICY.
        operations: `(B, 2)` int64, indices into OPERATIONS, in their order; NO_OPERATION where none is applied.
        negative: `(B, 2)` int64, 1 where a magnitude that has a sign is negative.
    """

    sub_policies: NDArray[np.int64]
    operations: NDArray[np.int64]
    negative: NDArray[np.int64]


def choose(uniform: NDArray[np.float64]) -> Choice:
    """Turn draws into sub-policies.

    Args:
        uniform: As of `apply`.
    """
    sub_policies = draws.integers(uniform[:, 0], len(CIFAR10_POLICY))
    policy = _tabulate(1, 1)  # an image's size decides magnitudes alone
    applied = uniform[:, 1:3] < policy.probabilities[sub_policies]
    operations = np.where(applied, policy.operations[sub_policies], NO_OPERATION)
    return Choice(sub_policies, operations, (uniform[:, 3:] < 0.5).astype(np.int64))


def signed_magnitudes(choice: Choice, height: int, width: int) -> NDArray[np.float64]:
    """Return the magnitudes of what is applied, `(B, 2)` in the units of `magnitude`, with sign; 0 where nothing is.

    Args:
        choice: Of B images.
        height: H, pixels.
        width: W, pixels.
    """
    policy = _tabulate(height, width)
    signed = _take_signed(policy, choice)
    geometric = (choice.operations >= 0) & (choice.operations < len(GEOMETRIC_OPERATIONS))
    instances = np.array([value for _, value in policy.instances])
    signed[geometric] = instances[signed[geometric].astype(np.int64)]
    return np.where(choice.operations == NO_OPERATION, 0.0, signed)


def _take_signed(policy: _Policy, choice: Choice) -> NDArray[np.float64]:
    """Return each image's entries of `_Policy.magnitudes`, `(B, 2)`."""
    entries = policy.magnitudes[choice.sub_policies]
    signed: NDArray[np.float64] = np.take_along_axis(entries, choice.negative[..., None], axis=2)[..., 0]
    return signed


def apply(images: Tensor, uniform: NDArray[np.float64]) -> Tensor:
    """Apply one sub-policy, drawn per image.

    Args:
        images: `(B, 3, H, W)` uint8.
        uniform: `(B, 5)` float64 in [0, 1): the sub-policy, whether its first and second operation are
            applied, and whether their magnitudes are negative (below 1/2).

    Returns:
        `(B, 3, H, W)` uint8.

    Source: arXiv:1805.09501, Table 7; torchvision's `AutoAugment(AutoAugmentPolicy.CIFAR10)`.
    Differs: an operation is applied below its probability, torchvision's also at it, so that there one of
        probability 0 is applied once in 2^24 times.
    """
    choice = choose(uniform)
    operations, magnitudes = choice.operations, _take_signed(_tabulate(*images.shape[-2:]), choice)
    order = np.arange(len(images))
    for place in range(2):
        resorted = np.argsort(operations[order, place], kind="stable")
        order = order[resorted]
        images = _take(images, resorted)
        _apply_sorted(images, operations[order, place], magnitudes[order, place])
    return _take(images, np.argsort(order))


def magnitude(operation: str, magnitude_bin: int | None, height: int, width: int) -> float:
    """Look up the positive magnitude of an operation.

    Args:
        operation: One of OPERATIONS.
        magnitude_bin: Bin in [0, 10), or None for an operation without magnitude.
        height: H, pixels.
        width: W, pixels.

    Returns:
        Tangents (shears), pixels (translations, not rounded), degrees (rotation), changes of a factor
        (brightness, color, contrast, sharpness), bits (posterize), a level (solarize), or 0 without a
        magnitude.

    Source: torchvision's `AutoAugment._augmentation_space`, whose bins are a float32 linspace.
    Differs: torch.linspace's last bit varies with the CPU (fused multiply-add or not); this one's does not.
    """
    if magnitude_bin is None:
        return 0.0
    if operation == "Posterize":
        return 8.0 - round(magnitude_bin / ((NUM_BINS - 1) / 4))
    low, high = {
        "ShearX": (0.0, 0.3),
        "ShearY": (0.0, 0.3),
        "TranslateX": (0.0, 150.0 / 331.0 * width),
        "TranslateY": (0.0, 150.0 / 331.0 * height),
        "Rotate": (0.0, 30.0),
        "Solarize": (255.0, 0.0),
    }.get(operation, (0.0, 0.9))
    start, end = np.float32(low), np.float32(high)
    step = float((end - start) / np.float32(NUM_BINS - 1))
    # As torch.linspace: from the nearer end, rounded once.
    if magnitude_bin < NUM_BINS // 2:
        return float(np.float32(float(start) + step * magnitude_bin))
    return float(np.float32(float(end) - step * (NUM_BINS - 1 - magnitude_bin)))


def _apply_sorted(images: Tensor, operations: NDArray[np.int64], magnitudes: NDArray[np.float64]) -> None:
    """Apply to each image its own operation, in place; `operations` ascends."""
    bounds = np.searchsorted(operations, np.arange(len(OPERATIONS) + 1))
    geometric = slice(bounds[0], bounds[len(GEOMETRIC_OPERATIONS)])
    if geometric.start < geometric.stop:
        # Index maps carry the magnitude, so that all geometric operations are one group.
        rows = torch.from_numpy(magnitudes[geometric].astype(np.int64)).to(images.device)
        maps = _geometric_maps(*images.shape[-2:], images.device).index_select(0, rows)
        images[geometric] = geometry.gather(images[geometric], maps)
    for number, name in enumerate(OPERATIONS[len(GEOMETRIC_OPERATIONS) :], start=len(GEOMETRIC_OPERATIONS)):
        group = slice(bounds[number], bounds[number + 1])
        if group.start < group.stop:
            values = torch.from_numpy(magnitudes[group]).to(images.device)
            images[group] = COLOUR_OPERATIONS[name](images[group], values)


def _take(images: Tensor, order: NDArray[np.int64]) -> Tensor:
    """The images in another order."""
    return images.index_select(0, torch.from_numpy(order).to(images.device))


@dataclass(frozen=True)
class _Policy:
    """The policy as arrays over (sub-policy, place, negative or not).

    Attributes:
        operations: `(25, 2)` int64, indices into OPERATIONS.
        probabilities: `(25, 2)` float64.
        magnitudes: `(25, 2, 2)` float64, with sign; for a geometric operation the row of its index map
            instead.
        instances: The geometric operations with their signed magnitudes, in the order of those rows.
    """

    operations: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    magnitudes: NDArray[np.float64]
    instances: tuple[tuple[str, float], ...]


@functools.lru_cache(maxsize=8)
def _tabulate(height: int, width: int) -> _Policy:
    """Tabulate the policy for images of H x W pixels."""
    operations = np.zeros((len(CIFAR10_POLICY), 2), dtype=np.int64)
    probabilities = np.zeros((len(CIFAR10_POLICY), 2))
    magnitudes = np.zeros((len(CIFAR10_POLICY), 2, 2))
    instances: list[tuple[str, float]] = []
    for row, sub_policy in enumerate(CIFAR10_POLICY):
        for place, (operation, probability, magnitude_bin) in enumerate(sub_policy):
            operations[row, place] = OPERATIONS.index(operation)
            probabilities[row, place] = probability
            value = magnitude(operation, magnitude_bin, height, width)
            signed = (value, value if operation in UNSIGNED_OPERATIONS else -value)
            if operation in GEOMETRIC_OPERATIONS:
                instances += [(operation, one) for one in signed]
                magnitudes[row, place] = (len(instances) - 2, len(instances) - 1)
            else:
                magnitudes[row, place] = signed
    return _Policy(operations, probabilities, magnitudes, tuple(instances))


@functools.lru_cache(maxsize=8)
def _geometric_maps(height: int, width: int, device: torch.device) -> Tensor:
    """Index maps of the policy's geometric instances, `(num_instances, H, W)` int64."""
    instances = _tabulate(height, width).instances
    matrices = np.concatenate([_instance_matrix(*instance, height, width) for instance in instances])
    return geometry.index_maps(matrices, height, width, device)


def _instance_matrix(operation: str, signed_magnitude: float, height: int, width: int) -> NDArray[np.float64]:
    """Matrix `(1, 6)` of one geometric operation; shears keep the corner (0, 0), the others the centre."""
    if operation == "Rotate":
        return geometry.rotation_matrices(np.array([signed_magnitude]), height, width)
    along_x = operation.endswith("X")
    if operation.startswith("Translate"):
        pixels = int(signed_magnitude)
        translate = np.array([[pixels, 0] if along_x else [0, pixels]])
        return geometry.affine_matrices(translate, np.ones(1), np.zeros((1, 2)), (width * 0.5, height * 0.5))
    degrees = math.degrees(math.atan(signed_magnitude))
    shear = np.array([[degrees, 0.0] if along_x else [0.0, degrees]])
    return geometry.affine_matrices(np.zeros((1, 2), dtype=np.int64), np.ones(1), shear, (0.0, 0.0))
