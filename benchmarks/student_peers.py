"""Other projects' models of the same students, at our geometry.

Each builder imports its package itself: one that is not installed is told by `Report.has` and never built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.synthetic import NUM_CLASSES, SIZE
from pipeline.config.recipes import StudentRecipe


@dataclass(frozen=True)
class Peer:
    """A model of another project.

    Attributes:
        package: As it is imported.
        beside: Names of our students that it is compared with.
        build: Makes it at the geometry of a student, whose patch and token sizes it takes.
    """

    package: str
    beside: tuple[str, ...]
    build: Callable[[StudentRecipe], nn.Module]


def timm_tnt(recipe: StudentRecipe) -> nn.Module:
    """Build timm's TNT.

    Differs from ours: pixels are embedded by a 7x7 convolution of stride 2 inside each patch instead of a linear map of
    2x2 pixels, patch tokens are projected from the pixels, and a second LayerNorm follows each projection.
    """
    from timm.models.tnt import TNT

    model: nn.Module = TNT(
        img_size=SIZE,
        patch_size=recipe.patch_size,
        num_classes=NUM_CLASSES,
        embed_dim=recipe.width,
        inner_dim=recipe.pixel_width,
        depth=recipe.depth,
        num_heads_inner=recipe.pixel_heads,
        num_heads_outer=recipe.num_heads,
        mlp_ratio=4.0,
        first_stride=recipe.pixel_size,
    )
    return model


def lucidrains_tnt(recipe: StudentRecipe) -> nn.Module:
    """Build the TNT of `transformer-in-transformer`.

    Differs from ours: heads and their width are the same on both paths, so that the inner attention, 12 wide with us,
    is as wide as the outer one, 192.

    Its forward pass adds the positions in place to `repeat(patch_tokens)`, which einops returns as a view of the
    parameter; autograd refuses. The mend is a copy, made where it calls `repeat` and nowhere else.
    """
    import einops
    from transformer_in_transformer import tnt

    tnt.repeat = lambda *arguments, **sizes: einops.repeat(*arguments, **sizes).clone()
    model: nn.Module = tnt.TNT(
        image_size=SIZE,
        patch_dim=recipe.width,
        pixel_dim=recipe.pixel_width,
        patch_size=recipe.patch_size,
        pixel_size=recipe.pixel_size,
        depth=recipe.depth,
        num_classes=NUM_CLASSES,
        heads=recipe.num_heads,
        dim_head=recipe.width // recipe.num_heads,
    )
    return model


def timm_vit(recipe: StudentRecipe) -> nn.Module:
    """Build timm's ViT; differs from ours in queries, keys and values with bias."""
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=SIZE,
        patch_size=recipe.patch_size,
        num_classes=NUM_CLASSES,
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.num_heads,
    )
    return model


def timm_deit(recipe: StudentRecipe) -> nn.Module:
    """Build timm's distilled DeiT, which trains with both heads; differs from ours as its ViT does."""
    from timm.models.deit import VisionTransformerDistilled

    model = VisionTransformerDistilled(
        img_size=SIZE,
        patch_size=recipe.patch_size,
        num_classes=NUM_CLASSES,
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.num_heads,
    )
    model.set_distilled_training(True)
    built: nn.Module = model
    return built


PEERS = {
    "timm TNT": Peer("timm", ("titn", "tnt"), timm_tnt),
    "lucidrains TNT": Peer("transformer_in_transformer", ("titn", "tnt"), lucidrains_tnt),
    "timm ViT": Peer("timm", ("vit",), timm_vit),
    "timm DeiT": Peer("timm", ("deit",), timm_deit),
}
