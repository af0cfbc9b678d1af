"""DeiT: the vision transformer with a distillation token and a head of its own for it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pipeline.models.students.vit import ViT


class DeiT(ViT):
    """ViT with a distillation token behind the patches, a second head that reads it, and one LayerNorm for both.

    Arguments and errors are ViT's.

    Source: arXiv:2502.16762 Table 3; arXiv:2012.12877 §4.
    Differs: from arXiv:2012.12877 in queries, keys and values without bias (the paper's parameter count), and
        in the distillation token's place, last as in TITN.
    """

    has_distillation_head: ClassVar[bool] = True

    def forward(self, images: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Classify images by both heads.

        Args:
            images: `(B, 3, image_size, image_size)` float, normalised.
            draws: See Student.num_draws; None draws from PyTorch's generator.

        Returns:
            `(B, K)` class logits and `(B, K)` distillation logits.
        """
        tokens = self.encode(images, draws)
        return self.class_head(tokens[:, 0]), self.distillation_head(tokens[:, -1])
