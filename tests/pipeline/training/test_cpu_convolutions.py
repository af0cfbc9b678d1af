"""Convolutions as matrix products, against PyTorch's convolution in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.training import cpu_convolutions
from pipeline.training.cpu_convolutions import CpuConv2d, use_cpu_convolutions
from tests.support.in_process import invoke
from tests.support.project import Project


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_convolutions, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(cpu_convolutions, "FEWEST_WEIGHTS_POINTWISE", 0)


def gradients(layer: nn.Module, images: Tensor) -> list[Tensor]:
    """Return a layer's output and the gradients of its input and parameters, of a loss that weighs each output."""
    images = images.clone().requires_grad_()
    outputs = layer(images)
    torch.manual_seed(1)
    (outputs * torch.randn(outputs.shape, dtype=outputs.dtype)).sum().backward()
    assert images.grad is not None
    return [
        outputs.detach(),
        images.grad,
        *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None),
    ]


@settings(deadline=None, max_examples=200)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    bias=st.booleans(),
    channels_last=st.booleans(),
)
def test_it_is_the_convolution(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
    bias: bool,
    channels_last: bool,
) -> None:
    assume(all(length + 2 * outside >= reach for length, outside, reach in zip(size, padding, kernel, strict=True)))
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, kernel, stride, padding, bias=bias, dtype=torch.float64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    plain.to(memory_format=layout)
    images = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=layout)
    ours = copy.deepcopy(plain)
    use_cpu_convolutions(ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_convolutions, "FEWEST_WEIGHTS", 0)
        patch.setattr(cpu_convolutions, "FEWEST_WEIGHTS_POINTWISE", 0)
        actual = gradients(ours, images)
    expected = gradients(plain, images)
    assert len(actual) == len(expected) == 3 + bias
    for ours_is, should_be in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_is, should_be, rtol=1e-12, atol=1e-12)


def test_it_has_the_outputs_and_dtype_of_autocast(always: None) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, 3, padding=1)
    ours = copy.deepcopy(plain)
    use_cpu_convolutions(ours)
    images = torch.randn(2, 8, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = ours(images), plain(images)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_has_float32s_gradients_in_bfloat16(stride: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(24, 24, 5, stride, 2, groups=24, bias=False)
    ours = copy.deepcopy(plain)
    use_cpu_convolutions(ours)
    images = torch.randn(4, 24, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, images_gradient, weight_gradient = gradients(ours, images)
    assert outputs.dtype == images_gradient.dtype == torch.bfloat16
    expected = gradients(plain, images.float())
    assert torch.equal(outputs, expected[0].bfloat16())
    torch.testing.assert_close(images_gradient.float(), expected[1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(weight_gradient, expected[2], rtol=1e-2, atol=1e-1)


def test_large_maps_and_evaluation_are_pytorchs_own() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 64, 3, padding=1)
    ours = copy.deepcopy(plain)
    use_cpu_convolutions(ours)
    large, small = torch.randn(2, 64, 16, 16), torch.randn(1, 64, 1, 1)
    assert torch.equal(ours(large), plain(large))
    assert torch.equal(ours.eval()(small), plain.eval()(small))


def test_a_model_keeps_its_weights_and_its_other_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1),
    )
    before = model.state_dict()
    use_cpu_convolutions(model)
    assert [type(layer) for layer in model] == [*2 * [CpuConv2d], *4 * [nn.Conv2d]]
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resnet_trains_as_without(always: None) -> None:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=5).double()
    ours = copy.deepcopy(plain)
    use_cpu_convolutions(ours)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for actual, expected in zip(gradients(ours, images), gradients(plain, images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_a_teacher_is_trained_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project.create(tmp_path / "project", alone=True)
    invoke(project, "prepare")
    trained, forward = [], CpuConv2d.forward

    def recording(self: CpuConv2d, images: Tensor) -> Tensor:
        trained.append(self.training)
        return forward(self, images)

    monkeypatch.setattr(CpuConv2d, "forward", recording)
    invoke(project, "teacher", "squeezenet1_1", "--device", "cpu", "--set", "epochs=1")
    assert any(trained)
