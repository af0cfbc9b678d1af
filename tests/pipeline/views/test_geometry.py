from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from pipeline.views import geometry
from tests.support.pillow_reference import on_pil

SIZES = [(32, 32), (28, 28), (7, 13), (40, 21), (1, 5)]
NUM_RANDOM = 500


def noise(num_images: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    # From 1, so that a black pixel is always a filled one.
    return torch.randint(1, 256, (num_images, 3, height, width), dtype=torch.uint8, generator=generator)


def counting_image(height: int, width: int) -> torch.Tensor:
    image = torch.arange(1, height * width + 1, dtype=torch.uint8).reshape(height, width)
    return torch.stack([image, image + 50, image + 100])[None]


def crop_flip(images: torch.Tensor, offsets: torch.Tensor, flipped: torch.Tensor) -> torch.Tensor:
    return geometry.gather(images, geometry.crop_flip_maps(offsets, flipped, *images.shape[-2:]))


def rotate(images: torch.Tensor, angles: np.ndarray) -> torch.Tensor:
    matrices = geometry.rotation_matrices(angles, *images.shape[-2:])
    return geometry.gather(images, geometry.index_maps(matrices, *images.shape[-2:], images.device))


def affine(images: torch.Tensor, translate: np.ndarray, scale: np.ndarray, shear: np.ndarray) -> torch.Tensor:
    height, width = images.shape[-2:]
    matrices = geometry.affine_matrices(translate, scale, shear, (width * 0.5, height * 0.5))
    maps = geometry.index_maps(matrices, height, width, images.device)
    return geometry.gather(images, maps)


def test_gather_copies_pixels_of_every_channel_and_fills_black() -> None:
    index_map = torch.tensor([[[6, 0, 1], [1, 4, 0]]])
    expected = torch.tensor([[[6, 0, 1], [1, 4, 0]], [[56, 0, 51], [51, 54, 0]], [[106, 0, 101], [101, 104, 0]]])
    assert torch.equal(geometry.gather(counting_image(2, 3), index_map)[0].long(), expected)


def test_gather_uses_one_map_for_all_images_or_one_for_each() -> None:
    images = noise(4, 3, 5)
    maps = torch.randint(0, 16, (4, 3, 5), generator=torch.Generator().manual_seed(0))
    gathered = torch.cat([geometry.gather(images[i : i + 1], maps[i : i + 1]) for i in range(4)])
    assert torch.equal(geometry.gather(images, maps), gathered)
    assert torch.equal(geometry.gather(images, maps[:1]), geometry.gather(images, maps[:1].expand(4, 3, 5)))


def test_composed_maps_do_one_after_the_other() -> None:
    images, generator = noise(50, 3, 5), torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 16, (50, 3, 5), generator=generator) for _ in range(2))
    expected = geometry.gather(geometry.gather(images, first), second)
    assert torch.equal(geometry.gather(images, geometry.compose(first, second)), expected)


@pytest.mark.parametrize(
    ("offset", "flipped", "expected"),
    [
        ((0, 0), False, [[1, 2, 3], [4, 5, 6]]),
        ((0, 0), True, [[3, 2, 1], [6, 5, 4]]),
        ((1, 0), False, [[4, 5, 6], [0, 0, 0]]),
        ((0, 1), False, [[2, 3, 0], [5, 6, 0]]),
        ((-1, -1), False, [[0, 0, 0], [0, 1, 2]]),
        ((0, 1), True, [[0, 3, 2], [0, 6, 5]]),
        ((-1, 2), True, [[0, 0, 0], [0, 0, 3]]),
        ((2, 0), False, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_crop_moves_the_frame_down_and_right_then_flips_left_right(
    offset: tuple[int, int], flipped: bool, expected: list[list[int]]
) -> None:
    cropped = crop_flip(counting_image(2, 3), torch.tensor([offset]), torch.tensor([flipped]))
    assert cropped[0, 0].tolist() == expected


@pytest.mark.parametrize("padding", [1, 4, 9])
def test_crop_and_flip_equal_torchvision(padding: int) -> None:
    images = noise(300, 7, 13)
    generator = torch.Generator().manual_seed(padding)
    corners = torch.randint(0, 2 * padding + 1, (300, 2), generator=generator)
    flipped = torch.randint(0, 2, (300,), generator=generator).bool()

    def reference(image: Image.Image, corner: torch.Tensor, flip: torch.Tensor) -> Image.Image:
        cropped = F.crop(F.pad(image, [padding] * 4), int(corner[0]), int(corner[1]), 7, 13)
        return F.hflip(cropped) if flip else cropped

    expected = on_pil(reference, images, corners, flipped)
    assert torch.equal(crop_flip(images, corners - padding, flipped), expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_rotation_equals_torchvision_at_any_angle(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    multiples = np.arange(-450, 451, 15.0)
    angles = np.concatenate([multiples, multiples + 1e-9, rng.uniform(-360, 360, NUM_RANDOM)])
    images = noise(len(angles), height, width)
    expected = on_pil(lambda image, angle: F.rotate(image, float(angle)), images, angles)
    assert torch.equal(rotate(images, angles), expected)


@pytest.mark.parametrize("sheared", ["neither axis", "x", "y", "both axes"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_affine_equals_torchvision_at_any_parameters(height: int, width: int, sheared: str) -> None:
    rng = np.random.default_rng(width)
    images = noise(NUM_RANDOM, height, width)
    translate = np.stack(
        [rng.integers(-width, width + 1, NUM_RANDOM), rng.integers(-height, height + 1, NUM_RANDOM)], axis=1
    )
    translate[::5] = 0
    scale = rng.uniform(0.1, 1.9, NUM_RANDOM)
    scale[::3] = 1.0
    # Whole tenths put pixels on the borders between two, where the last bit of Pillow's running sum decides.
    scale[1::3] = rng.integers(1, 20, len(scale[1::3])) / 10
    shear = rng.uniform(-60, 60, (NUM_RANDOM, 2)) * [
        sheared in ("x", "both axes"),
        sheared in ("y", "both axes"),
    ]

    def reference(image: Image.Image, shift: np.ndarray, factor: float, angles: np.ndarray) -> Image.Image:
        return F.affine(image, 0.0, shift.tolist(), float(factor), angles.tolist())

    expected = on_pil(reference, images, translate, scale, shear)
    assert torch.equal(affine(images, translate, scale, shear), expected)


def test_extreme_scales_equal_torchvision() -> None:
    images, scale = noise(200, 32, 32), np.geomspace(0.002, 0.1, 200)
    translate, shear = np.zeros((200, 2), dtype=np.int64), np.tile([20.0, 0.0], (200, 1))
    expected = on_pil(lambda image, factor: F.affine(image, 0.0, [0, 0], float(factor), [20.0, 0.0]), images, scale)
    assert torch.equal(affine(images, translate, scale, shear), expected)


def test_axis_aligned_and_sheared_images_may_share_a_batch() -> None:
    images = noise(6, 9, 9)
    translate, scale = np.zeros((6, 2), dtype=np.int64), np.linspace(0.7, 1.3, 6)
    shear = np.array([[0, 0], [20, 0], [0, 0], [0, 20], [5, 5], [0, 0]], dtype=np.float64)
    one_by_one = [affine(images[i : i + 1], translate[i : i + 1], scale[i : i + 1], shear[i : i + 1]) for i in range(6)]
    assert torch.equal(affine(images, translate, scale, shear), torch.cat(one_by_one))


def test_a_translation_moves_right_and_down() -> None:
    moved = affine(counting_image(3, 3), np.array([[1, 2]]), np.ones(1), np.zeros((1, 2)))
    assert moved[0, 0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 2]]


def test_a_rotation_by_90_degrees_is_counter_clockwise() -> None:
    turned = rotate(counting_image(3, 3), np.array([90.0]))
    assert turned[0, 0].tolist() == [[3, 6, 9], [2, 5, 8], [1, 4, 7]]


@pytest.mark.gpu
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_gpu_gathers_what_the_cpu_does(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    images = noise(NUM_RANDOM, height, width)
    angles, shear = rng.uniform(-360, 360, NUM_RANDOM), rng.uniform(-60, 60, (NUM_RANDOM, 2))
    scale, translate = rng.uniform(0.1, 1.9, NUM_RANDOM), np.zeros((NUM_RANDOM, 2), dtype=np.int64)
    assert torch.equal(rotate(images.cuda(), angles).cpu(), rotate(images, angles))
    on_gpu = affine(images.cuda(), translate, scale, shear)
    assert torch.equal(on_gpu.cpu(), affine(images, translate, scale, shear))
