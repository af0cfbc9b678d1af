from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from torch import Tensor

from pipeline.views import colour as imageops
from pipeline.views.parcel import one_by_one
from tests.support.pillow_reference import on_pil, sample_images

SIZES = [(32, 32), (5, 9), (2, 3), (1, 1)]
ENHANCEMENTS = {
    "brightness": F.adjust_brightness,
    "color": F.adjust_saturation,
    "contrast": F.adjust_contrast,
    "sharpness": F.adjust_sharpness,
}
OPERATIONS_WITHOUT_PARAMETER: dict[str, Callable[[Tensor], Tensor]] = {
    "invert": imageops.invert,
    "autocontrast": imageops.autocontrast,
    "equalize": imageops.equalize,
}


def random_factors(num_factors: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    factors = np.concatenate([rng.uniform(0, 2, num_factors), rng.choice([0, 1, 1e-9, 1 - 1e-9, 1.9, 40], 30)])
    return rng.permutation(factors)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", ENHANCEMENTS)
def test_an_enhancement_equals_pillow_at_any_factor(name: str, height: int, width: int) -> None:
    factors = random_factors(450)
    images = sample_images(height, width, num_noise=12)
    images = images[torch.arange(len(factors)) % len(images)]
    expected = on_pil(ENHANCEMENTS[name], images, factors.tolist())
    assert torch.equal(getattr(imageops, name)(images, torch.from_numpy(factors)), expected)


@pytest.mark.parametrize("name", [*ENHANCEMENTS, *OPERATIONS_WITHOUT_PARAMETER])
def test_large_images_are_worked_on_one_by_one_with_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = sample_images(61, 70)
    factors = [torch.from_numpy(random_factors(len(images))[: len(images)])] if name in ENHANCEMENTS else []
    assert one_by_one(images)
    assert torch.equal(
        imageops.solarize(images, torch.arange(24) * 10.5), on_pil(F.solarize, images, np.arange(24) * 10.5)
    )
    large = getattr(imageops, name)(images, *factors)
    monkeypatch.setattr("pipeline.views.parcel.LARGE_PIXELS", 2**30)
    assert torch.equal(large, getattr(imageops, name)(images, *factors))
    if factors:
        assert torch.equal(large, on_pil(ENHANCEMENTS[name], images, factors[0].tolist()))


def test_brightness_equals_pillow_at_every_level() -> None:
    factors = random_factors(2000)
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 256).expand(len(factors), 3, 1, 256)
    expected = on_pil(F.adjust_brightness, ramp, factors.tolist())
    assert torch.equal(imageops.brightness(ramp, torch.from_numpy(factors)), expected)


def test_luminance_equals_pillow_on_every_green_and_blue() -> None:
    red, level = torch.arange(0, 256, 15), torch.arange(256)
    grid = torch.meshgrid(red, level, level, indexing="ij")  # one in 65,536 colours is a tie in rounding
    colours = torch.stack(grid, dim=1).to(torch.uint8)
    expected = on_pil(lambda image: image.convert("L").convert("RGB"), colours)
    assert torch.equal(imageops.luminance(colours).expand(-1, 3, -1, -1).to(torch.uint8), expected)


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_posterize_equals_pillow(num_bits: int) -> None:
    images = sample_images(8, 11)
    expected = on_pil(lambda image: F.posterize(image, num_bits), images)
    assert torch.equal(imageops.posterize(images, torch.full((len(images),), num_bits)), expected)


def test_solarize_equals_pillow_at_any_threshold() -> None:
    rng = np.random.default_rng(0)
    thresholds = np.concatenate([np.arange(256.0), rng.uniform(0, 255, 200)])
    images = sample_images(6, 50)[torch.arange(len(thresholds)) % 24]
    expected = on_pil(F.solarize, images, thresholds.tolist())
    assert torch.equal(imageops.solarize(images, torch.from_numpy(thresholds)), expected)


@pytest.mark.parametrize(("height", "width"), [*SIZES, (16, 16), (64, 48)])
@pytest.mark.parametrize("name", OPERATIONS_WITHOUT_PARAMETER)
def test_an_operation_without_parameter_equals_pillow(name: str, height: int, width: int) -> None:
    images = sample_images(height, width, num_noise=60)
    expected = on_pil(getattr(F, name), images)
    assert torch.equal(OPERATIONS_WITHOUT_PARAMETER[name](images), expected)


def test_autocontrast_equals_pillow_at_every_range_of_levels() -> None:
    pairs = torch.combinations(torch.arange(0, 256))[::7]
    levels = torch.arange(256)
    images = torch.minimum(torch.maximum(levels, pairs[:, :1]), pairs[:, 1:]).to(torch.uint8)
    images = images.reshape(-1, 1, 16, 16).expand(-1, 3, -1, -1)
    assert torch.equal(imageops.autocontrast(images), on_pil(F.autocontrast, images))


def test_equalize_equals_pillow_on_histograms_of_few_levels() -> None:
    rng = np.random.default_rng(1)
    images = []
    for num_levels in range(1, 200):
        levels = np.sort(rng.choice(256, num_levels, replace=False))
        weights = rng.dirichlet(np.full(num_levels, 0.3), size=3)
        images.append(np.stack([rng.choice(levels, (32, 32), p=weight) for weight in weights]))
    batch = torch.from_numpy(np.stack(images).astype(np.uint8))
    assert torch.equal(imageops.equalize(batch), on_pil(F.equalize, batch))


def test_equalize_clips_what_its_table_pushes_beyond_white() -> None:
    # 295 pixels below the highest level: step 295 // 255 = 1, and the highest level's entry is 295 // 1.
    image = torch.cat([torch.full((295,), 10), torch.full((5,), 20)]).to(torch.uint8).reshape(1, 1, 15, 20)
    image = image.expand(1, 3, 15, 20)
    assert imageops.equalize(image).unique().tolist() == [0, 255]
    assert torch.equal(imageops.equalize(image), on_pil(F.equalize, image))


def test_histograms_count_each_channel_of_each_image() -> None:
    images = sample_images(5, 7)
    counts = imageops.histograms(images)
    for image, histograms in zip(images, counts, strict=True):
        for channel, histogram in zip(image, histograms, strict=True):
            assert histogram.tolist() == np.bincount(channel.numpy().ravel(), minlength=256).tolist()


@pytest.mark.parametrize("name", [*ENHANCEMENTS, "posterize", "solarize", *OPERATIONS_WITHOUT_PARAMETER])
def test_an_operation_leaves_its_input_alone_and_each_image_to_itself(name: str) -> None:
    images = sample_images(9, 9)
    untouched = images.clone()
    arguments = [] if name in OPERATIONS_WITHOUT_PARAMETER else [torch.arange(len(images)) % 8 + 1.0]
    operation = getattr(imageops, name)
    together = operation(images, *arguments)
    alone = [operation(images[i : i + 1], *[a[i : i + 1] for a in arguments]) for i in range(len(images))]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(images, untouched)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*ENHANCEMENTS, "posterize", "solarize", *OPERATIONS_WITHOUT_PARAMETER])
def test_the_gpu_computes_what_the_cpu_does(name: str) -> None:
    images = sample_images(32, 32, num_noise=60)
    arguments = [] if name in OPERATIONS_WITHOUT_PARAMETER else [torch.linspace(1, 8, len(images)).double()]
    operation = getattr(imageops, name)
    on_gpu = operation(images.cuda(), *[argument.cuda() for argument in arguments])
    assert torch.equal(on_gpu.cpu(), operation(images, *arguments))
