"""The weights of a student's attention, by the plain formulation, however the student is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from pipeline.models.students.layers import Attention, EncoderBlock, Student
from pipeline.models.students.tnt import NestedBlock


@torch.no_grad()
def attention_maps(student: Student, images: Tensor) -> Tensor:
    """Return how much each token attends to every token, in every block; of nested blocks, in the outer block.

    Args:
        student: In evaluation mode.
        images: `(B, 3, image_size, image_size)` float, normalised.

    Returns:
        `(B, L, heads, T, T)` float32, row: the token that attends, column: the attended one; rows add up to 1. Token 0
        is the class token, patches follow row by row over the image, and the distillation token, if any, is the last.

    Source: arXiv:1706.03762 Eq. 1, softmax(Q K^T / sqrt(d)).
    """
    maps: list[Tensor] = []

    def keep(attention: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        # The input has all tokens, also where the last block returns only those that a head reads.
        maps.append(attention_weights(cast(Attention, attention), arguments[0]))

    blocks = outer_blocks(student)
    hooks = [block.attention.register_forward_pre_hook(keep) for block in blocks]
    before, student.plain = student.plain, True  # fused passes would not call the layers
    try:
        student(images)
    finally:
        student.plain = before
        for hook in hooks:
            hook.remove()
    return torch.stack(maps, dim=1)


def attention_weights(attention: Attention, tokens: Tensor) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)), `(N, heads, T, T)` float32.

    Args:
        attention: The layer.
        tokens: `(N, T, D)` float, its input.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        projected = attention.queries_keys_values(tokens.float())
    queries, keys, _ = rearrange(projected, "n t (three h d) -> three n h t d", three=3, h=attention.num_heads)
    weights: Tensor = (queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5).softmax(dim=-1)
    return weights


def attention_rollout(maps: Tensor) -> Tensor:
    """Return how much of each token before the first block reaches each token behind the last.

    Each block passes on half of a token unchanged, for its residual connection, and half of what it attends to, the
    mean over heads. MLPs and what pixel tokens add to the patches are left out.

    Args:
        maps: `(B, L, heads, T, T)` float, of `attention_maps`.

    Returns:
        `(B, T, T)` float, row: a token behind the last block, column: a token before the first; rows add up to 1.

    Source: arXiv:2005.00928 §3, attention rollout.
    """
    reached = torch.eye(maps.shape[-1], device=maps.device, dtype=maps.dtype).expand(len(maps), -1, -1)
    identity = reached
    for block in maps.mean(dim=2).unbind(dim=1):
        reached = (block + identity) / 2 @ reached
    return reached


def outer_blocks(student: Student) -> list[EncoderBlock]:
    """Return the blocks between patches, in their order; none of a student that is not one of ours."""
    blocks = cast(Iterable[torch.nn.Module], getattr(student, "blocks", ()))
    layers = [block.outer if isinstance(block, NestedBlock) else block for block in blocks]
    return [layer for layer in layers if isinstance(layer, EncoderBlock)]
