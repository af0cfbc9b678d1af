"""What comes before a model: normalisation as in training, and the precision."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.models.network import Network
from pipeline.views.views import normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_pixels_are_normalised_as_in_training_bit_for_bit() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    network = Network(nn.Identity(), MEAN, STD)
    assert network.normalize(images).equal(normalize(images, MEAN, STD))
    assert network(images).equal(normalize(images, MEAN, STD))
    assert Network(network.module, network.mean, network.std)(images).equal(network(images))


def test_the_precision_is_that_of_the_products() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    logits = [Network(module, MEAN, STD, precision)(images) for precision in ("fp32", "bf16")]
    assert [values.dtype for values in logits if isinstance(values, torch.Tensor)] == [torch.float32, torch.bfloat16]
