"""What comes before a model: normalisation as in training, and the precision; and that of its last layer."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.models.network import Network, decide_in_fp32, last_layers
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


def tied() -> nn.Linear:
    """Logits 0, 4 and 4.005 of a one: in bf16, whose step is 1/32 there, the last two are equal."""
    layer = nn.Linear(1, 3, bias=False)
    layer.weight.data = torch.tensor([[0.0], [4.0], [4.005]])
    return layer


def test_the_last_layer_is_not_rounded_where_a_class_is_decided() -> None:
    layer = tied()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer.eval()(torch.ones(1, 1))
    assert rounded.tolist() == [[0.0, 4.0, 4.0]] and rounded.argmax(1).item() == 1, "of equal ones the lower counts"
    for _ in range(2):
        decide_in_fp32(layer)
    assert len(layer._forward_hooks) == 1, "the second call does nothing"
    with torch.autocast("cpu", torch.bfloat16):
        exact, trained = layer(torch.ones(1, 1)), layer.train()(torch.ones(1, 1))
    assert exact.dtype == torch.float32 and exact.argmax(1).item() == 2
    assert torch.equal(exact, torch.tensor([[0.0, 4.0, 4.005]]))
    assert torch.equal(trained, rounded), "training is left as it was"


def test_the_last_layer_is_the_last_that_has_weights_of_its_own() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2), nn.LayerNorm(2), nn.ReLU())
    assert last_layers(layers) == [layers[1]]
    assert last_layers(layers[1]) == [layers[1]] and last_layers(nn.ReLU()) == []
