/*
 * One vector of floats of this translation unit's instruction set, and the few operations on it.
 *
 * Included only by the files that are compiled once per instruction set (cpu_tile.c, cpu_vector.c);
 * the -m flags choose the section below. Plain arithmetic is the compiler's own vector extension
 * (a + b, u << 16); what is here is what it cannot say: a fused multiply-add, maximum, loads.
 *
 * Every operation is exactly rounded or exact, and none depends on VF_N: code that works element by
 * element, or sums into sixteen partial sums (struct sum16), gives the same bits at every width.
 */
#ifndef INTERNVLD_KERNELS_CPU_SIMD_H
#define INTERNVLD_KERNELS_CPU_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VF_N 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define VF_N 8
#else
#define VF_N 4
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Vectors in a block of sixteen columns, the unit of every layout. */
#define BLOCK_VECTORS (16 / VF_N)

typedef float vf __attribute__((vector_size(4 * VF_N)));
typedef int32_t vi __attribute__((vector_size(4 * VF_N)));
typedef uint32_t vu __attribute__((vector_size(4 * VF_N)));
typedef uint16_t vh __attribute__((vector_size(2 * VF_N)));
/* The same in memory: any alignment, any type behind the pointer. */
typedef float vf_memory __attribute__((vector_size(4 * VF_N), aligned(4), may_alias));
typedef int32_t vi_memory __attribute__((vector_size(4 * VF_N), aligned(4), may_alias));
typedef uint32_t vu_memory __attribute__((vector_size(4 * VF_N), aligned(4), may_alias));
typedef uint16_t vh_memory __attribute__((vector_size(2 * VF_N), aligned(2), may_alias));

#if defined(__AVX512F__)

ALWAYS_INLINE vf vf_set(float x)
{
    return _mm512_set1_ps(x);
}

ALWAYS_INLINE vf vf_fma(vf a, vf b, vf c) // a * b + c, rounded once
{
    return _mm512_fmadd_ps(a, b, c);
}

/* sum += a * b, rounded once, in the sum's own register: where the compiler may choose, it writes
 * some over a factor that it needs no longer, and copies or spills them to get them back. */
ALWAYS_INLINE void vf_add_product(vf *sum, vf a, vf b)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
}

ALWAYS_INLINE vf vf_max(vf a, vf b) // a > b ? a : b, so b when either is a NaN
{
    return _mm512_max_ps(a, b);
}

ALWAYS_INLINE vf vf_min(vf a, vf b) // a < b ? a : b
{
    return _mm512_min_ps(a, b);
}

ALWAYS_INLINE vi vi_max(vi a, vi b)
{
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
}

ALWAYS_INLINE vf vf_swap(vf x, const int step) // element i is x[i ^ step]
{
    switch (step) {
    case 8:
        return _mm512_shuffle_f32x4(x, x, 0x4e);
    case 4:
        return _mm512_shuffle_f32x4(x, x, 0xb1);
    case 2:
        return _mm512_permute_ps(x, 0x4e);
    default:
        return _mm512_permute_ps(x, 0xb1);
    }
}

#elif defined(__AVX2__)

ALWAYS_INLINE vf vf_set(float x)
{
    return _mm256_set1_ps(x);
}

ALWAYS_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}

ALWAYS_INLINE void vf_add_product(vf *sum, vf a, vf b)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(*sum) : "x"(a), "x"(b));
}

ALWAYS_INLINE vf vf_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}

ALWAYS_INLINE vf vf_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}

ALWAYS_INLINE vi vi_max(vi a, vi b)
{
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
}

ALWAYS_INLINE vf vf_swap(vf x, const int step)
{
    switch (step) {
    case 4:
        return _mm256_permute2f128_ps(x, x, 1);
    case 2:
        return _mm256_permute_ps(x, 0x4e);
    default:
        return _mm256_permute_ps(x, 0xb1);
    }
}

#else

ALWAYS_INLINE vf vf_set(float x)
{
    return (vf){x, x, x, x};
}

ALWAYS_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return (vf){fmaf(a[0], b[0], c[0]), fmaf(a[1], b[1], c[1]), fmaf(a[2], b[2], c[2]),
                fmaf(a[3], b[3], c[3])};
}

ALWAYS_INLINE void vf_add_product(vf *sum, vf a, vf b)
{
    *sum = vf_fma(a, b, *sum);
}

ALWAYS_INLINE vf vf_max(vf a, vf b)
{
    vi m = a > b;
    return (vf)((m & (vi)a) | (~m & (vi)b));
}

ALWAYS_INLINE vf vf_min(vf a, vf b)
{
    vi m = a < b;
    return (vf)((m & (vi)a) | (~m & (vi)b));
}

ALWAYS_INLINE vi vi_max(vi a, vi b)
{
    vi m = a > b;
    return (m & a) | (~m & b);
}

ALWAYS_INLINE vf vf_swap(vf x, const int step)
{
    return (vf){x[0 ^ step], x[1 ^ step], x[2 ^ step], x[3 ^ step]};
}

#endif

/* Of codes, that a line is fetched ahead of its loads. */
#define PREFETCH_BYTES 4096

/* A line to come: to the second-level cache, which waits for more of them at once than the first,
 * where memory is what takes the time; where arithmetic does, it does not wait for that cache. */
ALWAYS_INLINE void prefetch(const char *p, const int waits_for_memory)
{
    if (waits_for_memory)
        __builtin_prefetch(p, 0, 2);
    else
        __builtin_prefetch(p);
}

/* x * 2^n, rounded once, for whole n in [-151, 129] and x in [1/2, 2]. */
ALWAYS_INLINE vf vf_scale(vf x, vf n)
{
#if VF_N == 16
    return _mm512_scalef_ps(x, n);
#else /* in two factors, of which the first is exact */
    vi whole = (vi)(n + 12582912.0f) - 0x4b400000, half = whole >> 1;
    return x * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
#endif
}

ALWAYS_INLINE vf vf_select(vi mask /* 0 or -1 */, vf a, vf b)
{
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}

ALWAYS_INLINE vf vf_load(const float *p)
{
    return *(const vf_memory *)p;
}

/* VF_N bytes. */
ALWAYS_INLINE vf vf_load_i8(const int8_t *p)
{
#if VF_N == 16
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u *)p)));
#elif VF_N == 8
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i_u *)p)));
#else
    return (vf){p[0], p[1], p[2], p[3]};
#endif
}

ALWAYS_INLINE void vf_store(float *p, vf x)
{
    *(vf_memory *)p = x;
}

/* The first n < VF_N floats; the others are 0. */
ALWAYS_INLINE vf vf_load_n(const float *p, int64_t n)
{
    float tail[VF_N] = {0};
    memcpy(tail, p, (size_t)n * sizeof(float));
    return vf_load(tail);
}

ALWAYS_INLINE void vf_store_n(float *p, vf x, int64_t n)
{
    float tail[VF_N];
    vf_store(tail, x);
    memcpy(p, tail, (size_t)n * sizeof(float));
}

/* Rounded to bfloat16, to nearest even, in the upper half of each element; a NaN stays one. The
 * processor's own rounding takes denormals for 0. */
ALWAYS_INLINE vu vf_round_bf16(vf x)
{
#if defined(__AVX512BF16__)
    return __builtin_convertvector((vh)_mm512_cvtneps_pbh(x), vu) << 16;
#else
    vu u = (vu)x;
    vi is_nan = x != x;
    vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
    vu quiet = u | 0x400000u;
    return (((vu)is_nan & quiet) | (~(vu)is_nan & rounded)) & 0xffff0000u;
#endif
}

/* The same in half the width. */
ALWAYS_INLINE vh vf_to_bf16(vf x)
{
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh(x);
#else
    return __builtin_convertvector(vf_round_bf16(x) >> 16, vh);
#endif
}

/* Two of them as pairs, `even` in the lower halves. */
ALWAYS_INLINE vu vf_pair_bf16(vf even, vf odd)
{
#if defined(__AVX512BF16__)
    static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vu)_mm512_permutexvar_epi16(_mm512_loadu_si512(order),
                                        (__m512i)_mm512_cvtne2ps_pbh(odd, even));
#else
    return vf_round_bf16(even) >> 16 | vf_round_bf16(odd);
#endif
}

/* Sixteen partial sums; element i of a row belongs to partial i % 16. */
struct sum16 {
    vf v[BLOCK_VECTORS];
};

/* Their sum as a fixed tree: i + (i + 8), then 4, 2, 1 apart. */
ALWAYS_INLINE float sum16_total(struct sum16 s)
{
    for (int half = BLOCK_VECTORS / 2; half >= 1; half /= 2) {
        for (int i = 0; i < half; i++)
            s.v[i] += s.v[i + half];
    }
    vf x = s.v[0];
#pragma GCC unroll 4
    for (int step = VF_N / 2; step >= 1; step /= 2)
        x += vf_swap(x, step);
    return x[0];
}

/* The largest element; a NaN counts only if all are. */
ALWAYS_INLINE float vf_largest(vf x)
{
#pragma GCC unroll 4
    for (int step = VF_N / 2; step >= 1; step /= 2)
        x = vf_max(x, vf_swap(x, step));
    return x[0];
}

/*
 * e^x within 1.1 ulp (op_test measures it): x = n ln 2 + r, n being x / ln 2 rounded by a magic
 * number, and e^r (coefficients: Cephes expf) times 2^n, so that the whole range of floats comes
 * out, infinity above 88.73 and 0 below -104; a NaN gives a NaN.
 */
ALWAYS_INLINE vf vf_exp(vf x)
{
    const vf magic = vf_set(12582912.0f); // 1.5 * 2^23
    x = vf_max(vf_set(-104.0f), vf_min(vf_set(89.0f), x));
    vf whole = vf_fma(x, vf_set(1.44269504f), magic) - magic;
    vf r = vf_fma(whole, vf_set(-0.693359375f), x);
    r = vf_fma(whole, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_fma(p, r * r, r) + 1.0f;
    return vf_scale(p, whole);
}

/*
 * 2^x within 1.8 ulp, x being at most 0 or a NaN: 2^r times 2^n, n being x rounded to the nearest,
 * ties to even; 0 below -150, and 1 of 0. Half the time of vf_exp().
 */
ALWAYS_INLINE vf vf_exp2_falling(vf x)
{
#if VF_N == 16
    const vf r = _mm512_reduce_ps(x, 0x08); // 0 of -infinity
    const vf whole = x - r;
#else /* 2^n in two factors: the first's exponent, n + 33, is in the lower bits of the sum */
    const vf magic = vf_set(12582912.0f + 127.0f + 33.0f); // 1.5 * 2^23
    x = vf_max(vf_set(-151.0f), x);
    const vf shifted = x + magic;
    const vf r = x - (shifted - magic);
#endif
    vf p = vf_set(1.32257445e-3f);
    p = vf_fma(p, r, vf_set(9.67173278e-3f));
    p = vf_fma(p, r, vf_set(5.55089116e-2f));
    p = vf_fma(p, r, vf_set(2.40222365e-1f));
    p = vf_fma(p, r, vf_set(6.93146825e-1f));
    p = vf_fma(p, r, vf_set(1.0f));
#if VF_N == 16
    return _mm512_scalef_ps(p, whole);
#else
    return p * (vf)((vi)shifted << 23) * 0x1p-33f;
#endif
}

/*
 * erf(x) within 1 ulp of 1 (absolute 6e-8), for the erf form of GELU: an odd polynomial below 0.93,
 * 1 - e^(-polynomial) above (both after N. Juffa's single-precision erff).
 */
ALWAYS_INLINE vf vf_erf(vf x)
{
    vf t = (vf)((vi)x & 0x7fffffff);
    vf s = x * x;
    vf big = vf_fma(vf_set(-1.72853470e-5f), t, vf_set(3.83197126e-4f));
    vf u = vf_fma(vf_set(-3.88396438e-3f), t, vf_set(2.42546219e-2f));
    big = vf_fma(big, s, u);
    big = vf_fma(big, t, vf_set(-1.06777877e-1f));
    big = vf_fma(big, t, vf_set(-6.34846687e-1f));
    big = vf_fma(big, t, vf_set(-1.28717512e-1f));
    big = vf_fma(big, t, -t);
    big = 1.0f - vf_exp(big);
    big = (vf)((vi)big | ((vi)x & (vi)vf_set(-0.0f)));
    vf small = vf_set(-5.96761703e-4f);
    small = vf_fma(small, s, vf_set(4.99119423e-3f));
    small = vf_fma(small, s, vf_set(-2.67681349e-2f));
    small = vf_fma(small, s, vf_set(1.12819925e-1f));
    small = vf_fma(small, s, vf_set(-3.76125336e-1f));
    small = vf_fma(small, s, vf_set(1.28379166e-1f));
    small = vf_fma(small, x, x);
    return vf_select(t > 0.927734375f, big, small);
}

#endif
