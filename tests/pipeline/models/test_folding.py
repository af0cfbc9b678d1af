"""Folded teachers: the same logits from fewer products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import TEACHERS
from pipeline.models.folding import fold
from pipeline.models.teachers import build_teacher

# Norms that precede their convolutions; all other norms of the eight teachers fold.
REMAINING_NORMS = {"densenet121": 62}
NUM_COLUMNS = 25_088


def images(size: int = 32, batch_size: int = 4) -> Tensor:
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def used_teacher(name: str) -> nn.Module:
    """A teacher in training mode whose norms have seen images and have random scales and shifts."""
    torch.manual_seed(0)
    model = build_teacher(name, num_classes=7)
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    if norms(model):
        logits(model, images(batch_size=16))
    return model


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(batch.to(next(model.parameters()).dtype)).double()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


QUICK = ("densenet121", "mobilenet_v3_large", "resnet50", "squeezenet1_1")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TEACHERS]
)
def test_every_teacher_folds_to_one_of_fewer_norms_and_the_same_logits(name: str) -> None:
    model = used_teacher(name).eval()
    folded = fold(model, 32)[0]
    assert len(norms(folded)) == REMAINING_NORMS.get(name, 0)
    single = logits(folded, images())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(folded, images())
    assert not torch.equal(mixed, mixed.bfloat16().double()), "logits are rounded to bf16"
    expected = logits(model.double(), images())
    assert relative_error(single, expected) < 1e-4
    assert relative_error(logits(fold(model, 32)[0], images()), expected) < 1e-10


@pytest.mark.parametrize("name", ["mobilenet_v3_large", pytest.param("vgg16", marks=pytest.mark.slow)])
def test_the_folded_model_shares_nothing_with_the_given_one(name: str) -> None:
    model = used_teacher(name)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model, 32)[0]
    assert not any(module.training for module in folded.modules())
    assert all(module.training for module in model.modules())
    for tensor in [*folded.parameters(), *folded.buffers()]:
        tensor.detach().zero_()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    return used_teacher("vgg16").eval()


@pytest.mark.parametrize(("size", "num_columns"), [(32, 512), (63, 512), (64, NUM_COLUMNS)])
def test_a_vggs_repeated_columns_are_added_up_where_the_map_is_1x1(vgg: nn.Module, size: int, num_columns: int) -> None:
    folded = fold(vgg, size)[0]
    columns = {module.in_features for module in folded.modules() if isinstance(module, nn.Linear)}
    assert columns == {num_columns, 4096}
    batch = images(size, batch_size=2)
    assert relative_error(logits(folded, batch), logits(vgg, batch)) < 1e-4


def test_a_folded_vgg_refuses_images_at_which_its_map_is_larger(vgg: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        logits(fold(vgg, 32)[0], images(64, batch_size=1))


def test_a_convolution_that_something_else_reads_keeps_its_norm() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, batch: Tensor) -> Tensor:
            features = self.convolution(batch)
            return self.norm(features) + features

    model = Forked()
    nn.init.uniform_(model.norm.weight, 2.0, 3.0)
    folded = fold(model, 32)[0]
    assert len(norms(folded)) == 1
    assert torch.allclose(logits(folded, images()), logits(model.eval(), images()), atol=1e-6)
