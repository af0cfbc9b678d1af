"""The view: a pure function of (images, view recipe, key, view index, sample index).

Nothing else decides a view's pixels: not the batch, its order, the process, the device, or earlier draws. Each
operation draws for all samples at once under its own name (`pipeline.views.draws`), so that adding an operation to a
recipe leaves the others' draws alone. Operations work on whole uint8 batches, with results equal bit for bit to
torchvision's on PIL images.

The mixing partner of each sample is an independent uniform draw over all samples, or `paired`: the samples of each view
form random pairs, which suits images that cost much to read. Before all samples of a view are used, `Views.prepare`
augments every image once, and batches only mix; this takes the memory of one view. Other batches augment their images
once, and those partners that are not among them: none in a batch of whole pairs. (With partners from one permutation,
b samples would need b + 1 images, but every student would train in that order whatever its seed, and a sample would
depend on its neighbours.)

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
from pipeline.views import draws, guard, mixing, per_image
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
        rows: `(N,)` int64, the partners, on the host; a sample that is not mixed is its own.
        paired: `(N,)` int64, the other sample of each pair, on the host; None where there are no pairs.
        partners: `(N,)` int64, the partners.
        amounts: The last argument of the mixing's `mix`: boxes, shares, or both.
        lam: `(N,)` float32.
    """

    rows: NDArray[np.int64]
    paired: NDArray[np.int64] | None
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
    """Images of a batch before augmentation, those that have been read once.

    Attributes:
        rows: `(U,)` int64, their indices, on the host: the samples of the batch, then partners that are not among them.
        partners: `(B,)` int64, for each sample where in `rows` its partner is; None without mixing.
        images: `(U, H, W, 3)` uint8, read on the host; None if they are on the device.
    """

    rows: NDArray[np.int64]
    partners: NDArray[np.int64] | None = None
    images: Tensor | None = None


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
            opened.images = self._render(opened, _Raw(np.arange(self.num_samples)))

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
        float32, the share of the first image. Where samples mix in different ways, or not at all, `mixing` `(N,)` int64
        says how: indices into mixing.KINDS.
        """
        opened = self._open(view)
        height, width = self.images.shape[-2:]
        drawn = augmentation.parameters(opened.uniform, self.recipe, height, width)
        if opened.mix is not None:
            drawn |= {"partner": opened.mix.rows, "lambda": opened.mix.lam.cpu().numpy()}
            if {"mixing", "switch"} & opened.uniform.keys():
                drawn["mixing"] = mixing.kinds(opened.uniform, self.recipe)
        return drawn

    def pairs(self, view: int) -> NDArray[np.int64] | None:
        """Return the other sample of each pair of a view, `(N,)` int64, or None where the recipe has no pairs.

        A batch of whole pairs reads and augments each image once: see mixing.by_pairs.
        """
        mix = self._open(view).mix
        return None if mix is None else mix.paired

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
            self._opened = None  # what was drawn before is freed first
            height, width = self.images.shape[-2:]
            sizes = self.images.sizes if isinstance(self.images, HostImages) else None

            def uniforms(name: str, number: int) -> NDArray[np.float64]:
                return draws.uniforms(self.recipe.seed, self.key, view, name, self.num_samples, number)

            drawn = augmentation.draw(uniforms, self.recipe, height, width, sizes)
            drawn |= {name: uniforms(name, number) for name, number in mixing.num_draws(self.recipe).items()}
            mix = None if self.recipe.mixing == "none" else self._draw_mix(drawn)
            self._opened = _View(view, drawn, mix)
        return self._opened

    def _draw_mix(self, uniform: augmentation.Draws) -> _Mix:
        """Draw partners and amounts for all samples."""
        partners = mixing.partners(uniform, self.recipe)
        amounts, lam = mixing.draw(uniform, self.recipe, *self.images.shape[-2:])
        rows = np.where(mixing.kinds(uniform, self.recipe) > 0, partners, np.arange(self.num_samples))
        paired = partners if self.recipe.partner == "paired" else None
        return _Mix(rows, paired, *send(self.device, rows, amounts, lam))

    def _read(self, opened: _View, samples: Tensor) -> _Raw | None:
        """Read the images of `(B,)` samples, and with mixing their partners'; safe in any thread."""
        if opened.images is not None:
            return None
        rows, partners = samples.cpu().numpy(), None
        if opened.mix is not None:
            rows, partners = _together(rows, opened.mix.rows[rows])
        if isinstance(self.images, Tensor):
            return _Raw(rows, partners)
        boxes = opened.uniform.get("resized_crop")
        return _Raw(rows, partners, self.images.read(rows, None if boxes is None else boxes[rows]))

    def _make(self, opened: _View, samples: Tensor, raw: _Raw | None) -> ViewBatch:
        """Make a batch of `(B,)` samples on the device, from what `_read` returned for them."""
        labels, mix = self.labels.index_select(0, samples), opened.mix
        partners = samples if mix is None else mix.partners.index_select(0, samples)
        if raw is None:
            assert opened.images is not None
            made = opened.images
            first, places = made.index_select(0, samples), partners
        else:
            made = self._render(opened, raw)
            first = made[: len(samples)]
            places = samples if raw.partners is None else self._placed(torch.from_numpy(raw.partners))
        if mix is None:
            return ViewBatch(samples, first, labels, labels, torch.ones(len(samples), device=self.device))
        mix_images = mixing.MIXINGS[self.recipe.mixing].mix
        return ViewBatch(
            samples,
            mix_images(first, made.index_select(0, places), mix.amounts.index_select(0, samples)),
            labels,
            self.labels.index_select(0, partners),
            mix.lam.index_select(0, samples),
        )

    def _render(self, opened: _View, raw: _Raw) -> Tensor:
        """Augment images of a view, up to mixing, `(U, 3, H, W)` uint8."""
        shape, device = self.images.shape[1:], self.device
        made = torch.empty((len(raw.rows), *shape), dtype=torch.uint8, device=device)
        num_pixels = shape[1] * shape[2]
        chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        size = max(1, chunk * CHUNK_PIXELS // max(num_pixels, CHUNK_PIXELS))
        if device.type == "cpu" and len(raw.rows) > size:  # as much for each thread
            num_rounds = -(-len(raw.rows) // (size * torch.get_num_threads()))
            size = -(-len(raw.rows) // (num_rounds * torch.get_num_threads()))
        parts = [
            functools.partial(self._plan, opened, raw, slice(start, start + size), made)
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
        elif len(raw.rows) <= MAX_TOGETHER:
            render(parts)
        else:
            for part in parts:
                render([part])
        return made

    def _plan(self, opened: _View, raw: _Raw, part: slice, made: Tensor, parcel: Parcel) -> Callable[[], None]:
        """Prepare to augment a part of some images into the same part of `made`."""
        rows = raw.rows[part]
        uniform = {name: values[rows] for name, values in opened.uniform.items()}
        height, width = self.images.shape[-2:]
        augment = augmentation.plan(uniform, self.recipe, height, width, parcel)
        resident = self.images if isinstance(self.images, Tensor) else None
        chosen = parcel.add(rows) if resident is not None else None

        def work() -> None:
            images = target = made[part]
            if resident is not None and chosen is not None:
                torch.index_select(resident, 0, chosen(), out=target)
            else:
                assert raw.images is not None and isinstance(self.images, HostImages)
                if parcel.device.type == "cpu" and guard.why_not() is None:
                    per_image.channels_first(raw.images[part], target)
                else:
                    images = self.images.place(raw.images[part])
            augmented = augment(images)
            if augmented is not target:
                target.copy_(augmented)

        return work


def _together(rows: NDArray[np.int64], partners: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the samples of a batch, then those of their partners that are not among them, and where the partners are.

    Args:
        rows: `(B,)`, the samples.
        partners: `(B,)`, their partners.

    Returns:
        `(U,)` and `(B,)`: the second are places in the first.
    """
    order = np.argsort(rows, kind="stable")
    found = np.searchsorted(rows, partners, sorter=order)
    places = order[np.minimum(found, len(rows) - 1)]
    is_missing = rows[places] != partners
    missing, where = np.unique(partners[is_missing], return_inverse=True)
    places[is_missing] = len(rows) + where
    return np.concatenate([rows, missing]), places


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
