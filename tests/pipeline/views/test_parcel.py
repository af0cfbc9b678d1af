"""What augmentations need on a device goes there in one piece, and the views are the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.data.streaming import HostImages
from pipeline.views import parcel
from pipeline.views.parcel import Parcel, fetch, send
from pipeline.views.views import Views
from tests.pipeline.views.test_views import EVERYTHING, GOLDEN_DIGESTS, NUM_SAMPLES, RECIPES, make_views

CPU = torch.device("cpu")
ARRAYS: list[NDArray[Any]] = [
    np.array([True, False, True]),
    np.arange(7),
    np.zeros((0, 4)),
    np.arange(12, dtype=np.int32).reshape(6, 2),
    np.array([[0.1, -2.5], [np.inf, 3.0]]).T,
    np.array(5, dtype=np.uint8),
    np.arange(9, dtype=np.float32)[::2],
]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs as for a GPU."""
    monkeypatch.setattr(parcel, "PACKED", ("cuda", "cpu"))


def test_arrays_come_out_of_one_piece_as_they_went_in(packed: None) -> None:
    box = Parcel(CPU)
    later = [box.add(array) for array in ARRAYS]
    box.send()
    tensors = [take() for take in later]
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        expected = torch.from_numpy(array.copy())
        assert tensor.dtype == expected.dtype and tensor.shape == expected.shape and torch.equal(tensor, expected)
    pieces = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    assert len(pieces) == 1, "one copy"
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def test_a_parcel_may_be_empty(packed: None) -> None:
    Parcel(CPU).send()
    box = Parcel(CPU)
    later = box.add(np.zeros((0, 3)))
    box.send()
    assert later().shape == (0, 3)


@pytest.mark.parametrize("most", [0, 60, 2**28])
def test_tensors_come_back_as_they_are(most: int, packed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "MAX_FETCHED", most)
    tensors = [*send(CPU, *ARRAYS), torch.tensor(2.5, dtype=torch.bfloat16), torch.arange(6.0).view(2, 3).T]
    fetched = fetch(tensors)
    for ours, tensor in zip(fetched, tensors, strict=True):
        assert ours.dtype == tensor.dtype and torch.equal(ours, tensor)
    assert len({tensor.untyped_storage().data_ptr() for tensor in (*fetched, *tensors) if tensor.numel()}) == 8 + 2 + 1
    assert fetch([]) == []


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("streamed", [False, True])
def test_packed_views_are_the_same(name: str, streamed: bool, packed: None) -> None:
    views = make_views(RECIPES[name])
    if streamed:
        views = Views(HostImages(views.images.permute(0, 2, 3, 1).numpy(), CPU), views.labels, views.recipe)
    batches = views.batches(2, torch.arange(NUM_SAMPLES).split(7)) if streamed else [views.batch(2, range(NUM_SAMPLES))]
    pixels = torch.cat([batch.images for batch in batches]).numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest() == GOLDEN_DIGESTS[name]


@pytest.mark.gpu
@pytest.mark.parametrize("streamed", [False, True])
def test_a_batch_that_is_not_prepared_goes_to_a_gpu_in_pinned_copies(
    streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.views.views.MAX_PREPARED_BYTES", 0)
    views, gpu = make_views(EVERYTHING, num_samples=3000), torch.device("cuda", 0)
    images = HostImages(views.images.permute(0, 2, 3, 1).numpy(), gpu) if streamed else views.images.to(gpu)
    on_gpu, parts = Views(images, views.labels, views.recipe), torch.arange(3000).split(500)
    expected = [batch.images for batch in on_gpu.batches(1, parts)]  # draws the view, and makes the maps that are kept
    with torch.profiler.profile() as profile:
        made = [batch.images for batch in on_gpu.batches(1, parts)]
        torch.cuda.synchronize()
    copies = Counter(event.name for event in profile.events() if event.name.startswith("Memcpy HtoD"))
    each = 3 if streamed else 2  # the draws, the partners' places, and images
    assert copies["Memcpy HtoD (Pinned -> Device)"] <= len(parts) * each + 1, "and the epoch's indices"
    assert copies["Memcpy HtoD (Pageable -> Device)"] <= 1
    for part, batch, other in zip(parts, made, expected, strict=True):
        assert torch.equal(batch, other) and torch.equal(batch.cpu(), views.batch(1, part).images)
