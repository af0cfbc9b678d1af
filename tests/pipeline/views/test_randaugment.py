"""RandAugment and TrivialAugment are torchvision's, given the same draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandAugment, TrivialAugmentWide

from pipeline.config.recipes import ViewRecipe
from pipeline.views import operations, per_image, policies
from pipeline.views.policies import POLICIES
from pipeline.views.views import Views
from tests.support.pillow_reference import on_pil, sample_images

SIZES = [(32, 32), (28, 28), (9, 17)]
PEERS = {"randaugment": RandAugment(), "trivialaugment": TrivialAugmentWide()}
NUM_OPERATIONS = len(operations.EVENLY_DRAWN)
NUM_BINS = POLICIES["trivialaugment"].space.num_bins
SIGNS = (0.2, 0.7)


def middle(number: int, num_values: int) -> float:
    """The draw in the middle of those that give a number."""
    return (number + 0.5) / num_values


NUMBERS = [middle(number, NUM_OPERATIONS) for number in range(NUM_OPERATIONS)]


def peers_space(name: str, height: int, width: int) -> dict[str, tuple[Tensor, bool]]:
    size = () if name == "trivialaugment" else ((height, width),)
    return PEERS[name]._augmentation_space(NUM_BINS, *size)


def replayed(name: str, images: Tensor, uniform: NDArray[np.float64]) -> Tensor:
    """Return torchvision's result for the images with given draws.

    The magnitudes are ours: torchvision's depend on the CPU's instructions. Another test compares them.
    """
    height, width = images.shape[-2:]
    space = {
        operation: (
            torch.tensor(
                [
                    operations.magnitude(POLICIES[name].space, operation, magnitude_bin, height, width)
                    for magnitude_bin in range(magnitudes.numel())
                ]
            ).reshape(magnitudes.shape),
            signed,
        )
        for operation, (magnitudes, signed) in peers_space(name, height, width).items()
    }
    pending: Iterator[int] = iter(())

    def transform(image: Image.Image, image_draws: NDArray[np.float64]) -> Image.Image:
        nonlocal pending
        pending = iter(torchvisions_draws(name, space, image_draws))
        result = PEERS[name](image)
        assert next(pending, None) is None, "not all draws were asked for"
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PEERS[name], "_augmentation_space", lambda *_: space)
        patch.setattr(torch, "randint", lambda high, size, **_: torch.tensor([next(pending)]))
        return on_pil(transform, images, uniform)


def torchvisions_draws(name: str, space: dict[str, tuple[Tensor, bool]], uniform: NDArray[np.float64]) -> Iterator[int]:
    """Yield torchvision's draws: an operation, then its magnitude and its sign where it has them."""
    if name == "randaugment":
        chosen = [(uniform[0], None, uniform[2]), (uniform[1], None, uniform[3])]
    else:
        chosen = [(uniform[0], uniform[1], uniform[2])]
    for operation, magnitude_bin, sign in chosen:
        number = int(operation * len(space))
        magnitudes, signed = list(space.values())[number]
        yield number
        if magnitude_bin is not None and magnitudes.ndim:
            yield int(magnitude_bin * len(magnitudes))
        if signed:
            yield int(sign < 0.5)


def ours(name: str, images: Tensor, uniform: NDArray[np.float64]) -> Tensor:
    return operations.apply(images, POLICIES[name].choose(uniform, *images.shape[-2:]))


def each_with_each(images: Tensor, rows: list[tuple[float, ...]]) -> tuple[Tensor, NDArray[np.float64]]:
    return images.repeat(len(rows), 1, 1, 1), np.repeat(np.array(rows), len(images), axis=0)


def test_a_recipe_can_name_every_policy() -> None:
    choices = ViewRecipe.__dataclass_fields__["autoaugment"].metadata["choices"]
    assert list(choices) == ["none", *POLICIES]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("height", "width"), [*SIZES, (331, 500), (96, 224)])
def test_operations_and_magnitudes_are_torchvisions(name: str, height: int, width: int) -> None:
    space = peers_space(name, height, width)
    assert tuple(space) == operations.EVENLY_DRAWN
    for operation, (magnitudes, signed) in space.items():
        unsigned = operation in (*operations.UNSIGNED_OPERATIONS, "Identity")
        assert signed != unsigned and (magnitudes.ndim == 0) == (operation in operations.WITHOUT_MAGNITUDE)
        expected = magnitudes.double().reshape(-1).numpy()
        computed = [
            operations.magnitude(POLICIES[name].space, operation, magnitude_bin, height, width)
            for magnitude_bin in range(len(expected))
        ]
        # torch.linspace's last bit varies with the CPU.
        last_bit = float(np.spacing(np.float32(expected.max())))
        np.testing.assert_allclose(computed, expected, rtol=0, atol=last_bit, err_msg=operation)


def test_randaugments_strength_is_torchvisions_default() -> None:
    peer = PEERS["randaugment"]
    assert (peer.num_ops, peer.magnitude, peer.num_magnitude_bins) == (
        POLICIES["randaugment"].num_draws // 2,
        *{magnitude_bin for _, magnitude_bin in POLICIES["randaugment"].entries},
        POLICIES["randaugment"].space.num_bins,
    )
    assert PEERS["trivialaugment"].num_magnitude_bins == NUM_BINS


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_operation_of_randaugment_equals_torchvisions_with_either_sign(height: int, width: int) -> None:
    identity = NUMBERS[0]
    rows = [(identity, number, 0.5, sign) for number, sign in itertools.product(NUMBERS, SIGNS)]
    images, uniform = each_with_each(sample_images(height, width), rows)
    assert torch.equal(ours("randaugment", images, uniform), replayed("randaugment", images, uniform))


def test_every_operation_after_every_other_equals_torchvisions() -> None:
    images, uniform = each_with_each(
        sample_images(32, 32, num_noise=1)[::3], list(itertools.product(NUMBERS, NUMBERS, SIGNS, SIGNS))
    )
    expected = replayed("randaugment", images, uniform)
    assert torch.equal(ours("randaugment", images, uniform), expected)
    if per_image.why_not() is None:
        choice = POLICIES["randaugment"].choose(uniform, 32, 32)
        assert torch.equal(per_image.apply_operations(images.clone(), choice), expected)


@pytest.mark.parametrize("strength", [0, 4, 15, 30])
def test_randaugment_of_any_strength_equals_torchvisions(strength: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "randaugment", RandAugment(magnitude=strength))
    recipe = ViewRecipe(count=1, autoaugment="randaugment", magnitude=strength)
    chosen = policies.policy(recipe)
    assert chosen is policies.policy(recipe) and chosen is not None
    rows = [(NUMBERS[0], number, 0.5, sign) for number, sign in itertools.product(NUMBERS, SIGNS)]
    images, uniform = each_with_each(sample_images(17, 9, num_noise=2)[::2], rows)
    made = operations.apply(images, chosen.choose(uniform, 17, 9))
    assert torch.equal(made, replayed("randaugment", images, uniform))


@pytest.mark.parametrize("level", range(11))
@pytest.mark.parametrize(("height", "width"), [(10, 20), (31, 17)])
def test_timms_scale_gives_timms_operations_and_pixels(
    level: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm.data.auto_augment", reason="comes with the extra timm")
    # Without its resampling filters and its grey, see TimmRandAugment.
    hparams = {"img_mean": (0, 0, 0), "interpolation": Image.Resampling.NEAREST}
    peers = timm.rand_augment_transform(f"rand-m{level}-inc1-p1", hparams).ops
    chosen = policies.policy(ViewRecipe(count=1, autoaugment="randaugment", magnitudes="timm", magnitude=level))
    assert isinstance(chosen, policies.TimmRandAugment)
    images = sample_images(height, width, num_noise=2)[::2]
    for number, (peer, name) in enumerate(zip(peers, chosen.drawn, strict=True)):
        assert peer.name.removesuffix("Increasing").removesuffix("Rel") == name
        for sign in SIGNS:
            uniform = np.array([[middle(number, 15), middle(0, 15), sign, sign]] * len(images))
            choice = chosen.choose(uniform, height, width)
            only = choice._replace(rows=choice.rows[:, :1])
            # timm negates above 1/2, and moves an image the other way.
            negates = (sign < 0.5) != name.startswith("Translate")
            monkeypatch.setattr(timm.random, "random", lambda negates=negates: 0.9 if negates else 0.1)
            made = operations.apply(images, only)
            if (name, level) == ("Posterize", 10):  # no bit is left, which Pillow 13 refuses
                assert not made.any()
            else:
                assert torch.equal(made, on_pil(peer, images)), (name, sign)


def test_an_operation_is_applied_with_its_probability() -> None:
    images = torch.zeros((20_000, 3, 1, 1), dtype=torch.uint8)
    always, some = (
        Views(images, torch.zeros(20_000, dtype=torch.int64), recipe).drawn(0)["operations"]
        for recipe in (
            ViewRecipe(count=1, autoaugment="randaugment"),
            ViewRecipe(count=1, autoaugment="randaugment", probability=0.7),
        )
    )
    is_applied = some != operations.NO_OPERATION
    assert (some[is_applied] == always[is_applied]).all(), "the draws of what is applied are as they were"
    assert stats.binomtest(int(is_applied.sum()), 40_000, 0.7 * 13 / 14).pvalue > 1e-4  # one of 14 is the identity
    both = is_applied.all(axis=1).sum() / 20_000
    assert both == pytest.approx((0.7 * 13 / 14) ** 2, abs=0.015), "each by a draw of its own"


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_trivialaugment_equals_torchvision_for_every_operation_magnitude_and_sign(height: int, width: int) -> None:
    bins = [middle(number, NUM_BINS) for number in range(NUM_BINS)]
    images, uniform = each_with_each(
        sample_images(height, width, num_noise=1)[:: 1 if (height, width) == (32, 32) else 3],
        list(itertools.product(NUMBERS, bins, SIGNS)),
    )
    assert torch.equal(ours("trivialaugment", images, uniform), replayed("trivialaugment", images, uniform))


@pytest.mark.parametrize("name", PEERS)
def test_images_too_large_for_kept_maps_equal_torchvisions_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uniform = np.random.default_rng(0).random((200, POLICIES[name].num_draws))
    images = sample_images(24, 31)[torch.arange(200) % 24]
    kept = ours(name, images, uniform)
    monkeypatch.setattr(operations, "MAX_KEPT_BYTES", 0)
    assert torch.equal(ours(name, images, uniform), kept)
    assert torch.equal(kept, replayed(name, images, uniform))


@pytest.mark.parametrize("name", PEERS)
def test_the_input_is_left_alone(name: str) -> None:
    images = sample_images(8, 8)
    untouched = images.clone()
    ours(name, images, np.random.default_rng(0).random((len(images), POLICIES[name].num_draws)))
    assert torch.equal(images, untouched)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("max_kept_bytes", [operations.MAX_KEPT_BYTES, 0])
def test_the_gpu_computes_what_the_cpu_does(name: str, max_kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MAX_KEPT_BYTES", max_kept_bytes)
    uniform = np.random.default_rng(0).random((5000, POLICIES[name].num_draws))
    images = sample_images(32, 32, num_noise=30)[torch.arange(5000) % 102]
    assert torch.equal(ours(name, images.cuda(), uniform).cpu(), ours(name, images, uniform))
