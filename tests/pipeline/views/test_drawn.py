"""What `Views.drawn` says was drawn is what happened to the pixels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.config.recipes import ViewRecipe
from pipeline.views import colour as imageops
from pipeline.views import mixing, operations
from pipeline.views.policies import CIFAR10_POLICY
from pipeline.views.views import Views

N, SIZE = 64, 16
IMAGES = torch.randint(1, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N)


def views(**operations: object) -> Views:
    return Views(IMAGES, LABELS, ViewRecipe(**{"count": 2, "seed": 3, **operations}))  # type: ignore[arg-type]


def pixels(of: Views, view: int = 1) -> torch.Tensor:
    return of.batch(view, torch.arange(N)).images


def test_only_what_the_recipe_has_is_told() -> None:
    assert views().drawn(0) == {}
    assert set(views(flip=True, scale=0.1, mixing="mixup").drawn(0)) == {"flip", "scale", "partner", "lambda"}


def test_a_flip_is_drawn_where_the_image_is_flipped() -> None:
    made, flipped = pixels(views(flip=True)), views(flip=True).drawn(1)["flip"]
    assert 10 < flipped.sum() < N - 10
    for image, result, is_flipped in zip(IMAGES, made, flipped, strict=True):
        assert torch.equal(result, image.flip(-1) if is_flipped else image)


def test_the_crops_offset_is_how_far_the_frame_moves() -> None:
    made, offsets = pixels(views(crop=3)), views(crop=3).drawn(1)["crop"]
    assert offsets.min() == -3 and offsets.max() == 3
    padded = torch.nn.functional.pad(IMAGES, (3, 3, 3, 3))
    for image, result, (down, right) in zip(padded, made, offsets.tolist(), strict=True):
        assert torch.equal(result, image[:, 3 + down : 3 + down + SIZE, 3 + right : 3 + right + SIZE])


def test_a_translation_moves_the_image_right_and_down() -> None:
    made, shifts = pixels(views(translate=0.2)), views(translate=0.2).drawn(1)["translate"]
    assert np.abs(shifts).max() == 3
    for image, result, (right, down) in zip(IMAGES, made, shifts.tolist(), strict=True):
        expected = torch.zeros_like(image)
        inner = image[:, max(0, -down) : SIZE - max(0, down), max(0, -right) : SIZE - max(0, right)]
        top, left = max(0, down), max(0, right)
        expected[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
        assert torch.equal(result, expected)


def test_angles_scales_and_shears_stay_in_range_and_move_more_pixels_the_larger_they_are() -> None:
    for name, reach, middle in (("rotation", 20.0, 0), ("scale", 0.5, 1), ("shear", 20.0, 0)):
        of = views(**{name: reach})
        amount = np.abs(of.drawn(1)[name] - middle)
        assert 0 < amount.min() and 0.8 * reach < amount.max() <= reach
        changed = (pixels(of) != IMAGES).any(1).float().mean((1, 2)).numpy()
        assert changed[amount < 0.1 * reach].mean() < changed[amount > 0.8 * reach].mean()


def test_jitters_factors_are_applied_in_the_order_drawn() -> None:
    of = views(brightness=0.4, contrast=0.4)
    drawn = of.drawn(1)
    brightness, contrast = (torch.from_numpy(drawn[name]) for name in ("brightness", "contrast"))
    first = torch.from_numpy(drawn["brightness_first"])[:, None, None, None]
    expected = torch.where(
        first,
        imageops.contrast(imageops.brightness(IMAGES, brightness), contrast),
        imageops.brightness(imageops.contrast(IMAGES, contrast), brightness),
    )
    assert 10 < first.sum() < N - 10 and torch.equal(pixels(of), expected)


@pytest.mark.parametrize(("policy", "num_operations"), [("cifar10", 2), ("randaugment", 2), ("trivialaugment", 1)])
def test_a_policys_operations_are_those_applied(policy: str, num_operations: int) -> None:
    of = views(autoaugment=policy)
    drawn, made = of.drawn(1), pixels(of)
    assert drawn["operations"].shape == drawn["magnitudes"].shape == (N, num_operations)
    assert ("sub_policy" in drawn) == (policy == "cifar10")
    num_compared = 0
    for index in range(N):
        expected = IMAGES[index : index + 1]
        for place in range(num_operations):
            number, magnitude = drawn["operations"][index, place], drawn["magnitudes"][index, place]
            if number == operations.NO_OPERATION:
                assert magnitude == 0
                continue
            name = operations.OPERATIONS[number]
            if policy == "cifar10":
                assert name == CIFAR10_POLICY[drawn["sub_policy"][index]][place][0]
            if name in operations.COLOUR_OPERATIONS:
                expected = operations.COLOUR_OPERATIONS[name](expected, torch.tensor([magnitude]))
            elif name.startswith("Translate"):
                axis, pixels_ = (-1 if name.endswith("X") else -2), int(magnitude)
                rolled = expected.roll(pixels_, axis)
                kept = torch.arange(SIZE) - pixels_
                inside = (kept >= 0) & (kept < SIZE)
                expected = rolled * (inside if axis == -1 else inside[:, None])
            else:
                break  # rotations and shears are compared with Pillow's elsewhere
        else:
            assert torch.equal(made[index : index + 1], expected), index
            num_compared += 1
    assert num_compared > N // 2


def test_partners_and_lambda_are_those_of_the_mixed_pixels() -> None:
    for operation in ("cutmix", "mixup"):
        of = views(flip=True, mixing=operation)
        drawn, batch = of.drawn(1), of.batch(1, torch.arange(N))
        plain = Views(IMAGES, LABELS, dataclasses.replace(of.recipe, mixing="none")).batch(1, torch.arange(N)).images
        assert torch.equal(batch.partner_labels, torch.from_numpy(drawn["partner"]))
        assert np.array_equal(batch.lam.numpy(), drawn["lambda"])
        partners = plain[drawn["partner"]]
        if operation == "mixup":
            shares = torch.from_numpy(np.rint(drawn["lambda"] * mixing.MIXUP_STEPS).astype(np.int32))
            assert torch.equal(batch.images, mixing.mixup(plain, partners, shares))
            continue
        kept_share = (batch.images == plain).all(1).float().mean((1, 2)).numpy()
        assert (np.abs(kept_share - drawn["lambda"]) < 0.02)[drawn["partner"] != np.arange(N)].all()
