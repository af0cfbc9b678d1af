"""ViT: the plain vision transformer, the baseline without an inner path and without distillation.

DeiT is this class with `has_distillation_head`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.models.students.layers import (
    DRAWS,
    EncoderBlock,
    PatchEmbedding,
    Student,
    draws_by_block,
    drop_paths,
    initialise,
    learned,
)


class ViT(Student):
    """Vision transformer with a class token and one final LayerNorm over all tokens.

    Args:
        num_classes: Classes K.
        image_size: Side of the square image, pixels.
        patch_size: Side of a patch, pixels.
        width: Token width D.
        depth: Number of blocks L.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs as a multiple of D.
        drop_path: Rate of stochastic depth in the last block, see pipeline.models.students.layers.drop_paths.

    Raises:
        UsageError: `patch_size` does not divide `image_size`, or `num_heads` does not divide `width`.

    Source: arXiv:2502.16762 Table 3; arXiv:2010.11929 Eq. 1 to 4.
    Differs: from arXiv:2010.11929 in queries, keys and values without bias (the paper's parameter count).
    """

    has_distillation_head: ClassVar[bool] = False

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
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(image_size=image_size, patch_size=patch_size, width=width)
        self.class_token = learned(1, width)
        if self.has_distillation_head:
            self.distillation_token = learned(1, width)
        self.positions = learned(1 + self.embedding.num_patches + self.has_distillation_head, width)
        self.blocks = nn.ModuleList(
            EncoderBlock(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=rate)
            for rate in drop_paths(drop_path, depth)
        )
        self.num_draws = DRAWS * depth if drop_path else 0
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, num_classes)
        if self.has_distillation_head:
            self.distillation_head = nn.Linear(width, num_classes)
        initialise(self)

    def encode(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the tokens that the heads read, `(B, W, D)`: class token first, distillation token, if any, last."""
        class_token = self.class_token.expand(images.shape[0], -1, -1)
        tokens = [class_token, self.embedding(images)]
        if self.has_distillation_head:
            tokens.append(self.distillation_token.expand_as(class_token))
        encoded = torch.cat(tokens, dim=1) + self.positions
        *blocks, last = self.blocks
        *parts, last_part = draws_by_block(draws, len(self.blocks))
        for block, part in zip(blocks, parts, strict=True):
            encoded = block(encoded, draws=part, plain=self.plain)
        normed: Tensor = self.norm(last(encoded, self.head_tokens(encoded.shape[1]), last_part, plain=self.plain))
        return normed

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
