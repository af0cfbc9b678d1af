"""The layers of the four students.

Letters: B batch, P patches, D width, K classes, N sequences of T tokens.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.models.network import logit_layers
from pipeline.models.students.fused.passes import Branch, Passes

ALL = slice(None)
MAX_SEQUENCES = 65_535
"""Blocks of CUDA's grid in the direction in which attention kernels of some versions count sequences. A plain inner
block has one for each patch of each image."""
DRAWS = 2
"""Numbers that stochastic depth draws for a sample in a block: one for each residual branch."""


class Student(nn.Module):
    """The base of every student.

    A constructor takes by keyword `num_classes`, what it needs of pipeline.models.students.SHARED_ARGUMENTS, and
    arguments of its own. These are annotated with int, float, str or bool and should have defaults. Of two heads each
    is an attribute whose name ends in `head`.

    Attributes:
        has_distillation_head: True where `forward` returns (class logits, distillation logits), False where it returns
            class logits.
        has_pixels: Whether the constructor takes `pixel_size`, `pixel_width` and `pixel_heads`.
        plain: Whether `forward` calls every module on every token, as the paper's formulas do; costs are counted so.
            Otherwise the last block leaves out the tokens that no head reads, which changes no logit, and blocks are
            computed as `use_inner_block` and `use_outer_block` of pipeline.models.students have set.
        num_draws: Random numbers that `forward` takes for each image in training, as its second argument `(B,
            num_draws)` float32, uniform in [0, 1); 0 where it takes none.
    """

    has_distillation_head: ClassVar[bool]
    has_pixels: ClassVar[bool] = False
    plain: bool = False
    num_draws: int = 0

    @property
    def logit_layers(self) -> list[nn.Module]:
        """The layers that make the logits, see `logit_layers` of pipeline.models.network."""
        return logit_layers(self)

    @property
    def rounded(self) -> list[str]:
        """Names of the parameters that autocast on a GPU would round one by one: weights of products in the blocks.

        A fused inner block takes its own in float32.
        """
        return [
            f"{name}.weight"
            for name, layer in self.named_modules()
            if isinstance(layer, nn.Linear) and name.startswith("blocks.") and ".inner." not in name
        ]

    @property
    def tokens_per_image(self) -> int:
        """Patch tokens of an image, P; 1 where there is no `embedding` that knows."""
        return int(getattr(getattr(self, "embedding", None), "num_patches", 1))

    def head_tokens(self, num_tokens: int) -> slice:
        """Return which of T tokens the last block returns: the class token and, with two heads, the last; plain, all.

        Args:
            num_tokens: T, special tokens included.
        """
        if self.plain:
            return ALL
        return slice(None, None, num_tokens - 1) if self.has_distillation_head else slice(1)


def drop_paths(rate: float, depth: int) -> list[float]:
    """Return the rate of stochastic depth in each block: it rises linearly from 0 to `rate` in the last of several.

    Raises:
        UsageError: The rate is not in [0, 1).

    Source: arXiv:1603.09382 §3; arXiv:2012.12877 Table 9.
    """
    if not 0.0 <= rate < 1.0:
        raise UsageError(f"drop_path {rate:g} is impossible; choose from 0 up to, but not, 1")
    return [rate * block / max(1, depth - 1) for block in range(depth)]


def is_float32_on(device_type: str | None, norm: nn.LayerNorm) -> bool:
    """Return whether a block's norm is float32 and on a type of device; whoever has a module may move or convert it."""
    weight = norm.weight
    return weight.dtype == torch.float32 and device_type in (None, weight.device.type)


def draws_by_block(draws: Tensor | None, depth: int) -> list[Tensor | None]:
    """Return each block's part of a student's draws, `(B, DRAWS)`; None where there are none."""
    return [None] * depth if draws is None else [*torch.split(draws, DRAWS, dim=1)]


def divide(whole_name: str, whole: int, part_name: str, part: int) -> int:
    """Return `whole` / `part`, at least 1, of two numbers of a student's geometry with these names.

    Raises:
        UsageError: `part` does not divide `whole` evenly.
    """
    if part < 1 or whole % part:
        divisors = ", ".join(str(number) for number in range(1, whole + 1) if whole % number == 0)
        raise UsageError(f"{part_name} {part} does not divide {whole_name} {whole}; choose one of {divisors}")
    return whole // part


def learned(num_tokens: int, width: int) -> nn.Parameter:
    """Return learned tokens or positions, a `(num_tokens, width)` parameter drawn from a standard normal.

    The embedded pixels and patches that positions are added to have the same scale, see `initialise`.
    """
    return nn.Parameter(torch.randn(num_tokens, width))


def initialise(model: nn.Module) -> None:
    """Draw each Linear's weights from a normal of standard deviation 1 / sqrt(inputs), and zero its bias, in place.

    So everything keeps the variance of the normalised image, 1. LayerNorms keep PyTorch's 1 and 0. The paper does not
    say. DeiT and TNT draw weights, tokens and positions with 0.02 for any width. That leaves TITN's 12-wide inner
    path, the image's only way in, nearly silent. TITN's training loss after 5 epochs on the digits is 2.12 with 0.02
    throughout, 1.29 with these weights and tokens of 0.02, 0.39 with both as here (one seed, no teacher; not compared
    on larger data).

    Source: LeCun et al., Efficient BackProp (1998), §4.6.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return scaled dot-product attention, softmax(Q K^T / sqrt(d)) V; all are `(N, heads, T, d)` float.

    Source: arXiv:1706.03762 Eq. 1.
    """
    if queries.device.type == "cpu":
        # On a CPU PyTorch's fused attention is slower for short sequences, above all in bfloat16.
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
        mixed: Tensor = scores.softmax(dim=-1) @ values
        return mixed
    return attend_in_parts(queries, keys, values)


def attend_in_parts(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return what `attend` does by PyTorch's fused attention, of at most MAX_SEQUENCES sequences at a time."""
    if len(queries) <= MAX_SEQUENCES:
        return F.scaled_dot_product_attention(queries, keys, values)
    parts = zip(*(torch.split(tensor, MAX_SEQUENCES) for tensor in (queries, keys, values)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


class Attention(nn.Module):
    """Multi-head self-attention.

    The joint projection to queries, keys and values has no bias, the output projection has one. These are the paper's
    parameter counts.

    Args:
        width: Token width D.
        num_heads: Heads; each is D / num_heads wide.

    Raises:
        UsageError: `num_heads` does not divide `width`.

    Source: arXiv:2502.16762 §3.2, Table 3.
    """

    def __init__(self, *, width: int, num_heads: int) -> None:
        super().__init__()
        divide("width", width, "num_heads", num_heads)
        self.num_heads = num_heads
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor, selection: slice = ALL) -> Tensor:
        """Let tokens of a sequence attend to all tokens of the sequence.

        Args:
            tokens: `(N, T, D)` float.
            selection: Which tokens attend, W of them.

        Returns:
            `(N, W, D)` float.
        """
        one, *other = self.project(tokens, selection)
        if not other:
            queries, keys, values = rearrange(
                one, "n t (three h d) -> three n h t d", three=3, h=self.num_heads
            ).unbind(0)
        else:
            queries = rearrange(one, "n t (h d) -> n h t d", h=self.num_heads)
            keys, values = rearrange(other[0], "n t (two h d) -> two n h t d", two=2, h=self.num_heads).unbind(0)
        mixed = rearrange(attend(queries, keys, values), "n h t d -> n t (h d)")
        projected: Tensor = self.projection(mixed)
        return projected

    def project(self, tokens: Tensor, selection: slice = ALL) -> list[Tensor]:
        """Return queries, keys and values of tokens `(N, T, D)`.

        They lie side by side, `(N, T, 3D)`; or, where only W tokens are selected, as queries `(N, W, D)`, and keys and
        values `(N, T, 2D)`.
        """
        if selection == ALL:
            return [self.queries_keys_values(tokens)]
        weight = self.queries_keys_values.weight
        width = weight.shape[1]
        return [F.linear(tokens[:, selection], weight[:width]), F.linear(tokens, weight[width:])]


class Entering(NamedTuple):
    """What joins the tokens of a block before it: a linear layer's results.

    Attributes:
        layer: The layer.
        inputs: `(N, W, features)` float, its inputs.
        first: The first of the W tokens that the results are added to.
    """

    layer: nn.Linear
    inputs: Tensor
    first: int


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: tokens += Attention(LN(tokens)); tokens += MLP(LN(tokens)).

    Args:
        width: Token width D.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP as a multiple of D.
        drop_path: Rate of stochastic depth: in training each branch is left out with this probability, for each
            sequence by a draw of its own, and otherwise multiplied by 1 / (1 - rate), which keeps its expectation.

    Attributes:
        passes: Compute what is between products in place of the modules; None where they do.
        passes_on: The type of device that they are for; elsewhere the modules compute. None is any.

    Raises:
        UsageError: `num_heads` does not divide `width`, or `mlp_ratio` is below 1.

    Source: arXiv:2502.16762 §3.2; arXiv:2010.11929 Eq. 2 and 3; arXiv:1603.09382 §3.
    """

    passes: Passes | None = None
    passes_on: str | None = None

    def __init__(self, *, width: int, num_heads: int, mlp_ratio: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        if mlp_ratio < 1:
            raise UsageError(f"mlp_ratio {mlp_ratio} is too small; choose 1 or more")
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width=width, num_heads=num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(
        self,
        tokens: Tensor,
        selection: slice = ALL,
        draws: Tensor | None = None,
        *,
        entering: Entering | None = None,
        plain: bool = False,
    ) -> Tensor:
        """Apply the block.

        Args:
            tokens: `(N, T, D)` float.
            selection: Which tokens are returned, W of them; all tokens are attended to.
            draws: `(N, DRAWS)` float32, uniform in [0, 1), which decide what stochastic depth leaves out in training;
                None draws them from PyTorch's generator.
            entering: What is added to the tokens first.
            plain: Whether the modules compute the block although `passes` could.

        Returns:
            `(N, W, D)` float.
        """
        if self.passes is not None and not plain and is_float32_on(self.passes_on, self.attention_norm):
            return self._by_passes(self.passes, tokens, selection, draws, entering)
        if entering is not None:
            behind = tokens.shape[1] - entering.first - entering.inputs.shape[1]
            tokens = tokens + F.pad(entering.layer(entering.inputs), (0, 0, entering.first, behind))
        tokens = tokens[:, selection] + self._kept(self.attention(self.attention_norm(tokens), selection), draws, 0)
        tokens = tokens + self._kept(self.mlp(self.mlp_norm(tokens)), draws, 1)
        return tokens

    @property
    def mlp_layers(self) -> tuple[nn.Linear, nn.Linear]:
        """The layers into and out of the MLP."""
        into, out = self.mlp[0], self.mlp[2]
        assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
        return into, out

    @property
    def geometry(self) -> tuple[int, int, int]:
        """D, heads, and the hidden width of the MLP."""
        into, _ = self.mlp_layers
        return into.in_features, self.attention.num_heads, into.out_features

    def _by_passes(
        self, passes: Passes, tokens: Tensor, selection: slice, draws: Tensor | None, entering: Entering | None
    ) -> Tensor:
        """Apply the block as `forward` does; every product leaves its bias to the pass behind it."""
        projection, (into, out) = self.attention.projection, self.mlp_layers
        enters = None
        if entering is not None:
            enters = Branch(F.linear(entering.inputs, entering.layer.weight), entering.layer.bias, entering.first)
        tokens, normed = passes.residual(tokens, enters, self.attention_norm)
        mixed = passes.attend(self.attention.project(normed, selection), self.attention.num_heads)
        product = F.linear(mixed, projection.weight)
        branch = Branch(product, projection.bias, factors=self._factors(tokens, draws, 0))
        tokens, normed = passes.residual(tokens[:, selection], branch, self.mlp_norm)
        active = passes.gelu(F.linear(normed, into.weight), into.bias)
        branch = Branch(F.linear(active, out.weight), out.bias, factors=self._factors(tokens, draws, 1))
        tokens, _ = passes.residual(tokens, branch, None)
        return tokens

    def _kept(self, branch: Tensor, draws: Tensor | None, which: int) -> Tensor:
        """Return a residual branch, of which stochastic depth leaves out some sequences in training."""
        factors = self._factors(branch, draws, which)
        return branch if factors is None else branch * factors[:, None, None]

    def _factors(self, tokens: Tensor, draws: Tensor | None, which: int) -> Tensor | None:
        """Return by what stochastic depth multiplies each sequence's branch, `(N,)`; None where it leaves all."""
        if not (self.training and self.drop_path):
            return None
        keep = 1.0 - self.drop_path
        drawn = torch.rand(len(tokens), device=tokens.device) if draws is None else draws[:, which]
        return (drawn < keep) / keep


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
        UsageError: `patch_size` does not divide `image_size`.

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
