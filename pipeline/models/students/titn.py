"""TITN: the paper's student, a transformer in transformer with a distillation token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pipeline.models.students.layers import Student, initialise, learned
from pipeline.models.students.tnt import NestedBlock, PixelEmbedding


class TITN(Student):
    """Transformer in transformer with a class token in front and a distillation token behind.

    The patch tokens are learned, not projected from the image: only so do the paper's parameter count and
    MACs come out. The image enters by the pixel tokens, which every block adds to the patches. The
    large-patch variant is `patch_size=16, pixel_size=4`.

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

    Raises:
        UsageError: Where a size, or a number of heads, does not divide what it cuts.

    Source: arXiv:2502.16762 §3.2, Table 3.
    """

    has_distillation_head: ClassVar[bool] = True
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
    ) -> None:
        super().__init__()
        self.embedding = PixelEmbedding(
            image_size=image_size, patch_size=patch_size, pixel_size=pixel_size, pixel_width=pixel_width
        )
        self.patch_tokens = learned(1 + self.embedding.num_patches + 1, width)
        self.patch_positions = learned(1 + self.embedding.num_patches + 1, width)
        self.blocks = nn.ModuleList(
            NestedBlock(
                num_pixels=self.embedding.num_pixels,
                pixel_width=pixel_width,
                pixel_heads=pixel_heads,
                width=width,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                num_behind=1,
            )
            for _ in range(depth)
        )
        self.class_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        self.distillation_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        initialise(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images by both heads.

        Args:
            images: `(B, 3, image_size, image_size)` float, normalised.

        Returns:
            `(B, K)` class logits and `(B, K)` distillation logits.
        """
        pixels = self.embedding(images)
        patches = (self.patch_tokens + self.patch_positions).expand(images.shape[0], -1, -1)
        *blocks, last = self.blocks
        for block in blocks:
            pixels, patches = block(pixels, patches, plain=self.plain)
        _, patches = last(pixels, patches, self.head_tokens(patches.shape[1]), plain=self.plain)
        return self.class_head(patches[:, 0]), self.distillation_head(patches[:, -1])
