"""The Triton kernel of the fused inner block's backward pass; see the forward pass for words and letters."""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.models.students.fused.triton_forward import (
    gelu,
    hidden_chunk,
    locate,
    matrix,
    normalise,
    refine_by_attention,
    refine_by_mlp,
    vector,
)


@triton.jit
def normalise_backward(gradient, gain, normal, inverse, of: tl.constexpr):
    """Return the gradient of LayerNorm's input from that of its output."""
    gradient = gradient * gain
    mean = tl.sum(gradient, 1, keep_dims=True) / of.width
    along = tl.sum(gradient * normal, 1, keep_dims=True) / of.width
    return inverse * (gradient - mean - normal * along)


@triton.jit
def mlp_backward(gradient, kept, weights, sums, of: tl.constexpr):
    """Pass the gradient of `refine_by_mlp`'s tokens back, adding to two `sums` for every chunk of the hidden layer.

    They sum the gradients of the hidden weight, `(H, C)`, with normalised tokens as inputs, and of the output weight,
    `(C, H)`.
    """
    normal, inverse, inputs = kept
    row = tl.arange(0, of.columns)[:, None]
    column = tl.arange(0, of.columns)[None, :]
    new_sums = ()
    inputs_gradient = tl.zeros_like(gradient)
    for chunk in tl.static_range(of.num_chunks):
        unit = chunk * of.chunk + tl.arange(0, of.chunk)
        activated, slope = gelu(hidden_chunk(inputs, weights, chunk, of))
        weight = matrix(weights.output_weight, row, unit[None, :], of.width, of.hidden)
        hidden_gradient = slope * tl.dot(gradient, weight, input_precision=of.precision)
        weight = matrix(weights.hidden_weight, unit[:, None], column, of.hidden, of.width)
        inputs_gradient = tl.dot(hidden_gradient, weight, inputs_gradient, input_precision=of.precision)
        new_sums += (
            tl.dot(tl.trans(hidden_gradient), normal, sums[2 * chunk], input_precision=of.precision),
            tl.dot(tl.trans(gradient), activated, sums[2 * chunk + 1], input_precision=of.precision),
        )
    gain = vector(weights.mlp_norm_weight, of.width, 0, of.columns)
    return gradient + normalise_backward(inputs_gradient, gain, normal, inverse, of), new_sums


@triton.jit
def attention_backward(gradient, kept, weights, sums, of: tl.constexpr):
    """Pass the gradient of `refine_by_attention`'s tokens back, adding to four `sums`, `(C, C)`.

    They sum the gradients of the weights of queries, keys and values, with normalised tokens as inputs, and of the
    projection's weight.
    """
    normal, inverse, queries, keys, values, shares, mixed = kept
    head_width: tl.constexpr = of.width // of.num_heads
    scale: tl.constexpr = head_width**-0.5
    row = tl.arange(0, of.columns)[:, None]
    column = tl.arange(0, of.columns)[None, :]
    projection_sum = tl.dot(tl.trans(gradient), mixed, sums[3], input_precision=of.precision)
    weight = matrix(weights.projection_weight, row, column, of.width, of.width)
    mixed_gradient = tl.dot(gradient, weight, input_precision=of.precision)
    queries_gradient = tl.zeros_like(gradient)
    keys_gradient = tl.zeros_like(gradient)
    values_gradient = tl.zeros_like(gradient)
    for head in tl.static_range(of.num_heads):
        mine = column // head_width == head
        share = shares[head]
        moved = tl.dot(tl.trans(share), mixed_gradient, input_precision=of.precision)
        values_gradient = tl.where(mine, moved, values_gradient)
        shares_gradient = tl.dot(tl.where(mine, mixed_gradient, 0.0), tl.trans(values), input_precision=of.precision)
        balance = tl.sum(share * shares_gradient, 1, keep_dims=True)
        scores_gradient = share * (shares_gradient - balance) * scale
        moved = tl.dot(scores_gradient, keys, input_precision=of.precision)
        queries_gradient = tl.where(mine, moved, queries_gradient)
        moved = tl.dot(tl.trans(scores_gradient), queries, input_precision=of.precision)
        keys_gradient = tl.where(mine, moved, keys_gradient)
    gradients = (queries_gradient, keys_gradient, values_gradient)
    inputs_gradient = tl.zeros_like(gradient)
    new_sums = ()
    for part in tl.static_range(3):
        start = weights.queries_keys_values_weight + part * of.width * of.width
        weight = matrix(start, row, column, of.width, of.width)
        inputs_gradient = tl.dot(gradients[part], weight, inputs_gradient, input_precision=of.precision)
        new_sums += (tl.dot(tl.trans(gradients[part]), normal, sums[part], input_precision=of.precision),)
    gain = vector(weights.attention_norm_weight, of.width, 0, of.columns)
    gradient += normalise_backward(inputs_gradient, gain, normal, inverse, of)
    new_sums += (projection_sum,)
    return gradient, new_sums


@triton.jit
def store_matrix(pointer, values, rows, columns, num_rows: tl.constexpr, num_columns: tl.constexpr):
    """Write elements at `rows` x `columns` of a `(num_rows, num_columns)` matrix, nothing outside."""
    exists = (rows < num_rows) & (columns < num_columns)
    tl.store(pointer + rows * num_columns + columns, values, mask=exists)


@triton.jit
def separate(total, weight, gain, bias, of: tl.constexpr):
    """Return the gradients of a weight, LayerNorm's gain and its bias from a sum with normalised tokens as inputs.

    The inputs were normal * gain + bias. Column c of `total` is the sum of the outputs' gradients; it is returned last.
    """
    column = tl.arange(0, of.columns)[None, :]
    outputs = tl.sum(tl.where(column == of.width, total, 0.0), 1, keep_dims=True)
    gain_gradient = tl.sum(total * weight, 0, keep_dims=True)
    bias_gradient = tl.sum(outputs * weight, 0, keep_dims=True)
    return total * gain + outputs * bias, gain_gradient, bias_gradient, outputs


@triton.jit
def store_attention_sums(targets, at, sums, weights, of: tl.constexpr):
    """Write the gradients of the attention's and its LayerNorm's parameters."""
    row = tl.arange(0, of.columns)[:, None]
    column = tl.arange(0, of.columns)[None, :]
    gain = vector(weights.attention_norm_weight, of.width, 0, of.columns)
    bias = vector(weights.attention_norm_bias, of.width, 0, of.columns)
    gain_gradient = tl.zeros_like(gain)
    bias_gradient = tl.zeros_like(bias)
    for part in tl.static_range(3):
        start = part * of.width * of.width
        weight = matrix(weights.queries_keys_values_weight + start, row, column, of.width, of.width)
        gradient, gain_part, bias_part, _ = separate(sums[part], weight, gain, bias, of)
        target = targets.queries_keys_values_weight + at + start
        store_matrix(target, gradient, row, column, of.width, of.width)
        gain_gradient += gain_part
        bias_gradient += bias_part
    store_matrix(targets.attention_norm_weight + at, gain_gradient, 0, column, 1, of.width)
    store_matrix(targets.attention_norm_bias + at, bias_gradient, 0, column, 1, of.width)
    store_matrix(targets.projection_weight + at, sums[3], row, column, of.width, of.width)
    bias_gradient = tl.sum(tl.where(column == of.width, sums[3], 0.0), 1, keep_dims=True)
    store_matrix(targets.projection_bias + at, bias_gradient, row, 0, of.width, 1)


@triton.jit
def store_mlp_sums(targets, at, sums, weights, of: tl.constexpr):
    """Write the gradients of the MLP's and its LayerNorm's parameters, except the output bias."""
    row = tl.arange(0, of.columns)[:, None]
    column = tl.arange(0, of.columns)[None, :]
    gain = vector(weights.mlp_norm_weight, of.width, 0, of.columns)
    bias = vector(weights.mlp_norm_bias, of.width, 0, of.columns)
    gain_gradient = tl.zeros_like(gain)
    bias_gradient = tl.zeros_like(bias)
    for chunk in tl.static_range(of.num_chunks):
        unit = chunk * of.chunk + tl.arange(0, of.chunk)
        weight = matrix(weights.hidden_weight, unit[:, None], column, of.hidden, of.width)
        gradient, gain_part, bias_part, outputs = separate(sums[2 * chunk], weight, gain, bias, of)
        store_matrix(targets.hidden_weight + at, gradient, unit[:, None], column, of.hidden, of.width)
        store_matrix(targets.hidden_bias + at, outputs, unit[:, None], 0, of.hidden, 1)
        store_matrix(targets.output_weight + at, sums[2 * chunk + 1], row, unit[None, :], of.width, of.hidden)
        gain_gradient += gain_part
        bias_gradient += bias_part
    store_matrix(targets.mlp_norm_weight + at, gain_gradient, 0, column, 1, of.width)
    store_matrix(targets.mlp_norm_bias + at, bias_gradient, 0, column, 1, of.width)


@triton.jit(do_not_specialize=["num_patches"])
def backward_kernel(
    pixels, refined_gradient, normed_gradient, pixels_gradient, weights, targets, num_patches, size, of: tl.constexpr
):
    """Write the pixels' gradient and, `size` elements apart, each program's sums of the parameters' gradients."""
    column = tl.arange(0, of.columns)[None, :]
    attention_sums = ()
    for _ in tl.static_range(4):
        attention_sums += (tl.zeros((of.columns, of.columns), tl.float32),)
    mlp_sums = ()
    for _ in tl.static_range(of.num_chunks):
        mlp_sums += (
            tl.zeros((of.chunk, of.columns), tl.float32),
            tl.zeros((of.columns, of.chunk), tl.float32),
        )
    output_sum = tl.zeros((1, of.columns), tl.float32)
    gain_sum = tl.zeros((1, of.columns), tl.float32)
    bias_sum = tl.zeros((1, of.columns), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_patches, of.rows // of.spacing), tl.num_programs(0)):
        start, offsets, exists = locate(tile, num_patches, of)
        tokens = tl.load(pixels + start + offsets, mask=exists, other=0.0).to(tl.float32)
        kept, tokens = refine_by_attention(tokens, weights, of)
        mlp_kept, tokens = refine_by_mlp(tokens, weights, of)
        normal, inverse = normalise(tokens, of)

        gradient = tl.load(normed_gradient + start + offsets, mask=exists, other=0.0).to(tl.float32)
        gain_sum += tl.sum(gradient * normal, 0, keep_dims=True)
        bias_sum += tl.sum(gradient, 0, keep_dims=True)
        gain = vector(weights.pixel_norm_weight, of.width, 0, of.columns)
        gradient = normalise_backward(gradient, gain, normal, inverse, of)
        gradient += tl.load(refined_gradient + start + offsets, mask=exists, other=0.0).to(tl.float32)
        output_sum += tl.sum(gradient, 0, keep_dims=True)
        gradient, mlp_sums = mlp_backward(gradient, mlp_kept, weights, mlp_sums, of)
        gradient, attention_sums = attention_backward(gradient, kept, weights, attention_sums, of)
        tl.store(pixels_gradient + start + offsets, gradient, mask=exists)

    at = tl.program_id(0) * size
    store_attention_sums(targets, at, attention_sums, weights, of)
    store_mlp_sums(targets, at, mlp_sums, weights, of)
    store_matrix(targets.output_bias + at, output_sum, 0, column, 1, of.width)
    store_matrix(targets.pixel_norm_weight + at, gain_sum, 0, column, 1, of.width)
    store_matrix(targets.pixel_norm_bias + at, bias_sum, 0, column, 1, of.width)
