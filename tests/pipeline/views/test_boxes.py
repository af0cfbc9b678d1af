"""Boxes of resized crops and of erasing are torchvision's, given the same draws; so are the pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomErasing, RandomResizedCrop

from pipeline.config.recipes import ViewRecipe
from pipeline.views import boxes, draws
from pipeline.views.views import Views
from tests.support.encoded import photographs, views_of

SPANS = {"scale": [0.08, 1.0], "ratio": [0.75, 1.333]}
SIZES = np.tile([[500, 375], [375, 500], [64, 64], [20, 300], [300, 20], [7, 9], [1, 1]], (60, 1))
N = len(SIZES)


def uniforms(name: str, number: int) -> NDArray[np.float64]:
    return draws.uniforms(0, "", 0, name, N, number)


class Replay:
    """Gives torchvision the draws of one sample in place of its own; those of the place come last."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str) -> None:
        self.name, self.sample, self.pending = name, 0, iter(())
        empty, randint = torch.empty, torch.randint

        class Drawn:
            def uniform_(_, low: float, high: float) -> torch.Tensor:
                return torch.tensor([float(low) + float(high - low) * next(self.pending)], dtype=torch.float64)

        patch.setattr(torch, "empty", lambda *size, **rest: Drawn() if size == (1,) else empty(*size, **rest))
        patch.setattr(
            torch, "randint",
            lambda low, high, size, **_: torch.tensor([low + int((high - low) * next(self.place))])
            if low == 0 else randint(low, high, size),
        )  # fmt: skip

    def of(self, sample: int, *, y_first: bool = True) -> None:
        """Take the draws of a sample; torchvision draws the place along y first."""
        place = uniforms(f"{self.name}, place", 2)[sample]
        self.place = iter(place[::-1] if y_first else place)
        self.pending = self._attempts(sample)

    def _attempts(self, sample: int) -> Iterator[float]:
        for attempt in range(10):
            yield from uniforms(f"{self.name}, attempt {attempt}", 2)[sample]


def test_boxes_of_resized_crops_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = boxes.crop_boxes(uniforms, SIZES, SPANS)
    replay = Replay(monkeypatch, "resized crop")
    for sample in range(0, N, 3):
        replay.of(sample)
        top, left, height, width = RandomResizedCrop.get_params(
            Image.new("L", tuple(SIZES[sample].tolist())), SPANS["scale"], SPANS["ratio"]
        )
        assert ours[sample].tolist() == [left, top, left + width, top + height], SIZES[sample]


def test_where_no_box_fits_it_is_the_middle() -> None:
    # 20 x 300 is narrower than 3 to 4: 20 / 0.75 = 26.67 rows from (300 - 27) // 2; and the same lying down, by 1.333.
    ours = boxes.crop_boxes(lambda name, number: uniforms(name, number) * 0 + 0.999, SIZES, SPANS)
    by_size = {tuple(size): box for size, box in zip(SIZES.tolist(), ours.tolist(), strict=True)}
    assert by_size[20, 300] == [0, 136, 20, 163] and by_size[300, 20] == [136, 0, 163, 20]
    assert by_size[1, 1] == [0, 0, 1, 1]


def test_a_sample_without_a_box_draws_again_and_others_draw_nothing_more() -> None:
    asked: list[str] = []

    def draw(name: str, number: int) -> NDArray[np.float64]:
        asked.append(name)
        return uniforms(name, number)

    boxes.crop_boxes(draw, np.full((N, 2), 64), {"scale": [0.1, 0.2], "ratio": [1.0, 1.0]})
    assert asked == ["resized crop, place", "resized crop, attempt 0"]


def test_erased_boxes_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = boxes.erased_boxes(uniforms, 0.5, 24, 40)
    is_erased = uniforms("erasing", 1)[:, 0] < 0.5
    assert stats.binomtest(int(is_erased.sum()), N, 0.5).pvalue > 1e-4
    assert (ours[~is_erased] == 0).all()
    image, replay = torch.zeros(3, 24, 40), Replay(monkeypatch, "erasing")
    for sample in np.flatnonzero(is_erased):
        replay.of(int(sample), y_first=False)
        top, left, height, width, _ = RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])
        assert ours[sample].tolist() == [left, top, left + width, top + height]


def test_areas_and_places_are_evenly_spread() -> None:
    number = 20_000
    made = boxes.crop_boxes(
        lambda name, count: draws.uniforms(2, "", 5, name, number, count),
        np.tile([[4000, 3000]], (number, 1)),
        {"scale": [0.1, 0.4], "ratio": [0.75, 1.333]},
    )
    sides = made[:, 2:] - made[:, :2]
    share = sides.prod(axis=1) / 12e6  # up to 0.4 every ratio fits, so that nothing is drawn again
    assert stats.kstest(share, stats.uniform(0.1, 0.3).cdf).pvalue > 1e-4
    ratio = np.log(sides[:, 0] / sides[:, 1])
    assert stats.kstest(ratio, stats.uniform(np.log(0.75), np.log(1.333 / 0.75)).cdf).pvalue > 1e-4
    place = made[:, :2] / ([4000, 3000] - sides + 1)
    assert all(stats.kstest(place[:, axis], stats.uniform.cdf).pvalue > 1e-4 for axis in (0, 1))


RECIPE = ViewRecipe(count=2, resized_crop=SPANS, flip=True)


def test_a_view_is_torchvisions_resized_crop_of_the_image_then_the_rest() -> None:
    images = photographs()
    views = views_of(images, RECIPE)
    drawn, made = views.drawn(1), views.batch(1, np.arange(30)).images
    for row, image in enumerate(images.images):
        left, top, right, bottom = drawn["resized_crop"][row].tolist()
        expected = F.resized_crop(image, top, left, bottom - top, right - left, [12, 12])
        expected = F.hflip(expected) if drawn["flip"][row] else expected
        assert np.array_equal(made[row].permute(1, 2, 0).numpy(), np.asarray(expected)), row
        share = (right - left) * (bottom - top) / (image.width * image.height)
        assert drawn["resized_crop_share"][row] == pytest.approx(share)


def test_images_without_sizes_cannot_be_cut() -> None:
    views = Views(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), RECIPE)
    with pytest.raises(AssertionError, match="sizes are not known"):
        views.batch(0, np.arange(4))


def test_what_is_erased_is_black_and_the_rest_as_it_was() -> None:
    images = torch.randint(1, 256, (60, 3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = Views(images, torch.zeros(60, dtype=torch.int64), ViewRecipe(count=1, erasing=0.6))
    erased, made = views.drawn(0)["erasing"], views.batch(0, np.arange(60)).images
    expected = images.clone()
    for image, (left, top, right, bottom) in zip(expected, erased.tolist(), strict=True):
        image[:, top:bottom, left:right] = 0
    assert torch.equal(made, expected)
    share = (made == 0).all(dim=1).float().mean(dim=(1, 2))
    assert 20 < (share > 0).sum() < 50 and 0.01 < share[share > 0].min() and share.max() < 0.36
