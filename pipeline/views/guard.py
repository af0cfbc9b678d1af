"""Whether views are made image by image, in C++: where that can be compiled, and gives the pixels of whole batches."""

from __future__ import annotations

import functools

import numpy as np
import torch

from pipeline.views import geometry, operations, per_image
from pipeline.views.policies import POLICIES, TimmRandAugment

CHECKED = (*POLICIES.values(), TimmRandAugment(9))
"""Together they draw every operation."""
NUM_CHECKED = 96
HEIGHT, WIDTH = 19, 37  # no whole number of vectors


@functools.cache
def why_not() -> str | None:
    """Say in a phrase why images are not worked on one by one; None if they are.

    The first call of a process compiles the library, if that has not been done here, and compares a few images.
    """
    return per_image.why_not() or _difference()


def _difference() -> str | None:
    """Say in a phrase what the library does otherwise than the operations on whole batches."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (NUM_CHECKED, 3, HEIGHT, WIDTH))
    levels[::3] = 90 + levels[::3] // 5  # little contrast
    images = torch.from_numpy(levels.astype(np.uint8))
    for policy in CHECKED:
        choice = policy.choose(rng.random((NUM_CHECKED, policy.num_draws)), HEIGHT, WIDTH)
        if not torch.equal(per_image.apply_operations(images.clone(), choice), operations.apply(images, choice)):
            return f"what was compiled gives other pixels for {policy.title}"
    offsets, flipped = rng.integers(-9, 10, (NUM_CHECKED, 2)), rng.random(NUM_CHECKED) < 0.5
    maps = geometry.crop_flip_maps(torch.from_numpy(offsets), torch.from_numpy(flipped), HEIGHT, WIDTH)
    if not torch.equal(per_image.crop_flip(images.clone(), offsets, flipped), geometry.gather(images, maps)):
        return "what was compiled gives other pixels for crop and flip"
    last, first = images.permute(0, 2, 3, 1).contiguous(), torch.empty_like(images)
    per_image.channels_first(last, first)
    return None if torch.equal(first, images) else "what was compiled mixes channels up"
