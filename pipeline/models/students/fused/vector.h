// SIMD lanes, the functions of them that transformers need, and PyTorch's threads.
//
// Plain C++ on GCC's and clang's vectors, no headers of PyTorch. Threads are those of the OpenMP runtime that PyTorch has
// loaded, called by its binary interface: a second runtime would bring a second team of threads. Nothing of the C++
// library is used, so that a compiler without one will do.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned num_threads, unsigned flags);
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr float EPSILON = 1e-5f;  // of torch.nn.LayerNorm

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));

#define INLINE inline __attribute__((always_inline))

INLINE Lanes all(float value) { return Lanes{} + value; }

INLINE Lanes square_root(Lanes x) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
    return (Lanes)_mm256_sqrt_ps((__m256)x);
#else
    for (int lane = 0; lane < LANES; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
#endif
}

// 1 / x to the last bit or two: an estimate and Newton's step cost a third of a division.
INLINE Lanes reciprocal(Lanes x) {
#if defined(__AVX512F__)
    Lanes y = (Lanes)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
INLINE Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }

// e^x for x <= 0. 2^n by the exponent's bits, the rest by its Taylor polynomial on [-ln 2 / 2, ln 2 / 2], whose error is
// below 2^-24. A NaN stays one.
INLINE Lanes exponential(Lanes x) {
    x = x < -87.0f ? all(-87.0f) : x;
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    Lanes shifted = x * 1.44269504f + to_integer;
    Lanes n = shifted - to_integer;
    Lanes r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Lanes p = all(1.3981999507e-3f);
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (Lanes)((Bits)p + (((Bits)shifted) << 23));
}

// The normal distribution's cumulative function of x and its density, to 1e-7 (Abramowitz and Stegun 7.1.26).
INLINE void normal(Lanes x, Lanes& cumulative, Lanes& density) {
    Lanes size = x < 0.0f ? -x : x;
    Lanes t = reciprocal(1.0f + size * (0.3275911f * 0.70710678f));
    Lanes tail = exponential(-0.5f * size * size);
    Lanes p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    Lanes beyond = 0.5f * (p * t * tail);
    cumulative = x < 0.0f ? beyond : 1.0f - beyond;
    density = tail * 0.39894228f;
}

// Count<N>::Numbers is the Sequence 0, 1, ..., N - 1.
template <int... I>
struct Sequence {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
    using Numbers = Sequence<I...>;
};

// An equal share of the items for every thread: work(thread, first, last).
template <class Work>
void for_each_share(int64_t num_items, int num_threads, Work&& work) {
    struct Task {
        Work& work;
        int64_t num_items;
    } task{work, num_items};
    GOMP_parallel(
        [](void* data) {
            Task& task = *static_cast<Task*>(data);
            int thread = omp_get_thread_num(), threads = omp_get_num_threads();
            task.work(thread, task.num_items * thread / threads, task.num_items * (thread + 1) / threads);
        },
        &task, unsigned(num_threads), 0);
}

// Room for a thread; a machine without it ends here.
template <class Scratch>
Scratch* scratch(size_t count = 1) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(Scratch))) abort();
    return static_cast<Scratch*>(memory);
}

}  // namespace
