// What an encoder block does between its matrix products, on the CPU, forward and backward: attention, bias and GELU,
// residual sum and LayerNorm. Each is one pass over memory, where PyTorch's operations make several.
//
// Rows are tokens, values of a row lie side by side. Tensors that enter or leave a product are float32 or, under
// autocast, bfloat16 (`Short`); all else, and all arithmetic, is float32. Widths are multiples of LANES.

#include "vector.h"

namespace {

typedef uint16_t Short;
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint16_t LooseShorts __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef float Quad __attribute__((vector_size(16)));
typedef float LooseQuad __attribute__((vector_size(16), aligned(4)));

INLINE Lanes load(const float* memory) { return *(const Loose*)memory; }
INLINE void store(float* memory, Lanes values) { *(Loose*)memory = values; }

INLINE Lanes load(const Short* memory) {
    return (Lanes)(__builtin_convertvector((Shorts) * (const LooseShorts*)memory, Words) << 16);
}

// Rounded to the nearest, of two equally near ones to the even one, as PyTorch rounds; a NaN stays one.
INLINE void store(Short* memory, Lanes values) {
    Words bits = (Words)values;
    Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    Words kept = (values == values) ? rounded : (Words{} + 0x7FC0);
    *(LooseShorts*)memory = __builtin_convertvector(kept, Shorts);
}

// Asks for memory that a pass over rows will soon read or write. Without it an Intel Xeon with AMX, whose tensors lie in a
// far cache, waited for a third of the time that GELU took.
constexpr int64_t AHEAD = 1024;  // bytes
INLINE void will_read(const void* memory) { __builtin_prefetch((const char*)memory + AHEAD, 0); }
INLINE void will_write(void* memory) { __builtin_prefetch((char*)memory + AHEAD, 1); }

using Four = Count<4>::Numbers;

template <int FIRST, int... I>
INLINE Quad part(Lanes x, Sequence<I...>) {
    return __builtin_shufflevector(x, x, (FIRST + I)...);
}

INLINE Quad folded(Lanes x) {
    Quad sum = part<0>(x, Four()) + part<4>(x, Four());
#if defined(__AVX512F__)
    sum += part<8>(x, Four()) + part<12>(x, Four());
#endif
    return sum;
}

// The sums over the lanes of four registers.
INLINE Quad sums_of_four(Lanes a, Lanes b, Lanes c, Lanes d) {
    Quad p = folded(a), q = folded(b), r = folded(c), s = folded(d);
    Quad pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    Quad rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

INLINE float sum_of(Lanes x) {
    Quad quad = folded(x);
    return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

INLINE float largest_of(Lanes x) {
    float largest = x[0];
    for (int lane = 1; lane < LANES; ++lane) largest = x[lane] > largest ? x[lane] : largest;
    return largest;
}

INLINE int64_t rounded_up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// out[r][s] = sum_c a[r][c] b[s][c] for ROWS rows of `a` and four of `b`.
template <int ROWS>
INLINE void dot_block(float* out, int64_t out_width, const float* a, const float* b, int64_t width) {
    Lanes sums[ROWS][4] = {};
    for (int64_t c = 0; c < width; c += LANES) {
        Lanes columns[4];
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) columns[s] = load(b + s * width + c);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            Lanes row = load(a + r * width + c);
#pragma GCC unroll 4
            for (int s = 0; s < 4; ++s) sums[r][s] += row * columns[s];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
        *(LooseQuad*)(out + r * out_width) = sums_of_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
}

// out (rows, out_width) = a (rows, width) times b (columns, width) transposed; `columns` is a multiple of four.
void dots(float* out, int64_t out_width, const float* a, int64_t rows, const float* b, int64_t columns, int64_t width) {
    for (int64_t s = 0; s < columns; s += 4) {
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2) dot_block<2>(out + r * out_width + s, out_width, a + r * width, b + s * width, width);
        if (r < rows) dot_block<1>(out + r * out_width + s, out_width, a + r * width, b + s * width, width);
    }
}

// out[r][c] = sum_s share[r * row_step + s * step] in[s][c] for ROWS rows and REGISTERS * LANES columns.
template <int ROWS, int REGISTERS, class Out>
INLINE void mix_block(Out* out, int64_t out_step, const float* share, int64_t row_step, int64_t step, const float* in,
                      int64_t num_in, int64_t width) {
    Lanes sums[ROWS][REGISTERS] = {};
    for (int64_t s = 0; s < num_in; ++s) {
        Lanes values[REGISTERS];
#pragma GCC unroll 4
        for (int v = 0; v < REGISTERS; ++v) values[v] = load(in + s * width + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            float weight = share[r * row_step + s * step];
#pragma GCC unroll 4
            for (int v = 0; v < REGISTERS; ++v) sums[r][v] += values[v] * weight;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < REGISTERS; ++v) store(out + r * out_step + v * LANES, sums[r][v]);
}

template <int ROWS, class Out>
INLINE void mix_rows(Out* out, int64_t out_step, const float* share, int64_t row_step, int64_t step, const float* in,
                     int64_t num_in, int64_t width) {
    int64_t c = 0;
    for (; c + 2 * LANES <= width; c += 2 * LANES)
        mix_block<ROWS, 2>(out + c, out_step, share, row_step, step, in + c, num_in, width);
    if (c < width) mix_block<ROWS, 1>(out + c, out_step, share, row_step, step, in + c, num_in, width);
}

template <class Out>
void mix(Out* out, int64_t out_step, int64_t rows, const float* share, int64_t row_step, int64_t step, const float* in,
         int64_t num_in, int64_t width) {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6)
        mix_rows<6>(out + r * out_step, out_step, share + r * row_step, row_step, step, in, num_in, width);
    for (; r + 2 <= rows; r += 2)
        mix_rows<2>(out + r * out_step, out_step, share + r * row_step, row_step, step, in, num_in, width);
    if (r < rows) mix_rows<1>(out + r * out_step, out_step, share + r * row_step, row_step, step, in, num_in, width);
}

// `rows` rows of a head, each `step` apart in memory, to rows side by side, times `scale`; zeros up to `padded` rows.
template <class In>
void gather(float* out, const In* in, int64_t step, int64_t rows, int64_t padded, int64_t width, float scale) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; c += LANES) store(out + r * width + c, load(in + r * step + c) * scale);
    memset(out + rows * width, 0, size_t((padded - rows) * width) * sizeof(float));
}

// A tensor of heads: where head `h` of token `t` of sequence `n` begins.
template <class Type>
struct Heads {
    Type* first;
    int64_t sequence_step, token_step, width;

    Type* at(int64_t sequence, int64_t head) const { return first + sequence * sequence_step + head * width; }
};

struct Sizes {
    int64_t sequences, heads, queries, keys, width;

    int64_t padded_keys() const { return rounded_up(keys, LANES); }  // of a row of shares
    int64_t padded_values() const { return rounded_up(keys, 4); }    // of the rows that dots() takes four of
};

template <class Type>
void attention_forward(const Sizes& z, int num_threads, Heads<const Type> q, Heads<const Type> k, Heads<const Type> v,
                       Type* mixed, float* shares) {
    const float scale = 1.0f / __builtin_sqrtf(float(z.width));
    for_each_share(z.sequences * z.heads, num_threads, [&](int, int64_t first, int64_t last) {
        const int64_t padded = z.padded_keys(), values = z.padded_values();
        float* room = scratch<float>(size_t((z.queries + values + z.keys) * z.width));
        float *queries = room, *keys = queries + z.queries * z.width, *vals = keys + values * z.width;
        for (int64_t item = first; item < last; ++item) {
            const int64_t n = item / z.heads, h = item % z.heads;
            gather(queries, q.at(n, h), q.token_step, z.queries, z.queries, z.width, scale);
            gather(keys, k.at(n, h), k.token_step, z.keys, values, z.width, 1.0f);
            gather(vals, v.at(n, h), v.token_step, z.keys, z.keys, z.width, 1.0f);
            float* table = shares + item * z.queries * padded;
            dots(table, padded, queries, z.queries, keys, values, z.width);
            for (int64_t i = 0; i < z.queries; ++i) {
                float* row = table + i * padded;
                for (int64_t j = z.keys; j < padded; ++j) row[j] = -3.4e38f;
                Lanes highest = load(row);
                for (int64_t j = LANES; j < padded; j += LANES) highest = larger(highest, load(row + j));
                const float top = largest_of(highest);
                Lanes total{};
                for (int64_t j = 0; j < padded; j += LANES) {
                    Lanes grown = exponential(load(row + j) - top);
                    store(row + j, grown);
                    total += grown;
                }
                // What stands beyond the keys has grown to e^-87, which adds nothing.
                const float rate = 1.0f / sum_of(total);
                for (int64_t j = 0; j < padded; j += LANES) store(row + j, load(row + j) * rate);
                for (int64_t j = z.keys; j < padded; ++j) row[j] = 0.0f;
            }
            const int64_t step = z.heads * z.width;
            mix(mixed + n * z.queries * step + h * z.width, step, z.queries, table, padded, 1, vals, z.keys, z.width);
        }
        free(room);
    });
}

template <class Type>
void attention_backward(const Sizes& z, int num_threads, Heads<const Type> q, Heads<const Type> k,
                        Heads<const Type> v, const float* shares, const Type* mixed_gradient, Heads<Type> q_gradient,
                        Heads<Type> k_gradient, Heads<Type> v_gradient) {
    const float scale = 1.0f / __builtin_sqrtf(float(z.width));
    for_each_share(z.sequences * z.heads, num_threads, [&](int, int64_t first, int64_t last) {
        const int64_t padded = z.padded_keys(), values = z.padded_values(), step = z.heads * z.width;
        float* room = scratch<float>(size_t((2 * z.queries + z.keys + values) * z.width + z.queries * padded));
        float *queries = room, *given = queries + z.queries * z.width, *keys = given + z.queries * z.width;
        float *vals = keys + z.keys * z.width, *changes = vals + values * z.width;
        for (int64_t item = first; item < last; ++item) {
            const int64_t n = item / z.heads, h = item % z.heads;
            gather(queries, q.at(n, h), q.token_step, z.queries, z.queries, z.width, scale);
            gather(keys, k.at(n, h), k.token_step, z.keys, z.keys, z.width, scale);
            gather(vals, v.at(n, h), v.token_step, z.keys, values, z.width, 1.0f);
            gather(given, mixed_gradient + n * z.queries * step + h * z.width, step, z.queries, z.queries, z.width, 1.0f);
            const float* table = shares + item * z.queries * padded;
            mix(v_gradient.at(n, h), v_gradient.token_step, z.keys, table, 1, padded, given, z.queries, z.width);
            dots(changes, padded, given, z.queries, vals, values, z.width);
            for (int64_t i = 0; i < z.queries; ++i) {
                const float* row = table + i * padded;
                float* change = changes + i * padded;
                for (int64_t j = z.keys; j < padded; ++j) change[j] = 0.0f;
                Lanes total{};
                for (int64_t j = 0; j < padded; j += LANES) total += load(row + j) * load(change + j);
                const float mean = sum_of(total);
                for (int64_t j = 0; j < padded; j += LANES)
                    store(change + j, load(row + j) * (load(change + j) - mean));
            }
            mix(q_gradient.at(n, h), q_gradient.token_step, z.queries, changes, padded, 1, keys, z.keys, z.width);
            mix(k_gradient.at(n, h), k_gradient.token_step, z.keys, changes, 1, padded, queries, z.queries, z.width);
        }
        free(room);
    });
}

template <class Type>
void gelu_forward(int64_t rows, int64_t width, int num_threads, const Type* in, const float* bias, Type* out) {
    for_each_share(rows, num_threads, [&](int, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            for (int64_t c = 0; c < width; c += LANES) {
                will_read(in + r * width + c);
                will_write(out + r * width + c);
                Lanes x = load(in + r * width + c) + load(bias + c), cumulative, density;
                normal(x, cumulative, density);
                store(out + r * width + c, x * cumulative);
            }
    });
}

// `sums` is (num_threads, width): each thread's share of the bias's gradient.
template <class Type>
void gelu_backward(int64_t rows, int64_t width, int num_threads, const Type* in, const float* bias,
                   const Type* out_gradient, Type* in_gradient, float* sums) {
    for_each_share(rows, num_threads, [&](int thread, int64_t first, int64_t last) {
        float* sum = sums + thread * width;
        memset(sum, 0, size_t(width) * sizeof(float));
        for (int64_t r = first; r < last; ++r)
            for (int64_t c = 0; c < width; c += LANES) {
                will_read(in + r * width + c);
                will_read(out_gradient + r * width + c);
                will_write(in_gradient + r * width + c);
                Lanes x = load(in + r * width + c) + load(bias + c), cumulative, density;
                normal(x, cumulative, density);
                Lanes gradient = load(out_gradient + r * width + c) * (cumulative + x * density);
                store(in_gradient + r * width + c, gradient);
                store(sum + c, load(sum + c) + gradient);
            }
    });
}

// Tokens (sequences, tokens, width) to which a branch (sequences, branch_tokens, width) is added, from token `first` on,
// with its bias and times the factor of its sequence; and their LayerNorm. `branch`, `factors` and `normed` may be null,
// `sum` too without a branch.
struct Residual {
    int64_t sequences, tokens, width, first, branch_tokens;
    const float *bias, *factors, *norm_weight, *norm_bias;

    // Which row of the branch a row of the tokens gets; -1 is none.
    INLINE int64_t branch_row(int64_t row) const {
        const int64_t token = row % tokens - first;
        return token < 0 || token >= branch_tokens ? -1 : row / tokens * branch_tokens + token;
    }
    INLINE float factor(int64_t row) const { return factors ? factors[row / tokens] : 1.0f; }
};

INLINE void statistics(const float* row, int64_t width, float& mean, float& rate) {
    Lanes total{}, squares{};
    for (int64_t c = 0; c < width; c += LANES) {
        will_read(row + c);
        total += load(row + c);
    }
    mean = sum_of(total) / float(width);
    for (int64_t c = 0; c < width; c += LANES) {
        Lanes off = load(row + c) - mean;
        squares += off * off;
    }
    rate = 1.0f / __builtin_sqrtf(sum_of(squares) / float(width) + EPSILON);
}

template <class Type>
void residual_forward(const Residual& z, int num_threads, const float* tokens, const Type* branch, float* sum,
                      Type* normed) {
    const int64_t width = z.width;
    for_each_share(z.sequences * z.tokens, num_threads, [&](int, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            const float* row = tokens + r * width;
            if (branch) {
                float* out = sum + r * width;
                const int64_t from = z.branch_row(r);
                if (from < 0)
                    memcpy(out, row, size_t(width) * sizeof(float));
                else {
                    const float factor = z.factor(r);
                    for (int64_t c = 0; c < width; c += LANES) {
                        will_read(row + c);
                        will_read(branch + from * width + c);
                        will_write(out + c);
                        store(out + c, load(row + c) + factor * (load(branch + from * width + c) + load(z.bias + c)));
                    }
                }
                row = out;
            }
            if (!normed) continue;
            float mean, rate;
            statistics(row, width, mean, rate);
            for (int64_t c = 0; c < width; c += LANES) {
                will_write(normed + r * width + c);
                store(normed + r * width + c,
                      (load(row + c) - mean) * rate * load(z.norm_weight + c) + load(z.norm_bias + c));
            }
        }
    });
}

// `tokens` is what was normalised: the sum, or without a branch the tokens. `sum_gradient` and `normed_gradient` may be
// null. `tokens_gradient` may be null where it would be `sum_gradient`, and `branch_gradient` where it would be the
// tokens'. `sums` is (num_threads, 3, width): each thread's share of the gradients of the norm's weight and bias and of
// the branch's bias.
template <class Type>
void residual_backward(const Residual& z, int num_threads, const float* tokens, const float* sum_gradient,
                       const Type* normed_gradient, float* tokens_gradient, Type* branch_gradient, float* sums) {
    const int64_t width = z.width;
    for_each_share(z.sequences * z.tokens, num_threads, [&](int thread, int64_t first, int64_t last) {
        float *weight_sum = sums + thread * 3 * width, *norm_sum = weight_sum + width, *bias_sum = norm_sum + width;
        memset(weight_sum, 0, size_t(3 * width) * sizeof(float));
        for (int64_t r = first; r < last; ++r) {
            const float* passed = sum_gradient ? sum_gradient + r * width : nullptr;
            const float* gradients = tokens_gradient ? tokens_gradient + r * width : passed;
            if (normed_gradient) {
                float* out = tokens_gradient + r * width;
                const float* row = tokens + r * width;
                const Type* given = normed_gradient + r * width;
                float mean, rate;
                statistics(row, width, mean, rate);
                Lanes total{}, along{};
                for (int64_t c = 0; c < width; c += LANES) {
                    will_read(given + c);
                    will_write(out + c);
                    if (passed) will_read(passed + c);
                    Lanes gradient = load(given + c), standard = (load(row + c) - mean) * rate;
                    store(weight_sum + c, load(weight_sum + c) + gradient * standard);
                    store(norm_sum + c, load(norm_sum + c) + gradient);
                    gradient *= load(z.norm_weight + c);
                    total += gradient;
                    along += gradient * standard;
                }
                const float share = sum_of(total) / float(width), slope = sum_of(along) / float(width);
                for (int64_t c = 0; c < width; c += LANES) {
                    Lanes standard = (load(row + c) - mean) * rate;
                    Lanes gradient = rate * (load(given + c) * load(z.norm_weight + c) - share - standard * slope);
                    store(out + c, passed ? load(passed + c) + gradient : gradient);
                }
            } else if (tokens_gradient)
                memcpy(tokens_gradient + r * width, passed, size_t(width) * sizeof(float));
            const int64_t to = z.branch_row(r);
            if (to < 0) continue;
            const float factor = z.factor(r);
            for (int64_t c = 0; c < width; c += LANES) {
                Lanes gradient = load(gradients + c) * factor;
                if (branch_gradient) will_write(branch_gradient + to * width + c);
                if (branch_gradient) store(branch_gradient + to * width + c, gradient);
                store(bias_sum + c, load(bias_sum + c) + gradient);
            }
        }
    });
}

}  // namespace

// Every function exists for float32 and for bfloat16, `is_short`. Pointers to tensors that enter or leave a product are
// void*. A head of queries, keys or values is given by its first element and its steps from sequence to sequence and from
// token to token.
#define FOR_TYPE(CALL)            \
    if (is_short) {               \
        using Type = Short;       \
        CALL;                     \
    } else {                      \
        using Type = float;       \
        CALL;                     \
    }

extern "C" {

int outer_lanes() { return LANES; }

struct Steps {
    int64_t sequence, token;
};

void outer_attention_forward(int is_short, int num_threads, const Sizes* sizes, const void* q, const Steps* q_steps,
                             const void* k, const Steps* k_steps, const void* v, const Steps* v_steps, void* mixed,
                             float* shares) {
#define HEADS(NAME) {(Type*)NAME, NAME##_steps->sequence, NAME##_steps->token, sizes->width}
#define READ(NAME) {(const Type*)NAME, NAME##_steps->sequence, NAME##_steps->token, sizes->width}
    FOR_TYPE((attention_forward<Type>(*sizes, num_threads, READ(q), READ(k), READ(v), (Type*)mixed, shares)))
}

void outer_attention_backward(int is_short, int num_threads, const Sizes* sizes, const void* q, const Steps* q_steps,
                              const void* k, const Steps* k_steps, const void* v, const Steps* v_steps,
                              const float* shares, const void* mixed_gradient, void* q_gradient, void* k_gradient,
                              void* v_gradient) {
    const Steps *q_gradient_steps = q_steps, *k_gradient_steps = k_steps, *v_gradient_steps = v_steps;
    FOR_TYPE((attention_backward<Type>(*sizes, num_threads, READ(q), READ(k), READ(v), shares,
                                       (const Type*)mixed_gradient, HEADS(q_gradient), HEADS(k_gradient),
                                       HEADS(v_gradient))))
}

void outer_gelu_forward(int is_short, int num_threads, int64_t rows, int64_t width, const void* in, const float* bias,
                        void* out) {
    FOR_TYPE((gelu_forward<Type>(rows, width, num_threads, (const Type*)in, bias, (Type*)out)))
}

void outer_gelu_backward(int is_short, int num_threads, int64_t rows, int64_t width, const void* in, const float* bias,
                         const void* out_gradient, void* in_gradient, float* sums) {
    FOR_TYPE((gelu_backward<Type>(rows, width, num_threads, (const Type*)in, bias, (const Type*)out_gradient,
                                  (Type*)in_gradient, sums)))
}

void outer_residual_forward(int is_short, int num_threads, const Residual* sizes, const float* tokens,
                            const void* branch, float* sum, void* normed) {
    FOR_TYPE((residual_forward<Type>(*sizes, num_threads, tokens, (const Type*)branch, sum, (Type*)normed)))
}

void outer_residual_backward(int is_short, int num_threads, const Residual* sizes, const float* tokens,
                             const float* sum_gradient, const void* normed_gradient, float* tokens_gradient,
                             void* branch_gradient, float* sums) {
    FOR_TYPE((residual_backward<Type>(*sizes, num_threads, tokens, sum_gradient, (const Type*)normed_gradient,
                                      tokens_gradient, (Type*)branch_gradient, sums)))
}

}
