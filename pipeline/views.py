"""The view: a pure function of (images, view recipe, key, view index, sample index).

Nothing else decides a view's pixels: not the batch, its order, the process, the device, or what was drawn
before. Each operation draws for all samples at once under its own name (`pipeline.draws`), so that adding one
to a recipe shifts no other, and works on whole uint8 batches with results equal bit for bit to torchvision's
on PIL images.

A mixing partner is an independent uniform draw over all samples, made for each sample. Were it the next position
of a permutation that belongs to the view, b samples could be made from b + 1 images, but students would have to
train in that order whatever their seed, and a sample alone could not be told from its neighbours. Instead a view
about to be used whole is made once ahead (`Views.prepare`), every image once, and each batch only mixes; the price
is the memory of one view.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import augmentation, draws, mixing
from pipeline.recipes import ViewRecipe
from pipeline.threads import for_each

# Samples made at once. On the CPU what an operation touches should fit the cache; a GPU wants few, large launches.
CPU_CHUNK = 2048
GPU_CHUNK = 16384
# A larger view is not kept: its batches make their images when asked, and partners a second time.
MAX_PREPARED_BYTES = 2**31


@dataclass(frozen=True)
class ViewBatch:
    """Some samples of one view.

    Attributes:
        images: `(B, 3, H, W)` uint8, mixed.
        labels: `(B,)` int64, y1: the labels of the first images.
        partner_labels: `(B,)` int64, y2: the labels of the partners; equal to `labels` without mixing.
        lam: `(B,)` float32 in [0, 1], lambda: the share of the first image; 1 without mixing.
    """

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: Tensor


@dataclass(frozen=True)
class _Mix:
    """How the samples of a view mix, on the device of the images.

    Attributes:
        partners: `(N,)` int64.
        amounts: What `mixing.cutmix` or `mixing.mixup` takes: boxes or shares.
        lam: `(N,)` float32.
    """

    partners: Tensor
    amounts: Tensor
    lam: Tensor


@dataclass
class _View:
    """A view that has been drawn.

    Attributes:
        index: View index.
        uniform: The draws of all samples.
        mix: None without mixing.
        images: `(N, 3, H, W)` uint8 without mixing, once prepared.
    """

    index: int
    uniform: augmentation.Draws
    mix: _Mix | None
    images: Tensor | None = None


class Views:
    """All views of one set of images.

    Args:
        images: `(N, 3, H, W)` uint8; its device is where views are made.
        labels: `(N,)` int64.
        recipe: The operations; they run in the order of its fields.
        key: Whose draws: "" for the labelled views that students train on, "teacher" for a teacher's
            training.

    Source: arXiv:2502.16762 §3.4.
    """

    def __init__(self, images: Tensor, labels: Tensor, recipe: ViewRecipe, *, key: str = "") -> None:
        assert images.dtype == torch.uint8, f"images are {images.dtype}, not uint8"
        assert images.ndim == 4 and images.shape[1] == 3, f"images are {tuple(images.shape)}, not (N, 3, H, W)"
        assert labels.shape == images.shape[:1], f"{len(images)} images have {tuple(labels.shape)} labels"
        self.images = images
        self.labels = labels.to(images.device)
        self.recipe = recipe
        self.key = key
        self._opened: _View | None = None

    def __len__(self) -> int:
        """Return V, the number of views that the recipe labels."""
        return self.recipe.count

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.images)

    def prepare(self, view: int) -> None:
        """Make all images of a view ahead, up to mixing; those of another view are dropped.

        Batches of that view then only mix, and are the same. A view of more than MAX_PREPARED_BYTES is not kept.

        Args:
            view: View index, at least 0.
        """
        opened = self._open(view)
        if opened.images is None and self.images.nbytes <= MAX_PREPARED_BYTES:
            opened.images = self._render(opened, np.arange(self.num_samples))

    def batch(self, view: int, indices: Tensor | NDArray[np.int64]) -> ViewBatch:
        """Make some samples of one view.

        Nothing waits for a GPU where the view is prepared and `indices` are there.

        Args:
            view: View index, at least 0; there is a view at every index, also beyond the labelled ones.
            indices: `(B,)` int64 in [0, N), in any order.

        Returns:
            The samples in the order of `indices`, on the device of the images.
        """
        opened = self._open(view)
        samples = torch.as_tensor(indices)
        if samples.device.type == "cpu":
            assert ((samples >= 0) & (samples < self.num_samples)).all(), "unknown sample"
        samples = samples.to(self.images.device)
        images, labels = self._unmixed(opened, samples), self.labels.index_select(0, samples)
        if opened.mix is None:
            return ViewBatch(images, labels, labels, torch.ones(len(samples), device=images.device))
        partners = opened.mix.partners.index_select(0, samples)
        mix = mixing.cutmix if self.recipe.mixing == "cutmix" else mixing.mixup
        return ViewBatch(
            mix(images, self._unmixed(opened, partners), opened.mix.amounts.index_select(0, samples)),
            labels,
            self.labels.index_select(0, partners),
            opened.mix.lam.index_select(0, samples),
        )

    def digest(self, view: int) -> bytes:
        """Hash the pixels of a whole view.

        Args:
            view: View index, at least 0.

        Returns:
            32 bytes: SHA-256 of the mixed images `(N, 3, H, W)`, uint8, in C order.
        """
        self.prepare(view)
        return self._hash(view, np.arange(self.num_samples))

    def canary_digest(self, view: int, indices: NDArray[np.int64]) -> str:
        """Hash the pixels of a few samples, to notice cheaply that a view is no longer what it was.

        Args:
            view: View index, at least 0.
            indices: `(B,)` int64 in [0, N).

        Returns:
            64 hexadecimal digits: SHA-256 of the mixed images `(B, 3, H, W)`, uint8, in C order.
        """
        return self._hash(view, indices).hex()

    def _hash(self, view: int, indices: NDArray[np.int64]) -> bytes:
        """SHA-256 of some samples' pixels, rendered a batch at a time."""
        sha256 = hashlib.sha256()
        for start in range(0, len(indices), CPU_CHUNK):
            images = self.batch(view, indices[start : start + CPU_CHUNK]).images
            sha256.update(images.cpu().contiguous().numpy().data)
        return sha256.digest()

    def _open(self, view: int) -> _View:
        """Draw a view for all samples, unless it is the one that was drawn last."""
        assert view >= 0, f"view {view} is negative"
        if self._opened is None or self._opened.index != view:
            uniform = {
                name: draws.uniforms(self.recipe.seed, self.key, view, name, self.num_samples, number)
                for name, number in augmentation.num_draws(self.recipe).items()
            }
            mix = None if self.recipe.mixing == "none" else self._draw_mix(uniform)
            self._opened = _View(view, uniform, mix)
        return self._opened

    def _draw_mix(self, uniform: augmentation.Draws) -> _Mix:
        """Draw partners and amounts for all samples."""
        partners = draws.integers(uniform["partner"][:, 0], self.num_samples)
        lambda_uniform = uniform["lambda"][:, 0]
        if self.recipe.mixing == "cutmix":
            height, width = self.images.shape[-2:]
            boxes = mixing.cutmix_boxes(lambda_uniform, uniform["box"], height, width)
            drawn: tuple[NDArray[Any], ...] = partners, boxes, mixing.cutmix_lambda(boxes, height, width)
        else:
            shares = mixing.mixup_shares(lambda_uniform)
            drawn = partners, shares, mixing.mixup_lambda(shares)
        return _Mix(*(torch.from_numpy(values).to(self.images.device) for values in drawn))

    def _unmixed(self, opened: _View, samples: Tensor) -> Tensor:
        """Samples of a view without mixing, `(B, 3, H, W)` uint8: prepared ones, or made now."""
        if opened.images is not None:
            return opened.images.index_select(0, samples)
        return self._render(opened, samples.cpu().numpy())

    def _render(self, opened: _View, samples: NDArray[np.int64]) -> Tensor:
        """Make samples of a view without mixing, `(B, 3, H, W)` uint8."""
        device = self.images.device
        made = torch.empty((len(samples), *self.images.shape[1:]), dtype=torch.uint8, device=device)

        def render(part: slice) -> None:
            own = {name: values[samples[part]] for name, values in opened.uniform.items()}
            images = self.images.index_select(0, torch.from_numpy(samples[part]).to(device))
            made[part] = augmentation.augment(images, own, self.recipe)

        size = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        parts = [slice(start, start + size) for start in range(0, len(samples), size)]
        if device.type == "cpu":
            for_each(parts, render)
        else:
            for part in parts:
                render(part)
        return made


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn pixels into a network's input, (x / 255 - mean) / std.

    Args:
        images: `(B, 3, H, W)` uint8.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1], above 0.

    Returns:
        `(B, 3, H, W)` float32.
    """
    shift, spread = _per_channel(tuple(mean), images.device), _per_channel(tuple(std), images.device)
    return images.float().div_(255).sub_(shift).div_(spread)


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Shape `(3, 1, 1)` float32; kept, because a copy to a GPU would wait for it in every batch."""
    return torch.tensor(values, device=device).reshape(3, 1, 1)
