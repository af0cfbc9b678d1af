from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from pipeline.views import operations, per_image
from pipeline.views.policies import CIFAR10_POLICY, POLICIES
from tests.support.pillow_reference import on_pil, sample_images

OURS = POLICIES["cifar10"]
SIZES = [(32, 32), (28, 28), (9, 17)]


def apply(images: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
    return operations.apply(images, OURS.choose(uniform, *images.shape[-2:]))


class ReplayedAutoAugment(AutoAugment):
    """torchvision's AutoAugment with given draws."""

    def __init__(self) -> None:
        super().__init__(AutoAugmentPolicy.CIFAR10)

    def replay(self, image: Image.Image, uniform: np.ndarray) -> Image.Image:
        sub_policy, *rest = uniform
        draws = (
            int(sub_policy * 25),
            torch.tensor(rest[:2]),
            torch.tensor([int(u >= 0.5) for u in rest[2:]]),
        )
        self.get_params = lambda _: draws  # type: ignore[method-assign]
        return self(image)


def test_the_policy_is_torchvisions() -> None:
    assert list(CIFAR10_POLICY) == AutoAugment(AutoAugmentPolicy.CIFAR10).policies


@pytest.mark.parametrize(("height", "width"), [*SIZES, (331, 500), (96, 224)])
def test_magnitudes_are_torchvisions_as_far_as_they_are_used(height: int, width: int) -> None:
    space = AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(OURS.space.num_bins, (height, width))
    assert {*space, "SolarizeAdd"} == set(operations.OPERATIONS)  # timm alone has it
    for operation, (magnitudes, signed) in space.items():
        assert signed == (operation not in operations.UNSIGNED_OPERATIONS)
        bins = range(magnitudes.numel())
        ours = [operations.magnitude(OURS.space, operation, magnitude_bin, height, width) for magnitude_bin in bins]
        # Translations are by whole pixels; their fraction's last bit varies with the CPU in torch.linspace.
        used = int if operation.startswith("Translate") else float
        assert [*map(used, ours)] == [*map(used, magnitudes.double().reshape(-1).tolist())], operation


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("sub_policy", range(25))
def test_a_sub_policy_equals_torchvision_for_every_sign_and_choice(sub_policy: int, height: int, width: int) -> None:
    # Probabilities 0 < p < 1 are met by 0.0005 and missed by 0.9995.
    choices = list(itertools.product((0.0005, 0.9995), (0.0005, 0.9995), (0.2, 0.7), (0.2, 0.7)))
    images = sample_images(height, width, num_noise=2)
    uniform = np.array([[(sub_policy + 0.5) / 25, *choice] for choice in choices for _ in images])
    images = images.repeat(len(choices), 1, 1, 1)
    expected = on_pil(ReplayedAutoAugment().replay, images, uniform)
    assert torch.equal(apply(images, uniform), expected)


def test_a_mixed_batch_equals_torchvision() -> None:
    uniform = np.random.default_rng(0).random((1500, OURS.num_draws))
    images = sample_images(32, 32, num_noise=30)[torch.arange(1500) % 102]
    expected = on_pil(ReplayedAutoAugment().replay, images, uniform)
    assert torch.equal(apply(images, uniform), expected)
    if per_image.why_not() is None:
        choice = OURS.choose(uniform, 32, 32)
        assert torch.equal(per_image.apply_operations(images.clone(), choice), expected)


def test_an_operation_of_probability_zero_is_never_applied() -> None:
    row = next(i for i, pair in enumerate(CIFAR10_POLICY) if pair[1] == ("Invert", 0.0, None))
    images = sample_images(8, 8)
    uniform = np.tile([(row + 0.5) / 25, 0.999, 0.0, 0.3, 0.3], (len(images), 1))
    assert torch.equal(apply(images, uniform), images)


def test_the_input_is_left_alone() -> None:
    images = sample_images(8, 8)
    untouched = images.clone()
    apply(images, np.random.default_rng(0).random((len(images), OURS.num_draws)))
    assert torch.equal(images, untouched)


@pytest.mark.gpu
def test_the_gpu_computes_what_the_cpu_does() -> None:
    uniform = np.random.default_rng(0).random((5000, OURS.num_draws))
    images = sample_images(32, 32, num_noise=30)[torch.arange(5000) % 102]
    assert torch.equal(apply(images.cuda(), uniform).cpu(), apply(images, uniform))
