"""TITN: the paper's student, a transformer in transformer with a distillation token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pipeline.models.students.tnt import TNT


class TITN(TNT):
    """TNT with a distillation token behind the patches and a second head that reads it.

    Arguments and errors are TNT's. The large-patch variant is `patch_size=16, pixel_size=4`.

    Source: arXiv:2502.16762 §3.2, Table 3.
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
        patches = self.encode(images, draws)
        return self.class_head(patches[:, 0]), self.distillation_head(patches[:, -1])
