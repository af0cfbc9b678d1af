"""How often labels are right by operation, against counts by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config.recipes import ViewRecipe
from pipeline.views import operations
from pipeline.views.scores import EVERYTHING, OperationMeter, wilson_interval

TARGETS = np.array([0, 1, 2, 3])
Counts = dict[tuple[str, str], tuple[int, int, int]]


def count(labels: list[int], drawn: dict[str, Any], times: int = 1, **operations: Any) -> Counts:
    meter = OperationMeter(ViewRecipe(count=1, **operations), 32)
    arrays: dict[str, NDArray[Any]] = {name: np.array(values) for name, values in drawn.items()}
    for _ in range(times):
        meter.add(np.array(labels, dtype=np.uint8), TARGETS, arrays)
    return {
        (score.operation, score.drawn): (score.num_images, score.num_right, score.num_either)
        for score in meter.scores()
    }


def test_without_mixing_a_label_is_right_where_it_is_the_target() -> None:
    counts = count([0, 1, 0, 0], {"flip": [True, False, True, False]}, flip=True)
    assert counts == {
        (EVERYTHING, EVERYTHING): (4, 2, 2),
        ("flip", "left-right"): (2, 1, 1),
        ("flip", "none"): (2, 1, 1),
    }


def test_views_add_up() -> None:
    assert count([0, 1, 2, 0], {}, times=3) == {(EVERYTHING, EVERYTHING): (12, 9, 9)}


def test_with_mixing_it_is_the_larger_shares_target_and_the_larger_shares_operation() -> None:
    drawn = {
        "lambda": np.array([0.95, 0.15, 0.5, 0.55], dtype=np.float32),
        "partner": [1, 2, 3, 0],
        "flip": [True, False, False, False],
    }
    # The larger shares are those of images 0, 2, 2 and 3.
    counts = count([0, 1, 2, 0], drawn, flip=True, mixing="cutmix")
    assert counts[EVERYTHING, EVERYTHING] == (4, 2, 4)
    assert counts["flip", "left-right"] == (1, 1, 1) and counts["flip", "none"] == (3, 1, 3)
    assert counts["larger share", "0.90 to 1.00"] == (1, 1, 1)
    assert counts["larger share", "0.80 to 0.90"] == (1, 0, 1)
    assert counts["larger share", "0.50 to 0.60"] == (2, 1, 2)


def test_magnitudes_fall_into_equal_parts() -> None:
    counts = count([0, 1, 2, 0], {"rotation": [0.0, -4.9, 5.0, -20.0]}, rotation=20.0)
    assert counts["rotation, either way", "0.0° to 5.0°"] == (2, 2, 2)
    assert counts["rotation, either way", "5.0° to 10.0°"] == (1, 1, 1)
    assert counts["rotation, either way", "15.0° to 20.0°"] == (1, 0, 0)
    counts = count([0, 1, 2, 0], {"scale": [0.9, 0.96, 1.0, 1.09]}, scale=0.1)
    assert [key[1] for key in counts if key[0] == "scale, times"] == [
        "0.90 to 0.95", "0.95 to 1.00", "1.00 to 1.05", "1.05 to 1.10",
    ]  # fmt: skip


def test_crops_fall_by_the_larger_shift_a_pixel_or_several_at_a_time() -> None:
    crop = [[0, 0], [-4, 1], [2, -3], [3, 3]]
    counts = count([0, 1, 2, 0], {"crop": crop}, crop=4)
    assert {key[1]: value for key, value in counts.items() if key[0] == "crop, moved by"} == {
        "0 px": (1, 1, 1), "3 px": (2, 1, 1), "4 px": (1, 1, 1),
    }  # fmt: skip
    wide = count([0, 1, 2, 0], {"crop": [[0, 0], [-4, 1], [20, -3], [32, 3]]}, crop=32)
    assert sum(value[0] for key, value in wide.items() if key[0] == "crop, moved by") == 4
    assert ("crop, moved by", "0 to 5 px") in wide and ("crop, moved by", "30 to 32 px") in wide


def test_an_image_counts_under_each_operation_that_was_applied() -> None:
    invert, contrast = (operations.OPERATIONS.index(name) for name in ("Invert", "Contrast"))
    applied = [[invert, contrast], [-1, -1], [-1, contrast], [invert, -1]]
    drawn = {"sub_policy": [0, 0, 0, 0], "operations": applied, "magnitudes": np.zeros((4, 2))}
    counts = count([0, 1, 0, 3], drawn, autoaugment="cifar10")
    assert counts["AutoAugment", "Invert"] == (2, 2, 2) and counts["AutoAugment", "Contrast"] == (2, 1, 1)
    assert counts["AutoAugment", "nothing applied"] == (1, 1, 1)
    assert counts["sub-policy", "1: Invert 0.1, Contrast 0.2"] == (4, 3, 3)


def test_a_policy_without_sub_policies_has_groups_of_its_own_name() -> None:
    equalize = operations.OPERATIONS.index("Equalize")
    drawn = {"operations": [[equalize], [-1], [equalize], [0]], "magnitudes": np.zeros((4, 1))}
    assert count([0, 1, 0, 3], drawn, autoaugment="trivialaugment") == {
        (EVERYTHING, EVERYTHING): (4, 3, 3),
        ("TrivialAugment", "nothing applied"): (1, 1, 1),
        ("TrivialAugment", "Equalize"): (2, 1, 1),
        ("TrivialAugment", "ShearX"): (1, 1, 1),
    }
    counts = count([0, 1, 0, 3], drawn, autoaugment="randaugment")
    assert counts["RandAugment", "Equalize"] == (2, 1, 1)


def test_cut_and_erased_boxes_fall_by_their_share_of_the_area() -> None:
    share = [0.1, 0.29, 0.31, 1.0]
    spans = {"scale": [0.1, 0.9], "ratio": [0.75, 1.333]}
    counts = count([0, 1, 0, 3], {"resized_crop_share": share}, resized_crop=spans)
    assert {key[1]: value for key, value in counts.items() if key[0] == "resized crop, share of the area"} == {
        "0.10 to 0.30": (2, 2, 2), "0.30 to 0.50": (1, 0, 0), "0.70 to 0.90": (1, 1, 1),
    }  # fmt: skip
    # Of 32 x 32 pixels: nothing, 2 % and 33 % of the area, and 19 x 10 of them, 18.6 %.
    erased = [[0, 0, 0, 0], [0, 0, 5, 4], [5, 5, 31, 18], [1, 1, 20, 11]]
    counts = count([0, 1, 0, 3], {"erasing": erased}, erasing=0.5)
    assert {key[1]: value for key, value in counts.items() if key[0] == "erasing"} == {
        "nothing": (1, 1, 1), "0.02 to 0.10": (1, 1, 1), "0.17 to 0.25": (1, 1, 1), "0.25 to 0.33": (1, 0, 0),
    }  # fmt: skip


def test_samples_that_mix_in_different_ways_are_told_apart() -> None:
    drawn = {"lambda": [1.0, 0.7, 0.2, 0.6], "partner": [0, 2, 1, 0], "mixing": [0, 1, 1, 2]}
    counts = count([0, 1, 1, 0], drawn, mixing="both", mixing_probability=0.5)
    assert counts["mixing", "none"] == (1, 1, 1)
    assert counts["mixing", "cutmix"] == (2, 2, 2) and counts["mixing", "mixup"] == (1, 0, 1)


def test_wilsons_interval_is_that_of_statsmodels() -> None:
    # statsmodels.stats.proportion.proportion_confint(7, 10, method="wilson")
    assert wilson_interval(7, 10) == pytest.approx((39.6778, 89.2209), abs=1e-3)
    low, high = wilson_interval(0, 5)
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(43.4482, abs=1e-3)
