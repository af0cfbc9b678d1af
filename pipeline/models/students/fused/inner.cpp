// The fused inner block on the CPU, forward and backward.
//
// LANES patches are computed at once, one in each lane of a SIMD register, so that every operation on a token of any width
// fills the registers and no shuffle is needed but one transposition when pixels come in and one when they go out. A
// group's tokens stay in the first two caches. The backward pass computes the forward pass again from the pixels.
//
// Compiled for one geometry: -DTOKENS=M -DWIDTH=c -DHEADS=h -DHIDDEN=rc. Plain C interface.

#include "vector.h"

namespace {

constexpr int M = TOKENS, C = WIDTH, H = HEADS, F = HIDDEN, D = C / H;

// Weights or their gradients, in the order of InnerWeights.
template <class T>
struct Parameters {
    T *norm1_weight, *norm1_bias, *qkv, *projection, *projection_bias, *norm2_weight, *norm2_bias, *hidden, *hidden_bias,
        *output, *output_bias, *norm3_weight, *norm3_bias;
};

constexpr int NUM_PARAMETERS = 13;
constexpr int SIZES[NUM_PARAMETERS] = {C, C, 3 * C * C, C * C, C, C, C, F * C, F, C * F, C, C, C};
constexpr int total_size() {
    int total = 0;
    for (int size : SIZES) total += size;
    return total;
}
constexpr int TOTAL = total_size();

template <class T>
Parameters<T> parameters(T* const* arrays) {
    Parameters<T> p;
    memcpy(static_cast<void*>(&p), arrays, sizeof p);
    return p;
}

using Weights = Parameters<const float>;
using Sums = Parameters<Lanes>;

// out[o] = bias[o] + sum_i weight[o][i] in[i]
template <int OUT, int IN>
INLINE void linear(Lanes* __restrict out, const Lanes* __restrict in, const float* __restrict weight,
                   const float* __restrict bias) {
    constexpr int STEP = OUT % 12 == 0 ? 12 : OUT % 8 == 0 ? 8 : OUT % 4 == 0 ? 4 : 1;
    for (int first = 0; first < OUT; first += STEP) {
        Lanes sums[STEP];
        for (int o = 0; o < STEP; ++o) sums[o] = bias ? all(bias[first + o]) : Lanes{};
#pragma GCC unroll 4
        for (int i = 0; i < IN; ++i)
#pragma GCC unroll 16
            for (int o = 0; o < STEP; ++o) sums[o] += in[i] * weight[(first + o) * IN + i];
        for (int o = 0; o < STEP; ++o) out[first + o] = sums[o];
    }
}

// in_gradient[i] = sum_o weight[o][i] out_gradient[o]
template <int OUT, int IN>
INLINE void linear_backward(Lanes* __restrict in_gradient, const Lanes* __restrict out_gradient,
                            const float* __restrict weight) {
    constexpr int STEP = IN % 12 == 0 ? 12 : IN % 8 == 0 ? 8 : IN % 4 == 0 ? 4 : 1;
    for (int first = 0; first < IN; first += STEP) {
        Lanes sums[STEP] = {};
#pragma GCC unroll 4
        for (int o = 0; o < OUT; ++o)
#pragma GCC unroll 16
            for (int i = 0; i < STEP; ++i) sums[i] += out_gradient[o] * weight[o * IN + first + i];
        for (int i = 0; i < STEP; ++i) in_gradient[first + i] = sums[i];
    }
}

// weight_sums[o][i] += sum_t out_gradient[t][o] in[t][i], and bias_sums[o] += sum_t out_gradient[t][o]
template <int OUT, int IN>
INLINE void add_weight_gradient(Lanes* __restrict weight_sums, Lanes* __restrict bias_sums,
                                const Lanes (*__restrict out_gradient)[OUT], const Lanes (*__restrict in)[IN]) {
    constexpr int ROWS = OUT % 4 == 0 ? 4 : 1, COLUMNS = IN % 6 == 0 ? 6 : IN % 4 == 0 ? 4 : 1;
    for (int o = 0; o < OUT; o += ROWS)
        for (int i = 0; i < IN; i += COLUMNS) {
            Lanes sums[ROWS][COLUMNS] = {};
            for (int t = 0; t < M; ++t)
#pragma GCC unroll 8
                for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
                    for (int column = 0; column < COLUMNS; ++column)
                        sums[row][column] += out_gradient[t][o + row] * in[t][i + column];
            for (int row = 0; row < ROWS; ++row)
                for (int column = 0; column < COLUMNS; ++column)
                    weight_sums[(o + row) * IN + i + column] += sums[row][column];
        }
    if (bias_sums)
        for (int t = 0; t < M; ++t)
            for (int o = 0; o < OUT; ++o) bias_sums[o] += out_gradient[t][o];
}

// A token normalised, `standard`, and scaled, `out`; returns 1 / standard deviation.
INLINE Lanes layer_norm(Lanes* __restrict standard, Lanes* __restrict out, const Lanes* __restrict token,
                        const float* __restrict weight, const float* __restrict bias) {
    Lanes mean{}, variance{};
    for (int c = 0; c < C; ++c) mean += token[c];
    mean *= 1.0f / C;
    for (int c = 0; c < C; ++c) variance += (token[c] - mean) * (token[c] - mean);
    Lanes rate = 1.0f / square_root(variance * (1.0f / C) + EPSILON);
    for (int c = 0; c < C; ++c) {
        standard[c] = (token[c] - mean) * rate;
        out[c] = standard[c] * weight[c] + bias[c];
    }
    return rate;
}

// token_gradient += the gradient through a LayerNorm; the gradients of its weight and bias are added up.
INLINE void layer_norm_backward(Lanes* __restrict token_gradient, const Lanes* __restrict out_gradient,
                                const Lanes* __restrict standard, Lanes rate, const float* __restrict weight,
                                Lanes* __restrict weight_sums, Lanes* __restrict bias_sums) {
    Lanes mean{}, along{}, scaled[C];
    for (int c = 0; c < C; ++c) {
        weight_sums[c] += out_gradient[c] * standard[c];
        bias_sums[c] += out_gradient[c];
        scaled[c] = out_gradient[c] * weight[c];
        mean += scaled[c];
        along += scaled[c] * standard[c];
    }
    mean *= 1.0f / C;
    along *= 1.0f / C;
    for (int c = 0; c < C; ++c) token_gradient[c] += rate * (scaled[c] - mean - standard[c] * along);
}

// Softmax of one query's products with every key.
INLINE void attention_row(Lanes* __restrict row, const Lanes* __restrict query, const Lanes (*__restrict qkv)[3 * C],
                          int head) {
    const float scale = 1.0f / __builtin_sqrtf(float(D));
    Lanes scaled[D];
    for (int d = 0; d < D; ++d) scaled[d] = query[d] * scale;
    Lanes highest = all(-3.4e38f);
    for (int j = 0; j < M; ++j) {
        const Lanes* key = qkv[j] + C + head * D;
        Lanes sum = scaled[0] * key[0];
        for (int d = 1; d < D; ++d) sum += scaled[d] * key[d];
        row[j] = sum;
        highest = larger(highest, sum);
    }
    Lanes total{};
    for (int j = 0; j < M; ++j) {
        row[j] = exponential(row[j] - highest);
        total += row[j];
    }
    total = 1.0f / total;
    for (int j = 0; j < M; ++j) row[j] *= total;
}

// LANES patches, one in each lane, and what the backward pass needs of their forward pass.
struct Group {
    Lanes pixels[M][C], standard1[M][C], normed1[M][C], rate1[M], qkv[M][3 * C], mixed[M][C], middle[M][C];
};

INLINE void attend(Group& g, const Weights& w) {
    for (int t = 0; t < M; ++t) {
        g.rate1[t] = layer_norm(g.standard1[t], g.normed1[t], g.pixels[t], w.norm1_weight, w.norm1_bias);
        linear<3 * C, C>(g.qkv[t], g.normed1[t], w.qkv, nullptr);
    }
    for (int t = 0; t < M; ++t) {
        for (int head = 0; head < H; ++head) {
            Lanes row[M], sums[D] = {};
            attention_row(row, g.qkv[t] + head * D, g.qkv, head);
            for (int j = 0; j < M; ++j)
                for (int d = 0; d < D; ++d) sums[d] += row[j] * g.qkv[j][2 * C + head * D + d];
            for (int d = 0; d < D; ++d) g.mixed[t][head * D + d] = sums[d];
        }
        linear<C, C>(g.middle[t], g.mixed[t], w.projection, w.projection_bias);
        for (int c = 0; c < C; ++c) g.middle[t][c] += g.pixels[t][c];
    }
}

template <int... I>
INLINE void exchange(Lanes& a, Lanes& b, int step, Sequence<I...>) {
    // Rows `step` apart exchange those halves of every 2 * step lanes that belong to the other.
    Lanes first, second;
    switch (step) {
#define CASE(S)                                                                                        \
    case S:                                                                                            \
        first = __builtin_shufflevector(a, b, ((I & S) ? LANES + (I ^ S) : I)...);                     \
        second = __builtin_shufflevector(a, b, ((I & S) ? LANES + I : (I ^ S))...);                    \
        break;
        CASE(1) CASE(2) CASE(4)
#if defined(__AVX512F__)
        CASE(8)
#endif
#undef CASE
        default: __builtin_unreachable();
    }
    a = first;
    b = second;
}

INLINE void transpose(Lanes (&block)[LANES]) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2)
#pragma GCC unroll 8
        for (int first = 0; first < LANES; first += 2 * step)
#pragma GCC unroll 8
            for (int row = first; row < first + step; ++row)
                exchange(block[row], block[row + step], step, Count<LANES>::Numbers());
}

// Patches in memory, (patch, token, channel), to tokens whose lanes are patches. Lanes without a patch are zero.
void load(Lanes* __restrict tokens, const float* __restrict memory, int num_patches) {
    constexpr int SIZE = M * C;
    int e = 0;
    if (num_patches == LANES)
        for (; e + LANES <= SIZE; e += LANES) {
            Lanes block[LANES];
            for (int row = 0; row < LANES; ++row) block[row] = *(const Loose*)(memory + row * SIZE + e);
            transpose(block);
            for (int row = 0; row < LANES; ++row) tokens[e + row] = block[row];
        }
    for (; e < SIZE; ++e) {
        Lanes token{};
        for (int row = 0; row < num_patches; ++row) token[row] = memory[row * SIZE + e];
        tokens[e] = token;
    }
}

void store(float* __restrict memory, const Lanes* __restrict tokens, int num_patches) {
    constexpr int SIZE = M * C;
    int e = 0;
    if (num_patches == LANES)
        for (; e + LANES <= SIZE; e += LANES) {
            Lanes block[LANES];
            for (int row = 0; row < LANES; ++row) block[row] = tokens[e + row];
            transpose(block);
            for (int row = 0; row < LANES; ++row) *(Loose*)(memory + row * SIZE + e) = block[row];
        }
    for (; e < SIZE; ++e)
        for (int row = 0; row < num_patches; ++row) memory[row * SIZE + e] = tokens[e][row];
}

struct Forward {
    Group group;
    Lanes refined[M][C], normed[M][C];

    void run(const float* pixels, float* refined_out, float* normed_out, const Weights& w, int num_patches) {
        load(&group.pixels[0][0], pixels, num_patches);
        attend(group, w);
        for (int t = 0; t < M; ++t) {
            Lanes standard[C], token[C], hidden[F];
            layer_norm(standard, token, group.middle[t], w.norm2_weight, w.norm2_bias);
            linear<F, C>(hidden, token, w.hidden, w.hidden_bias);
            for (int f = 0; f < F; ++f) {
                Lanes cumulative, density;
                normal(hidden[f], cumulative, density);
                hidden[f] *= cumulative;
            }
            linear<C, F>(refined[t], hidden, w.output, w.output_bias);
            for (int c = 0; c < C; ++c) refined[t][c] += group.middle[t][c];
            layer_norm(standard, normed[t], refined[t], w.norm3_weight, w.norm3_bias);
        }
        store(refined_out, &refined[0][0], num_patches);
        store(normed_out, &normed[0][0], num_patches);
    }
};

struct Backward {
    Group group;
    Lanes sums[TOTAL];
    Lanes refined_gradient[M][C], normed_gradient[M][C], middle_gradient[M][C], mixed_gradient[M][C];
    Lanes normed2[M][C], active[M][F], hidden_gradient[M][F], qkv_gradient[M][3 * C];
    Lanes rows[M][M], row_gradients[M][M];

    Sums parts() {
        Lanes* arrays[NUM_PARAMETERS];
        Lanes* next = sums;
        for (int i = 0; i < NUM_PARAMETERS; next += SIZES[i++]) arrays[i] = next;
        return parameters<Lanes>(arrays);
    }

    // LayerNorm, MLP and the last LayerNorm: from the gradients of their results to that of their input, `middle`.
    void mlp(const Weights& w, Sums s) {
        for (int t = 0; t < M; ++t) {
            Lanes standard2[C], standard3[C], hidden[F], slope[F], refined[C], unused[C], gradient[C];
            Lanes rate2 = layer_norm(standard2, normed2[t], group.middle[t], w.norm2_weight, w.norm2_bias);
            linear<F, C>(hidden, normed2[t], w.hidden, w.hidden_bias);
            for (int f = 0; f < F; ++f) {
                Lanes cumulative, density;
                normal(hidden[f], cumulative, density);
                active[t][f] = hidden[f] * cumulative;
                slope[f] = cumulative + hidden[f] * density;
            }
            linear<C, F>(refined, active[t], w.output, w.output_bias);
            for (int c = 0; c < C; ++c) refined[c] += group.middle[t][c];
            Lanes rate3 = layer_norm(standard3, unused, refined, w.norm3_weight, w.norm3_bias);
            layer_norm_backward(refined_gradient[t], normed_gradient[t], standard3, rate3, w.norm3_weight, s.norm3_weight,
                                s.norm3_bias);
            linear_backward<C, F>(hidden_gradient[t], refined_gradient[t], w.output);
            for (int f = 0; f < F; ++f) hidden_gradient[t][f] *= slope[f];
            linear_backward<F, C>(gradient, hidden_gradient[t], w.hidden);
            for (int c = 0; c < C; ++c) middle_gradient[t][c] = refined_gradient[t][c];
            layer_norm_backward(middle_gradient[t], gradient, standard2, rate2, w.norm2_weight, s.norm2_weight,
                                s.norm2_bias);
        }
        add_weight_gradient<C, F>(s.output, s.output_bias, refined_gradient, active);
        add_weight_gradient<F, C>(s.hidden, s.hidden_bias, hidden_gradient, normed2);
    }

    // Attention of one head: from `mixed_gradient` to `qkv_gradient`.
    void head(int head) {
        const float scale = 1.0f / __builtin_sqrtf(float(D));
        const int q = head * D, k = C + q, v = 2 * C + q;
        for (int t = 0; t < M; ++t) {
            attention_row(rows[t], group.qkv[t] + q, group.qkv, head);
            Lanes along{}, sums[D] = {};
            for (int j = 0; j < M; ++j) {
                Lanes sum = mixed_gradient[t][q] * group.qkv[j][v];
                for (int d = 1; d < D; ++d) sum += mixed_gradient[t][q + d] * group.qkv[j][v + d];
                row_gradients[t][j] = sum;
                along += sum * rows[t][j];
            }
            for (int j = 0; j < M; ++j) {
                row_gradients[t][j] = (row_gradients[t][j] - along) * rows[t][j] * scale;
                for (int d = 0; d < D; ++d) sums[d] += row_gradients[t][j] * group.qkv[j][k + d];
            }
            for (int d = 0; d < D; ++d) qkv_gradient[t][q + d] = sums[d];
        }
        for (int j = 0; j < M; ++j) {
            Lanes keys[D] = {}, values[D] = {};
            for (int t = 0; t < M; ++t)
                for (int d = 0; d < D; ++d) {
                    keys[d] += row_gradients[t][j] * group.qkv[t][q + d];
                    values[d] += rows[t][j] * mixed_gradient[t][q + d];
                }
            for (int d = 0; d < D; ++d) {
                qkv_gradient[j][k + d] = keys[d];
                qkv_gradient[j][v + d] = values[d];
            }
        }
    }

    void run(const float* pixels, const float* refined_in, const float* normed_in, float* pixels_out, const Weights& w,
             int num_patches) {
        Sums s = parts();
        load(&group.pixels[0][0], pixels, num_patches);
        load(&refined_gradient[0][0], refined_in, num_patches);
        load(&normed_gradient[0][0], normed_in, num_patches);
        attend(group, w);
        mlp(w, s);
        for (int t = 0; t < M; ++t) linear_backward<C, C>(mixed_gradient[t], middle_gradient[t], w.projection);
        add_weight_gradient<C, C>(s.projection, s.projection_bias, middle_gradient, group.mixed);
        for (int h = 0; h < H; ++h) head(h);
        add_weight_gradient<3 * C, C>(s.qkv, nullptr, qkv_gradient, group.normed1);
        for (int t = 0; t < M; ++t) {
            Lanes gradient[C];
            linear_backward<3 * C, C>(gradient, qkv_gradient[t], w.qkv);
            layer_norm_backward(middle_gradient[t], gradient, group.standard1[t], group.rate1[t], w.norm1_weight,
                                s.norm1_weight, s.norm1_bias);
        }
        store(pixels_out, &middle_gradient[0][0], num_patches);
    }
};

int64_t num_groups(int64_t num_patches) { return (num_patches + LANES - 1) / LANES; }

int in_group(int64_t group, int64_t num_patches) {
    int64_t left = num_patches - group * LANES;
    return left < LANES ? int(left) : LANES;
}

}  // namespace

extern "C" {

int inner_block_lanes() { return LANES; }

void inner_block_forward(int64_t num_patches, int num_threads, const float* pixels, const float* const* weights,
                         float* refined, float* normed) {
    const Weights w = parameters<const float>(weights);
    for_each_share(num_groups(num_patches), num_threads, [&](int, int64_t first, int64_t last) {
        Forward* forward = scratch<Forward>();
        for (int64_t group = first; group < last; ++group) {
            int64_t at = group * LANES * M * C;
            forward->run(pixels + at, refined + at, normed + at, w, in_group(group, num_patches));
        }
        free(forward);
    });
}

// `sums` is (num_threads, number of all weights): each thread's share of the weights' gradients. Zero beforehand.
void inner_block_backward(int64_t num_patches, int num_threads, const float* pixels, const float* const* weights,
                          const float* refined_gradient, const float* normed_gradient, float* pixels_gradient,
                          float* sums) {
    const Weights w = parameters<const float>(weights);
    for_each_share(num_groups(num_patches), num_threads, [&](int thread, int64_t first, int64_t last) {
        Backward* backward = scratch<Backward>();
        memset(static_cast<void*>(backward->sums), 0, sizeof backward->sums);
        for (int64_t group = first; group < last; ++group) {
            int64_t at = group * LANES * M * C;
            backward->run(pixels + at, refined_gradient + at, normed_gradient + at, pixels_gradient + at, w,
                          in_group(group, num_patches));
        }
        for (int i = 0; i < TOTAL; ++i) {
            float total = 0.0f;
            for (int lane = 0; lane < LANES; ++lane) total += backward->sums[i][lane];
            sums[int64_t(thread) * TOTAL + i] = total;
        }
        free(backward);
    });
}

}
