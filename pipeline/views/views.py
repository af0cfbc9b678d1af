"""The view: a pure function of (images, view recipe, key, view index, sample index).

Nothing else decides a view's pixels: not the batch, its order, the process, the device, or earlier draws. Each
operation draws for all samples at once under its own name (`pipeline.views.draws`), so that adding an operation to a
recipe leaves the others' draws alone. Operations work on whole uint8 batches, with results equal bit for bit to
torchvision's on PIL images.

The mixing partner of each sample is an independent uniform draw over all samples. Before all samples of a view are
used, `Views.prepare` augments every image once, and batches only mix; this takes the memory of one view. (With partners
from a permutation, b samples would need b + 1 images, but every student would train in that order whatever its seed,
and a sample would depend on its neighbours.)

Images that do not fit the device stay on the host (`pipeline.data.streaming.HostImages`). The images of each batch and
their partners are gathered there, moved, and augmented on the device, with the same pixels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Generator, Sequence
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
from pipeline.views.parcel import Parcel, send

# Samples of 32 x 32 pixels made at once; of larger ones fewer. On the CPU an operation's data should fit the cache; a
# GPU needs few, large launches.
CPU_CHUNK = 2048
GPU_CHUNK = 16384
CHUNK_PIXELS = 32 * 32
# Samples and partners of a batch go to a GPU with one parcel; what a whole view needs would pin much memory.
MAX_TOGETHER = 2 * GPU_CHUNK
# A larger view is not kept: its batches augment their images, and the partners' again.
MAX_PREPARED_BYTES = 2**31


@dataclass(frozen=True)
class ViewBatch:
    """Some samples of one view.

    Attributes:
        indices: `(B,)` int64 in [0, N), the samples.
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
    """How the samples of a view mix; all but `rows` is on the device of the views.

    Attributes:
        rows: `(N,)` int64, the partners, on the host.
        partners: `(N,)` int64, the partners.
        amounts: The last argument of `mixing.cutmix` or `mixing.mixup`: boxes or shares.
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
        images: `(N, 3, H, W)` uint8 before mixing, if prepared.
    """

    index: int
    uniform: augmentation.Draws
    mix: _Mix | None
    images: Tensor | None = None


@dataclass(frozen=True)
class _Raw:
    """Images before augmentation.

    Attributes:
        rows: `(B,)` int64, their indices, on the host.
        images: `(B, H, W, 3)` uint8, read on the host; None if they are on the device.
    """

    rows: NDArray[np.int64]
    images: Tensor | None


class Views:
    """All views of one set of images.

    Args:
        images: `(N, 3, H, W)` uint8 on the device, or on the host to be streamed to it.
        labels: `(N,)` int64.
        recipe: The operations; they run in the order of its fields.
        key: Whose draws: "" for the labelled views that students train on, "teacher" for a teacher's training.

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
        """Augment all images of a view, up to mixing, and drop those of any other view.

        Its batches then only mix; they are the same. Nothing is done for a view of more than MAX_PREPARED_BYTES or with
        images on the host, for which the device has no room.

        Args:
            view: View index, at least 0.
        """
        opened = self._open(view)
        if opened.images is None and isinstance(self.images, Tensor) and self.images.nbytes <= MAX_PREPARED_BYTES:
            [opened.images] = self._render(opened, [_Raw(np.arange(self.num_samples), None)])

    def batch(self, view: int, indices: Tensor | NDArray[np.int64]) -> ViewBatch:
        """Make some samples of one view.

        Args:
            view: View index, at least 0. It may exceed those of the labelled views.
            indices: `(B,)` int64 in [0, N), in any order.

        Returns:
            The samples in the order of `indices`, on the device.
        """
        opened = self._open(view)
        samples = self._checked(torch.as_tensor(indices))
        return self._make(opened, self._placed(samples), self._read(opened, samples))

    def batches(self, view: int, parts: Sequence[Tensor]) -> Generator[ViewBatch, None, None]:
        """Make batches that together use all or nearly all samples of a view.

        If images are on the host, a thread reads the next batch while the caller works on the last; the thread ends
        with the iterator. With a prepared view nothing waits for a GPU.

        Args:
            view: See `batch`.
            parts: The indices of each batch, `(B,)` int64 in [0, N); best on the CPU.

        Yields:
            The batches in order, each as `batch` makes it.
        """
        if not parts:
            return
        self.prepare(view)
        opened = self._open(view)
        # In one move, because each move can wait for the device.
        indices, sizes = self._checked(torch.cat(list(parts))), [len(part) for part in parts]
        on_device = torch.split(self._placed(indices), sizes)
        if isinstance(self.images, Tensor):
            for part, samples in zip(parts, on_device, strict=True):
                yield self._make(opened, samples, self._read(opened, part))
            return
        on_host = torch.split(indices.cpu(), sizes)
        with contextlib.closing(prefetch(on_host, lambda part: self._read(opened, part))) as read:
            for samples, raw in zip(on_device, read, strict=True):
                yield self._make(opened, samples, raw)

    def drawn(self, view: int) -> dict[str, NDArray[Any]]:
        """Return what was drawn for the N samples of a view, by name.

        These are the `parameters` of each augmentation; with mixing also `partner` `(N,)` int64 and `lambda` `(N,)`
        float32, the share of the first image.
        """
        opened = self._open(view)
        height, width = self.images.shape[-2:]
        drawn = augmentation.parameters(opened.uniform, self.recipe, height, width)
        if opened.mix is not None:
            drawn |= {"partner": opened.mix.rows, "lambda": opened.mix.lam.cpu().numpy()}
        return drawn

    def digest(self, view: int, indices: NDArray[np.int64] | None = None) -> bytes:
        """Hash the pixels of a view, or of a few of its samples, to detect changes cheaply.

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
        """Check indices on the CPU; checking those on a GPU would wait for it."""
        if samples.device.type == "cpu":
            assert ((samples >= 0) & (samples < self.num_samples)).all(), "unknown sample"
        return samples

    def _placed(self, samples: Tensor) -> Tensor:
        """Return indices on the device."""
        return send(self.device, samples.numpy())[0] if samples.device.type == "cpu" else samples.to(self.device)

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
        return _Mix(partners, *send(self.device, partners, amounts, lam))

    def _read(self, opened: _View, samples: Tensor) -> list[_Raw]:
        """Read the images of `(B,)` samples, and with mixing their partners'; safe in any thread."""
        if opened.images is not None:
            return []
        first = samples.cpu().numpy()
        read = self.images.read if isinstance(self.images, HostImages) else None
        row_sets = [first] if opened.mix is None else [first, opened.mix.rows[first]]
        return [_Raw(rows, read and read(rows)) for rows in row_sets]

    def _make(self, opened: _View, samples: Tensor, read: Sequence[_Raw]) -> ViewBatch:
        """Make a batch of `(B,)` samples on the device, from what `_read` returned for them."""
        labels, mix = self.labels.index_select(0, samples), opened.mix
        row_sets = [samples] if mix is None else [samples, mix.partners.index_select(0, samples)]
        if opened.images is not None:
            unmixed = [opened.images.index_select(0, rows) for rows in row_sets]
        else:
            unmixed = self._render(opened, read)
        if mix is None:
            return ViewBatch(samples, unmixed[0], labels, labels, torch.ones(len(samples), device=self.device))
        partners, mix_images = row_sets[1], mixing.MIXINGS[self.recipe.mixing].mix
        return ViewBatch(
            samples,
            mix_images(unmixed[0], unmixed[1], mix.amounts.index_select(0, samples)),
            labels,
            self.labels.index_select(0, partners),
            mix.lam.index_select(0, samples),
        )

    def _render(self, opened: _View, raws: Sequence[_Raw]) -> list[Tensor]:
        """Augment samples of a view, up to mixing, `(B, 3, H, W)` uint8 for each of `raws`."""
        shape, device = self.images.shape[1:], self.device
        made = [torch.empty((len(raw.rows), *shape), dtype=torch.uint8, device=device) for raw in raws]
        num_pixels = shape[1] * shape[2]
        chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        size = max(1, chunk * CHUNK_PIXELS // max(num_pixels, CHUNK_PIXELS))
        parts = [
            functools.partial(self._plan, opened, raw, slice(start, start + size), target)
            for raw, target in zip(raws, made, strict=True)
            for start in range(0, len(raw.rows), size)
        ]

        def render(together: Sequence[Callable[[Parcel], Callable[[], None]]]) -> None:
            parcel = Parcel(device)
            planned = [plan(parcel) for plan in together]
            parcel.send()
            for work in planned:
                work()

        if device.type == "cpu":
            for_each([[part] for part in parts], render)
        elif sum(len(raw.rows) for raw in raws) <= MAX_TOGETHER:
            render(parts)
        else:
            for part in parts:
                render([part])
        return made

    def _plan(self, opened: _View, raw: _Raw, part: slice, made: Tensor, parcel: Parcel) -> Callable[[], None]:
        """Prepare to augment a part of some samples into the same part of `made`."""
        rows = raw.rows[part]
        uniform = {name: values[rows] for name, values in opened.uniform.items()}
        height, width = self.images.shape[-2:]
        augment = augmentation.plan(uniform, self.recipe, height, width, parcel)
        resident = self.images if isinstance(self.images, Tensor) else None
        chosen = parcel.add(rows) if resident is not None else None

        def work() -> None:
            if resident is not None and chosen is not None:
                images = resident.index_select(0, chosen())
            else:
                assert raw.images is not None and isinstance(self.images, HostImages)
                images = self.images.place(raw.images[part])
            made[part] = augment(images)

        return work


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
    """Return `(3, 1, 1)` float32; cached, because copying it to a GPU in every batch would wait for the GPU."""
    return torch.tensor(values, device=device).reshape(3, 1, 1)
