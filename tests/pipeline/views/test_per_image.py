"""Crop, flip and the operations in C++ give what those on whole batches give, which are compared with torchvision."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config.recipes import ViewRecipe
from pipeline.data.streaming import HostImages
from pipeline.training.execution import Execution
from pipeline.views import geometry, guard, operations, per_image
from pipeline.views.operations import GEOMETRIC_OPERATIONS, NO_OPERATION, OperationChoice, OperationTable
from pipeline.views.views import Views
from tests.support.pillow_reference import sample_images, whole_batches

CPU = torch.device("cpu")
SIZES = [(1, 1), (1, 7), (2, 3), (9, 17), (32, 32), (65, 70)]
LIMITS = {"Posterize": (0, 8), "Solarize": (0, 255), "SolarizeAdd": (0, 128)}
EVERYTHING = ViewRecipe(count=2, crop=3, flip=True, autoaugment="randaugment", erasing=0.5, mixing="both")


@pytest.fixture(autouse=True)
def _there_is_a_compiler(request: pytest.FixtureRequest) -> None:
    if "no_compiler" not in request.keywords and (why_not := per_image.why_not()) is not None:
        pytest.skip(why_not)


def random_table(rng: np.random.Generator, height: int, width: int) -> OperationTable:
    """Every operation at several magnitudes, some of them at the limits; matrices that no policy has are among them."""
    numbers = np.repeat(np.arange(len(operations.OPERATIONS)), 6)
    magnitudes = rng.uniform(-1, 1, len(numbers))
    for row, number in enumerate(numbers):
        if limits := LIMITS.get(operations.OPERATIONS[number]):
            whole = rng.choice([*limits, rng.integers(limits[0], limits[1] + 1)])
            magnitudes[row] = whole - (rng.random() if operations.OPERATIONS[number] == "Solarize" and whole else 0)
        elif rng.random() < 0.3:
            magnitudes[row] = rng.choice([-1, 0, 1, 39])
    num_moving = len(GEOMETRIC_OPERATIONS) * 6
    matrices = rng.normal(0, 1, (num_moving, 6)) * [1, 1, width, 1, 1, height]
    matrices[::3, [1, 3]] = 0  # the axes stay apart
    matrices[::6, [0, 4]] = rng.choice([1, -1, 1e-3, 50], (len(matrices[::6]), 2))
    matrices[1::7] *= rng.choice([1e-4, 1e4], (len(matrices[1::7]), 1))  # beyond 16.16 bits
    rows = np.empty((0, 2), dtype=np.int64)
    return OperationTable(height, width, rows, numbers, magnitudes, matrices)


@pytest.mark.parametrize(("height", "width"), SIZES)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_operations_equal_those_on_whole_batches(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = random_table(rng, height, width)
    images = sample_images(height, width, num_noise=8, seed=seed)
    rows = rng.integers(NO_OPERATION, len(table.operations), (len(images), 3))
    choice = OperationChoice(table, rows)
    expected = operations.apply(images, choice)
    assert torch.equal(per_image.apply_operations(images, choice), expected)
    assert torch.equal(images, expected), "in place"


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_each_operation_alone_equals_that_on_whole_batches(height: int, width: int) -> None:
    table = random_table(np.random.default_rng(1), height, width)
    images = sample_images(height, width)
    for row, number in enumerate(table.operations):
        choice = OperationChoice(table, np.full((len(images), 1), row))
        ours, expected = per_image.apply_operations(images.clone(), choice), operations.apply(images, choice)
        assert torch.equal(ours, expected), f"{operations.OPERATIONS[number]} by {table.magnitudes[row]}"


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_and_flip_equal_those_by_index_maps(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    images = sample_images(height, width, num_noise=50)
    offsets = rng.integers([-height - 2, -width - 2], [height + 3, width + 3], (len(images), 2))
    offsets[::4] = 0
    flipped = rng.random(len(images)) < 0.5
    maps = geometry.crop_flip_maps(torch.from_numpy(offsets), torch.from_numpy(flipped), height, width)
    assert torch.equal(per_image.crop_flip(images.clone(), offsets, flipped), geometry.gather(images, maps))


def test_images_that_are_not_contiguous_are_copied() -> None:
    images = sample_images(6, 5).permute(0, 1, 3, 2)
    before, still = images.clone(), np.zeros((len(images), 2), dtype=np.int64)
    flipped = per_image.crop_flip(images, still, np.ones(len(images), dtype=np.bool_))
    assert torch.equal(flipped, before.flip(-1)) and torch.equal(images, before)


def made(images: Tensor | HostImages, recipe: ViewRecipe) -> list[bytes]:
    views = Views(images, torch.arange(len(images)), recipe)
    whole = [views.digest(view) for view in range(2)]
    return [*whole, views.digest(1, np.array([5, 3, 3, 8]))]


@pytest.mark.parametrize("recipe", [EVERYTHING, ViewRecipe(count=1, flip=True), ViewRecipe(count=1, rotation=20)])
def test_views_are_the_same_with_a_compiler_without_one_and_from_the_host(recipe: ViewRecipe) -> None:
    images = sample_images(20, 24, num_noise=30)
    last = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    host, before, expected = HostImages(last, CPU), images.clone(), made(images, recipe)
    assert made(host, recipe) == expected
    with whole_batches():
        assert made(images, recipe) == made(host, recipe) == expected
    assert torch.equal(images, before) and np.array_equal(last, before.permute(0, 2, 3, 1).numpy())


@pytest.mark.no_compiler
def test_without_a_compiler_the_first_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(per_image, "_load", per_image._load.__wrapped__)
    monkeypatch.setattr(guard, "why_not", guard.why_not.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "views plain (no-such-compiler does not run)" in Execution().describe(CPU, 32)
    images = sample_images(8, 8)
    views = Views(images, torch.arange(len(images)), ViewRecipe(count=1, flip=True))
    flipped = torch.from_numpy(views.drawn(0)["flip"])
    expected = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    assert torch.equal(views.batch(0, torch.arange(len(images))).images, expected)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("apply_operations", "gives other pixels for "),
        ("crop_flip", "gives other pixels for crop and flip"),
        ("channels_first", "mixes channels up"),
    ],
)
def test_a_library_that_gives_other_pixels_is_not_used(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(per_image, name)

    def changed(images: Tensor, *arguments: Any) -> Tensor | None:
        made = real(images, *arguments)
        (arguments[-1] if name == "channels_first" else made)[7, 1, 3, 5] ^= 1
        return made

    monkeypatch.setattr(guard, "why_not", guard.why_not.__wrapped__)
    assert guard.why_not() is None
    monkeypatch.setattr(per_image, name, changed)
    assert f"what was compiled {what}" in str(guard.why_not())
    assert "views plain (what was compiled" in Execution().describe(CPU, 32)


def test_threads_load_the_library_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], per_image._load.__wrapped__
    together = threading.Barrier(4)

    def counted() -> object:
        loaded.append(library := load())
        return library

    monkeypatch.setattr(per_image, "_load", functools.cache(counted))

    def ask() -> None:
        together.wait()
        assert per_image.why_not() is None

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1


@pytest.mark.parametrize("name", operations.COLOUR_OPERATIONS)
def test_the_guard_compares_every_colour_operation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(guard, "why_not", guard.why_not.__wrapped__)
    assert guard.why_not() is None
    monkeypatch.setitem(operations.COLOUR_OPERATIONS, name, lambda images, magnitudes: images)
    assert "what was compiled gives other pixels for " in str(guard.why_not())
