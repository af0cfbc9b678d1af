"""Images that break image operations, and the bridge to operations on single PIL images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.views import guard


def sample_images(height: int, width: int, num_noise: int = 4, seed: int = 0) -> Tensor:
    """Noise of several ranges and degenerate images, `(N, 3, H, W)` uint8."""
    rng = np.random.default_rng(seed)
    shape = (3, height, width)

    def constant(*channels: int) -> np.ndarray:
        return np.full(shape, np.array(channels).reshape(3, 1, 1))

    one_hot = constant(0, 0, 0)
    one_hot[:, height // 2, width // 3] = 255
    one_dark = constant(255, 255, 255)
    one_dark[1, 0, 0] = 254
    ramp = np.broadcast_to(np.linspace(0, 255, width).astype(int), shape)
    dim_ramp = np.broadcast_to(np.linspace(100, 140, height).astype(int)[:, None], shape)
    images = [
        constant(0, 0, 0),
        constant(255, 255, 255),
        constant(128, 128, 128),
        constant(1, 200, 77),
        one_hot,
        one_dark,
        rng.choice([0, 255], shape),
        rng.choice([3, 4], shape),
        rng.choice([17, 230], shape, p=[0.02, 0.98]),
        ramp,
        dim_ramp,
        np.stack([ramp[0], constant(9, 9, 9)[0], rng.integers(0, 256, shape[1:])]),
    ]
    images += [rng.integers(0, 256, shape) for _ in range(num_noise)]
    images += [rng.integers(low := int(rng.integers(0, 128)), low + 90, shape) for _ in range(num_noise)]
    images += [np.clip(rng.normal(128, 30, shape), 0, 255) for _ in range(num_noise)]
    return torch.from_numpy(np.stack(images).astype(np.uint8))


def to_pil(image: Tensor) -> Image.Image:
    """One `(3, H, W)` uint8 image as RGB."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def on_pil(operation: Callable[..., Image.Image], images: Tensor, *arguments: Sequence[Any]) -> Tensor:
    """Apply an operation on PIL images to each image, with that image's element of each argument."""
    results = [
        operation(to_pil(image), *image_arguments) for image, *image_arguments in zip(images, *arguments, strict=True)
    ]
    return torch.from_numpy(np.stack([np.asarray(result) for result in results])).permute(0, 3, 1, 2)


@contextmanager
def whole_batches() -> Iterator[None]:
    """Views are made as where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "why_not", lambda: "no compiler")
        yield
