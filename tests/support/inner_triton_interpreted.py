"""What test_inner_triton runs in a process of its own, whose Triton interprets kernels on the CPU.

The interpreter multiplies in float32, whatever the precision: these tests are of the formulas and the indices.
"""

from __future__ import annotations

import pytest
import torch

from pipeline.models.students import build_student
from pipeline.models.students.fused import cuda as inner_triton
from pipeline.models.students.fused import guard
from pipeline.models.students.fused.cuda import inner_block
from tests.support.inner_block_cases import case, errors, outcome

CPU = torch.device("cpu")
TOLERANCE = 3e-6


@pytest.mark.parametrize(
    ("num_patches", "num_pixels", "width", "num_heads", "ratio"),
    [
        pytest.param(19, 16, 12, 2, 4, marks=pytest.mark.slow),  # more tiles than programs
        (6, 4, 12, 2, 4),  # a tile of four patches, and one half full
        pytest.param(2, 16, 16, 2, 4, marks=pytest.mark.slow),
        pytest.param(3, 9, 12, 3, 2, marks=pytest.mark.slow),  # no power of two
        pytest.param(1, 20, 6, 1, 3, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_block_of_modules(num_patches: int, num_pixels: int, width: int, num_heads: int, ratio: int) -> None:
    differences = errors(case(num_patches, num_pixels, width, num_heads, ratio=ratio), inner_block)
    assert len(differences) == 2 + 1 + 13
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.slow
def test_autocast_changes_no_dtype() -> None:
    drawn = case(2, 16, 12, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined, normed = inner_block(drawn.pixels, drawn.weights, 2)
    assert refined.dtype == normed.dtype == torch.float32
    torch.testing.assert_close(refined, drawn.plain(drawn.pixels, drawn.weights, 2)[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_pixels_are_computed_in_float32_and_rounded_once() -> None:
    drawn = case(2, 16, 12, 2)
    pixels = drawn.pixels.bfloat16().requires_grad_()
    refined, normed = inner_block(pixels, drawn.weights, 2)
    expected, expected_normed = drawn.plain(pixels.detach().float(), drawn.weights, 2)
    assert refined.dtype == normed.dtype == torch.bfloat16
    torch.testing.assert_close(refined, expected.bfloat16(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(normed, expected_normed.bfloat16(), rtol=2**-7, atol=1e-5)
    (refined.float().sum() + normed.float().square().sum()).backward()
    assert pixels.grad is not None and pixels.grad.dtype == torch.bfloat16
    assert drawn.weights.hidden_weight.grad.dtype == torch.float32


def test_without_gradients_nothing_is_kept() -> None:
    drawn = case(2, 16, 12, 2)
    with torch.no_grad():
        refined, _ = inner_block(drawn.pixels.requires_grad_(), drawn.weights, 2)
    assert refined.grad_fn is None


@pytest.mark.slow
def test_only_one_of_both_outputs_may_be_used() -> None:
    drawn = case(2, 16, 12, 2)
    for number in range(2):
        (expected,) = torch.autograd.grad(
            drawn.plain(drawn.pixels.requires_grad_(), drawn.weights, 2)[number], drawn.pixels, drawn.gradients[0]
        )
        (got,) = torch.autograd.grad(
            inner_block(drawn.pixels, drawn.weights, 2)[number], drawn.pixels, drawn.gradients[0]
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_strides_do_not_matter() -> None:
    drawn = case(2, 16, 12, 2)
    turned = drawn.pixels.transpose(0, 1).contiguous().transpose(0, 1)
    strided = drawn._replace(
        pixels=turned, gradients=tuple(gradient[:1].expand_as(gradient) for gradient in drawn.gradients)
    )
    assert not turned.is_contiguous()
    assert max(errors(strided, inner_block).values()) < TOLERANCE


def test_no_patches_give_no_gradient() -> None:
    result = outcome(case(0, 16, 12, 2), inner_block)
    assert result["refined"].shape == result["pixels_gradient"].shape == (0, 16, 12)
    assert all(not value.any() for value in result.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch's check looks at it
def test_the_operators_keep_the_rules() -> None:
    drawn = case(2, 4, 12, 2)
    torch.library.opcheck(inner_triton._inner_block, (drawn.pixels.requires_grad_(), list(drawn.weights), 2, "tf32x3"))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", ["fp32", "bf16"])
def test_the_guard_lets_it_through(autocast: str) -> None:
    torch.manual_seed(0)
    block = build_student("titn", num_classes=3, depth=1).blocks[0]
    compared = guard.compare_inner(inner_block, block, CPU, precision=autocast, training=True, num_patches=5)
    assert all(errors.are_alike for errors in compared.values()), compared


@pytest.mark.slow
def test_it_is_compiled_in_one_graph() -> None:
    drawn = case(2, 4, 12, 2)
    compiled = torch.compile(inner_block, backend="aot_eager", fullgraph=True)
    assert max(errors(drawn, compiled).values()) < TOLERANCE
