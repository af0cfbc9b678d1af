"""Where students look: against hand arithmetic and PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.students import (
    STUDENTS,
    Student,
    attention_maps,
    attention_rollout,
    build_student,
    use_inner_block,
)
from pipeline.models.students.attention import attention_weights
from pipeline.models.students.layers import Attention

SMALL = {"num_classes": 4, "image_size": 16, "patch_size": 8, "width": 24, "depth": 3, "num_heads": 3}


def build(name: str, **geometry: int) -> Student:
    torch.manual_seed(0)
    return build_student(name, **{**SMALL, **geometry}).eval()


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_weights_are_those_of_hand_arithmetic() -> None:
    attention = Attention(width=2, num_heads=2)
    with torch.no_grad():
        attention.queries_keys_values.weight.copy_(torch.tensor([[1.0, 0], [0, 2], [1, 0], [0, 1], [5, 5], [5, 5]]))
    weights = attention_weights(attention, torch.tensor([[[1.0, 0], [0, 1]]]))

    # Head 0 compares first entries, head 1 second ones, queries of which are doubled; heads are 1 wide.
    def share(a: float, b: float) -> list[float]:
        return [float(value) for value in torch.tensor([a, b], dtype=torch.float32).softmax(0)]

    expected = [[share(1, 0), share(0, 0)], [share(0, 0), share(0, 2)]]
    torch.testing.assert_close(weights, torch.tensor([expected]))


@pytest.mark.parametrize("name", STUDENTS)
def test_maps_times_values_are_what_pytorchs_attention_returns(name: str) -> None:
    student = build(name)
    maps = attention_maps(student, images())
    tokens = 4 + 1 + student.has_distillation_head
    assert maps.shape == (2, 3, 3, tokens, tokens) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    seen: list[torch.Tensor] = []
    block = student.get_submodule("blocks.2")
    attention = getattr(block, "outer", block).attention
    hook = attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    student.plain = True
    with torch.no_grad():
        student(images())
        hook.remove()
        queries, keys, values = (
            attention.queries_keys_values(seen[0]).reshape(2, tokens, 3, 3, 8).permute(2, 0, 3, 1, 4)
        )
        expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
    torch.testing.assert_close(maps[:, 2] @ values, expected)


@pytest.mark.parametrize("name", ["titn", "deit"])
def test_the_maps_do_not_depend_on_how_the_student_is_computed(name: str) -> None:
    student = build(name)
    trimmed = attention_maps(student, images())
    use_inner_block(student, "auto", torch.device("cpu"))
    fused = attention_maps(student, images())
    student.plain = True
    plain = attention_maps(student, images())
    torch.testing.assert_close(trimmed, plain)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in student.modules()), "no hook is left behind"


def test_large_patches_have_their_tokens() -> None:
    assert attention_maps(build("titn", image_size=32, patch_size=16, pixel_size=4), images(32)).shape[-1] == 4 + 2


def test_rollout_is_that_of_hand_arithmetic() -> None:
    first = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    second = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    maps = torch.stack([first, second])[None, :, None]
    # (A1 + I) / 2 = [[1, 0], [1/4, 3/4]]; (A2 + I) / 2 = [[1/2, 1/2], [0, 1]].
    torch.testing.assert_close(attention_rollout(maps), torch.tensor([[[0.625, 0.375], [0.25, 0.75]]]))
    deep = attention_rollout(attention_maps(build("titn"), images()))
    torch.testing.assert_close(deep.sum(-1), torch.ones(2, 6))
