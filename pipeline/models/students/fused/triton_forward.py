"""The Triton kernel of the fused inner block's forward pass, and what the backward pass shares with it.

A program computes tiles of patches in turn. A tile is a matrix with a row for each pixel token and more columns than c.
Elements beyond a patch's M tokens, the last patch or c are zero. The exception is column c of what `normalise` and
`refine_by_attention` return: it is 1, so that the product for a weight's gradient also gives that of a bias.

`weights` is an `InnerWeights` of pointers; `of` is the `Geometry`. Letters: N patches, M pixel tokens of a patch, c
their width, T rows and C columns of a tile, H columns of a chunk of the hidden layer.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from pipeline.models.students.fused.tiles import Geometry

EPSILON = tl.constexpr(1e-5)
LOG2_E = tl.constexpr(1.4426950408889634)


@functools.cache
def constants(of: Geometry) -> Geometry:
    """Make each number of a geometry a constant, as Triton 3.5 to 3.7 need it."""
    return of._make(tl.constexpr(value) for value in of)


@triton.jit
def locate(tile, num_patches, of: tl.constexpr):
    """Return where a tile starts in memory, `(T, C)` offsets from there, and which of them exist."""
    row = tl.arange(0, of.rows)[:, None]
    column = tl.arange(0, of.columns)[None, :]
    first = tile * (of.rows // of.spacing)
    patch, token = row // of.spacing, row % of.spacing
    exists = (token < of.num_pixels) & (first + patch < num_patches) & (column < of.width)
    start = first.to(tl.int64) * (of.num_pixels * of.width)
    return start, (patch * of.num_pixels + token) * of.width + column, exists


@triton.jit
def vector(pointer, size: tl.constexpr, start: tl.constexpr, columns: tl.constexpr):
    """Load elements from `start` as `(1, columns)`, zeros from `size` on."""
    at = start + tl.arange(0, columns)[None, :]
    return tl.load(pointer + at, mask=at < size, other=0.0)


@triton.jit
def matrix(pointer, rows, columns, num_rows: tl.constexpr, num_columns: tl.constexpr):
    """Load elements at `rows` x `columns` of a `(num_rows, num_columns)` matrix, zeros outside."""
    exists = (rows < num_rows) & (columns < num_columns)
    return tl.load(pointer + rows * num_columns + columns, mask=exists, other=0.0)


@triton.jit
def normalise(tokens, of: tl.constexpr):
    """Return LayerNorm without gain and bias, 1 in column c, and 1 / standard deviations `(T, 1)`."""
    column = tl.arange(0, of.columns)[None, :]
    mean = tl.sum(tokens, 1, keep_dims=True) / of.width
    centred = tl.where(column < of.width, tokens - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / of.width + EPSILON)
    return tl.where(column == of.width, 1.0, centred * inverse), inverse


@triton.jit
def gelu(inputs):
    """Return x Phi(x) and its derivative, with Phi of the normal distribution, to 1e-7.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    bell = tl.exp2(inputs * inputs * (-0.5 * LOG2_E))
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(inputs))
    series = ((((0.5307027 * t - 0.72657601) * t + 0.71070687) * t - 0.14224837) * t + 0.12741479) * t
    phi = tl.where(inputs < 0, series * bell, 1.0 - series * bell)
    return inputs * phi, phi + inputs * bell * 0.3989422804014327


@triton.jit
def project(inputs, weights, of: tl.constexpr):
    """Return queries, keys and values of `(T, C)` inputs, heads side by side."""
    inner = tl.arange(0, of.columns)[:, None]
    outer = tl.arange(0, of.columns)[None, :]
    outputs = ()
    for part in tl.static_range(3):
        weight = matrix(
            weights.queries_keys_values_weight + part * of.width * of.width, outer, inner, of.width, of.width
        )
        outputs += (tl.dot(inputs, weight, input_precision=of.precision),)
    return outputs


@triton.jit
def attend(queries, keys, head: tl.constexpr, of: tl.constexpr):
    """Return softmax(Q K^T / sqrt(d)) of a head over the tokens of a patch, `(T, T)`."""
    head_width: tl.constexpr = of.width // of.num_heads
    column = tl.arange(0, of.columns)[None, :]
    queries = tl.where(column // head_width == head, queries, 0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision=of.precision) * (LOG2_E / head_width**0.5)
    if of.rows > of.num_pixels:
        one, other = tl.arange(0, of.rows)[:, None], tl.arange(0, of.rows)[None, :]
        together = (one // of.spacing == other // of.spacing) & (other % of.spacing < of.num_pixels)
        scores = tl.where(together, scores, float("-inf"))
    powers = tl.exp2(scores - tl.max(scores, 1, keep_dims=True))
    return powers * (1.0 / tl.sum(powers, 1, keep_dims=True))


@triton.jit
def refine_by_attention(tokens, weights, of: tl.constexpr):
    """Return tokens + Projection(Attention(LN(tokens))), preceded by what the backward pass needs."""
    head_width: tl.constexpr = of.width // of.num_heads
    inner = tl.arange(0, of.columns)[:, None]
    outer = tl.arange(0, of.columns)[None, :]
    normal, inverse = normalise(tokens, of)
    gain = vector(weights.attention_norm_weight, of.width, 0, of.columns)
    bias = vector(weights.attention_norm_bias, of.width, 0, of.columns)
    queries, keys, values = project(normal * gain + bias, weights, of)
    mixed = tl.where(outer == of.width, 1.0, tl.zeros_like(tokens))
    shares = ()
    for head in tl.static_range(of.num_heads):
        share = attend(queries, keys, head, of)
        shares += (share,)
        mixed = tl.where(outer // head_width == head, tl.dot(share, values, input_precision=of.precision), mixed)
    weight = matrix(weights.projection_weight, outer, inner, of.width, of.width)
    tokens += tl.dot(mixed, weight, input_precision=of.precision)
    tokens += vector(weights.projection_bias, of.width, 0, of.columns)
    return (normal, inverse, queries, keys, values, shares, mixed), tokens


@triton.jit
def hidden_chunk(inputs, weights, chunk: tl.constexpr, of: tl.constexpr):
    """Return a chunk of the MLP's hidden layer before GELU, `(T, H)`."""
    start: tl.constexpr = chunk * of.chunk
    outer = start + tl.arange(0, of.chunk)[None, :]
    inner = tl.arange(0, of.columns)[:, None]
    weight = matrix(weights.hidden_weight, outer, inner, of.hidden, of.width)
    return tl.dot(inputs, weight, input_precision=of.precision) + vector(
        weights.hidden_bias, of.hidden, start, of.chunk
    )


@triton.jit
def refine_by_mlp(tokens, weights, of: tl.constexpr):
    """Return tokens + MLP(LN(tokens)), preceded by what the backward pass needs."""
    normal, inverse = normalise(tokens, of)
    gain = vector(weights.mlp_norm_weight, of.width, 0, of.columns)
    inputs = normal * gain + vector(weights.mlp_norm_bias, of.width, 0, of.columns)
    tokens += vector(weights.output_bias, of.width, 0, of.columns)
    for chunk in tl.static_range(of.num_chunks):
        activated, _ = gelu(hidden_chunk(inputs, weights, chunk, of))
        outer = tl.arange(0, of.columns)[None, :]
        inner = chunk * of.chunk + tl.arange(0, of.chunk)[:, None]
        weight = matrix(weights.output_weight, outer, inner, of.width, of.hidden)
        tokens = tl.dot(activated, weight, tokens, input_precision=of.precision)
    return (normal, inverse, inputs), tokens


@triton.jit(do_not_specialize=["num_patches"])
def forward_kernel(pixels, refined, normed, weights, num_patches, of: tl.constexpr):
    """Write the refined pixels and their LayerNorm."""
    for tile in range(tl.program_id(0), tl.cdiv(num_patches, of.rows // of.spacing), tl.num_programs(0)):
        start, offsets, exists = locate(tile, num_patches, of)
        tokens = tl.load(pixels + start + offsets, mask=exists, other=0.0).to(tl.float32)
        _, tokens = refine_by_attention(tokens, weights, of)
        _, tokens = refine_by_mlp(tokens, weights, of)
        tl.store(refined + start + offsets, tokens, mask=exists)
        normal, _ = normalise(tokens, of)
        gain = vector(weights.pixel_norm_weight, of.width, 0, of.columns)
        bias = vector(weights.pixel_norm_bias, of.width, 0, of.columns)
        tl.store(normed + start + offsets, normal * gain + bias, mask=exists)
