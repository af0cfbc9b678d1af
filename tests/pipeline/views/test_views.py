from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.recipes import ViewRecipe
from pipeline.views import draws, operations
from pipeline.views.policies import POLICIES
from pipeline.views.views import Views, normalize
from tests.support.pillow_reference import on_pil

NUM_SAMPLES, SIZE = 30, 12
NOTHING = ViewRecipe(seed=0, count=3)
EVERYTHING = ViewRecipe(
    seed=5,
    count=3,
    crop=2,
    flip=True,
    rotation=20.0,
    translate=0.1,
    scale=0.1,
    shear=5.0,
    brightness=0.2,
    contrast=0.2,
    autoaugment="cifar10",
    mixing="cutmix",
)
RECIPES = {
    "nothing": NOTHING,
    "crop, flip, autoaugment, cutmix": ViewRecipe(count=3, crop=4, flip=True, autoaugment="cifar10", mixing="cutmix"),
    "everything": EVERYTHING,
    "everything, mixup": replace(EVERYTHING, mixing="mixup"),
    "randaugment": ViewRecipe(count=3, autoaugment="randaugment"),
    "trivialaugment": ViewRecipe(count=3, autoaugment="trivialaugment"),
    "timm, erasing, either mixing": ViewRecipe(
        count=3, autoaugment="randaugment", magnitudes="timm", probability=0.5, erasing=0.5, mixing="both",
        mixing_probability=0.8, cutmix_alpha=1.0, mixup_alpha=0.8,
    ),
    "pairs": ViewRecipe(count=3, crop=2, flip=True, mixing="cutmix", partner="paired"),
}  # fmt: skip
# Changing one of these changes what every label cache was made from: raise labels.SCHEMA_VERSION with it.
GOLDEN_DIGESTS = {
    "nothing": "f8b80ed24a4e6d2946e9c49ae14f3460483f5f36a0e9246b80454b106fcd5587",
    "crop, flip, autoaugment, cutmix": "ac70fbb70b3e0b3f00e6025c4798036c060c260604561d7226968670a9c9cdec",
    "everything": "effabbb3b2b3cf3b72d5bae1e3c01760a3e7ca22baa84c004d3e326a7ca753b1",
    "everything, mixup": "3f05b13c1234d1fb0c5979279870399f6961e24c6b4a948add351ce6b9af7216",
    "randaugment": "bbfc4f8b3a72ee78b830a1888f373ccb08caa9c5053227c5f71633b1e9808678",
    "trivialaugment": "b26dab85437abf9679894fb5f17f398164bc77fae1db950e6a8f31d9f5b9a032",
    "timm, erasing, either mixing": "0633f4621c47ebf2054711f67a3e752d5c02df68c60b2126fedfd0d4bb9ea2e6",
    "pairs": "657bb4255879474262464877192743bbce064090f66e14b6f84caa87b8fe3a81",
}


def make_views(recipe: ViewRecipe, *, num_samples: int = NUM_SAMPLES, key: str = "") -> Views:
    pixels = np.arange(num_samples * 3 * SIZE * SIZE) * 40503 % 65536 // 256
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(num_samples, 3, SIZE, SIZE)
    # Unequal ranges of levels, or contrast operations would have nothing to do.
    images = images // (torch.arange(num_samples) % 8 + 1).to(torch.uint8).reshape(-1, 1, 1, 1) + 20
    return Views(images, torch.arange(num_samples) % 7, recipe, key=key)


def whole(views: Views, view: int) -> torch.Tensor:
    return views.batch(view, np.arange(views.num_samples)).images


@pytest.mark.parametrize("name", RECIPES)
def test_a_view_of_a_recipe_never_changes(name: str) -> None:
    assert make_views(RECIPES[name]).digest(2).hex() == GOLDEN_DIGESTS[name]


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=15)
@given(data=st.data())
def test_a_view_ignores_batch_size_order_and_repetition(name: str, data: st.DataObject) -> None:
    views = make_views(RECIPES[name])
    indices = np.array(data.draw(st.lists(st.integers(0, NUM_SAMPLES - 1), min_size=1, max_size=40)))
    every = views.batch(1, np.arange(NUM_SAMPLES))
    views.batch(data.draw(st.integers(0, 5)), indices[:1])
    some = views.batch(1, torch.from_numpy(indices))
    for of_some, of_every in zip(vars(some).values(), vars(every).values(), strict=True):
        assert torch.equal(of_some, of_every[indices])


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=10)
@given(prepared=st.lists(st.integers(0, 2), max_size=3), chunk=st.integers(1, 40), limit=st.sampled_from([0, 2**31]))
def test_a_view_made_ahead_is_the_same(name: str, prepared: list[int], chunk: int, limit: int) -> None:
    expected = vars(make_views(RECIPES[name]).batch(1, np.arange(NUM_SAMPLES))).values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.views.views.CPU_CHUNK", chunk)
        patch.setattr("pipeline.views.views.MAX_PREPARED_BYTES", limit)
        views = make_views(RECIPES[name])
        for view in prepared:
            views.prepare(view)
        batches = [vars(views.batch(1, np.arange(start, start + 10))).values() for start in range(0, NUM_SAMPLES, 10)]
    for whole_view, parts in zip(expected, zip(*batches, strict=True), strict=True):
        assert torch.equal(whole_view, torch.cat(parts))


def test_images_of_a_prepared_view_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    views = make_views(EVERYTHING)
    views.prepare(1)
    monkeypatch.setattr(operations, "apply", lambda *_: pytest.fail("made twice"))
    views.prepare(1)
    assert whole(views, 1).shape == (NUM_SAMPLES, 3, SIZE, SIZE)


def test_a_view_ignores_the_process_its_threads_and_its_global_generators() -> None:
    script = (
        "import sys, random, numpy, torch\n"
        "random.seed(3); numpy.random.seed(3); torch.manual_seed(3); torch.set_num_threads(3)\n"
        "from test_views import RECIPES, make_views\n"
        "print(make_views(RECIPES['everything']).digest(2).hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[3]}", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == GOLDEN_DIGESTS["everything"]


def test_a_view_leaves_the_global_generators_and_the_images_alone() -> None:
    views = make_views(EVERYTHING)
    images = views.images.clone()
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    whole(views, 0)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert states == after
    assert torch.equal(views.images, images)


def test_views_seeds_and_keys_differ_from_each_other() -> None:
    digests = {
        make_views(replace(EVERYTHING, seed=seed), key=key).digest(view)
        for seed in (5, 6)
        for key in ("", "teacher")
        for view in (0, 1, 7)
    }
    assert len(digests) == 12


def test_there_is_a_view_beyond_the_labelled_ones() -> None:
    views = make_views(EVERYTHING, key="teacher")
    assert len(views) == 3
    assert views.batch(1_000_000, np.arange(2)).images.shape == (2, 3, SIZE, SIZE)


def test_the_number_of_labelled_views_changes_no_view() -> None:
    assert make_views(replace(EVERYTHING, count=600)).digest(1) == make_views(EVERYTHING).digest(1)


def test_a_view_without_operations_is_the_images_themselves() -> None:
    views = make_views(NOTHING)
    batch = views.batch(0, np.arange(NUM_SAMPLES))
    assert torch.equal(batch.images, views.images)
    assert torch.equal(batch.labels, views.labels) and torch.equal(batch.partner_labels, views.labels)
    assert torch.equal(batch.lam, torch.ones(NUM_SAMPLES))


def test_adding_an_operation_shifts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, np.ndarray] = {}
    uniforms = draws.uniforms

    def record(seed: int, key: str, view: int, operation: str, num_samples: int, num_draws: int) -> np.ndarray:
        values = uniforms(seed, key, view, operation, num_samples, num_draws)
        np.testing.assert_array_equal(drawn.setdefault(operation, values), values)
        return values

    monkeypatch.setattr(draws, "uniforms", record)
    make_views(EVERYTHING).batch(0, np.arange(2))
    named = set(drawn)
    for name, off in vars(NOTHING).items():
        if name not in ("seed", "count"):
            make_views(replace(EVERYTHING, **{name: off})).batch(0, np.arange(2))
    make_views(replace(EVERYTHING, mixing="mixup")).batch(0, np.arange(2))
    assert set(drawn) == named == {
        *("crop", "flip", "rotation", "translate", "scale", "shear", "brightness", "contrast"),
        *("jitter-order", "autoaugment", "partner", "lambda", "box"),
    }  # fmt: skip


def test_operations_left_out_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "uniforms", lambda *_: pytest.fail("drawn"))
    make_views(NOTHING).batch(0, np.arange(2))


def test_draws_of_a_view_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    views = make_views(EVERYTHING)
    expected = whole(views, 1)
    monkeypatch.setattr(draws, "uniforms", lambda *_: pytest.fail("drawn twice"))
    assert torch.equal(whole(views, 1), expected)


def column(recipe: ViewRecipe, operation: str, view: int, num_draws: int = 1) -> np.ndarray:
    return draws.uniforms(recipe.seed, "", view, operation, NUM_SAMPLES, num_draws)


def test_a_view_is_crop_flip_rotation_affine_jitter_in_that_order() -> None:
    recipe = replace(EVERYTHING, autoaugment="none", mixing="none")
    views = make_views(recipe)
    draws = {name: column(recipe, name, 1) for name in ("flip", "rotation", "scale", "shear", "brightness", "contrast")}

    def reference(image: Image.Image, i: int) -> Image.Image:
        top, left = (int(u * 5) for u in column(recipe, "crop", 1, 2)[i])
        image = F.crop(F.pad(image, [2] * 4), top, left, SIZE, SIZE)
        image = F.hflip(image) if draws["flip"][i, 0] < 0.5 else image
        image = F.rotate(image, -20 + 40 * draws["rotation"][i, 0])
        shift = [round((-0.1 + 0.2 * u) * SIZE) for u in column(recipe, "translate", 1, 2)[i]]
        shear = [-5 + 10 * draws["shear"][i, 0], 0.0]
        image = F.affine(image, 0.0, shift, 0.9 + 0.2 * draws["scale"][i, 0], shear)
        brightness, contrast = (0.8 + 0.4 * draws[name][i, 0] for name in ("brightness", "contrast"))
        if column(recipe, "jitter-order", 1)[i, 0] < 0.5:
            return F.adjust_contrast(F.adjust_brightness(image, brightness), contrast)
        return F.adjust_brightness(F.adjust_contrast(image, contrast), brightness)

    assert torch.equal(whole(views, 1), on_pil(reference, views.images, range(NUM_SAMPLES)))


@pytest.mark.parametrize("jitter", ["brightness", "contrast"])
def test_one_half_of_the_colour_jitter_may_be_left_out(jitter: str) -> None:
    recipe = replace(NOTHING, **{jitter: 0.5})
    views = make_views(recipe)
    factors = (0.5 + column(recipe, jitter, 2)[:, 0]).tolist()
    expected = on_pil(getattr(F, f"adjust_{jitter}"), views.images, factors)
    assert torch.equal(whole(views, 2), expected)


@pytest.mark.parametrize(
    ("policy", "drawn"),
    [
        ("cifar10", ("autoaugment", 0, 5)),
        ("randaugment", ("randaugment", 0, 4)),
        ("trivialaugment", ("trivialaugment", 0, 3)),
    ],
)
def test_a_policy_follows_the_jitter(policy: str, drawn: tuple[str, int, int]) -> None:
    unmixed = replace(EVERYTHING, autoaugment=policy, mixing="none")
    before = whole(make_views(replace(unmixed, autoaugment="none")), 0)
    choice = POLICIES[policy].choose(column(unmixed, *drawn), SIZE, SIZE)
    expected = operations.apply(before, choice)
    assert torch.equal(whole(make_views(unmixed), 0), expected)


@pytest.mark.parametrize("mixing", ["cutmix", "mixup"])
def test_a_partner_is_its_own_view_before_mixing(mixing: str) -> None:
    views = make_views(replace(EVERYTHING, mixing=mixing))
    unmixed = whole(make_views(replace(EVERYTHING, mixing="none")), 2)
    batch = views.batch(2, np.arange(NUM_SAMPLES))
    partners = np.floor(column(views.recipe, "partner", 2)[:, 0] * NUM_SAMPLES).astype(int)
    assert torch.equal(batch.labels, views.labels)
    assert torch.equal(batch.partner_labels, views.labels[partners])
    lam = batch.lam.double()[:, None, None, None]
    if mixing == "mixup":
        expected = torch.floor(lam * unmixed + (1 - lam) * unmixed[partners] + 0.5)
        assert torch.equal(batch.images.double(), expected)
        return
    from_first = (batch.images == unmixed).all(dim=1)
    from_partner = (batch.images == unmixed[partners]).all(dim=1)
    assert (from_first | from_partner).all()
    num_first = torch.round(lam.flatten() * SIZE * SIZE)
    assert (num_first <= from_first.sum(dim=(1, 2))).all()
    assert (SIZE * SIZE - num_first <= from_partner.sum(dim=(1, 2))).all()


def test_partners_are_drawn_uniformly_over_all_samples() -> None:
    num_samples = 50
    counts = np.zeros((num_samples, num_samples))
    views = Views(
        torch.zeros((num_samples, 3, 1, 1), dtype=torch.uint8),
        torch.arange(num_samples),
        ViewRecipe(count=1, mixing="mixup"),
    )
    for view in range(1000):
        batch = views.batch(view, np.arange(num_samples))
        counts[batch.labels.numpy(), batch.partner_labels.numpy()] += 1
    chi_square = ((counts - 20.0) ** 2 / 20.0).sum()
    assert 2000 < chi_square < 3000  # 2,450 degrees of freedom (50 x 49): standard deviation 70


def test_crops_and_flips_are_equally_likely() -> None:
    images = torch.zeros((20_000, 3, 3, 3), dtype=torch.uint8)
    images[:, :, 1, 1], images[:, :, 1, 2] = 1, 2
    views = Views(images, torch.zeros(20_000, dtype=torch.int64), ViewRecipe(count=1, crop=1, flip=True))
    made = views.batch(0, np.arange(20_000)).images[:, 0]
    distinct, counts = made.unique(dim=0, return_counts=True)
    # 9 crops x 2 flips; with the frame at the left edge the 2 is outside, and a flip shows in the 1 alone.
    assert len(distinct) == 18
    assert ((counts - 20_000 / 18) ** 2 / (20_000 / 18)).sum() < 50  # 17 degrees of freedom


def test_a_digest_is_that_of_the_pixels_however_they_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    views = make_views(EVERYTHING)
    expected = hashlib.sha256(whole(views, 1).numpy().tobytes())
    assert views.digest(1) == expected.digest()
    monkeypatch.setattr("pipeline.views.views.CPU_CHUNK", 7)
    assert views.digest(1) == expected.digest()
    assert views.digest(1, np.arange(NUM_SAMPLES)) == expected.digest()
    few = views.batch(1, np.array([4, 2])).images.numpy().tobytes()
    assert views.digest(1, np.array([4, 2])) == hashlib.sha256(few).digest()


def test_a_batch_may_be_empty() -> None:
    batch = make_views(EVERYTHING).batch(0, np.array([], dtype=np.int64))
    assert batch.images.shape == (0, 3, SIZE, SIZE) and batch.lam.shape == (0,)


@pytest.mark.parametrize("index", [-1, NUM_SAMPLES])
def test_a_sample_that_does_not_exist_is_an_error(index: int) -> None:
    with pytest.raises(AssertionError, match="unknown sample"):
        make_views(EVERYTHING).batch(0, np.array([index]))


def test_normalize_is_the_standard_score_of_pixels_in_the_unit_interval() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    result = normalize(images, mean=(0.5, 0.1, 0.0), std=(0.25, 0.2, 0.5))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.flatten(), torch.tensor([-2.0, 0.5, 2.0]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_the_gpu_makes_the_views_of_the_cpu(name: str) -> None:
    views = make_views(RECIPES[name], num_samples=3000)
    on_gpu = Views(views.images.cuda(), views.labels.cuda(), views.recipe)
    indices = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    expected, batch = views.batch(1, indices), on_gpu.batch(1, indices.cuda())
    for of_gpu, of_cpu in zip(vars(batch).values(), vars(expected).values(), strict=True):
        assert of_gpu.is_cuda and torch.equal(of_gpu.cpu(), of_cpu)
