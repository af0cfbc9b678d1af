"""The students' layers against independent formulations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.models.students import layers
from pipeline.models.students.layers import Attention, EncoderBlock, PatchEmbedding, attend, divide, initialise, learned
from pipeline.models.students.tnt import NestedBlock, PixelEmbedding

FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return the module in float64 with every parameter drawn anew: zero biases would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return module


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def reference_attention(x: Tensor, attention: Attention) -> Tensor:
    """One head at a time, with the projection's rows cut out by hand."""
    width = x.shape[-1]
    head_width = width // attention.num_heads
    weight = attention.queries_keys_values.weight
    heads = []
    for head in range(attention.num_heads):
        rows = [slice(part * width + head * head_width, part * width + (head + 1) * head_width) for part in range(3)]
        q, k, v = (torch.einsum("ntd,ed->nte", x, weight[part]) for part in rows)
        scores = torch.einsum("nie,nje->nij", q, k) / head_width**0.5
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(torch.einsum("nij,nje->nie", shares, v))
    mixed = torch.cat(heads, dim=-1)
    return torch.einsum("nte,de->ntd", mixed, attention.projection.weight) + attention.projection.bias


def reference_mlp(x: Tensor, mlp: nn.Sequential) -> Tensor:
    first, last = mlp[0], mlp[2]
    hidden = torch.einsum("ntd,hd->nth", x, first.weight) + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return torch.einsum("nth,dh->ntd", hidden, last.weight) + last.bias


def reference_block(x: Tensor, block: EncoderBlock) -> Tensor:
    x = x + reference_attention(reference_norm(x, block.attention_norm), block.attention)
    return x + reference_mlp(reference_norm(x, block.mlp_norm), block.mlp)


def reference_nested(pixels: Tensor, patches: Tensor, block: NestedBlock) -> tuple[Tensor, Tensor]:
    """Add each patch's pixels to its own row in a loop; the rows of the extra tokens are never touched."""
    pixels = reference_block(pixels, block.inner)
    num_patches = len(pixels) // len(patches)
    patches = patches.clone()
    for image in range(len(patches)):
        for patch in range(num_patches):
            flat = reference_norm(pixels[image * num_patches + patch], block.pixel_norm).flatten()
            patches[image, 1 + patch] += block.pixels_to_patch.weight @ flat + block.pixels_to_patch.bias
    return pixels, reference_block(patches, block.outer)


@pytest.mark.parametrize(("width", "num_heads"), [(12, 2), (192, 3), (10, 1), (6, 6)])
def test_attention_equals_torch_multihead_attention_with_the_same_weights(width: int, num_heads: int) -> None:
    ours = randomised(Attention(width=width, num_heads=num_heads))
    theirs = nn.MultiheadAttention(width, num_heads, bias=True, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data = ours.queries_keys_values.weight.data
    theirs.in_proj_bias.data.zero_()
    theirs.out_proj.weight.data = ours.projection.weight.data
    theirs.out_proj.bias.data = ours.projection.bias.data
    x = tokens(4, 7, width)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], **FLOAT64)


def test_attention_weights_are_a_softmax_over_the_keys() -> None:
    queries, keys, values = tokens(3, 2, 2, 5, 4)
    scores = torch.einsum("nhid,nhjd->nhij", queries, keys) / 2
    torch.testing.assert_close(attend(queries, keys, values), scores.softmax(-1) @ values, **FLOAT64)


def test_equal_keys_attend_to_the_mean_of_the_values() -> None:
    values = tokens(2, 3, 5, 4)
    mixed = attend(tokens(2, 3, 5, 4, seed=2), torch.ones_like(values), values)
    torch.testing.assert_close(mixed, values.mean(2, keepdim=True).expand_as(values), **FLOAT64)


def test_an_encoder_block_equals_the_formula_written_out() -> None:
    block = randomised(EncoderBlock(width=12, num_heads=2, mlp_ratio=4))
    x = tokens(3, 5, 12)
    torch.testing.assert_close(block(x), reference_block(x, block), **FLOAT64)


@pytest.mark.parametrize("num_behind", [0, 1])
def test_a_nested_block_equals_the_formula_written_out(num_behind: int) -> None:
    block = randomised(
        NestedBlock(
            num_pixels=16,
            pixel_width=12,
            pixel_heads=2,
            width=24,
            num_heads=3,
            mlp_ratio=4,
        )
    )
    inputs = (tokens(2 * 4, 16, 12).requires_grad_(), tokens(2, 1 + 4 + num_behind, 24, seed=2).requires_grad_())
    for ours, theirs in zip(block(*inputs), reference_nested(*inputs, block), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)
        gradients = [
            torch.autograd.grad(output.sin().sum(), inputs, retain_graph=True, allow_unused=True)
            for output in (ours, theirs)
        ]
        for our_gradient, their_gradient in zip(*gradients, strict=True):
            torch.testing.assert_close(our_gradient, their_gradient, **FLOAT64)


@pytest.mark.parametrize("num_behind", [0, 1])
def test_tokens_that_stand_for_no_patch_receive_nothing_from_the_pixels(num_behind: int) -> None:
    block = randomised(
        NestedBlock(
            num_pixels=4,
            pixel_width=6,
            pixel_heads=2,
            width=8,
            num_heads=2,
            mlp_ratio=2,
        )
    )
    # Without attention and MLP the outer block is the identity, so what is left is the residual alone.
    for layer in (block.outer.attention.projection, block.outer.mlp[2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    patches = tokens(2, 1 + 3 + num_behind, 8)
    residual = block(tokens(2 * 3, 4, 6, seed=2), patches)[1] - patches
    extra = [0] if num_behind == 0 else [0, -1]
    assert torch.equal(residual[:, extra], torch.zeros_like(residual[:, extra]))
    assert (residual[:, 1:4].abs().amax(-1) > 0).all()


def test_pixels_of_one_patch_never_reach_another_patchs_pixels() -> None:
    block = randomised(NestedBlock(num_pixels=4, pixel_width=6, pixel_heads=2, width=8, num_heads=2, mlp_ratio=2))
    pixels, patches = tokens(2 * 3, 4, 6), tokens(2, 5, 8)
    changed = pixels.clone()
    changed[1] += 1
    before, after = block(pixels, patches)[0], block(changed, patches)[0]
    untouched = [0, 2, 3, 4, 5]
    assert torch.equal(before[untouched], after[untouched])
    assert not torch.equal(before[1], after[1])


def test_patch_embedding_equals_a_convolution_with_the_patch_as_stride() -> None:
    embedding = randomised(PatchEmbedding(image_size=12, patch_size=4, width=10))
    images = tokens(2, 3, 12, 12)
    convolved = nn.functional.conv2d(images, embedding.linear.weight.view(10, 3, 4, 4), embedding.linear.bias, stride=4)
    torch.testing.assert_close(embedding(images), convolved.flatten(2).transpose(1, 2), **FLOAT64)


def test_pixel_embedding_equals_slices_taken_by_hand() -> None:
    embedding = randomised(PixelEmbedding(image_size=12, patch_size=6, pixel_size=2, pixel_width=5))
    images = tokens(2, 3, 12, 12)
    embedded = embedding(images)
    assert embedded.shape == (2 * 4, 9, 5)
    for image in range(2):
        for patch in range(4):
            for pixel in range(9):
                top, left = patch // 2 * 6 + pixel // 3 * 2, patch % 2 * 6 + pixel % 3 * 2
                values = images[image, :, top : top + 2, left : left + 2].flatten()
                expected = embedding.linear.weight @ values + embedding.linear.bias + embedding.positions[pixel]
                torch.testing.assert_close(embedded[image * 4 + patch, pixel], expected, **FLOAT64)


def test_a_number_that_does_not_divide_is_refused_with_both_numbers_and_the_choices() -> None:
    assert divide("image_size", 32, "patch_size", 8) == 4
    message = "patch_size 5 does not divide image_size 12; choose one of 1, 2, 3, 4, 6, 12"
    with pytest.raises(UsageError, match=f"^{message}$"):
        divide("image_size", 12, "patch_size", 5)


@pytest.mark.parametrize("part", [0, -4, 64])
def test_divisors_below_one_and_above_the_whole_are_refused(part: int) -> None:
    with pytest.raises(UsageError, match=f"patch_size {part} does not divide image_size 32"):
        divide("image_size", 32, "patch_size", part)


def test_weights_keep_the_variance_of_their_inputs_and_biases_start_at_zero() -> None:
    torch.manual_seed(0)
    block = EncoderBlock(width=192, num_heads=3, mlp_ratio=4)
    initialise(block)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(module.in_features**-0.5, rel=0.02)
            assert abs(module.weight.mean().item()) < 5e-4
            assert module.bias is None or not module.bias.any()
    assert learned(100, 192).std().item() == pytest.approx(1.0, rel=0.05)
    assert torch.equal(block.mlp_norm.weight, torch.ones(192))


def test_attention_kernels_never_get_more_sequences_than_cudas_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain inner block of 1,024 images of 64 patches has 65,536 sequences."""
    sizes: list[int] = []
    whole = torch.nn.functional.scaled_dot_product_attention

    def noted(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        sizes.append(len(queries))
        return whole(queries, keys, values)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", noted)
    with torch.device("meta"):
        block = EncoderBlock(width=12, num_heads=2, mlp_ratio=1)
        assert block(torch.empty(1024 * 64, 16, 12)).shape == (65_536, 16, 12) and sizes == [65_535, 1]
        block(torch.empty(1024 * 64 - 1, 16, 12))
    assert sizes[2:] == [65_535], "what fits is not cut"
    queries, keys, values = (tokens(7, 2, 5, 4, seed=seed).requires_grad_() for seed in range(3))
    together = attend(queries, keys, values)
    monkeypatch.setattr(layers, "MAX_SEQUENCES", 3)
    parts = layers.attend_in_parts(queries, keys, values)
    assert sizes[3:] == [3, 3, 1]
    torch.testing.assert_close(parts, together, **FLOAT64)
    for gradient, expected in zip(
        *(torch.autograd.grad(out.square().sum(), keys) for out in (parts, together)), strict=True
    ):
        torch.testing.assert_close(gradient, expected, **FLOAT64)
