"""The view: a pure function of (images, view recipe, key, view index, sample index).

Nothing else decides a view's pixels: not the batch, its order, the process, the device, or what was drawn
before. Each operation draws for all samples at once under its own name (`pipeline.views.draws`), so that adding one
to a recipe shifts no other, and works on whole uint8 batches with results equal bit for bit to torchvision's
on PIL images.

A mixing partner is an independent uniform draw over all samples, made for each sample. Were it the next position
of a permutation that belongs to the view, b samples could be made from b + 1 images, but students would have to
train in that order whatever their seed, and a sample alone could not be told from its neighbours. Instead a view
about to be used whole is made once ahead (`Views.prepare`), every image once, and each batch only mixes; the price
is the memory of one view.

Images that do not fit the device stay on the host (`pipeline.data.streaming.HostImages`): each batch's own and its
partners' are gathered there, moved, and made into the view on the device, with the same pixels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.recipes import ViewRecipe
from pipeline.data.streaming import HostImages
from pipeline.system.threads import for_each, prefetch
from pipeline.views import augment as augmentation
from pipeline.views import draws, mixing

# Samples made at once, of 32 x 32 pixels; fewer of larger ones. On the CPU what an operation touches should fit the
# cache; a GPU wants few, large launches.
CPU_CHUNK = 2048
GPU_CHUNK = 16384
CHUNK_PIXELS = 32 * 32
# A larger view is not kept: its batches make their images when asked, and partners a second time.
MAX_PREPARED_BYTES = 2**31


@dataclass(frozen=True)
class ViewBatch:
    """Some samples of one view.

    Attributes:
        indices: `(B,)` int64, which.
        images: `(B, 3, H, W)` uint8, mixed.
        labels: `(B,)` int64, y1: the labels of the first images.
        partner_labels: `(B,)` int64, y2: the labels of the partners; equal to `labels` without mixing.
        lam: `(B,)` float32 in [0, 1], lambda: the share of the first image; 1 without mixing.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: Tensor


@dataclass(frozen=True)
class _Mix:
    """How the samples of a view mix, on the device of the views.

    Attributes:
        rows: `(N,)` int64, the partners, on the host.
        partners: `(N,)` int64, the same on the device.
        amounts: What `mixing.cutmix` or `mixing.mixup` takes: boxes or shares.
        lam: `(N,)` float32.
    """

    rows: NDArray[np.int64]
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


@dataclass(frozen=True)
class _Raw:
    """Images of which a view is to be made.

    Attributes:
        rows: `(B,)` int64, which; on the host.
        images: `(B, H, W, 3)` uint8, read on the host; None where they are on the device.
    """

    rows: NDArray[np.int64]
    images: Tensor | None


class Views:
    """All views of one set of images.

    Args:
        images: `(N, 3, H, W)` uint8, on the device where views are made or on the host for it.
        labels: `(N,)` int64.
        recipe: The operations; they run in the order of its fields.
        key: Whose draws: "" for the labelled views that students train on, "teacher" for a teacher's
            training.

    Source: arXiv:2502.16762 §3.4.
    """

    def __init__(self, images: Tensor | HostImages, labels: Tensor, recipe: ViewRecipe, *, key: str = "") -> None:
        if isinstance(images, Tensor):
            assert images.dtype == torch.uint8, f"images are {images.dtype}, not uint8"
        shape = tuple(images.shape)
        assert len(shape) == 4 and shape[1] == 3, f"images are {shape}, not (N, 3, H, W)"
        assert labels.shape == shape[:1], f"{len(images)} images have {tuple(labels.shape)} labels"
        self.images = images
        self.device = images.device
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

        Batches of that view then only mix, and are the same. A view of more than MAX_PREPARED_BYTES is not kept, nor
        one of images on the host, for which the device had no room.

        Args:
            view: View index, at least 0.
        """
        opened = self._open(view)
        if opened.images is None and isinstance(self.images, Tensor) and self.images.nbytes <= MAX_PREPARED_BYTES:
            opened.images = self._render(opened, _Raw(np.arange(self.num_samples), None))

    def batch(self, view: int, indices: Tensor | NDArray[np.int64]) -> ViewBatch:
        """Make some samples of one view.

        Args:
            view: View index, at least 0; there is a view at every index, also beyond the labelled ones.
            indices: `(B,)` int64 in [0, N), in any order.

        Returns:
            The samples in the order of `indices`, on the device.
        """
        opened = self._open(view)
        samples = self._checked(torch.as_tensor(indices))
        return self._make(opened, samples.to(self.device), self._read(opened, samples))

    def batches(self, view: int, parts: Sequence[Tensor]) -> Generator[ViewBatch, None, None]:
        """Make batches of a view that is used whole, or nearly.

        Where images are on the host, those of the next batch are read while the caller works on the last; the thread
        that does ends with the iterator. Nothing waits for a GPU where the view is prepared.

        Args:
            view: As of `batch`.
            parts: The indices of each batch, `(B,)` int64 in [0, N); best on the CPU.

        Yields:
            The batches in order, each as `batch` makes it.
        """
        if not parts:
            return
        self.prepare(view)
        opened = self._open(view)
        # Moved at once, because each move can wait for the device.
        every, sizes = self._checked(torch.cat(list(parts))), [len(part) for part in parts]
        on_device = torch.split(every.to(self.device), sizes)
        if isinstance(self.images, Tensor):
            for part, samples in zip(parts, on_device, strict=True):
                yield self._make(opened, samples, self._read(opened, part))
            return
        on_host = torch.split(every.cpu(), sizes)
        with contextlib.closing(prefetch(on_host, lambda part: self._read(opened, part))) as read:
            for samples, raw in zip(on_device, read, strict=True):
                yield self._make(opened, samples, raw)

    def drawn(self, view: int) -> dict[str, NDArray[Any]]:
        """Tell what was drawn for each sample of a view.

        Args:
            view: View index, at least 0.

        Returns:
            What the `parameters` of each augmentation are, for all N samples; with mixing also `partner` `(N,)` int64
            and `lambda` `(N,)` float32, the share of the first image.
        """
        opened = self._open(view)
        height, width = self.images.shape[-2:]
        drawn = augmentation.parameters(opened.uniform, self.recipe, height, width)
        if opened.mix is not None:
            drawn |= {"partner": opened.mix.rows, "lambda": opened.mix.lam.cpu().numpy()}
        return drawn

    def digest(self, view: int, indices: NDArray[np.int64] | None = None) -> bytes:
        """Hash the pixels of a view, or of a few of its samples, by which a change is noticed cheaply.

        Args:
            view: View index, at least 0.
            indices: `(B,)` int64 in [0, N); None for all.

        Returns:
            32 bytes: SHA-256 of the mixed images `(B, 3, H, W)`, uint8, in C order.
        """
        if indices is None:
            self.prepare(view)
            indices = np.arange(self.num_samples)
        sha256 = hashlib.sha256()
        for start in range(0, len(indices), CPU_CHUNK):
            images = self.batch(view, indices[start : start + CPU_CHUNK]).images
            sha256.update(images.cpu().contiguous().numpy().data)
        return sha256.digest()

    def _checked(self, samples: Tensor) -> Tensor:
        """Return indices that are known to exist; a GPU is not waited for to ask."""
        if samples.device.type == "cpu":
            assert ((samples >= 0) & (samples < self.num_samples)).all(), "unknown sample"
        return samples

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
        amounts, lam = mixing.MIXINGS[self.recipe.mixing].draw(uniform, *self.images.shape[-2:])
        return _Mix(partners, *(torch.from_numpy(values).to(self.device) for values in (partners, amounts, lam)))

    def _read(self, opened: _View, samples: Tensor) -> list[_Raw]:
        """Read what a batch is made of, `(B,)` samples' own images and their partners'; any thread may."""
        if opened.images is not None:
            return []
        first = samples.cpu().numpy()
        read = self.images.read if isinstance(self.images, HostImages) else None
        wanted = [first] if opened.mix is None else [first, opened.mix.rows[first]]
        return [_Raw(rows, read and read(rows)) for rows in wanted]

    def _make(self, opened: _View, samples: Tensor, read: Sequence[_Raw]) -> ViewBatch:
        """Make a batch of `(B,)` samples, on the device, from what was read of them."""
        labels, mix = self.labels.index_select(0, samples), opened.mix
        images = self._unmixed(opened, samples, read[:1])
        if mix is None:
            return ViewBatch(samples, images, labels, labels, torch.ones(len(samples), device=self.device))
        partners = mix.partners.index_select(0, samples)
        mix_images = mixing.MIXINGS[self.recipe.mixing].mix
        return ViewBatch(
            samples,
            mix_images(images, self._unmixed(opened, partners, read[1:]), mix.amounts.index_select(0, samples)),
            labels,
            self.labels.index_select(0, partners),
            mix.lam.index_select(0, samples),
        )

    def _unmixed(self, opened: _View, samples: Tensor, read: Sequence[_Raw]) -> Tensor:
        """Samples of a view without mixing, `(B, 3, H, W)` uint8: prepared ones, or made now."""
        if opened.images is not None:
            return opened.images.index_select(0, samples)
        return self._render(opened, read[0])

    def _render(self, opened: _View, raw: _Raw) -> Tensor:
        """Make samples of a view without mixing, `(B, 3, H, W)` uint8."""
        rows, device = raw.rows, self.device
        made = torch.empty((len(rows), *self.images.shape[1:]), dtype=torch.uint8, device=device)

        def render(part: slice) -> None:
            uniform = {name: values[rows[part]] for name, values in opened.uniform.items()}
            if isinstance(self.images, Tensor):
                images = self.images.index_select(0, torch.from_numpy(rows[part]).to(device))
            else:
                assert raw.images is not None
                images = self.images.place(raw.images[part])
            made[part] = augmentation.augment(images, uniform, self.recipe)

        num_pixels = self.images.shape[2] * self.images.shape[3]
        chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        size = max(1, chunk * CHUNK_PIXELS // max(num_pixels, CHUNK_PIXELS))
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
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
