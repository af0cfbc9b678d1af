"""Colour operations on whole uint8 batches, equal bit for bit to Pillow's on each image.

Pillow computes in float32 in one place and in integers in another, and truncates rather than rounds. Each function
names the one it reproduces. Only elementwise arithmetic, integer sums and tables are used, so that every device gives
the same.

Convention: `images` and all results are `(B, 3, H, W)` uint8. `factors` are `(B,)`, at least 0: 0 gives the degenerate
image, 1 the images, above 1 exaggerates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.views.parcel import one_by_one

NUM_LEVELS = 256


def blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with a degenerate version of themselves: levels, broadcastable to `(B, 3, H, W)`.

    Source: Pillow's `ImagingBlend`, in float32, multiplication and addition rounded separately, clipped, truncated.
    """
    return to_bytes(_blend_levels(degenerate.float(), images.float(), factors))


def to_bytes(levels: Tensor) -> Tensor:
    """Truncate float32 levels in [0, 256) to uint8; on a CPU by NumPy, which takes a fifth of the time."""
    return torch.from_numpy(levels.numpy().astype(np.uint8)) if levels.device.type == "cpu" else levels.to(torch.uint8)


def _blend_levels(start: Tensor, levels: Tensor, factors: Tensor) -> Tensor:
    """Do what `blend` does on float32 levels, in place."""
    return levels.sub_(start).mul_(_per_sample(factors.float())).add_(start).clamp_(0, 255)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with black. Source: `PIL.ImageEnhance.Brightness`."""
    return to_bytes(images.float().mul_(_per_sample(factors.float())).clamp_(0, 255))


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image. Source: `PIL.ImageEnhance.Color` (torchvision's saturation)."""
    return blend(luminance(images), images, factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean luminance, rounded half up. Source: `PIL.ImageEnhance.Contrast`."""
    num_pixels = images.shape[2] * images.shape[3]
    exact = torch.float32 if num_pixels * NUM_LEVELS < 2**24 else torch.float64  # whichever order it is summed in
    total = luminance(images).sum(dim=(1, 2, 3), dtype=exact).long()
    mean = torch.div(2 * total + num_pixels, 2 * num_pixels, rounding_mode="floor")
    return blend(_per_sample(mean), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the smoothed image.

    Source: `PIL.ImageEnhance.Sharpness`; its 3 x 3 kernel (centre 5, else 1) over 13 leaves the border as it is.
    """
    levels, sharpened = images.float(), images.clone()
    inner = levels[:, :, 1:-1, 1:-1]
    rows = (levels[:, :, :-2] + levels[:, :, 1:-1]).add_(levels[:, :, 2:])
    weighted = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4)
    # Sums over 13 come no closer than 1/26 to a tie, so that rounding in float32 is exact.
    smooth = weighted.mul_(1 / 13).add_(0.5).floor_()
    sharpened[:, :, 1:-1, 1:-1] = to_bytes(_blend_levels(smooth, inner, factors))
    return sharpened


def posterize(images: Tensor, num_bits: Tensor) -> Tensor:
    """Keep the highest `num_bits` of each level, `(B,)` integers in [0, 8]. Source: `PIL.ImageOps.posterize`."""
    masks = 256 - (1 << (8 - num_bits.long()))
    return images & _per_sample(masks.to(torch.uint8))


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the levels at or above `thresholds`, `(B,)` in [0, 255], which may be fractional.

    Source: `PIL.ImageOps.solarize`.
    """
    lowest = _per_sample(thresholds.ceil().to(torch.uint8))
    if images.device.type == "cpu":  # NumPy's comparison takes a sixth of the time
        inverted = torch.from_numpy(np.greater_equal(images.numpy(), lowest.numpy()))
    else:
        inverted = images >= lowest
    return images ^ inverted.view(torch.uint8).neg_()  # 255 - v is v with every bit turned


def solarize_add(images: Tensor, amounts: Tensor) -> Tensor:
    """Add `amounts`, `(B,)` whole numbers in [0, 128], to the levels below 128. Source: timm's `solarize_add`."""
    is_low = (images < 128).view(torch.uint8)
    return images + is_low * _per_sample(amounts.to(torch.uint8))


def invert(images: Tensor) -> Tensor:
    """Turn each level v into 255 - v. Source: `PIL.ImageOps.invert`."""
    return 255 - images


def autocontrast(images: Tensor) -> Tensor:
    """Stretch the levels of each channel of each image over [0, 255]; a channel of one level stays.

    Source: `PIL.ImageOps.autocontrast` with cutoff 0, in float64.
    """
    lowest = images.amin(dim=(2, 3)).double()[..., None]
    span = images.amax(dim=(2, 3)).double()[..., None] - lowest
    # `255.0 / span` would multiply by a rounded reciprocal and truncate to other levels than Pillow does.
    scale = torch.full_like(span, 255.0) / span.clamp(min=1)
    levels = torch.arange(NUM_LEVELS, device=images.device)
    stretched = (levels * scale + -lowest * scale).clamp_(0, 255).to(torch.uint8)
    return apply_tables(images, torch.where(span > 0, stretched, levels.to(torch.uint8)))


def equalize(images: Tensor) -> Tensor:
    """Flatten the histogram of each channel of each image.

    A channel stays as it is where fewer than 255 of its pixels are below its highest level.

    Source: `PIL.ImageOps.equalize`, all in integers.
    """
    counts = histograms(images)
    highest = images.amax(dim=(2, 3)).long()[..., None]
    num_below = counts.sum(dim=2, keepdim=True) - counts.gather(2, highest)
    # In integers: a GPU divides by a number by multiplying with its reciprocal, which may fall short of a whole.
    step = torch.div(num_below.int(), 255, rounding_mode="floor")
    before = counts.cumsum(dim=2) - counts
    # Floors of float32 quotients are those of the integers: a quotient below 256 that is none is at least 1 / step from
    # the next, and step is below 2^16.
    equalized = ((before + (step >> 1)) / step.clamp(min=1)).clamp_(max=255).to(torch.uint8)
    identity = torch.arange(NUM_LEVELS, device=images.device, dtype=torch.uint8)
    return apply_tables(images, torch.where(step > 0, equalized, identity))


def luminance(images: Tensor) -> Tensor:
    """Convert to grey, `(B, 1, H, W)` float32, whole numbers in [0, 255].

    Source: Pillow's conversion of RGB to L: ITU-R 601-2 luma in 16 fractional bits, rounded half up. All sums are whole
        numbers below 2^24, which float32 holds exactly.
    """
    red, green, blue = images.float().unbind(1)
    sums = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000)
    return sums.mul_(1 / 65536).floor_()[:, None]


def histograms(images: Tensor) -> Tensor:
    """Count the levels of each channel of each image, `(B, 3, 256)` float32.

    Below 2^24 pixels the counts are exact in any order of addition.
    """
    levels = images.flatten(2)
    if one_by_one(images):
        counted = [channel.bincount(minlength=NUM_LEVELS) for channel in levels.flatten(0, 1)]
        return torch.stack(counted).reshape(*levels.shape[:2], NUM_LEVELS).float()
    counts = torch.zeros(*levels.shape[:2], NUM_LEVELS, device=images.device)
    return counts.scatter_add_(2, levels.long(), torch.ones((), device=images.device).expand_as(levels))


def apply_tables(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each level by its entry in `tables`, `(B, 3, 256)` uint8: one table for each channel of each image."""
    if not one_by_one(images):
        return tables.gather(2, images.flatten(2).long()).reshape(images.shape)
    made = torch.empty_like(images, memory_format=torch.contiguous_format)
    channels = (tensor.flatten(2).flatten(0, 1).numpy() for tensor in (images, tables, made))
    for channel, table, target in zip(*channels, strict=True):
        np.take(table, channel, out=target, mode="clip")  # NumPy's needs no wider indices in memory
    return made


def _per_sample(values: Tensor) -> Tensor:
    """Shape `(B,)` into `(B, 1, 1, 1)`, to act on whole images."""
    return values.reshape(-1, 1, 1, 1)
