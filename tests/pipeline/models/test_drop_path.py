"""Stochastic depth in the students: its rates, its draws, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import stochastic_depth

from pipeline.errors import UsageError
from pipeline.models.counting import flops_per_image, paper_macs
from pipeline.models.students import STUDENTS, Student, build_student
from pipeline.models.students.layers import DRAWS, EncoderBlock
from pipeline.models.students.tnt import NestedBlock

SMALL: dict[str, Any] = {"num_classes": 5, "image_size": 16, "patch_size": 8, "width": 24, "depth": 3}


def built(name: str, **arguments: Any) -> Student:
    torch.manual_seed(0)
    return build_student(name, **{**SMALL, **arguments})


def images(number: int) -> Tensor:
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def heads(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def block(rate: float) -> EncoderBlock:
    torch.manual_seed(0)
    return EncoderBlock(width=24, num_heads=3, mlp_ratio=2, drop_path=rate).train()


@pytest.mark.parametrize("name", STUDENTS)
def test_the_rate_rises_linearly_over_the_outer_blocks_as_timms_does(name: str) -> None:
    timm = pytest.importorskip("timm")
    student, theirs = built(name, drop_path=0.3, depth=5), timm.create_model("test_vit", depth=5, drop_path_rate=0.3)
    outer = [block.outer if isinstance(block, NestedBlock) else block for block in student.blocks]
    rates = [layer.drop_path for layer in outer]
    assert rates == pytest.approx([0.0, 0.075, 0.15, 0.225, 0.3])
    assert rates == pytest.approx([getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks])
    assert all(not block.inner.drop_path for block in student.blocks if isinstance(block, NestedBlock))
    assert student.num_draws == 5 * DRAWS and built(name).num_draws == 0
    with pytest.raises(UsageError, match="drop_path 1 is impossible; choose from 0"):
        built(name, drop_path=1.0)


def test_a_branch_that_is_kept_is_scaled_and_one_that_is_not_is_left_out() -> None:
    layer, tokens = block(0.25), torch.randn(4, 6, 24)
    draws = torch.tensor([[0.0, 0.74], [0.76, 0.1], [0.74, 0.76], [0.8, 0.9]])
    of_attention = layer.attention(layer.attention_norm(tokens))
    for sample, (attends, feeds) in enumerate([(1, 1), (0, 1), (1, 0), (0, 0)]):
        expected = tokens[sample] + attends * of_attention[sample] / 0.75
        expected = expected + feeds * layer.mlp(layer.mlp_norm(expected)) / 0.75
        torch.testing.assert_close(layer(tokens, draws=draws)[sample], expected)


def test_its_expectation_is_exact_and_its_draws_are_torchvisions() -> None:
    layer, branch = block(0.25), torch.ones(4000, 2, 3)
    grid = (torch.arange(8) + 0.5) / 8
    kept = layer._kept(branch[:8], torch.stack([grid, grid], dim=1), 1) / branch[:8]
    assert kept.mean().item() == pytest.approx(1.0, abs=1e-6), "6 of 8 at 4/3"
    torch.manual_seed(3)
    ours, theirs = layer._kept(branch, None, 0), stochastic_depth(branch, 0.25, "row", training=True)
    for output in (ours, theirs):
        factors = output / branch
        assert (factors == factors[:, :1, :1]).all(), "one draw for each sample"
        values = factors[:, 0, 0].unique()
        assert values.tolist() == pytest.approx([0.0, 4 / 3])
        share = (factors[:, 0, 0] > 0).float().mean().item()
        assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    assert abs(ours.mean() - theirs.mean()) < 0.1


@pytest.mark.parametrize("name", STUDENTS)
def test_weights_evaluation_and_costs_are_as_without(name: str) -> None:
    student, plain = built(name, drop_path=0.5), built(name)
    for ours, theirs in zip(student.state_dict().items(), plain.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    student.eval(), plain.eval()
    batch, draws = images(4), torch.zeros(4, student.num_draws)
    for given in ((), (draws,)):
        for ours, theirs in zip(heads(student(batch, *given)), heads(plain(batch)), strict=True):
            assert torch.equal(ours, theirs)
    student.train(), plain.train()
    assert paper_macs(student, 16) == paper_macs(plain, 16)
    assert flops_per_image(student, 16) == flops_per_image(plain, 16)
    for ours, theirs in zip(heads(student(batch)), heads(plain(batch)), strict=True):
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("name", STUDENTS)
def test_draws_decide_image_by_image(name: str) -> None:
    student, batch = built(name, drop_path=0.5).train(), images(6)
    draws = torch.rand(6, student.num_draws, generator=torch.Generator().manual_seed(2))
    whole = heads(student(batch, draws))
    parts = [heads(student(batch[part], draws[part])) for part in (slice(4), slice(4, 6))]
    for head, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(of_parts), head)
    draws[0] = torch.cat([draws[0, :-DRAWS], 1 - draws[0, -DRAWS:]])
    changed = heads(student(batch, draws))
    assert not torch.equal(changed[0][0], whole[0][0]) and torch.equal(changed[0][1:], whole[0][1:])
