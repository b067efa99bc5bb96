/*
 * Products of int8 codes of x with the codes of a quantised weight, in whole numbers. Compiled once
 * per instruction set (CPU_INTEGER_OPS names the table it exports).
 *
 * A run's sum is exact whatever the order, so the bits are the same everywhere. Codes of the weight
 * stay as they are stored, from 0 on: what that is too much is taken off once a run, as so much
 * times the sum of the run's codes of x.
 *
 * vpdpbusd adds four products a column and step. Without it vpmaddwd adds two of 16 bits, or, of
 * codes of 4 bits, vpmaddubsw adds pairs of bytes first, which cannot overflow there.
 */
#include "kernels/cpu_strip.h"

#if defined(__AVX512VNNI__) || VF_N == 4
#define BY_BYTES 1 // x stays bytes where the weight's codes have 8 bits
#else
#define BY_BYTES 0
#endif

#define ROWS_BESIDE 4 // so few rows stay in registers beside a weight

/* Words of x beside a unit of codes. */
ALWAYS_INLINE int unit_words(int bits)
{
    return bits == 4 || !BY_BYTES ? 2 : 1;
}

/* Blocks whose sums stay in registers. */
static int product_blocks(int n_rows)
{
    if (VF_N == 16)
        return n_rows <= ROWS_BESIDE ? 4 : 2;
    return VF_N == 8 && n_rows <= 2 ? 4 / n_rows : 1;
}

/* ---- x ---- */

typedef int8_t codes16 __attribute__((vector_size(16)));
typedef int8_t codes16_memory __attribute__((vector_size(16), aligned(1), may_alias));
typedef int16_t halves16 __attribute__((vector_size(32)));
typedef int16_t halves16_memory __attribute__((vector_size(32), aligned(4), may_alias));

/* As the codes of a unit lie in a column's word (kernels/cpu_isa.h), half byte by half byte. */
static void lay(uint32_t *words, const int8_t *codes, int64_t n_units, int bits)
{
    const int64_t n = n_units * (32 / bits);
    for (int64_t k = 0; k < n; k += 16) {
        codes16 x = *(const codes16_memory *)(codes + k);
        if (bits == 4) {
            x = __builtin_shufflevector(x, x, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        } else if (BY_BYTES) {
            x = __builtin_shufflevector(x, x, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
        } else { // pairs of 16 bits
            *(halves16_memory *)(words + k / 2) = __builtin_convertvector(x, halves16);
            continue;
        }
        *(codes16_memory *)(words + k / 4) = x;
    }
}

static int32_t total(const int8_t *codes, int64_t n)
{
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += codes[i];
    return sum;
}

/* ---- whole numbers ---- */

/* Codes of a unit u of one vector's columns, a byte each (or 16 bits). */
ALWAYS_INLINE void weights_of(vu w[2], vu u, const int bits)
{
    w[0] = bits == 4 ? u & 0x0f0f0f0fu : BY_BYTES ? u : u & 0x00ff00ffu;
    w[1] = bits == 4 ? u >> 4 & 0x0f0f0f0fu : u >> 8 & 0x00ff00ffu;
}

#if VF_N == 16
#define INTEGER(name) _mm512_##name
typedef __m512i integers;
#elif VF_N == 8
#define INTEGER(name) _mm256_##name
typedef __m256i integers;
#endif

/* sum += the products of a unit's codes with the words x of a row. */
ALWAYS_INLINE vi add_unit(vi sum, const vu w[2], const vu x[2], const int bits)
{
#if defined(__AVX512VNNI__)
    sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w[0], (__m512i)x[0]);
    if (bits == 4)
        sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w[1], (__m512i)x[1]);
    return sum;
#elif VF_N >= 8
    const integers w0 = (integers)w[0], w1 = (integers)w[1];
    const integers x0 = (integers)x[0], x1 = (integers)x[1];
    if (bits == 4) // at most 4 * 15 * 127
        return sum + (vi)INTEGER(madd_epi16)(INTEGER(add_epi16)(INTEGER(maddubs_epi16)(w0, x0),
                                                                INTEGER(maddubs_epi16)(w1, x1)),
                                             INTEGER(set1_epi16)(1));
    return sum + (vi)INTEGER(madd_epi16)(w0, x0) + (vi)INTEGER(madd_epi16)(w1, x1);
#else
    const int n = bits == 4 ? 2 : 1;
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) {
#pragma GCC unroll 4
        for (int byte = 0; byte < 32; byte += 8)
            sum += (vi)(w[i] >> byte & 0xffu) * ((vi)(x[i] << (24 - byte)) >> 24);
    }
    return sum;
#endif
}

/* One load for all that uses it, not an operand's for each. */
ALWAYS_INLINE void loaded(vu *x)
{
#if VF_N == 16
    __asm__("" : "+v"(*x));
#endif
    (void)x;
}

ALWAYS_INLINE vu load_x(uint32_t word)
{
    vu x = (vu){0} + word;
    loaded(&x);
    return x;
}

struct integer_sums {
    vi of[TILE_ROWS_MAX][PRODUCT_BLOCKS_MAX * BLOCK_VECTORS];
};

/* The codes from `codes` on of a unit of each block. */
ALWAYS_INLINE void add_codes(struct integer_sums *s, const struct expand_product *m,
                             const uint32_t *a, const uint8_t *codes, const int n_rows,
                             const int n_blocks, const int bits)
{
    const int n_vectors = n_blocks * BLOCK_VECTORS, n_words = unit_words(bits);
    vu w[PRODUCT_BLOCKS_MAX * BLOCK_VECTORS][2], x[TILE_ROWS_MAX][2];
#pragma GCC unroll 8
    for (int i = 0; i < n_vectors; i++) {
        const uint8_t *from = codes_of(m, codes, i / BLOCK_VECTORS);
        vu u = *(const vu_memory *)(from + i % BLOCK_VECTORS * VF_N * 4);
        loaded(&u);
        weights_of(w[i], u, bits);
    }
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 2
        for (int i = 0; i < n_words; i++)
            x[r][i] = load_x(a[i * n_rows + r]);
#pragma GCC unroll 8
        for (int i = 0; i < n_vectors; i++)
            s->of[r][i] = add_unit(s->of[r][i], w[i], x[r], bits);
    }
}

/* ---- runs and lanes ---- */

/* The zero points of a vector's columns, as they are stored: codes of 8 bits have 128 more. */
ALWAYS_INLINE vi zeros_of(const int8_t *zeros, const int bits)
{
    int32_t z[VF_N];
    for (int j = 0; j < VF_N; j++)
        z[j] = zeros[j] + (bits == 8 ? 128 : 0);
    return *(const vi_memory *)z;
}

/* The sums of a run begin with what stored codes have too much. */
ALWAYS_INLINE void begin_run(struct integer_sums *s, const struct expand_product *m,
                             const struct expansion *e, int64_t group, const int n_rows,
                             const int n_blocks, const int bits)
{
    const int n_vectors = n_blocks * BLOCK_VECTORS;
    const int32_t *begins = m->begins + group * n_rows;
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
        const vi begin = (vi)load_x((uint32_t)begins[r]);
#pragma GCC unroll 8
        for (int i = 0; i < n_vectors; i++)
            s->of[r][i] = begin;
    }
#pragma GCC unroll 4
    for (int b = 0; b < n_blocks; b++) { // the next strips' scales come in time
        const struct expansion at = block_of(m, e, group, b);
        __builtin_prefetch((const char *)at.scales + n_strips_of(n_blocks) * m->strip_bytes);
    }
    for (int i = 0; e->zeros && i < n_vectors; i++) {
        const struct expansion at = block_of(m, e, group, i / BLOCK_VECTORS);
        const vi zeros = zeros_of(at.zeros + i % BLOCK_VECTORS * VF_N, bits);
        for (int r = 0; r < n_rows; r++)
            s->of[r][i] *= zeros;
    }
}

/* c = scale * sums + c, where it `adds`; times the scales of x where it `ends`. */
ALWAYS_INLINE void end_run(const struct integer_sums *s, const struct expand_product *m,
                           const struct expansion *e, int64_t group, float factor, const int n_rows,
                           const int n_blocks, const int adds, const int ends)
{
#pragma GCC unroll 8
    for (int i = 0; i < n_blocks * BLOCK_VECTORS; i++) {
        const float *scales = block_of(m, e, group, i / BLOCK_VECTORS).scales;
        const vf scale = vf_load(scales + i % BLOCK_VECTORS * VF_N) * factor;
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; r++) {
            float *to = m->c + r * m->c_row + i * VF_N;
            const vf run = __builtin_convertvector(s->of[r][i], vf);
            const vf c = vf_fma(scale, run, adds ? vf_load(to) : (vf){0}); // no sum is -0
            vf_store(to, ends ? c * m->a_scales[r] : c);
        }
    }
}

ALWAYS_INLINE void multiply_as(const struct expand_product *m, const struct expansion *e,
                               float factor, const int n_rows, const int n_blocks, const int bits)
{
    const int unit = 32 / bits; // k
    /* One row of codes of 4 bits is so quick that fetching every line gets in the way of loads; the
     * processor's own fetches follow the stream. */
    const struct fetching f = {.n_lines = bits == 4 && n_rows == 1 ? 1 : lines_of(n_blocks),
                               .n_bytes = PREFETCH_BYTES,
                               .waits_for_memory = VF_N == 16 || n_rows == 1};
    const uint32_t *a = m->a;
    struct integer_sums s;
    int64_t run = m->first_run, group = 0, i = 0;
    for (int64_t left = e->n_k; left > 0; left -= run, run = m->run, group++) {
        run = run < left ? run : left;
        begin_run(&s, m, e, group, n_rows, n_blocks, bits);
        for (const int64_t end = i + (run + unit - 1) / unit; i < end; i++) {
            const uint8_t *codes = e->codes + i * e->unit_bytes;
            fetch_ahead(m, codes, m->codes_left - i * e->unit_bytes, i, n_blocks, f);
            add_codes(&s, m, a, codes, n_rows, n_blocks, bits);
            a += unit_words(bits) * n_rows;
        }
        if (group == 0 && run == left)
            end_run(&s, m, e, group, factor, n_rows, n_blocks, 0, 1);
        else if (group == 0)
            end_run(&s, m, e, group, factor, n_rows, n_blocks, 0, 0);
        else if (run == left)
            end_run(&s, m, e, group, factor, n_rows, n_blocks, 1, 1);
        else
            end_run(&s, m, e, group, factor, n_rows, n_blocks, 1, 0);
    }
    for (int r = 0; e->n_k == 0 && r < n_rows; r++) // a lane of nothing
        memset(m->c + r * m->c_row, 0, (size_t)n_blocks * 16 * sizeof(float));
}

/* ---- choosing ---- */

/* Blocks that are left over go one by one. */
ALWAYS_INLINE void multiply_blocks(const struct expand_product *m, const struct expansion *e,
                                   float factor, const int n_rows, const int wide, const int bits)
{
    for (int done = 0, n; done < m->n_blocks; done += n) {
        struct expand_product part = *m;
        struct expansion of = *e;
        begin_with(&part, &of, done);
        n = m->n_blocks - done >= wide ? wide : 1;
        if (n == wide)
            multiply_as(&part, &of, factor, n_rows, wide, bits);
        else
            multiply_as(&part, &of, factor, n_rows, 1, bits);
    }
}

typedef void (*product)(const struct expand_product *m, const struct expansion *e, float factor);

/* As many rows as the tile takes, a function each: compilers take longer than linearly over large
 * ones. */
#define PRODUCT(n_rows, bits)                                                                      \
    static __attribute__((noinline)) void product_##n_rows##_##bits(                               \
        const struct expand_product *m, const struct expansion *e, float factor)                   \
    {                                                                                              \
        multiply_blocks(m, e, factor, n_rows, product_blocks(n_rows), bits);                       \
    }
#define PRODUCTS(n_rows) PRODUCT(n_rows, 4) PRODUCT(n_rows, 8)
#define NAMES(n_rows)                                                                              \
    {                                                                                              \
        product_##n_rows##_4, product_##n_rows##_8                                                 \
    }

PRODUCTS(1)
PRODUCTS(2)
PRODUCTS(3)
PRODUCTS(4)
#if VF_N >= 8
PRODUCTS(5)
PRODUCTS(6)
#endif
#if VF_N == 16
PRODUCTS(7)
PRODUCTS(8)
PRODUCTS(9)
PRODUCTS(10)
PRODUCTS(11)
PRODUCTS(12)
#endif

static const product products[][2] = {
    NAMES(1), NAMES(2), NAMES(3), NAMES(4),
#if VF_N >= 8
    NAMES(5), NAMES(6),
#endif
#if VF_N == 16
    NAMES(7), NAMES(8), NAMES(9), NAMES(10), NAMES(11), NAMES(12),
#endif
};

static void multiply(const struct expand_product *m, const struct expansion *e,
                     enum weight_format format)
{
    const int is_8_bit = weight_format_bits(format) == 8;
    products[m->n_rows - 1][is_8_bit](m, e, format == WEIGHT_INT8_127 ? INT8_127_FACTOR : 1.0f);
}

const struct cpu_integer_ops CPU_INTEGER_OPS = {
    .unit_words = unit_words,
    .lay = lay,
    .total = total,
    .product_blocks = product_blocks,
    .multiply = multiply,
};
