"""Synthetic images with CIFAR-100's shape and statistics, so that a benchmark needs no download."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NUM_CLASSES = 100
SIZE = 32
# Of CIFAR-100's training images, which the synthetic ones resemble.
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)
NUM_DISTINCT = 2000


def images_and_labels(num_images: int, *, size: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make smooth coloured noise and random labels, the same on every run.

    Natural images have most of their contrast in coarse structures and in all channels alike. So noise of 2, 4, 8, ...
    cells a side is stretched to the whole image and added up, each scale at half the amplitude of the one before,
    three quarters of it shared by the channels. Levels then have CIFAR-100's mean and standard deviation and are
    clipped, which gives the black and white areas that histogram operations meet in photographs. Beyond NUM_DISTINCT
    images they repeat: every one still has memory of its own, and no operation here knows one image from another.

    Args:
        num_images: N.
        size: Side, pixels.
        seed: Of the noise and the labels.

    Returns:
        `(N, 3, size, size)` uint8 and `(N,)` int64 in [0, NUM_CLASSES), on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    images = _images(min(num_images, NUM_DISTINCT), size, generator)
    repeats = -(-num_images // len(images))
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    return images.repeat(repeats, 1, 1, 1)[:num_images].contiguous(), labels


def _images(num_images: int, size: int, generator: torch.Generator) -> Tensor:
    total = torch.zeros(num_images, 3, size, size)
    cells, amplitude = 2, 1.0
    while cells <= size:
        shared = torch.randn(num_images, 1, cells, cells, generator=generator)
        independent = torch.randn(num_images, 3, cells, cells, generator=generator)
        noise = 0.75**0.5 * shared + 0.25**0.5 * independent
        total += amplitude * functional.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False)
        cells, amplitude = 2 * cells, amplitude / 2
    total = (total - total.mean(dim=(0, 2, 3), keepdim=True)) / total.std(dim=(0, 2, 3), keepdim=True)
    levels = 255 * (total * torch.tensor(STD).reshape(3, 1, 1) + torch.tensor(MEAN).reshape(3, 1, 1))
    return levels.round().clamp(0, 255).to(torch.uint8)
