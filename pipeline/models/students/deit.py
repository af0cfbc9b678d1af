"""DeiT: the vision transformer with a distillation token and a head of its own for it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.models.students.layers import EncoderBlock, PatchEmbedding, Student, initialise, learned


class DeiT(Student):
    """Vision transformer with a class token in front, a distillation token behind, and one shared LayerNorm.

    Args:
        num_classes: Classes K.
        image_size: Side of the square image, pixels.
        patch_size: Side of a patch, pixels.
        width: Token width D.
        depth: Number of blocks L.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs as a multiple of D.

    Raises:
        UsageError: Where `patch_size` does not divide `image_size`, or `num_heads` not `width`.

    Source: arXiv:2502.16762 Table 3; arXiv:2012.12877 §4.
    Differs: from arXiv:2012.12877 in queries, keys and values without bias (the paper's parameter count), and
        in the distillation token's place, last as in TITN.
    """

    has_distillation_head: ClassVar[bool] = True

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int = 32,
        patch_size: int = 8,
        width: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(image_size=image_size, patch_size=patch_size, width=width)
        self.class_token = learned(1, width)
        self.distillation_token = learned(1, width)
        self.positions = learned(1 + self.embedding.num_patches + 1, width)
        self.blocks = nn.ModuleList(
            EncoderBlock(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, num_classes)
        self.distillation_head = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images by both heads.

        Args:
            images: `(B, 3, image_size, image_size)` float, normalised.

        Returns:
            `(B, K)` class logits and `(B, K)` distillation logits.
        """
        class_token = self.class_token.expand(images.shape[0], -1, -1)
        distillation_token = self.distillation_token.expand(images.shape[0], -1, -1)
        tokens = torch.cat([class_token, self.embedding(images), distillation_token], dim=1) + self.positions
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        tokens = self.norm(last(tokens, self.head_tokens(tokens.shape[1])))
        return self.class_head(tokens[:, 0]), self.distillation_head(tokens[:, -1])
