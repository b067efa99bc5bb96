/*
 * Codes of a quantised weight to the floats that a tile takes, or straight into a product of a few
 * rows. Compiled once per instruction set (CPU_EXPAND_OPS names the table it exports).
 *
 * A product with a quantised weight expands a few blocks of columns into the first-level cache and
 * runs the dense tile on them: the order of its sums is the dense one because it is the dense code.
 * A few rows, which would wait for that, multiply each pair of weights as it is decoded, in the
 * dense order again. Each value is computed as quantized_value() says, in the same roundings, at
 * every vector width.
 *
 * A pair is what the bfloat16 layout has of two k: 32 values, those of a column side by side. The
 * codes of a unit (kernels/cpu_isa.h) are laid out so that the vectors of a pair are cut from its
 * words by masks and shifts alone.
 */
#include "kernels/cpu_isa.h"
#include "kernels/cpu_simd.h"

/* Bytes of codes ahead of the loads, of one block. */
#define PREFETCH_BYTES 2048
/* Vectors of a pair: the first half of them has the columns 0 … 7, the other 8 … 15. */
#define PAIR_VECTORS (2 * BLOCK_VECTORS)

/* How codes become numbers, before the scale. */
enum decoding { DECODE_INT8, DECODE_INT8_127, DECODE_FP8, DECODE_INT4, DECODE_TABLE };

ALWAYS_INLINE int bits_of(const enum decoding d)
{
    return d == DECODE_INT4 || d == DECODE_TABLE ? 4 : 8;
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

/* Scales of a pair's vectors, and what is subtracted before: the powers above and zero points. */
struct grid {
    vf scale[PAIR_VECTORS];
    vf bias[PAIR_VECTORS][2]; // the second: of the odd pairs of a unit of 4 bits
};

/* The values of a pair's vectors v from those of its two k [16]. */
ALWAYS_INLINE vf interleave(const float *even, const float *odd, const int v)
{
    vf e = vf_load(even + v / 2 * VF_N), o = vf_load(odd + v / 2 * VF_N);
#if VF_N == 16
    return v % 2 ? __builtin_shufflevector(e, o, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                           30, 15, 31)
                 : __builtin_shufflevector(e, o, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                           23);
#elif VF_N == 8
    return v % 2 ? __builtin_shufflevector(e, o, 4, 12, 5, 13, 6, 14, 7, 15)
                 : __builtin_shufflevector(e, o, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return v % 2 ? __builtin_shufflevector(e, o, 2, 6, 3, 7)
                 : __builtin_shufflevector(e, o, 0, 4, 1, 5);
#endif
}

/* Sixteen zero points of a group as floats. */
ALWAYS_INLINE void load_zeros(float *dst, const int8_t *zeros)
{
#if VF_N >= 8
#pragma GCC unroll 2
    for (int i = 0; i < 16; i += VF_N) {
        const __m128i *bytes = (const __m128i *)(const void *)(zeros + i);
#if VF_N == 16
        vf_store(dst + i, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes))));
#else
        vf_store(dst + i, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes))));
#endif
    }
#else
    for (int i = 0; i < 16; i++)
        dst[i] = zeros[i];
#endif
}

ALWAYS_INLINE void grid_init(struct grid *g, const struct expansion *e, int64_t even_group,
                             int64_t odd_group, const enum decoding d)
{
    float even[16], odd[16];
#pragma GCC unroll 16
    for (int v = 0; v < PAIR_VECTORS; v++)
        g->scale[v] = interleave(e->scales + even_group * 16, e->scales + odd_group * 16, v);
    if (d == DECODE_FP8 || d == DECODE_TABLE)
        return;
    if (e->zeros) {
        load_zeros(even, e->zeros + even_group * 16);
        load_zeros(odd, e->zeros + odd_group * 16);
    }
#pragma GCC unroll 16
    for (int v = 0; v < PAIR_VECTORS; v++) {
        /* A stored code less what it means: but codes of 4 bits with zero points lie as they are.
         */
        vf offset = vf_set(d == DECODE_INT4 ? 8.0f : 128.0f);
        if (e->zeros)
            offset = interleave(even, odd, v) + (d == DECODE_INT4 ? 0.0f : 128.0f);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
            g->bias[v][i] =
                offset +
                (vf)((vu){0} + bits_of_power(bits_of(d) * (v / BLOCK_VECTORS + 2 * i) % 16));
    }
}

/* Vector v of pair p of a unit, whose words of v's columns are u. */
ALWAYS_INLINE vf decode(vu u, const int p, const int v, const struct grid *g,
                        const struct lookup *table, const enum decoding d)
{
    const int bits = bits_of(d), at = bits * (2 * p + v / BLOCK_VECTORS);
    vf x;
    if (d == DECODE_TABLE) {
        x = look_up(table, u >> at);
    } else if (d == DECODE_FP8) {
        x = decode_fp8(u >> at);
    } else {
        const uint32_t mask = ((1u << bits) - 1) << at % 16;
        vu low = at >= 16 ? u >> 16 : u;
        x = (vf)((low & mask) | bits_of_power(at % 16)) - g->bias[v][bits == 4 ? p % 2 : 0];
    }
    x *= g->scale[v];
    return d == DECODE_INT8_127 ? x * vf_set(INT8_127_FACTOR) : x;
}

/* ---- expanding ---- */

/* Finite values only; to the nearest, ties to even. Not used where the processor has this. */
__attribute__((unused)) ALWAYS_INLINE vu to_bf16(vf x)
{
    vu u = (vu)x;
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

/* A pair's vectors v and v + 1, v even, as bfloat16. */
ALWAYS_INLINE void store_bf16(uint16_t *dst, const vf *x, const int v)
{
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(dst, (__m512i)_mm512_cvtne2ps_pbh(x[v + 1], x[v]));
#elif VF_N == 8
    __m256i both = _mm256_packus_epi32((__m256i)to_bf16(x[v]), (__m256i)to_bf16(x[v + 1]));
    *(vu_memory *)(dst + v * VF_N) = (vu)_mm256_permute4x64_epi64(both, 0xd8);
#else
    *(vh_memory *)(dst + v * VF_N) = __builtin_convertvector(to_bf16(x[v]), vh);
    *(vh_memory *)(dst + (v + 1) * VF_N) = __builtin_convertvector(to_bf16(x[v + 1]), vh);
#endif
}

/* The same as float32: the even k's sixteen columns, then the odd's. */
ALWAYS_INLINE void store_f32(float *dst, const vf *x, const int v)
{
#if VF_N == 16
    vf even = __builtin_shufflevector(x[v], x[v + 1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24,
                                      26, 28, 30);
    vf odd = __builtin_shufflevector(x[v], x[v + 1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25,
                                     27, 29, 31);
#elif VF_N == 8
    vf even = __builtin_shufflevector(x[v], x[v + 1], 0, 2, 4, 6, 8, 10, 12, 14);
    vf odd = __builtin_shufflevector(x[v], x[v + 1], 1, 3, 5, 7, 9, 11, 13, 15);
#else
    vf even = __builtin_shufflevector(x[v], x[v + 1], 0, 2, 4, 6);
    vf odd = __builtin_shufflevector(x[v], x[v + 1], 1, 3, 5, 7);
#endif
    vf_store(dst + v / 2 * VF_N, even);
    vf_store(dst + 16 + v / 2 * VF_N, odd);
}

/* Everything but the pointers is a constant: one loop for each combination that is used. dst takes
 * n_units whole units. */
ALWAYS_INLINE void expand_units(void *dst, const struct expansion *e, const uint8_t *codes,
                                int64_t first, int64_t n_units, const enum decoding d,
                                const int has_groups, const enum dtype to)
{
    const struct lookup table = d == DECODE_TABLE ? lookup_of(e->table) : (struct lookup){0};
    const int n_pairs = bits_of(d) == 4 ? 4 : 2;
    struct grid g;
    float *to_f32 = dst;
    uint16_t *to_bf16_words = dst;
    if (!has_groups)
        grid_init(&g, e, 0, 0, d);
    for (int64_t i = 0; i < n_units; i++, codes += UNIT_BYTES) {
        __builtin_prefetch(codes + PREFETCH_BYTES);
#pragma GCC unroll 4
        for (int p = 0; p < n_pairs; p++) {
            vf x[PAIR_VECTORS];
            if (has_groups) {
                const int32_t *of = e->group_of + first + (i * n_pairs + p) * 2;
                grid_init(&g, e, of[0], of[1], d);
            }
#pragma GCC unroll 16
            for (int v = 0; v < PAIR_VECTORS; v++) {
                vu u = *(const vu_memory *)(codes + v % BLOCK_VECTORS * VF_N * 4);
                x[v] = decode(u, p, v, &g, &table, d);
            }
#pragma GCC unroll 16
            for (int v = 0; v < PAIR_VECTORS; v += 2) {
                if (to == DTYPE_F32)
                    store_f32(to_f32, x, v);
                else
                    store_bf16(to_bf16_words, x, v);
            }
            to_f32 += 32;
            to_bf16_words += 32;
        }
    }
}

/* Whole units straight to dst; what is left by way of a unit of its own, a missing odd k being 0.
 */
ALWAYS_INLINE void expand(void *dst, const struct expansion *e, const enum decoding d,
                          const int has_groups, const enum dtype to)
{
    const int unit = UNIT_BYTES / 2 / bits_of(d); // k
    const int64_t n_units = e->n_k / unit, left = e->n_k % unit;
    const size_t element = to == DTYPE_F32 ? sizeof(float) : sizeof(uint16_t);
    expand_units(dst, e, e->codes, 0, n_units, d, has_groups, to);
    if (left == 0)
        return;
    float rest[8 * 16];
    char *end = (char *)dst + (size_t)(n_units * unit) * 16 * element;
    expand_units(rest, e, e->codes + n_units * UNIT_BYTES, n_units * unit, 1, d, has_groups, to);
    if (to == DTYPE_F32) {
        memcpy(end, rest, (size_t)left * 16 * element);
        return;
    }
    for (int j = 0; left % 2 && j < 16; j++)
        memset((char *)rest + (size_t)(left / 2 * 32 + 2 * j + 1) * element, 0, element);
    memcpy(end, rest, (size_t)((left + 1) / 2) * 32 * element);
}

ALWAYS_INLINE void expand_as(void *dst, const struct expansion *e, const enum decoding d,
                             const enum dtype to)
{
    if (e->group_of)
        expand(dst, e, d, 1, to);
    else
        expand(dst, e, d, 0, to);
}

static enum decoding decoding_of(enum weight_format format)
{
    switch (format) {
    case WEIGHT_INT8:
        return DECODE_INT8;
    case WEIGHT_INT8_127:
        return DECODE_INT8_127;
    case WEIGHT_FP8:
        return DECODE_FP8;
    case WEIGHT_INT4:
        return DECODE_INT4;
    default:
        return DECODE_TABLE;
    }
}

ALWAYS_INLINE void expand_to(void *dst, const struct expansion *e, enum weight_format format,
                             const enum dtype to)
{
    switch (decoding_of(format)) {
    case DECODE_INT8:
        return expand_as(dst, e, DECODE_INT8, to);
    case DECODE_INT8_127:
        return expand_as(dst, e, DECODE_INT8_127, to);
    case DECODE_FP8:
        return expand_as(dst, e, DECODE_FP8, to);
    case DECODE_INT4:
        return expand_as(dst, e, DECODE_INT4, to);
    case DECODE_TABLE:
        return expand_as(dst, e, DECODE_TABLE, to);
    }
}

static void run(void *dst, const struct expansion *e, enum weight_format format, enum dtype to)
{
    if (to == DTYPE_F32)
        expand_to(dst, e, format, DTYPE_F32);
    else
        expand_to(dst, e, format, DTYPE_BF16);
}

/* ---- multiplying at once ---- */

#if defined(__AVX512BF16__)
/* Two blocks' sums at a time hide each other's latency. What the next two need of memory is fetched
 * meanwhile: a block can be too short for a distance of its own. */
ALWAYS_INLINE void multiply_as(const struct expand_product *m, const struct expansion *e,
                               const int n_rows, const int n_blocks, const enum decoding d)
{
    const struct lookup table = d == DECODE_TABLE ? lookup_of(e->table) : (struct lookup){0};
    const int n_pairs = bits_of(d) == 4 ? 4 : 2;
    const int64_t n_units = e->n_k / (2 * n_pairs);
    const uint8_t *codes = e->codes;
    const uint32_t *a = m->a;
    struct grid g[2];
    __m512 acc[PRODUCT_ROWS_MAX][2];
#pragma GCC unroll 2
    for (int b = 0; b < n_blocks; b++) {
        struct expansion at = *e;
        at.scales = (const float *)(const void *)((const char *)e->scales + b * m->e_block);
        at.zeros = e->zeros ? e->zeros + b * m->e_block : NULL;
        grid_init(&g[b], &at, 0, 0, d);
        __builtin_prefetch((const char *)at.scales + 2 * m->e_block);
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 2
        for (int b = 0; b < n_blocks; b++)
            acc[r][b] = _mm512_loadu_ps(m->c + r * m->c_row + b * 16);
    }
    for (int64_t i = 0; i < n_units; i++, codes += UNIT_BYTES) {
        vu u[2];
#pragma GCC unroll 2
        for (int b = 0; b < n_blocks; b++) {
            __builtin_prefetch(codes + (b + 2) * m->e_block);
            u[b] = *(const vu_memory *)(codes + b * m->e_block);
        }
#pragma GCC unroll 4
        for (int p = 0; p < n_pairs; p++, a += m->a_step) {
#pragma GCC unroll 2
            for (int b = 0; b < n_blocks; b++) {
                vf low = decode(u[b], p, 0, &g[b], &table, d);
                vf high = decode(u[b], p, 1, &g[b], &table, d);
                __m512bh w = _mm512_cvtne2ps_pbh(high, low);
#pragma GCC unroll 4
                for (int r = 0; r < n_rows; r++)
                    acc[r][b] =
                        _mm512_dpbf16_ps(acc[r][b], (__m512bh)_mm512_set1_epi32((int32_t)a[r]), w);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 2
        for (int b = 0; b < n_blocks; b++)
            _mm512_storeu_ps(m->c + r * m->c_row + b * 16, acc[r][b]);
    }
}

ALWAYS_INLINE void multiply_rows(const struct expand_product *m, const struct expansion *e,
                                 const int n_blocks, const enum decoding d)
{
    switch (m->n_rows) {
    case 1:
        return multiply_as(m, e, 1, n_blocks, d);
    case 2:
        return multiply_as(m, e, 2, n_blocks, d);
    case 3:
        return multiply_as(m, e, 3, n_blocks, d);
    case 4:
        return multiply_as(m, e, 4, n_blocks, d);
    }
}

ALWAYS_INLINE void multiply_blocks(const struct expand_product *m, const struct expansion *e,
                                   const enum decoding d)
{
    if (m->n_blocks == 2)
        multiply_rows(m, e, 2, d);
    else
        multiply_rows(m, e, 1, d);
}

static void multiply(const struct expand_product *m, const struct expansion *e,
                     enum weight_format format)
{
    switch (decoding_of(format)) {
    case DECODE_INT8:
        return multiply_blocks(m, e, DECODE_INT8);
    case DECODE_INT8_127:
        return multiply_blocks(m, e, DECODE_INT8_127);
    case DECODE_FP8:
        return multiply_blocks(m, e, DECODE_FP8);
    case DECODE_INT4:
        return multiply_blocks(m, e, DECODE_INT4);
    case DECODE_TABLE:
        return multiply_blocks(m, e, DECODE_TABLE);
    }
}
#endif

const struct cpu_expand_ops CPU_EXPAND_OPS = {
    .run = run,
#if defined(__AVX512BF16__)
    .multiply = multiply,
#endif
};
