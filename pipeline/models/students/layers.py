"""The layers the four students are composed of.

Letters: B batch, P patches, D width, K classes; N counts sequences of T tokens, whatever they are made of.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipeline.errors import UsageError

ALL = slice(None)


class Student(nn.Module):
    """What every student tells about itself.

    Its constructor takes by keyword `num_classes`, what it needs of pipeline.models.students.SHARED_ARGUMENTS, and any
    arguments of its own, annotated with int, float, str or bool, each best with a default.

    Attributes:
        has_distillation_head: Whether `forward` returns (class logits, distillation logits) or class logits.
        has_pixels: Whether the constructor takes `pixel_size`, `pixel_width` and `pixel_heads`.
        plain: Whether `forward` calls every module on every token, as the paper's formulas do and as costs are counted.
            Otherwise the last block leaves out the tokens that no head reads, which changes no logit, and the inner
            blocks are computed as `pipeline.models.students.use_inner_block` has set.
    """

    has_distillation_head: ClassVar[bool]
    has_pixels: ClassVar[bool] = False
    plain: bool = False

    def head_tokens(self, num_tokens: int) -> slice:
        """Say which tokens of the last block are wanted: all, or the class token and the last, if there are two heads.

        Args:
            num_tokens: T, special tokens included.
        """
        if self.plain:
            return slice(None)
        return slice(None, None, num_tokens - 1) if self.has_distillation_head else slice(1)


def divide(whole_name: str, whole: int, part_name: str, part: int) -> int:
    """Divide one number of a student's geometry by another.

    Args:
        whole_name: Name of the dividend, for the message.
        whole: Dividend, at least 1.
        part_name: Name of the divisor, for the message.
        part: Divisor.

    Returns:
        The quotient, at least 1.

    Raises:
        UsageError: Where `part` does not divide `whole` evenly.
    """
    if part < 1 or whole % part:
        divisors = ", ".join(str(number) for number in range(1, whole + 1) if whole % number == 0)
        raise UsageError(f"{part_name} {part} does not divide {whole_name} {whole}; choose one of {divisors}")
    return whole // part


def learned(num_tokens: int, width: int) -> nn.Parameter:
    """Make learned tokens or positions, drawn from a normal of standard deviation 1.

    That is the scale of the embedded pixels and patches that positions are added to, see `initialise`.

    Args:
        num_tokens: Rows T.
        width: Columns D.

    Returns:
        `(T, D)` parameter.
    """
    return nn.Parameter(torch.randn(num_tokens, width))


def initialise(model: nn.Module) -> None:
    """Draw each Linear's weights from a normal of standard deviation 1 / sqrt(inputs), and zero its bias.

    So everything keeps the variance of the normalised image, 1. LayerNorms keep PyTorch's own 1 and 0. The paper is
    silent; DeiT and TNT draw weights, tokens and positions with 0.02 whatever the width. That leaves TITN's 12-wide
    inner path, the only way the image comes in, nearly silent. Training loss of TITN after 5 epochs on the digits:
    2.12 with 0.02 throughout, 1.29 with these weights and tokens of 0.02, 0.39 with both as here (one seed, no teacher;
    on larger data it has not been compared).

    Args:
        model: Model whose Linear layers are changed in place.

    Source: LeCun et al., Efficient BackProp (1998), §4.6.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Mix values by scaled dot-product attention, softmax(Q K^T / sqrt(d)) V.

    Args:
        queries: `(N, heads, T, d)` float.
        keys: `(N, heads, T, d)` float.
        values: `(N, heads, T, d)` float.

    Returns:
        `(N, heads, T, d)` float.

    Source: arXiv:1706.03762 Eq. 1.
    """
    if queries.device.type == "cpu":
        # PyTorch's fused attention is slower on a CPU where sequences are short, above all in bfloat16.
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
        mixed: Tensor = scores.softmax(dim=-1) @ values
        return mixed
    return F.scaled_dot_product_attention(queries, keys, values)


class Attention(nn.Module):
    """Multi-head self-attention.

    The fused projection to queries, keys and values has no bias, the output projection has one: only so do
    the paper's parameter counts come out.

    Args:
        width: Token width D.
        num_heads: Heads; each is D / num_heads wide.

    Raises:
        UsageError: Where `num_heads` does not divide `width`.

    Source: arXiv:2502.16762 §3.2, Table 3.
    """

    def __init__(self, *, width: int, num_heads: int) -> None:
        super().__init__()
        divide("width", width, "num_heads", num_heads)
        self.num_heads = num_heads
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor, wanted: slice = ALL) -> Tensor:
        """Let tokens of a sequence attend to all of that sequence.

        Args:
            tokens: `(N, T, D)` float.
            wanted: Which tokens attend, W of them.

        Returns:
            `(N, W, D)` float.
        """
        if wanted == ALL:
            queries, keys, values = rearrange(
                self.queries_keys_values(tokens), "n t (three h d) -> three n h t d", three=3, h=self.num_heads
            ).unbind(0)
        else:
            weight = self.queries_keys_values.weight
            width = weight.shape[1]
            queries = rearrange(F.linear(tokens[:, wanted], weight[:width]), "n t (h d) -> n h t d", h=self.num_heads)
            keys, values = rearrange(
                F.linear(tokens, weight[width:]), "n t (two h d) -> two n h t d", two=2, h=self.num_heads
            ).unbind(0)
        mixed = rearrange(attend(queries, keys, values), "n h t d -> n t (h d)")
        projected: Tensor = self.projection(mixed)
        return projected


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: tokens += Attention(LN(tokens)); tokens += MLP(LN(tokens)).

    Args:
        width: Token width D.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP as a multiple of D.

    Raises:
        UsageError: Where `num_heads` does not divide `width`.

    Source: arXiv:2502.16762 §3.2; arXiv:2010.11929 Eq. 2 and 3.
    """

    def __init__(self, *, width: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width=width, num_heads=num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, tokens: Tensor, wanted: slice = ALL) -> Tensor:
        """Apply the block.

        Args:
            tokens: `(N, T, D)` float.
            wanted: Which tokens are returned, W of them; all of them are attended to.

        Returns:
            `(N, W, D)` float.
        """
        tokens = tokens[:, wanted] + self.attention(self.attention_norm(tokens), wanted)
        tokens = tokens + self.mlp(self.mlp_norm(tokens))
        return tokens


class PatchEmbedding(nn.Module):
    """Linear embedding of flattened patches, for ViT and DeiT.

    Patches run row by row over the image; inside one, values run over channel, row, column.

    Args:
        image_size: Side of the square image, pixels.
        patch_size: Side of a patch p, pixels.
        width: Token width D.

    Attributes:
        num_patches: P = (image_size / p)^2.

    Raises:
        UsageError: Where `patch_size` does not divide `image_size`.

    Source: arXiv:2010.11929 Eq. 1.
    """

    def __init__(self, *, image_size: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.num_patches = divide("image_size", image_size, "patch_size", patch_size) ** 2
        self.image_size = image_size
        self.patch_size = patch_size
        self.linear = nn.Linear(3 * patch_size**2, width)

    def forward(self, images: Tensor) -> Tensor:
        """Embed the patches of a batch of images.

        Args:
            images: `(B, 3, image_size, image_size)` float, normalised.

        Returns:
            `(B, P, D)` float.
        """
        assert images.shape[1:] == (3, self.image_size, self.image_size), images.shape
        patches = rearrange(
            images, "b c (rows p) (cols q) -> b (rows cols) (c p q)", p=self.patch_size, q=self.patch_size
        )
        embedded: Tensor = self.linear(patches)
        return embedded
