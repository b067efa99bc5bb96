/*
 * Codes of a quantised weight to the floats that a tile takes, or straight into a product of a few
 * rows. Compiled once per instruction set (CPU_EXPAND_OPS names the table it exports).
 *
 * A product with a quantised weight expands a few blocks of columns into the first-level cache and
 * runs the dense tile on them: the order of its sums is the dense one because it is the dense code.
 * A few rows, which would wait for that, multiply each pair of weights as it is decoded, in the
 * same order again. What is expanded is values, as quantized_value() says, in the same roundings at
 * every vector width; or multiples of the scale, exact in bfloat16, and then the scale comes in at
 * the end of each run (kernels/quantized.h).
 *
 * A pair is what the bfloat16 layout has of two k: 32 values, those of a column side by side. The
 * codes of a unit (kernels/cpu_isa.h) lie as the values of its pairs will.
 */
#include "kernels/cpu_isa.h"
#include "kernels/cpu_simd.h"

/* Bytes of codes ahead of the loads, of one block. */
#define PREFETCH_BYTES 2048

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

ALWAYS_INLINE struct decoder decoder_of(const struct expansion *e, const enum decoding d,
                                        const int has_zeros)
{
    struct decoder f = {0};
    (void)has_zeros;
    if (d == DECODE_TABLE)
        f.table = lookup_of(e->table);
#if VF_N == 16
    if (d == DECODE_INT4 || d == DECODE_FP8)
        f.words = words_of(d, has_zeros);
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

/* Rounded to the nearest, ties to even; finite values only. */
ALWAYS_INLINE vu rounded_pair(vf even, vf odd)
{
#if defined(__AVX512BF16__)
    static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vu)_mm512_permutexvar_epi16(_mm512_loadu_si512(order),
                                        (__m512i)_mm512_cvtne2ps_pbh(odd, even));
#else
    vu e = (vu)even, o = (vu)odd;
    e = (e + 0x7fffu + ((e >> 16) & 1u)) >> 16;
    o = (o + 0x7fffu + ((o >> 16) & 1u)) & 0xffff0000u;
    return e | o;
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

/* ---- expanding ---- */

/* Everything but the pointers is a constant: one loop for each combination that is used. dst takes
 * n_units whole units. */
ALWAYS_INLINE void expand_units(void *dst, const struct expansion *e, const uint8_t *codes,
                                int64_t first, int64_t n_units, const enum decoding d,
                                const int has_zeros, const int has_groups, const enum expand_to to)
{
    const int n_pairs = pairs_of_unit(d);
    const struct decoder f = decoder_of(e, d, has_zeros);
    struct grid even, odd;
    uint32_t *words = dst;
    grid_init(&even, e, 0, d, has_zeros);
    odd = even;
    for (int64_t i = 0; i < n_units; i++, codes += UNIT_BYTES) {
        __builtin_prefetch(codes + PREFETCH_BYTES);
#pragma GCC unroll 4
        for (int p = 0; p < n_pairs; p++) {
            if (has_groups) {
                const int32_t *of = e->group_of + first + (i * n_pairs + p) * 2;
                grid_init(&even, e, of[0], d, has_zeros);
                grid_init(&odd, e, of[1], d, has_zeros);
            }
#pragma GCC unroll 4
            for (int v = 0; v < BLOCK_VECTORS; v++) {
                vu u = *(const vu_memory *)(codes + v * VF_N * 4);
                if (to == EXPAND_MULTIPLES) {
                    *(vu_memory *)(words + v * VF_N) =
                        multiples_pair(u, p, v, &f, &even, d, has_zeros);
                    continue;
                }
                vf x = value(u, p, 0, v, &f, &even, d), y = value(u, p, 1, v, &f, &odd, d);
                if (to == EXPAND_BF16) {
                    *(vu_memory *)(words + v * VF_N) = rounded_pair(x, y);
                } else {
                    *(vf_memory *)(words + v * VF_N) = x;
                    *(vf_memory *)(words + 16 + v * VF_N) = y;
                }
            }
            words += to == EXPAND_F32 ? 32 : 16;
        }
    }
}

/* Whole units straight to dst; what is left by way of a unit of its own, a missing odd k being 0.
 */
ALWAYS_INLINE void expand(void *dst, const struct expansion *e, const enum decoding d,
                          const int has_zeros, const int has_groups, const enum expand_to to)
{
    const int unit = 2 * pairs_of_unit(d); // k
    const int64_t n_units = e->n_k / unit, left = e->n_k % unit;
    const size_t element = to == EXPAND_F32 ? sizeof(float) : sizeof(uint16_t);
    expand_units(dst, e, e->codes, 0, n_units, d, has_zeros, has_groups, to);
    if (left == 0)
        return;
    float rest[8 * 16];
    char *end = (char *)dst + (size_t)(n_units * unit) * 16 * element;
    expand_units(rest, e, e->codes + n_units * UNIT_BYTES, n_units * unit, 1, d, has_zeros,
                 has_groups, to);
    if (to == EXPAND_F32) {
        memcpy(end, rest, (size_t)left * 16 * element);
        return;
    }
    for (int j = 0; left % 2 && j < 16; j++)
        memset((char *)rest + (size_t)(left / 2 * 32 + 2 * j + 1) * element, 0, element);
    memcpy(end, rest, (size_t)((left + 1) / 2) * 32 * element);
}

ALWAYS_INLINE void expand_to(void *dst, const struct expansion *e, const enum decoding d,
                             const int has_zeros, const enum expand_to to)
{
    if (to == EXPAND_MULTIPLES)
        expand(dst, e, d, has_zeros, 0, EXPAND_MULTIPLES);
    else if (to == EXPAND_BF16 && e->group_of)
        expand(dst, e, d, has_zeros, 1, EXPAND_BF16);
    else if (to == EXPAND_BF16)
        expand(dst, e, d, has_zeros, 0, EXPAND_BF16);
    else if (e->group_of)
        expand(dst, e, d, has_zeros, 1, EXPAND_F32);
    else
        expand(dst, e, d, has_zeros, 0, EXPAND_F32);
}

ALWAYS_INLINE void expand_integers(void *dst, const struct expansion *e, const enum decoding d,
                                   const enum expand_to to)
{
    if (e->zeros)
        expand_to(dst, e, d, 1, to);
    else
        expand_to(dst, e, d, 0, to);
}

static void run(void *dst, const struct expansion *e, enum weight_format format, enum expand_to to)
{
    switch (format) {
    case WEIGHT_INT8:
        return expand_integers(dst, e, DECODE_INT8, to);
    case WEIGHT_INT8_127:
        return expand_to(dst, e, DECODE_INT8_127, 0, to);
    case WEIGHT_FP8:
        return expand_to(dst, e, DECODE_FP8, 0, to);
    case WEIGHT_INT4:
        return expand_integers(dst, e, DECODE_INT4, to);
    default:
        return expand_to(dst, e, DECODE_TABLE, 0, to);
    }
}

/* ---- the end of a run ---- */

static void add_run(float *sums, const float *part, int n_rows, int n_blocks, const float *scales,
                    int64_t block_bytes, enum weight_format format)
{
    const float factor = format == WEIGHT_INT8_127 ? INT8_127_FACTOR : 1.0f;
    for (int b = 0; b < n_blocks; b++) {
        const float *of_block =
            (const float *)(const void *)((const char *)scales + b * block_bytes);
#pragma GCC unroll 4
        for (int v = 0; v < BLOCK_VECTORS; v++) {
            vf scale = vf_load(of_block + v * VF_N) * factor;
            for (int r = 0; r < n_rows; r++) {
                int64_t at = (r * n_blocks + b) * 16 + v * VF_N;
                vf_store(sums + at, vf_fma(scale, vf_load(part + at), vf_load(sums + at)));
            }
        }
    }
}

/* Blocks at a time hide each other's latency and keep more of memory in flight. */
static int product_blocks(int n_rows)
{
    return n_rows == 1 ? PRODUCT_BLOCKS_MAX : PRODUCT_BLOCKS_MAX / 2;
}

/* ---- multiplying at once ---- */

#if defined(__AVX512BF16__)
/* The sums of a run or, of values, of a lane. */
struct sums {
    __m512 of[PRODUCT_ROWS_MAX][PRODUCT_BLOCKS_MAX];
};

ALWAYS_INLINE void clear(struct sums *s, const int n_rows, const int n_blocks)
{
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < n_blocks; b++)
            s->of[r][b] = _mm512_setzero_ps();
    }
}

/* Pair p of a unit of each block, u, times that pair of each row. */
ALWAYS_INLINE void add_pair(struct sums *s, const uint32_t *a, const vu *u, const int p,
                            const struct decoder *f, const struct grid *g, const int n_rows,
                            const int n_blocks, const enum decoding d, const int has_zeros)
{
    __m512i x[PRODUCT_ROWS_MAX];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        x[r] = _mm512_set1_epi32((int32_t)a[r]);
        __asm__("" : "+v"(x[r])); // one broadcast for all blocks, not an operand's for each
    }
#pragma GCC unroll 8
    for (int b = 0; b < n_blocks; b++) {
        vu w = d == DECODE_TABLE ? rounded_pair(value(u[b], p, 0, 0, f, &g[b], d),
                                                value(u[b], p, 1, 0, f, &g[b], d))
                                 : multiples_pair(u[b], p, 0, f, &g[b], d, has_zeros);
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
            s->of[r][b] = _mm512_dpbf16_ps(s->of[r][b], (__m512bh)x[r], (__m512bh)w);
    }
}

/* u <- a unit of each block, from `codes` on; `before` bytes of its codes a block has before it.
 * What comes later is fetched meanwhile: of these blocks, or of those that come next. */
ALWAYS_INLINE void load_unit(vu *u, const struct expand_product *m, const uint8_t *codes,
                             int64_t before, const int n_blocks)
{
    const uint8_t *ahead = codes + PREFETCH_BYTES;
    if (before + PREFETCH_BYTES >= m->codes_bytes)
        ahead += n_blocks * m->block_bytes - m->codes_bytes;
#pragma GCC unroll 8
    for (int b = 0; b < n_blocks; b++) {
        __builtin_prefetch(ahead);
        u[b] = *(const vu_memory *)codes;
        ahead += m->block_bytes;
        codes += m->block_bytes;
        __asm__("" : "+r"(ahead), "+r"(codes)); // not one register for each block
    }
}

/* n_k of one group. */
ALWAYS_INLINE void add_codes(struct sums *s, const struct expand_product *m, const uint8_t *codes,
                             const uint32_t *a, int64_t n_k, int64_t before,
                             const struct decoder *f, const struct grid *g, const int n_rows,
                             const int n_blocks, const enum decoding d, const int has_zeros)
{
    const int n_pairs = pairs_of_unit(d);
    vu u[PRODUCT_BLOCKS_MAX];
    int64_t left = (n_k + 1) / 2; // pairs
    for (; left >= n_pairs; left -= n_pairs, codes += UNIT_BYTES, before += UNIT_BYTES) {
        load_unit(u, m, codes, before, n_blocks);
#pragma GCC unroll 4
        for (int p = 0; p < n_pairs; p++, a += m->a_step)
            add_pair(s, a, u, p, f, g, n_rows, n_blocks, d, has_zeros);
    }
    if (left == 0)
        return;
    load_unit(u, m, codes, before, n_blocks);
    for (; left > 0; left--, a += m->a_step) {
        add_pair(s, a, u, 0, f, g, n_rows, n_blocks, d, has_zeros);
#pragma GCC unroll 8
        for (int b = 0; b < n_blocks; b++)
            u[b] >>= bits_of(d);
    }
}

/* The expansion of block b, from the `group`-th of the lane on. */
ALWAYS_INLINE struct expansion block_of(const struct expand_product *m, const struct expansion *e,
                                        int64_t group, int b)
{
    struct expansion at = *e;
    at.scales =
        (const float *)(const void *)((const char *)(e->scales + group * 16) + b * m->block_bytes);
    at.zeros = e->zeros ? e->zeros + group * 16 + b * m->block_bytes : NULL;
    return at;
}

ALWAYS_INLINE void store(const struct sums *s, const struct expand_product *m, const int n_rows,
                         const int n_blocks)
{
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < n_blocks; b++)
            _mm512_storeu_ps(m->c + r * m->c_row + b * 16, s->of[r][b]);
    }
}

/* The end of a run of the `group`-th of the lane. */
ALWAYS_INLINE void add_scaled(const struct sums *s, const struct expand_product *m,
                              const struct expansion *e, int64_t group, float factor,
                              const int n_rows, const int n_blocks)
{
#pragma GCC unroll 8
    for (int b = 0; b < n_blocks; b++) {
        vf scale = vf_load(block_of(m, e, group, b).scales) * factor;
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            float *c = m->c + r * m->c_row + b * 16;
            vf_store(c, vf_fma(scale, (vf)s->of[r][b], vf_load(c)));
        }
    }
}

ALWAYS_INLINE void multiply_as(const struct expand_product *m, const struct expansion *e,
                               float factor, const int n_rows, const int n_blocks,
                               const enum decoding d, const int has_zeros)
{
    const int is_factored = d != DECODE_TABLE;
    const struct decoder f = decoder_of(e, d, has_zeros);
    const uint8_t *codes = e->codes;
    const uint32_t *a = m->a;
    struct grid g[PRODUCT_BLOCKS_MAX];
    struct sums s;
    int64_t run = m->first_run, before = m->codes_before;
    clear(&s, n_rows, n_blocks);
    if (is_factored)
        store(&s, m, n_rows, n_blocks);
    for (int64_t left = e->n_k, group = 0; left > 0; left -= run, run = m->run, group++) {
        run = run < left ? run : left;
#pragma GCC unroll 8
        for (int b = 0; b < n_blocks; b++) {
            const struct expansion at = block_of(m, e, group, b);
            grid_init(&g[b], &at, 0, d, has_zeros);
            __builtin_prefetch((const char *)at.scales + n_blocks * m->block_bytes);
        }
        if (is_factored)
            clear(&s, n_rows, n_blocks);
        add_codes(&s, m, codes, a, run, before, &f, g, n_rows, n_blocks, d, has_zeros);
        if (is_factored) {
            __asm__ volatile("" ::: "memory"); // scales are loaded now, not kept until now
            add_scaled(&s, m, e, group, factor, n_rows, n_blocks);
        }
        codes += run / (2 * pairs_of_unit(d)) * UNIT_BYTES;
        before += run / (2 * pairs_of_unit(d)) * UNIT_BYTES;
        a += run / 2 * m->a_step;
    }
    if (!is_factored)
        store(&s, m, n_rows, n_blocks);
}

/* Blocks that are left over go one by one. */
ALWAYS_INLINE void multiply_blocks(const struct expand_product *m, const struct expansion *e,
                                   float factor, const int n_rows, const int wide,
                                   const enum decoding d, const int has_zeros)
{
    struct expand_product part = *m;
    struct expansion of = *e;
    for (int done = 0, n; done < m->n_blocks; done += n) {
        n = 1;
        if (m->n_blocks - done >= wide)
            n = wide;
        else if (wide > 4 && m->n_blocks - done >= 4)
            n = 4;
        of.codes = e->codes + done * m->block_bytes;
        of.scales = block_of(m, e, 0, done).scales;
        of.zeros = block_of(m, e, 0, done).zeros;
        part.c = m->c + done * 16;
        if (n == 1)
            multiply_as(&part, &of, factor, n_rows, 1, d, has_zeros);
        else if (wide > 4 && n == wide)
            multiply_as(&part, &of, factor, n_rows, wide, d, has_zeros);
        else
            multiply_as(&part, &of, factor, n_rows, 4, d, has_zeros);
    }
}

ALWAYS_INLINE void multiply_rows(const struct expand_product *m, const struct expansion *e,
                                 float factor, const enum decoding d, const int has_zeros)
{
    switch (m->n_rows) {
    case 1:
        return multiply_blocks(m, e, factor, 1, PRODUCT_BLOCKS_MAX, d, has_zeros);
    case 2:
        return multiply_blocks(m, e, factor, 2, 4, d, has_zeros);
    case 3:
        return multiply_blocks(m, e, factor, 3, 4, d, has_zeros);
    case 4:
        return multiply_blocks(m, e, factor, 4, 4, d, has_zeros);
    }
}

static void multiply(const struct expand_product *m, const struct expansion *e,
                     enum weight_format format)
{
    switch (format) {
    case WEIGHT_INT8_127:
        return multiply_rows(m, e, INT8_127_FACTOR, DECODE_INT8, 0);
    case WEIGHT_INT8:
        return e->zeros ? multiply_rows(m, e, 1, DECODE_INT8, 1)
                        : multiply_rows(m, e, 1, DECODE_INT8, 0);
    case WEIGHT_FP8:
        return multiply_rows(m, e, 1, DECODE_FP8, 0);
    case WEIGHT_INT4:
        return e->zeros ? multiply_rows(m, e, 1, DECODE_INT4, 1)
                        : multiply_rows(m, e, 1, DECODE_INT4, 0);
    default:
        return multiply_rows(m, e, 1, DECODE_TABLE, 0);
    }
}
#endif

const struct cpu_expand_ops CPU_EXPAND_OPS = {
    .run = run,
    .add_run = add_run,
    .product_blocks = product_blocks,
#if defined(__AVX512BF16__)
    .takes_bf16 = 1,
    .multiply = multiply,
#endif
};
