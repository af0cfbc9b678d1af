"""A teacher over views: labels, replay and canaries."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config.recipes import ViewRecipe
from pipeline.errors import NumericalError, UsageError
from pipeline.labels import replay as label_replay
from pipeline.labels.cache import LabelCache, make_identity, make_provenance
from pipeline.labels.replay import (
    OTHER_MARGIN,
    SAME_MARGIN,
    Replay,
    check_canaries,
    make_canaries,
    other_pixels,
    replay,
)
from pipeline.labels.teacher import Teacher, compile_teacher, label_view
from pipeline.models import TEACHERS
from pipeline.models.folding import fold
from pipeline.models.teachers import build_teacher
from pipeline.views.views import Views, normalize
from tests.support.project import ROOT

RECIPE = ViewRecipe(count=3, crop=1, flip=True, autoaugment="cifar10", mixing="cutmix")
NUM_SAMPLES, NUM_CLASSES, SIZE = 40, 4, 8
MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)


def make_views(recipe: ViewRecipe = RECIPE) -> Views:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_SAMPLES, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return Views(images, torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator), recipe)


def make_teacher(batch_size: int = 16) -> Teacher:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, NUM_CLASSES)).eval()
    return Teacher(model, MEAN, STD, "fp32", batch_size)


def make_cache(teacher: Teacher, views: Views) -> LabelCache:
    identity = make_identity(
        dataset_sha256="0" * 64, split="train", view_recipe=RECIPE, class_names="abcd", num_samples=NUM_SAMPLES
    )
    provenance = make_provenance(
        teacher="t", checkpoint_sha256="0" * 64, mean=MEAN, std=STD, precision="fp32", device="cpu", versions={},
    )  # fmt: skip
    rows = np.stack([label_view(teacher, views, view).labels for view in range(3)]).astype(np.uint8)
    canaries = tuple(make_canaries(views, 3))
    return LabelCache(labels=rows, clean={}, canaries=canaries, identity=identity, provenance=provenance)


@pytest.mark.parametrize("batch_size", [1, 7, 40, 100])
def test_labels_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    views = make_views()
    assert np.array_equal(
        label_view(make_teacher(), views, 1).labels, label_view(make_teacher(batch_size), views, 1).labels
    )


def test_a_label_is_the_argmax_on_the_mixed_view_itself() -> None:
    teacher, views = make_teacher(), make_views()
    batch = views.batch(2, torch.arange(NUM_SAMPLES))
    images = (batch.images.float() / 255 - 0.5) / 0.2
    expected = teacher.module(images).argmax(1)
    assert np.array_equal(label_view(teacher, views, 2).labels, expected.numpy())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("poisoned_batch", [0, 1, 2])
def test_one_logit_that_is_not_finite_leaves_the_whole_view_without_labels(poison: float, poisoned_batch: int) -> None:
    class Broken(nn.Module):
        num_batches = 0

        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), NUM_CLASSES)
            if self.num_batches == poisoned_batch:
                logits[-1, 2] = poison
            self.num_batches += 1
            return logits

    teacher = Teacher(Broken(), MEAN, STD, "fp32", batch_size=16)
    with pytest.raises(NumericalError, match="logit of the teacher is not finite"):
        label_view(teacher, make_views(), 0)


def test_a_replay_names_view_sample_labels_and_margin() -> None:
    teacher, views = make_teacher(), make_views()
    cache = make_cache(teacher, views)
    everything = [(view, sample) for view in range(3) for sample in range(NUM_SAMPLES)]
    assert replay(cache, teacher, views, everything) == Replay(len(everything), [], None)
    labels = np.array(cache.labels)
    labels[1, 5] = (labels[1, 5] + 1) % NUM_CLASSES
    [difference] = replay(dataclasses.replace(cache, labels=labels), teacher, views, everything).differences
    assert (difference.view, difference.sample, difference.cached) == (1, 5, labels[1, 5])
    assert difference.replayed == cache.labels[1, 5]
    images = (views.batch(1, torch.tensor([5])).images.float() / 255 - 0.5) / 0.2
    logits = teacher.module(images)[0]
    expected = (logits[difference.replayed] - logits[difference.cached]).item()
    assert difference.margin == pytest.approx(expected, abs=1e-5)


def test_canaries_notice_views_that_are_no_longer_the_same() -> None:
    cache = make_cache(make_teacher(), make_views())
    assert {canary.view for canary in cache.canaries} == {0, 1, 2}
    assert check_canaries(cache, make_views()) is None
    assert check_canaries(cache, make_views(dataclasses.replace(RECIPE, seed=1))) == 0


def test_other_pixels_of_files_are_said_with_both_decoders_and_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(make_teacher(), make_views())
    plain = "the pixels of view 2 are not those that were labelled (another version of this project or of its libraries"
    assert other_pixels(cache, 2) == f"{plain} made them)"
    recorded = {"torch": "2.9", "pillow": "12.0.0", "libjpeg": "turbo-3.1.2", "libwebp": "1.6.0"}
    identity = {**cache.identity, "rendition": {"image_size": SIZE, "resize": "crop"}}
    files = dataclasses.replace(cache, identity=identity, provenance={**cache.provenance, "versions": recorded})
    monkeypatch.setattr(label_replay, "decoders", lambda: {"pillow": "13.0.0", "libjpeg": "turbo-3.2.0"})
    assert other_pixels(files, 0) == (
        "the pixels of view 0 are not those that were labelled (the files were decoded by pillow 12.0.0, libjpeg "
        "turbo-3.1.2, libwebp 1.6.0, and are here by pillow 13.0.0, libjpeg turbo-3.2.0)"
    )
    monkeypatch.setattr(label_replay, "decoders", lambda: recorded)
    assert other_pixels(files, 2) == other_pixels(cache, 2)


# Random weights give every image nearly the same logits; standardised, they spread by this much over the images.
SPREAD = 0.5
NUM_IMAGES = 150


@dataclasses.dataclass(frozen=True)
class RealSize:
    """A teacher as large as real ones, `folded` as labelling folds it, and the logits that `folded` gives `images`."""

    model: nn.Module
    folded: nn.Module
    images: Tensor
    logits: Tensor


@pytest.fixture(
    scope="module",
    params=["densenet121", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg16_bn", "resnet50"))],
)
def real_size(request: pytest.FixtureRequest) -> RealSize:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (NUM_IMAGES, 3, 4, 4), generator=generator, dtype=torch.uint8)
    views = Views(
        nn.functional.interpolate(coarse, size=32, mode="bilinear"),
        torch.zeros(NUM_IMAGES, dtype=torch.int64),
        ViewRecipe(count=1, crop=4, flip=True, autoaugment="cifar10", mixing="cutmix"),
    )
    images = normalize(views.batch(0, torch.arange(NUM_IMAGES)).images, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    torch.manual_seed(0)
    model = build_teacher(request.param, num_classes=10)
    with torch.inference_mode():
        for part in images.split(50):
            model(part)
    std, mean = torch.std_mean(find_logits(model.eval(), images), dim=0)
    head = model.get_submodule(TEACHERS[request.param])
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_((SPREAD / std)[:, None])
        head.bias.sub_(mean).mul_(SPREAD / std)
    folded = fold(model, 32)[0].to(memory_format=torch.channels_last)
    logits = find_logits(folded, images)
    assert len(logits.argmax(1).unique()) == 10
    return RealSize(model, folded, images, logits)


def find_logits(model: nn.Module, images: Tensor, *, batch_size: int = 64, precision: str = "fp32") -> Tensor:
    teacher = Teacher(model, MEAN, STD, precision, batch_size)
    return torch.cat([teacher.logits(part) for part in images.split(batch_size)])


def test_in_fp32_nothing_but_a_near_tie_hangs_on_how_the_logits_are_computed(real_size: RealSize) -> None:
    """Shows that no logit moves by half of SAME_MARGIN: labels differ only where two logits are within SAME_MARGIN.

    That covers every margin a label could have, while an equality of labels would hold for these images alone.
    """
    model, folded, images = real_size.model, real_size.folded, real_size.images
    contiguous = copy.deepcopy(folded).to(memory_format=torch.contiguous_format)
    by_way = {
        "batches of 1": find_logits(folded, images[:24], batch_size=1),
        "batches of 7": find_logits(folded, images[:70], batch_size=7),
        "batches of 150": find_logits(folded, images, batch_size=150),
        "contiguous": find_logits(contiguous, images),
        "not folded": find_logits(model, images),
    }
    torch.set_num_threads(2)
    try:
        by_way["two threads"] = find_logits(folded, images[:64])
        by_way["all at once"] = find_logits(model, images[:35], batch_size=7)
    finally:
        torch.set_num_threads(1)
    for way, logits in by_way.items():
        assert (logits - real_size.logits[: len(logits)]).abs().max() < SAME_MARGIN / 2, way


def test_bf16_gives_another_label_at_near_ties_alone(real_size: RealSize) -> None:
    logits, labels = find_logits(real_size.folded, real_size.images, precision="bf16"), real_size.logits.argmax(1)
    assert logits.dtype == torch.float32
    margins = logits.amax(1) - logits[torch.arange(NUM_IMAGES), labels]
    assert margins.max() < OTHER_MARGIN
    assert (labels != logits.argmax(1)).float().mean() < 0.1


def test_a_teacher_that_cannot_be_compiled_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uncompiled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", lambda model, **settings: Uncompiled())
    with pytest.raises(
        UsageError, match=r"^label.compile: true: .*No working C\+\+ compiler.* set it to false"
    ) as error:
        compile_teacher(make_teacher(), SIZE)
    assert "\n" not in str(error.value)


COMPILE = """
import torch
from pipeline.labels.teacher import compile_teacher, label_view
from tests.pipeline.labels.test_teacher import SIZE, make_teacher, make_views
torch.set_num_threads(1)
plain = make_teacher()
compiled = compile_teacher(plain, SIZE)
assert compiled.compiled and not plain.compiled
for batch_size in (2, 4, 5, 10, 20, 40):
    compiled.batch_size = batch_size
    assert (label_view(plain, make_views(), 0).labels == label_view(compiled, make_views(), 0).labels).all()
# Small and large batches may take different convolutions.
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("compiler", "expected"), [("g++", "compiled"), ("/nowhere/g++", "UsageError: label.compile")])
def test_a_compiled_teacher_gives_the_same_labels_and_a_missing_compiler_is_named(
    compiler: str, expected: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert expected in (done.stdout or done.stderr).splitlines()[-1], done.stderr
