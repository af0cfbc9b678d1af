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

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import autoaugment, draws, geometry, imageops, mixing
from pipeline.recipes import ViewRecipe

# Samples made at once. On the CPU what an operation touches should fit the cache; a GPU wants few, large launches.
CPU_CHUNK = 1024
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
        self._drawn: tuple[int, dict[str, NDArray[np.float64]]] = (-1, {})
        self._prepared: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Return V, the number of views that the recipe labels."""
        return self.recipe.count

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.images)

    def prepare(self, view: int) -> None:
        """Make all images of a view ahead, up to mixing; the former prepared view is dropped.

        Batches of that view are then two to three times cheaper, and the same. A view of more than
        MAX_PREPARED_BYTES is not kept.

        Args:
            view: View index, at least 0.
        """
        if self._prepared is not None and self._prepared[0] == view:
            return
        self._prepared = None
        if self.images.nbytes <= MAX_PREPARED_BYTES:
            self._prepared = view, self._render(np.arange(self.num_samples), self._draw(view))

    def batch(self, view: int, indices: Tensor | NDArray[np.int64]) -> ViewBatch:
        """Make some samples of one view.

        Args:
            view: View index, at least 0; there is a view at every index, also beyond the labelled ones.
            indices: `(B,)` int64 in [0, N), in any order.

        Returns:
            The samples in the order of `indices`, on the device of the images.
        """
        samples = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices, dtype=np.int64)
        assert samples.size == 0 or (samples.min() >= 0 and samples.max() < self.num_samples), "unknown sample"
        uniform = self._draw(view)
        labels = self._take(self.labels, samples)
        if self.recipe.mixing == "none":
            lam = torch.ones(len(samples), device=self.images.device)
            return ViewBatch(self._unmixed(view, samples, uniform), labels, labels, lam)
        partners = draws.integers(uniform["partner"][samples, 0], self.num_samples)
        both = self._unmixed(view, np.concatenate([samples, partners]), uniform)
        first, second = both[: len(samples)], both[len(samples) :]
        lambda_uniform = uniform["lambda"][samples, 0]
        if self.recipe.mixing == "cutmix":
            boxes = mixing.cutmix_boxes(lambda_uniform, uniform["box"][samples], *first.shape[-2:])
            images, lam = mixing.cutmix(first, second, boxes)
        else:
            images, lam = mixing.mixup(first, second, lambda_uniform)
        return ViewBatch(images, labels, self._take(self.labels, partners), lam)

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

    def _draw(self, view: int) -> dict[str, NDArray[np.float64]]:
        """Each operation's draws of a view for all samples, `(N, num_draws)`; the last view's are kept."""
        assert view >= 0, f"view {view} is negative"
        if self._drawn[0] != view:
            uniform = {
                operation: draws.uniforms(self.recipe.seed, self.key, view, operation, self.num_samples, num_draws)
                for operation, num_draws in _operations(self.recipe)
            }
            self._drawn = (view, uniform)
        return self._drawn[1]

    def _unmixed(self, view: int, samples: NDArray[np.int64], uniform: dict[str, NDArray[np.float64]]) -> Tensor:
        """Samples of a view without mixing, `(B, 3, H, W)` uint8: prepared ones, or made now."""
        if self._prepared is not None and self._prepared[0] == view:
            return self._take(self._prepared[1], samples)
        return self._render(samples, uniform)

    def _render(self, samples: NDArray[np.int64], uniform: dict[str, NDArray[np.float64]]) -> Tensor:
        """Make samples of a view without mixing, `(B, 3, H, W)` uint8."""
        made = torch.empty((len(samples), *self.images.shape[1:]), dtype=torch.uint8, device=self.images.device)
        size = CPU_CHUNK if made.device.type == "cpu" else GPU_CHUNK
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            own = {operation: values[chunk] for operation, values in uniform.items()}
            made[start : start + size] = _augment(self._take(self.images, chunk), own, self.recipe)
        return made

    def _take(self, values: Tensor, samples: NDArray[np.int64]) -> Tensor:
        """The rows of some samples, on the device of the images."""
        return values.index_select(0, torch.from_numpy(samples).to(values.device))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn pixels into a network's input, (x / 255 - mean) / std.

    Args:
        images: `(B, 3, H, W)` uint8.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1], above 0.

    Returns:
        `(B, 3, H, W)` float32.
    """
    shift = torch.tensor(mean, device=images.device).reshape(3, 1, 1)
    spread = torch.tensor(std, device=images.device).reshape(3, 1, 1)
    return images.float().div_(255).sub_(shift).div_(spread)


def _operations(recipe: ViewRecipe) -> Iterator[tuple[str, int]]:
    """The operations that a recipe uses: (name of the draws, draws per sample)."""
    draws_per_field = {
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
    for field in dataclasses.fields(recipe):
        if field.name in draws_per_field and getattr(recipe, field.name) not in (0, False, "none"):
            yield field.name, draws_per_field[field.name]
    if recipe.brightness and recipe.contrast:
        yield "jitter-order", 1
    if recipe.mixing != "none":
        yield "partner", 1
        yield "lambda", 1
    if recipe.mixing == "cutmix":
        yield "box", 2


def _augment(images: Tensor, own: dict[str, NDArray[np.float64]], recipe: ViewRecipe) -> Tensor:
    """Apply all operations but mixing, `(B, 3, H, W)` uint8 to the same; `own` are the draws of these samples."""
    height, width = images.shape[-2:]
    maps = _index_maps(own, recipe, height, width, images.device)
    jitters = recipe.brightness or recipe.contrast
    if maps is not None and (jitters or recipe.autoaugment == "none"):
        images, maps = geometry.gather(images, maps), None
    if jitters:
        images = _jitter(images, own, recipe)
    if recipe.autoaugment == "cifar10":
        images = autoaugment.apply(images, own["autoaugment"], maps)
    return images


def _index_maps(
    own: dict[str, NDArray[np.float64]], recipe: ViewRecipe, height: int, width: int, device: torch.device
) -> Tensor | None:
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


def _crop_flip_maps(
    own: dict[str, NDArray[np.float64]], padding: int, height: int, width: int, device: torch.device
) -> Tensor:
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


def _affine_maps(
    own: dict[str, NDArray[np.float64]], recipe: ViewRecipe, height: int, width: int, device: torch.device
) -> Tensor:
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


def _jitter(images: Tensor, own: dict[str, NDArray[np.float64]], recipe: ViewRecipe) -> Tensor:
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
