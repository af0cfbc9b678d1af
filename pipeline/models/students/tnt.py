"""TNT: the transformer in transformer, whose patches read the image only through their pixel tokens.

TITN is this class with `has_distillation_head`.

Letters: B batch, P patches, M pixel tokens per patch, c pixel width, D width, K classes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from pipeline.models.students.fused.interface import InnerBlock, InnerWeights
from pipeline.models.students.layers import (
    ALL,
    DRAWS,
    EncoderBlock,
    Entering,
    Student,
    divide,
    draws_by_block,
    drop_paths,
    initialise,
    is_float32_on,
    learned,
)


class PixelEmbedding(nn.Module):
    """Linear embedding of the pixel patches inside every patch, with a position shared by all patches.

    Patches run row by row over the image and pixel patches row by row over their patch; inside a pixel patch,
    values run over channel, row, column.

    Args:
        image_size: Side of the square image, pixels.
        patch_size: Side of a patch p, pixels.
        pixel_size: Side of a pixel patch m, pixels.
        pixel_width: Width c of a pixel token.

    Attributes:
        num_patches: P = (image_size / p)^2.
        num_pixels: M = (p / m)^2, pixel tokens of one patch.

    Raises:
        UsageError: `patch_size` does not divide `image_size`, or `pixel_size` does not divide `patch_size`.

    Source: arXiv:2502.16762 §3.2; arXiv:2103.00112 §2.
    """

    def __init__(self, *, image_size: int, patch_size: int, pixel_size: int, pixel_width: int) -> None:
        super().__init__()
        self.num_patches = divide("image_size", image_size, "patch_size", patch_size) ** 2
        self.num_pixels = divide("patch_size", patch_size, "pixel_size", pixel_size) ** 2
        self.image_size = image_size
        self.patch_size = patch_size
        self.pixel_size = pixel_size
        self.linear = nn.Linear(3 * pixel_size**2, pixel_width)
        self.positions = learned(self.num_pixels, pixel_width)

    def forward(self, images: Tensor) -> Tensor:
        """Embed the pixel patches of a batch of images.

        Args:
            images: `(B, 3, image_size, image_size)` float, normalised.

        Returns:
            `(B * P, M, c)` float, one sequence for each patch.
        """
        assert images.shape[1:] == (3, self.image_size, self.image_size), images.shape
        pixels = rearrange(
            images,
            "b c (rows y m) (cols x n) -> (b rows cols) (y x) (c m n)",
            rows=self.image_size // self.patch_size,
            cols=self.image_size // self.patch_size,
            m=self.pixel_size,
            n=self.pixel_size,
        )
        embedded: Tensor = self.linear(pixels) + self.positions
        return embedded


class NestedBlock(nn.Module):
    """Inner and outer block: pixels refine themselves, are added to the patches, and these refine themselves.

    pixels += Attention(LN(pixels)); pixels += MLP(LN(pixels)); patches += Linear(flatten(LN(pixels)));
    patches += Attention(LN(patches)); patches += MLP(LN(patches)). Class and distillation token receive zeros from the
    pixels.

    Args:
        num_pixels: Pixel tokens M of one patch.
        pixel_width: Width c of a pixel token.
        pixel_heads: Heads of the inner attention.
        width: Width D of a patch token.
        num_heads: Heads of the outer attention.
        mlp_ratio: Hidden width of both MLPs as a multiple of their tokens' width.
        drop_path: Of the outer block.

    Attributes:
        fused: Computes the inner block and the LayerNorm behind it in place of their modules; None where they do.
        fused_on: The type of device that it is for; elsewhere the modules compute. None is any.

    Raises:
        UsageError: A number of heads does not divide its width.

    Source: arXiv:2502.16762 §3.2; arXiv:2103.00112 §2.
    """

    fused: InnerBlock | None = None
    fused_on: str | None = None

    def __init__(
        self,
        *,
        num_pixels: int,
        pixel_width: int,
        pixel_heads: int,
        width: int,
        num_heads: int,
        mlp_ratio: int,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        divide("pixel_width", pixel_width, "pixel_heads", pixel_heads)
        self.inner = EncoderBlock(width=pixel_width, num_heads=pixel_heads, mlp_ratio=mlp_ratio)
        self.pixel_norm = nn.LayerNorm(pixel_width)
        self.pixels_to_patch = nn.Linear(num_pixels * pixel_width, width)
        self.outer = EncoderBlock(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path)
        self.num_pixels = num_pixels

    def forward(
        self,
        pixels: Tensor,
        patches: Tensor,
        selection: slice = ALL,
        draws: Tensor | None = None,
        *,
        plain: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Apply the block.

        Args:
            pixels: `(B * P, M, c)` float.
            patches: `(B, T, D)` float: class token first, then the P patches, then any other token.
            selection: Which patch tokens are returned, W of them.
            draws: `(B, DRAWS)` float32, of the outer block's stochastic depth.
            plain: Whether the modules compute both blocks although fused ones could.

        Returns:
            Pixels `(B * P, M, c)` and patches `(B, W, D)`.
        """
        pixels, normed = self._refine(pixels, plain)
        flat = rearrange(normed, "(b p) m c -> b p (m c)", b=patches.shape[0])
        entering = Entering(self.pixels_to_patch, flat, first=1)
        return pixels, self.outer(patches, selection, draws, entering=entering, plain=plain)

    @property
    def inner_geometry(self) -> tuple[int, int, int, int]:
        """M, c, heads, and the hidden width of the MLP."""
        weights = inner_weights(self.inner, self.pixel_norm)
        hidden, width = weights.hidden_weight.shape
        return self.num_pixels, width, self.inner.attention.num_heads, hidden

    def _refine(self, pixels: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
        """Return the refined pixels and their LayerNorm, `(B * P, M, c)` each."""
        if self.fused is not None and not plain and is_float32_on(self.fused_on, self.pixel_norm):
            return self.fused(pixels, inner_weights(self.inner, self.pixel_norm), self.inner.attention.num_heads)
        # On a CPU bfloat16 is no faster here: the tokens are too narrow for its matrix units.
        with torch.autocast(pixels.device.type, enabled=False) if pixels.device.type == "cpu" else nullcontext():
            pixels = self.inner(pixels)
            return pixels, self.pixel_norm(pixels)


def inner_weights(block: EncoderBlock, norm: nn.LayerNorm) -> InnerWeights:
    """Return the parameters of an inner block and of the LayerNorm behind it."""
    attention, (into, out) = block.attention, block.mlp_layers
    return InnerWeights(
        block.attention_norm.weight,
        block.attention_norm.bias,
        attention.queries_keys_values.weight,
        attention.projection.weight,
        attention.projection.bias,
        block.mlp_norm.weight,
        block.mlp_norm.bias,
        into.weight,
        into.bias,
        out.weight,
        out.bias,
        norm.weight,
        norm.bias,
    )


class TNT(Student):
    """Transformer in transformer with a class token.

    The patch tokens are learned, not projected from the image; otherwise parameters and MACs would not be the paper's.
    The image enters by the pixel tokens, which every block adds to the patches.

    Args:
        num_classes: Classes K.
        image_size: Side of the square image, pixels.
        patch_size: Side of a patch, pixels.
        pixel_size: Side of a pixel patch, pixels.
        pixel_width: Width c of the pixel tokens.
        pixel_heads: Heads of the inner attention.
        width: Width D of the patch tokens.
        depth: Number of blocks L.
        num_heads: Heads of the outer attention.
        mlp_ratio: Hidden width of the MLPs as a multiple of their tokens' width.
        drop_path: Rate of stochastic depth in the last outer block, see pipeline.models.students.layers.drop_paths.

    Raises:
        UsageError: A size or a number of heads does not divide what it cuts.

    Source: arXiv:2502.16762 Table 3; arXiv:2103.00112 §2.
    Differs: from arXiv:2103.00112 in learned patch tokens, and in slicing the class token before the last
        LayerNorm (the paper's counts). Stochastic depth is in the outer blocks alone, in that article's code in the
        inner ones too; a fused inner block adds its branches before anything could leave them out.
    """

    has_distillation_head: ClassVar[bool] = False
    has_pixels: ClassVar[bool] = True

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int = 32,
        patch_size: int = 8,
        pixel_size: int = 2,
        pixel_width: int = 12,
        pixel_heads: int = 2,
        width: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = PixelEmbedding(
            image_size=image_size, patch_size=patch_size, pixel_size=pixel_size, pixel_width=pixel_width
        )
        num_tokens = 1 + self.embedding.num_patches + self.has_distillation_head
        self.patch_tokens = learned(num_tokens, width)
        self.patch_positions = learned(num_tokens, width)
        self.blocks = nn.ModuleList(
            NestedBlock(
                num_pixels=self.embedding.num_pixels,
                pixel_width=pixel_width,
                pixel_heads=pixel_heads,
                width=width,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
            )
            for rate in drop_paths(drop_path, depth)
        )
        self.num_draws = DRAWS * depth if drop_path else 0
        self.class_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        if self.has_distillation_head:
            self.distillation_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        initialise(self)

    def encode(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the tokens that the heads read, `(B, W, D)`: class token first, distillation token, if any, last."""
        pixels = self.embedding(images)
        patches = (self.patch_tokens + self.patch_positions).expand(images.shape[0], -1, -1)
        *blocks, last = self.blocks
        *parts, last_part = draws_by_block(draws, len(self.blocks))
        for block, part in zip(blocks, parts, strict=True):
            pixels, patches = block(pixels, patches, draws=part, plain=self.plain)
        selection = self.head_tokens(patches.shape[1])
        encoded: Tensor = last(pixels, patches, selection, last_part, plain=self.plain)[1]
        return encoded

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Classify images.

        Args:
            images: `(B, 3, image_size, image_size)` float, normalised.
            draws: See Student.num_draws; None draws from PyTorch's generator.

        Returns:
            `(B, K)` class logits.
        """
        class_logits: Tensor = self.class_head(self.encode(images, draws)[:, 0])
        return class_logits
