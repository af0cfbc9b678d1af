from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.views import draws, mixing

unit = st.floats(0, 1, exclude_max=True)


def two_batches(num_images: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, num_images, 3, height, width), dtype=torch.uint8, generator=generator)
    return images[0], images[1]


def cutmix(images: torch.Tensor, partners: torch.Tensor, boxes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    lam = mixing.cutmix_lambda(boxes, *images.shape[-2:])
    return mixing.cutmix(images, partners, torch.from_numpy(boxes)), torch.from_numpy(lam)


def mixup(images: torch.Tensor, partners: torch.Tensor, uniform: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    shares = mixing.mixup_shares(uniform)
    lam = mixing.mixup_lambda(shares)
    return mixing.mixup(images, partners, torch.from_numpy(shares)), torch.from_numpy(lam)


def test_cutmix_fills_the_box_with_the_partner() -> None:
    images = torch.full((1, 3, 3, 4), 1, dtype=torch.uint8)
    mixed, lam = cutmix(images, images + 8, np.array([[1, 0, 3, 2]]))
    assert mixed[0].tolist() == [[[1, 9, 9, 1], [1, 9, 9, 1], [1, 1, 1, 1]]] * 3
    assert lam.tolist() == [np.float32(8 / 12)]


def test_a_box_is_centred_even_sided_and_clipped() -> None:
    # The side is cos(pi u / 2) of the frame's: all of it at 0, just above a half at 0.66.
    lambda_uniform = np.array([0.0, 0.0, 0.66, 0.66, 0.66, 0.999])
    center_uniform = np.array([[0.0, 0.0], [0.99, 0.5], [0.5, 0.5], [0.0, 0.99], [0.3, 0.1], [0.5, 0.5]])
    boxes = mixing.cutmix_boxes(lambda_uniform, center_uniform, height=8, width=16)
    assert boxes.tolist() == [
        [0, 0, 8, 4],  # sides (16, 8): halves (8, 4), around (0, 0)
        [7, 0, 16, 8],  # around (15, 4)
        [4, 2, 12, 6],  # sides (8, 4): halves (4, 2), around (8, 4)
        [0, 5, 4, 8],  # around (0, 7)
        [0, 0, 8, 2],  # around (4, 0)
        [8, 4, 8, 4],  # a side below 2 leaves nothing
    ]


@given(st.lists(st.tuples(unit, unit, unit), min_size=1, max_size=20), st.integers(1, 40), st.integers(1, 40))
def test_lambda_is_the_share_of_pixels_left_of_the_first_image(
    uniform: list[tuple[float, float, float]], height: int, width: int
) -> None:
    values = np.array(uniform)
    boxes = mixing.cutmix_boxes(values[:, 0], values[:, 1:], height, width)
    first = torch.zeros((len(values), 3, height, width), dtype=torch.uint8)
    mixed, lam = cutmix(first, first + 1, boxes)
    assert lam.dtype == torch.float32
    num_left = (mixed == 0).sum(dim=(1, 2, 3)).double() / 3
    assert torch.equal(lam, (num_left / (height * width)).float())
    assert (boxes[:, :2] <= boxes[:, 2:]).all() and (boxes >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()


def test_unclipped_lambda_follows_beta_one_half_one_half() -> None:
    images = torch.zeros((40_000, 3, 1, 1), dtype=torch.uint8)
    _, lam = mixup(images, images, draws.uniforms(0, "", 0, "lambda", 40_000, 1)[:, 0])
    observed = np.sort(lam.double().numpy())
    arcsine_cdf = 2 / np.pi * np.arcsin(np.sqrt(observed))
    ranks = np.arange(1, len(observed) + 1) / len(observed)
    assert np.abs(ranks - arcsine_cdf).max() < 1.95 / np.sqrt(len(observed))  # Kolmogorov-Smirnov, p = 0.001


def test_box_sides_follow_the_same_lambda() -> None:
    uniform = draws.uniforms(0, "", 0, "lambda", 20_000, 1)[:, 0]
    boxes = mixing.cutmix_boxes(uniform, np.full((20_000, 2), 0.5), height=1000, width=2000)
    _, lam = mixup(*two_batches(20_000, 1, 1), uniform)
    for side, length in ((boxes[:, 2] - boxes[:, 0], 2000), (boxes[:, 3] - boxes[:, 1], 1000)):
        assert np.abs(side / length - np.sqrt(1 - lam.double().numpy())).max() < 2 / length + 0.004


def test_mixup_is_the_weighted_mean_rounded_half_up() -> None:
    first, second = two_batches(200, 5, 7)
    uniform = np.random.default_rng(0).random(200)
    uniform[:2] = 0.0, 1 - 2.0**-53
    mixed, lam = mixup(first, second, uniform)
    share = lam.double()[:, None, None, None]
    expected = torch.floor(share * first + (1 - share) * second + 0.5)
    assert torch.equal(mixed.double(), expected)
    assert torch.equal(lam * 65536, (lam * 65536).round())
    assert lam.dtype == torch.float32
    assert np.abs(lam.numpy() - np.sin(np.pi / 2 * uniform) ** 2).max() <= 2.0**-17 + 1e-9


def test_mixup_by_hand() -> None:
    images = torch.tensor([0, 255, 255, 10], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 1, 1)
    partners = torch.tensor([255, 255, 0, 11], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 1, 1)
    mixed, lam = mixup(images, partners, np.array([0.5, 0.5, 1 / 3, 0.5]))
    assert lam.tolist() == [0.5, 0.5, 0.25, 0.5]
    assert mixed[:, 0, 0, 0].tolist() == [128, 255, 64, 11]
