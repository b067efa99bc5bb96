/*
 * What codes of a quantised weight are as numbers, in this translation unit's vectors.
 *
 * Included only by the files that are compiled once per instruction set and read codes
 * (cpu_expand.c, cpu_multiply.c). They come as values, as quantized_value() says, in the same
 * roundings at every vector width; or as multiples of the scale, exact in bfloat16 (but for those
 * of NF4 and FP4), and then the scale comes in at the end of each run (kernels/quantized.h).
 *
 * A pair is what the bfloat16 layout has of two k: 32 values, those of a column side by side. The
 * codes of a unit (kernels/cpu_isa.h) lie as the values of its pairs will.
 */
#ifndef INTERNVLD_KERNELS_CPU_CODES_H
#define INTERNVLD_KERNELS_CPU_CODES_H

#include "kernels/cpu_isa.h"
#include "kernels/cpu_simd.h"

/* How codes become numbers, before the scale. */
enum decoding { DECODE_INT8, DECODE_INT8_127, DECODE_FP8, DECODE_INT4, DECODE_TABLE };

ALWAYS_INLINE int bits_of(const enum decoding d)
{
    return d == DECODE_INT4 || d == DECODE_TABLE ? 4 : 8;
}

ALWAYS_INLINE int pairs_of_unit(const enum decoding d)
{
    return 16 / bits_of(d);
}

/* table[index % 16] */
struct lookup {
#if VF_N == 16
    __m512 all;
#elif VF_N == 8
    __m256 lower, upper;
#else
    const float *table;
#endif
};

ALWAYS_INLINE struct lookup lookup_of(const float *table)
{
#if VF_N == 16
    return (struct lookup){_mm512_loadu_ps(table)};
#elif VF_N == 8
    return (struct lookup){_mm256_loadu_ps(table), _mm256_loadu_ps(table + 8)};
#else
    return (struct lookup){table};
#endif
}

ALWAYS_INLINE vf look_up(const struct lookup *l, vu index)
{
#if VF_N == 16
    return _mm512_permutexvar_ps((__m512i)index, l->all);
#elif VF_N == 8
    __m256i i = (__m256i)index;
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(l->lower, i),
                            _mm256_permutevar8x32_ps(l->upper, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
#else
    vu low = index & 15u;
    return (vf){l->table[low[0]], l->table[low[1]], l->table[low[2]], l->table[low[3]]};
#endif
}

/* ---- of one group ---- */

/* The sign and the seven other bits of E4M3 put where float32 has its sign and lowest exponents,
 * so that also the denormals come out right; 2^120 is the difference of the two biases. */
ALWAYS_INLINE vf decode_fp8(vu code)
{
    return (vf)((code << 24 & 0x80000000u) | (code << 20 & 0x07f00000u)) * vf_set(0x1p120f);
}

/* Integer codes become floats by bits: one that lies `at` bits up in a word, put into the mantissa
 * of 2^(23 - at), adds itself to it exactly. */
ALWAYS_INLINE uint32_t bits_of_power(const int at)
{
    return (uint32_t)(127 + 23 - at) << 23;
}

/* Sixteen zero points of a group as floats. */
ALWAYS_INLINE void load_zeros(float *dst, const int8_t *zeros)
{
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += VF_N)
        vf_store(dst + i, vf_load_i8(zeros + i));
}

/* What decodes a format. */
struct decoder {
    struct lookup table; // of 4 bits
#if VF_N == 16
    vu words; // [32] bfloat16: INT4's multiples by the low five bits of a word, FP8's denormals
#if defined(__AVX512VBMI__)
    vu magnitude[2][2]; // magnitude_bytes
#endif
#elif VF_N == 8
    uint8_t bytes[4][16]; // byte i of each float of the table
#endif
};

/* And of one group of sixteen columns. */
struct grid {
    vf scale[BLOCK_VECTORS];
    /* Subtracted of a code that lies 0, 4, 8 or 12 bits up: its zero point and the power above. */
    vf bias[4][BLOCK_VECTORS];
#if VF_N == 16
    vu zeros; // INT4's, of each column twice, as words
#endif
#if defined(__AVX512VBMI__)
    /* What a code of NF4 or FP4 is in each column as bfloat16, [16 columns][16 codes]: the lower
     * bytes, the upper bytes. */
    vu values[2][4];
#endif
};

ALWAYS_INLINE void init_bias(struct grid *g, const struct expansion *e, int64_t group,
                             const enum decoding d, const int has_zeros)
{
    float zeros[16];
    if (has_zeros)
        load_zeros(zeros, e->zeros + group * 16);
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_VECTORS; v++) {
        /* A stored code less what it means: but codes of 4 bits with zero points lie as they are.
         */
        vf offset = vf_set(d == DECODE_INT4 ? 8.0f : 128.0f);
        if (has_zeros)
            offset = vf_load(zeros + v * VF_N) + (d == DECODE_INT4 ? 0.0f : 128.0f);
#pragma GCC unroll 4
        for (int at = 0; at < 16; at += bits_of(d))
            g->bias[at / 4][v] = offset + (vf)((vu){0} + bits_of_power(at));
    }
}

#if VF_N == 16
/* The upper halves of 32 floats. */
ALWAYS_INLINE vu upper_halves(vf low, vf high)
{
    __m256i l = _mm512_cvtepi32_epi16((__m512i)((vu)low >> 16));
    __m256i h = _mm512_cvtepi32_epi16((__m512i)((vu)high >> 16));
    return (vu)_mm512_inserti64x4(_mm512_castsi256_si512(l), h, 1);
}

ALWAYS_INLINE vu words_of(const enum decoding d, const int has_zeros)
{
    const vf ramp = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vf mantissa = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
    if (d == DECODE_FP8)
        return upper_halves(mantissa * 0x1p-9f, mantissa * 0x1p-9f);
    if (has_zeros) // a code less its zero point in five bits: 0 … 15, then -16 … -1
        return upper_halves(ramp, ramp - 16.0f);
    return upper_halves(ramp - 8.0f, ramp - 8.0f); // the fifth bit is another code's
}
#endif

#if VF_N == 8
ALWAYS_INLINE void split_bytes(uint8_t bytes[4][16], const float table[16])
{
    for (int j = 0; j < 16; j++) {
        uint32_t word;
        memcpy(&word, &table[j], sizeof(word));
        for (int i = 0; i < 4; i++)
            bytes[i][j] = (uint8_t)(word >> (8 * i));
    }
}
#endif

#if defined(__AVX512VBMI__)
#define EIGHT(first, step)                                                                         \
    first, first + step, first + 2 * step, first + 3 * step, first + 4 * step, first + 5 * step,   \
        first + 6 * step, first + 7 * step
#define FOUR_EIGHTS(first, step)                                                                   \
    EIGHT(first, step), EIGHT(first + 8 * step, step), EIGHT(first + 16 * step, step),             \
        EIGHT(first + 24 * step, step)
/* The lower and the upper bytes of 64 words. */
static const uint8_t bytes_of_words[2][64] = {{FOUR_EIGHTS(0, 2), FOUR_EIGHTS(64, 2)},
                                              {FOUR_EIGHTS(1, 2), FOUR_EIGHTS(65, 2)}};
/* The lower and the upper bytes of bfloat16: of 128, and of 1 … 127, by their powers of two. */
static const uint8_t magnitude_bytes[2][128] = {
    {0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0, EIGHT(0, 16), EIGHT(0x80, 8), EIGHT(0xc0, 8),
     FOUR_EIGHTS(0, 4), FOUR_EIGHTS(0x80, 2), FOUR_EIGHTS(0xc0, 2)},
    {0x43, 0x3f, [2 ... 7] = 0x40, [8 ... 31] = 0x41, [32 ... 127] = 0x42}};
#undef FOUR_EIGHTS
#undef EIGHT
#endif

ALWAYS_INLINE struct decoder decoder_of(const struct expansion *e, const enum decoding d,
                                        const int has_zeros)
{
    struct decoder f = {0};
    (void)has_zeros;
    if (bits_of(d) == 4)
        f.table = lookup_of(e->table);
#if VF_N == 16
    if (d == DECODE_INT4 || d == DECODE_FP8)
        f.words = words_of(d, has_zeros);
#if defined(__AVX512VBMI__)
    if (d == DECODE_INT8 && !has_zeros)
        memcpy(f.magnitude, magnitude_bytes, sizeof(f.magnitude));
#endif
#elif VF_N == 8
    if (d == DECODE_TABLE)
        split_bytes(f.bytes, e->table);
#endif
    return f;
}

ALWAYS_INLINE void grid_init(struct grid *g, const struct expansion *e, int64_t group,
                             const enum decoding d, const int has_zeros)
{
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_VECTORS; v++)
        g->scale[v] = vf_load(e->scales + group * 16 + v * VF_N);
    if (d != DECODE_TABLE && d != DECODE_FP8)
        init_bias(g, e, group, d, has_zeros);
#if VF_N == 16
    if (d == DECODE_INT4 && has_zeros) {
        const void *of_group = e->zeros + group * 16;
        vu zero = (vu)_mm512_cvtepi8_epi32(_mm_loadu_si128(of_group));
        g->zeros = zero | zero << 16;
    }
#endif
}

/* Multiples of the scale: of the even or the odd k of pair p of a unit, whose words of the columns
 * of vector v are u. */
ALWAYS_INLINE vf multiple(vu u, const int p, const int is_odd, const int v, const struct decoder *f,
                          const struct grid *g, const enum decoding d)
{
    const int at = bits_of(d) * p;
    if (d == DECODE_TABLE)
        return look_up(&f->table, u >> (at + 16 * is_odd));
    if (d == DECODE_FP8)
        return decode_fp8(u >> (at + 16 * is_odd));
    const uint32_t mask = ((1u << bits_of(d)) - 1) << at;
    vu half = is_odd ? u >> 16 : u;
    return (vf)((half & mask) | bits_of_power(at)) - g->bias[at / 4][v];
}

/* quantized_value() */
ALWAYS_INLINE vf value(vu u, const int p, const int is_odd, const int v, const struct decoder *f,
                       const struct grid *g, const enum decoding d)
{
    vf x = multiple(u, p, is_odd, v, f, g, d) * g->scale[v];
    return d == DECODE_INT8_127 ? x * INT8_127_FACTOR : x;
}

/* ---- pairs of bfloat16 ---- */

/* Rounded to the nearest, ties to even, still float32; finite values only. */
ALWAYS_INLINE vf rounded(vf x)
{
    vu u = (vu)x;
    return (vf)((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}

/* Two, rounded in the same way. */
ALWAYS_INLINE vu rounded_pair(vf even, vf odd)
{
#if defined(__AVX512BF16__)
    return vf_pair_bf16(even, odd);
#else
    return (vu)rounded(even) >> 16 | (vu)rounded(odd);
#endif
}

#if VF_N == 16
ALWAYS_INLINE vu int4_pair(vu u, const int p, const struct decoder *f, const struct grid *g,
                           const int has_zeros)
{
    __m512i index = (__m512i)(u >> (4 * p));
    if (has_zeros)
        index = _mm512_sub_epi16((__m512i)((vu)index & 0x000f000fu), (__m512i)g->zeros);
    return (vu)_mm512_permutexvar_epi16(index, (__m512i)f->words);
}

/* Where E4M3's exponent is not 0, bfloat16's is 120 more. */
ALWAYS_INLINE vu fp8_pair(vu u, const int p, const struct decoder *f)
{
    vu high = p == 0 ? u << 8 : u; // each code in the upper half of a word, whatever is below
    __m512i x = _mm512_add_epi16((__m512i)(high >> 4 & 0x07f007f0u), _mm512_set1_epi16(120 << 7));
    __mmask32 is_denormal = _mm512_testn_epi16_mask((__m512i)high, _mm512_set1_epi16(0x7800));
    x = _mm512_mask_permutexvar_epi16(x, is_denormal, (__m512i)(high >> 8), (__m512i)f->words);
    return (vu)x | (high & 0x80008000u);
}
#endif

#if defined(__AVX512VBMI__)
/* The bytes of 64 multiples' magnitudes are looked up at once, 0 and 128 as one, which is why the
 * upper one of a 0 is masked; then those of pair p are put side by side. */
ALWAYS_INLINE vu int8_pair(vu u, const int p, const struct decoder *f)
{
    static const uint8_t twice[2][16] = {{0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14},
                                         {1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15}};
    const __m512i sign = _mm512_set1_epi8(-128);
    const __m512i x = _mm512_xor_si512((__m512i)u, sign), magnitude = _mm512_abs_epi8(x);
    __m512i low = _mm512_permutex2var_epi8((__m512i)f->magnitude[0][0], magnitude,
                                           (__m512i)f->magnitude[0][1]);
    __m512i high =
        _mm512_maskz_permutex2var_epi8(_mm512_test_epi8_mask(x, x), (__m512i)f->magnitude[1][0],
                                       magnitude, (__m512i)f->magnitude[1][1]);
    high = _mm512_ternarylogic_epi32(high, x, sign, 0xf8); // high | (x & sign)
    const __m512i order = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)twice[p]));
    return (vu)(p == 0 ? _mm512_mask_shuffle_epi8(low, 0xaaaaaaaaaaaaaaaau, high, order)
                       : _mm512_mask_shuffle_epi8(high, 0x5555555555555555u, low, order));
}
#endif

#if defined(__AVX512VBMI__)
/* NF4 and FP4: of a column and group, sixteen values are multiplied and rounded, not each weight.
 */
ALWAYS_INLINE void init_values(struct grid *g, const struct expansion *e)
{
    const vf table = vf_load(e->table);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { // four columns each
        const float *scales = e->scales + 4 * i;
        __m512i words[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
            words[j] = (__m512i)_mm512_cvtne2ps_pbh(table * vf_set(scales[2 * j + 1]),
                                                    table * vf_set(scales[2 * j]));
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
            g->values[j][i] = (vu)_mm512_permutex2var_epi8(
                words[0], _mm512_loadu_si512(bytes_of_words[j]), words[1]);
    }
}

/* The four pairs of a unit: the lower and the upper bytes of two pairs at a time are looked up by
 * column and code, in the table of the first eight columns and then in that of the others. */
ALWAYS_INLINE void values_pairs(vu pairs[4], vu u, const struct grid *g)
{
    static const uint8_t by_pair[16] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
    const vu column = {0x10100000u, 0x30302020u, 0x10100000u, 0x30302020u, 0x50504040u, 0x70706060u,
                       0x50504040u, 0x70706060u, 0x10100000u, 0x30302020u, 0x10100000u, 0x30302020u,
                       0x50504040u, 0x70706060u, 0x50504040u, 0x70706060u};
    u = (vu)_mm512_shuffle_epi8((__m512i)u,
                                _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)by_pair)));
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
        const __m512i index = _mm512_ternarylogic_epi32(
            (__m512i)(u >> (4 * p)), _mm512_set1_epi8(0x0f), (__m512i)column, 0xea); // & |
        __m512i bytes[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const __m512i *table = (const __m512i *)g->values[i];
            bytes[i] =
                _mm512_mask2_permutex2var_epi8(table[0], index, 0x00000000ffffffffu, table[1]);
            bytes[i] =
                _mm512_mask2_permutex2var_epi8(table[2], bytes[i], 0xffffffff00000000u, table[3]);
        }
        pairs[p] = (vu)_mm512_unpacklo_epi8(bytes[0], bytes[1]);
        pairs[p + 2] = (vu)_mm512_unpackhi_epi8(bytes[0], bytes[1]);
    }
}
#endif

/* Multiples of pair p of a unit: exact. */
ALWAYS_INLINE vu multiples_pair(vu u, const int p, const int v, const struct decoder *f,
                                const struct grid *g, const enum decoding d, const int has_zeros)
{
#if VF_N == 16
    if (d == DECODE_INT4)
        return int4_pair(u, p, f, g, has_zeros);
    if (d == DECODE_FP8)
        return fp8_pair(u, p, f);
#endif
    (void)has_zeros;
    return (vu)multiple(u, p, 0, v, f, g, d) >> 16 | (vu)multiple(u, p, 1, v, f, g, d);
}

#endif
