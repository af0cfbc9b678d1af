"""Inner blocks of PyTorch's modules, and how far a fused one is from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.students.fused.interface import InnerBlock, InnerWeights
from pipeline.models.students.layers import EncoderBlock


class Case(NamedTuple):
    """Patches of pixel tokens, the parameters of a block, and gradients of what it makes of the patches."""

    block: EncoderBlock
    norm: nn.LayerNorm
    pixels: Tensor
    gradients: tuple[Tensor, Tensor]

    @property
    def weights(self) -> InnerWeights:
        attention, mlp = self.block.attention, self.block.mlp
        return InnerWeights(
            self.block.attention_norm.weight,
            self.block.attention_norm.bias,
            attention.queries_keys_values.weight,
            attention.projection.weight,
            attention.projection.bias,
            self.block.mlp_norm.weight,
            self.block.mlp_norm.bias,
            mlp[0].weight,
            mlp[0].bias,
            mlp[2].weight,
            mlp[2].bias,
            self.norm.weight,
            self.norm.bias,
        )

    def plain(self, pixels: Tensor, weights: InnerWeights, num_heads: int) -> tuple[Tensor, Tensor]:
        """Return the modules' results. Their parameters are the weights already."""
        refined = self.block(pixels)
        return refined, self.norm(refined)


def case(num_patches: int, num_pixels: int, width: int, num_heads: int, *, ratio: int = 4, device: str = "cpu") -> Case:
    """Draw a case in float32. Zero biases and gains of 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    block, norm = EncoderBlock(width=width, num_heads=num_heads, mlp_ratio=ratio), nn.LayerNorm(width)
    for parameter in (*block.parameters(), *norm.parameters()):
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    pixels, *gradients = (torch.randn(num_patches, num_pixels, width, generator=generator) for _ in range(3))
    return Case(
        block.to(device), norm.to(device), pixels.to(device), tuple(gradient.to(device) for gradient in gradients)
    )


def outcome(case: Case, inner_block: InnerBlock) -> dict[str, Tensor]:
    """Both outputs and all gradients, by name."""
    pixels, weights = case.pixels.clone().requires_grad_(), case.weights
    refined, normed = inner_block(pixels, weights, case.block.attention.num_heads)
    gradients = torch.autograd.grad((refined, normed), (pixels, *weights), case.gradients)
    names = ("pixels_gradient", *(f"{field}_gradient" for field in InnerWeights._fields))
    return {"refined": refined.detach(), "normed": normed.detach(), **dict(zip(names, gradients, strict=True))}


def errors(case: Case, inner_block: InnerBlock) -> dict[str, float]:
    """The largest difference from the modules in everything, relative to the largest magnitude there."""
    expected, got = outcome(case, case.plain), outcome(case, inner_block)
    for name, value in expected.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
    return {name: float((got[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()}
