/*
 * Products of a few rows with the codes of a quantised weight, each weight multiplied as it is
 * decoded. Compiled once per instruction set that gains by it (CPU_MULTIPLY_OPS names the table it
 * exports).
 *
 * The order of the sums is that of the tile on expanded codes, and so are their bits: one sum a
 * column, pair after pair, the odd k of a pair first; where the format is factored, one sum a run,
 * which its scale adds to the lane's (kernels/quantized.h). vdpbf16ps takes both products of a
 * pair; without it, or where it is slow, each has a multiply-add (CPU_MULTIPLY_FLUSHES: that takes
 * denormals for 0, as vdpbf16ps does).
 *
 * A row waits for memory, so what counts is instructions a weight: several blocks at once, for
 * their sums to hide each other's latency and to keep more of memory in flight, and each format
 * decoded in the fewest. With more rows than ROWS_BESIDE arithmetic takes the time: their sums fill
 * the registers, and decoding goes on beside the products.
 */
#include "kernels/cpu_codes.h"
#include "kernels/cpu_strip.h"

/* x of a pair of k: one word of two bfloat16, or two floats. */
#if defined(__AVX512BF16__)
#define DOTS 1
#define PAIR_WORDS 1
typedef uint32_t x_word;
#else
#define DOTS 0
#define PAIR_WORDS 2
typedef float x_word;
#endif

#define ROWS_BESIDE 4

/* The sums of a run or, of values, of a lane: of each row, the vectors of blocks side by side. */
struct sums {
    vf of[TILE_ROWS_MAX][PRODUCT_BLOCKS_MAX * BLOCK_VECTORS];
};

/* Blocks whose sums stay in registers. */
static int product_blocks(int n_rows)
{
    if (VF_N == 16)
        return n_rows <= ROWS_BESIDE ? 4 : 2;
    return n_rows == 1 ? 4 : n_rows == 2 ? 2 : 1;
}

ALWAYS_INLINE void clear(struct sums *s, const int n_rows, const int n_vectors)
{
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 8
        for (int i = 0; i < n_vectors; i++)
            s->of[r][i] = vf_set(0.0f);
    }
}

#if CPU_MULTIPLY_FLUSHES
/* MXCSR <- mode, after all that was added to the sums and before all that will be: the compiler
 * does not know that arithmetic depends on it. */
ALWAYS_INLINE void set_mode(struct sums *s, unsigned mode, const int n_rows, const int n_vectors)
{
#pragma GCC unroll 2
    for (int side = 0; side < 2; side++) {
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 8
            for (int i = 0; i < n_vectors; i++)
                __asm__ volatile("" : "+v"(s->of[r][i])::"memory");
        }
        if (side == 0)
            _mm_setcsr(mode);
    }
}
#endif

/* ---- whole units ---- */

/* Six KiB ahead of a strip that a few rows read alone: less, and loads wait; more brings nothing.
 */
ALWAYS_INLINE struct fetching fetching_of(const int n_rows, const int n_blocks,
                                          const enum decoding d)
{
    return (struct fetching){.n_lines = lines_of(n_blocks),
                             .n_bytes = STRIP > 1 ? 6144 : PREFETCH_BYTES,
                             .waits_for_memory = DOTS || (d == DECODE_INT8 && n_rows == 1)};
}

/* From any byte on. */
ALWAYS_INLINE vu load_codes(const uint8_t *codes)
{
    vu u;
    memcpy(&u, codes, sizeof(u));
    return u;
}

#if DOTS
/* Pair p of a unit u of a block. To look integers of 8 bits up takes fewer instructions than to
 * compute them, but in the ports that products want: it pays with a few rows. */
ALWAYS_INLINE vu decode_pair(vu u, const int p, const struct decoder *f, const struct grid *g,
                             const int n_rows, const enum decoding d, const int has_zeros)
{
    if (d == DECODE_TABLE)
        return rounded_pair(value(u, p, 0, 0, f, g, d), value(u, p, 1, 0, f, g, d));
    if (d == DECODE_INT8 && !has_zeros && n_rows <= ROWS_BESIDE)
        return int8_pair(u, p, f);
    return multiples_pair(u, p, 0, f, g, d, has_zeros);
}

ALWAYS_INLINE void add_product(vf *sum, __m512i x, vu w)
{
    *sum = (vf)_mm512_dpbf16_ps((__m512)*sum, (__m512bh)x, (__m512bh)w);
}

/* One broadcast for all blocks, not an operand's for each. */
ALWAYS_INLINE __m512i load_x(x_word word)
{
    __m512i x = _mm512_set1_epi32((int32_t)word);
    __asm__("" : "+v"(x));
    return x;
}

/* NF4 and FP4: two blocks at once share x. */
ALWAYS_INLINE void add_values(struct sums *s, const struct expand_product *m, const x_word *a,
                              const uint8_t *codes, const struct grid *g, const int n_rows,
                              const int n_blocks)
{
    const int n = n_blocks > 1 ? 2 : 1;
#pragma GCC unroll 2
    for (int b = 0; b < n_blocks; b += n) {
        vu w[2][4];
#pragma GCC unroll 2
        for (int i = 0; i < n; i++)
            values_pairs(w[i], load_codes(codes_of(m, codes, b + i)), &g[b + i]);
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
#pragma GCC unroll 16
            for (int r = 0; r < n_rows; r++) {
                __m512i x = load_x(a[p * n_rows + r]);
#pragma GCC unroll 2
                for (int i = 0; i < n; i++)
                    add_product(&s->of[r][b + i], x, w[i][p]);
            }
        }
        __asm__("" : "+r"(a)); // x is loaded again, not spilled
    }
}

ALWAYS_INLINE void add_unit(struct sums *s, const struct expand_product *m, const x_word *a,
                            const uint8_t *codes, const struct decoder *f, const struct grid *g,
                            const int n_rows, const int n_blocks, const enum decoding d,
                            const int has_zeros)
{
    if (d == DECODE_TABLE) {
        add_values(s, m, a, codes, g, n_rows, n_blocks);
        return;
    }
    vu u[PRODUCT_BLOCKS_MAX], w[PRODUCT_BLOCKS_MAX];
#pragma GCC unroll 8
    for (int b = 0; b < n_blocks; b++)
        u[b] = load_codes(codes_of(m, codes, b));
#pragma GCC unroll 4
    for (int p = 0; p < pairs_of_unit(d); p++, a += n_rows) {
        if (n_rows > ROWS_BESIDE) { /* few blocks: their weights stay, rows come one by one */
#pragma GCC unroll 8
            for (int b = 0; b < n_blocks; b++)
                w[b] = decode_pair(u[b], p, f, &g[b], n_rows, d, has_zeros);
#pragma GCC unroll 16
            for (int r = 0; r < n_rows; r++) {
                __m512i x = load_x(a[r]);
#pragma GCC unroll 8
                for (int b = 0; b < n_blocks; b++)
                    add_product(&s->of[r][b], x, w[b]);
            }
            continue;
        }
        __m512i x[TILE_ROWS_MAX];
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; r++)
            x[r] = load_x(a[r]);
#pragma GCC unroll 8
        for (int b = 0; b < n_blocks; b++) {
            w[0] = decode_pair(u[b], p, f, &g[b], n_rows, d, has_zeros);
#pragma GCC unroll 16
            for (int r = 0; r < n_rows; r++)
                add_product(&s->of[r][b], x[r], w[0]);
        }
    }
}

/* The first pair of u, vector v of block b. */
ALWAYS_INLINE void add_first_pair(struct sums *s, const int b, const int v, const x_word *a, vu u,
                                  const struct decoder *f, const struct grid *g, const int n_rows,
                                  const enum decoding d, const int has_zeros)
{
    vu w = decode_pair(u, 0, f, g, n_rows, d, has_zeros);
    (void)v;
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++)
        add_product(&s->of[r][b], load_x(a[r]), w);
}
#else
/* Vector i of the sums += a pair of weights times that pair of each row. */
ALWAYS_INLINE void add_weights(struct sums *s, const int i, const x_word *a, vf even, vf odd,
                               const int n_rows)
{
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++)
        s->of[r][i] = vf_fma(vf_set(a[n_rows + r]), odd, s->of[r][i]);
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++)
        s->of[r][i] = vf_fma(vf_set(a[r]), even, s->of[r][i]);
}

/* The same of bfloat16. */
ALWAYS_INLINE void add_bf16(struct sums *s, const int i, const x_word *a, vu w, const int n_rows)
{
    add_weights(s, i, a, (vf)(w << 16), (vf)(w & 0xffff0000u), n_rows);
}

/* Pair p of u, vector v of block b. */
ALWAYS_INLINE void add_pair(struct sums *s, const int b, const int v, const x_word *a, vu u,
                            const int p, const struct decoder *f, const struct grid *g,
                            const int n_rows, const enum decoding d, const int has_zeros)
{
    const int i = b * BLOCK_VECTORS + v;
    if (d == DECODE_TABLE)
        add_weights(s, i, a, rounded(value(u, p, 0, v, f, g, d)),
                    rounded(value(u, p, 1, v, f, g, d)), n_rows);
    else if (VF_N == 16 && d == DECODE_FP8) // denormals of it are none of float32
        add_bf16(s, i, a, multiples_pair(u, p, v, f, g, d, has_zeros), n_rows);
    else
        add_weights(s, i, a, multiple(u, p, 0, v, f, g, d), multiple(u, p, 1, v, f, g, d), n_rows);
}

#if VF_N == 16
/* Vector v of block b. */
ALWAYS_INLINE void add_vector(struct sums *s, const int b, const int v, const x_word *a,
                              const uint8_t *codes, const struct decoder *f, const struct grid *g,
                              const int n_rows, const enum decoding d, const int has_zeros)
{
    vu u = load_codes(codes);
#pragma GCC unroll 4
    for (int p = 0; p < pairs_of_unit(d); p++, a += 2 * n_rows) {
        if (d == DECODE_INT4 && !has_zeros) {
            /* Where a code lies in a byte matters, which byte does not: loads shift for nothing. */
            vu even = load_codes(codes + p / 2), odd = load_codes(codes + p / 2 + 2);
            add_weights(s, b, a, look_up(&f->table, even >> (p % 2 * 4)),
                        look_up(&f->table, odd >> (p % 2 * 4)), n_rows);
            continue;
        }
        add_pair(s, b, v, a, u, p, f, g, n_rows, d, has_zeros);
    }
}

ALWAYS_INLINE void add_unit(struct sums *s, const struct expand_product *m, const x_word *a,
                            const uint8_t *codes, const struct decoder *f, const struct grid *g,
                            const int n_rows, const int n_blocks, const enum decoding d,
                            const int has_zeros)
{
#pragma GCC unroll 8
    for (int b = 0; b < n_blocks; b++) {
        const uint8_t *of_block = codes_of(m, codes, b);
#pragma GCC unroll 2
        for (int v = 0; v < BLOCK_VECTORS; v++)
            add_vector(s, b, v, a, of_block + v * VF_N * 4, f, &g[b], n_rows, d, has_zeros);
        if (n_rows > 1)
            __asm__("" : "+r"(a));
    }
}

#else
/* n vectors of the sums, from the i-th on, += weights of one k times that k of each row. */
ALWAYS_INLINE void add_half(struct sums *s, const int i, const int n, const x_word *a, const vf *w,
                            const int n_rows)
{
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
        vf x = vf_set(a[r]);
#pragma GCC unroll 2
        for (int v = 0; v < n; v++)
            vf_add_product(&s->of[r][i + v], x, w[v]);
    }
}

/* The same of a pair, the odd k first. */
ALWAYS_INLINE void add_vectors(struct sums *s, const int i, const int n, const x_word *a,
                               const vf *even, const vf *odd, const int n_rows)
{
    add_half(s, i, n, a + n_rows, odd, n_rows);
    add_half(s, i, n, a, even, n_rows);
}

/* INT8: pair p of all blocks, so that what the pair has in common stays in registers; with many
 * rows, whose sums take those, the odd and the even k apart. */
ALWAYS_INLINE void add_int8(struct sums *s, const struct expand_product *m, const x_word *a,
                            const uint8_t *first, const int p, const struct grid *g,
                            const int n_rows, const int n_blocks, const int has_zeros)
{
    const int at = 8 * p;
    const int n = n_rows == 1 ? 1 : BLOCK_VECTORS; // vectors that share a broadcast of x
    vu mask = (vu){0} + (0xffu << at), power = (vu){0} + bits_of_power(at);
    vf bias = g[0].bias[at / 4][0];
    /* Of codes and x, what is needed again is loaded again, not spilled. */
    if (n_rows <= ROWS_BESIDE)
        __asm__ volatile("" : "+x"(mask), "+x"(power), "+x"(bias), "+r"(first));
#pragma GCC unroll 4
    for (int b = 0; b < n_blocks; b++) {
        const uint8_t *codes = codes_of(m, first, b);
#pragma GCC unroll 2
        for (int v = 0; v < BLOCK_VECTORS; v += n) {
            vf w[2][BLOCK_VECTORS]; // of the even and the odd k
#pragma GCC unroll 2
            for (int is_odd = 1; is_odd >= 0; is_odd--) {
#pragma GCC unroll 2
                for (int i = 0; i < n; i++) {
                    const uint8_t *from = codes + (v + i) * VF_N * 4 + 2 * is_odd; // no shift
                    const vf of_column = has_zeros ? g[b].bias[at / 4][v + i] : bias;
                    w[is_odd][i] = (vf)((load_codes(from) & mask) | power) - of_column;
                }
                if (n_rows > ROWS_BESIDE) {
                    add_half(s, b * BLOCK_VECTORS + v, n, a + is_odd * n_rows, w[is_odd], n_rows);
                    __asm__ volatile("" : "+r"(codes));
                }
            }
            if (n_rows <= ROWS_BESIDE)
                add_vectors(s, b * BLOCK_VECTORS + v, n, a, w[0], w[1], n_rows);
        }
        __asm__ volatile("" : "+r"(codes));
        if (n_rows > 1)
            __asm__ volatile("" : "+r"(a));
    }
}

/* INT4: pair after pair of all blocks. The codes of even and of odd k are kept as words whose upper
 * halves are all ones, of which one AND leaves a code and its power. */
ALWAYS_INLINE void add_int4(struct sums *s, const struct expand_product *m, const x_word *a,
                            const uint8_t *first, const struct grid *g, const int n_rows,
                            const int n_blocks, const int has_zeros)
{
    const int n = n_rows == 1 ? 1 : BLOCK_VECTORS; // vectors that share a broadcast of x
    vu words[PRODUCT_BLOCKS_MAX][2][BLOCK_VECTORS];
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++, a += 2 * n_rows) {
        vu mask = (vu){0} + (0xfu << 4 * p | bits_of_power(4 * p));
        vf bias = g[0].bias[p][0];
        if (n_rows < 6) // whose sums leave registers for both
            __asm__ volatile("" : "+x"(mask), "+x"(bias));
#pragma GCC unroll 2
        for (int is_odd = 1; is_odd >= 0; is_odd--) {
#pragma GCC unroll 8
            for (int i = 0; i < n_blocks * BLOCK_VECTORS; i += n) {
                const int b = i / BLOCK_VECTORS;
                vf w[BLOCK_VECTORS];
#pragma GCC unroll 2
                for (int v = i % BLOCK_VECTORS, j = 0; j < n; v++, j++) {
                    vu *word = &words[b][is_odd][v];
                    if (p == 0) // loads shift for nothing
                        *word = load_codes(codes_of(m, first, b) + v * VF_N * 4 + 2 * is_odd) |
                                0xffff0000u;
                    w[j] = (vf)(*word & mask) - (has_zeros ? g[b].bias[p][v] : bias);
                }
                add_half(s, i, n, a + is_odd * n_rows, w, n_rows);
            }
            if (n_rows >= 6)
                __asm__ volatile("" : "+r"(a));
        }
        /* Words go to memory: sums take the registers. */
        __asm__ volatile("" : "+m"(words), "+r"(a));
    }
}

ALWAYS_INLINE __m256i look_up_bytes(const uint8_t table[16], vu index)
{
    __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table));
    return _mm256_shuffle_epi8(t, (__m256i)index);
}

/* Of a block the i-th bytes of each half word, four columns of the first vector in the lower eight
 * bytes of each lane and four of the second in the upper: all even k, then all odd ones
 * (`by_column`: side by side). */
ALWAYS_INLINE vu half_words_bytes(const uint8_t *codes, const int i, const int by_column)
{
    static const uint8_t apart[16] = {0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15};
    static const uint8_t beside[16] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(by_column ? beside : apart)));
    __m256i x = _mm256_shuffle_epi8((__m256i)load_codes(codes), order);
    __m256i y = _mm256_shuffle_epi8((__m256i)load_codes(codes + 32), order);
    return (vu)(i == 0 ? _mm256_unpacklo_epi64(x, y) : _mm256_unpackhi_epi64(x, y));
}

/* FP8: the bytes of a bfloat16 are looked up by the upper and the lower four bits of a code; but
 * where the upper ones but the sign are 0, the lower ones say both: these are E4M3's denormals. */
ALWAYS_INLINE void add_fp8(struct sums *s, const x_word *a, const uint8_t *codes, const int b,
                           const int p, const int n_rows)
{
    static const uint8_t upper[16] = {0x00, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43,
                                      0x80, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc2, 0xc3};
    static const uint8_t lower[16] = {0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70,
                                      0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0};
    static const uint8_t small_upper[16] = {0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c,
                                            0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c};
    static const uint8_t small_change[16] = {0x00, 0x10, 0xa0, 0xf0, 0x40, 0x70, 0x20, 0x10};
    const vu code = half_words_bytes(codes, p, 1), magnitude = code & 0x7f7f7f7fu;
    /* Above 0x7f, which looks up 0, from the code 0x10 on. */
    const vu small = (vu)_mm256_add_epi8((__m256i)magnitude, _mm256_set1_epi8(0x70));
    __m256i up = _mm256_or_si256(look_up_bytes(upper, code >> 4 & 0x0f0f0f0fu),
                                 look_up_bytes(small_upper, small));
    __m256i low =
        _mm256_xor_si256(look_up_bytes(lower, magnitude), look_up_bytes(small_change, small));
    const vu pairs[2] = {(vu)_mm256_unpacklo_epi8(low, up), (vu)_mm256_unpackhi_epi8(low, up)};
    vf even[2], odd[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
        even[v] = (vf)(pairs[v] << 16);
        odd[v] = (vf)(pairs[v] & 0xffff0000u);
    }
    add_vectors(s, b * BLOCK_VECTORS, BLOCK_VECTORS, a, even, odd, n_rows);
}

/* A pair of NF4 or FP4, the codes as half_words_bytes() has them: the four bytes of a float are
 * looked up for 32 of them at a time. */
ALWAYS_INLINE void add_table(struct sums *s, const x_word *a, vu index, const int b,
                             const struct decoder *f, const struct grid *g, const int n_rows)
{
    __m256i byte[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        byte[i] = look_up_bytes(f->bytes[i], index);
    const __m256i lower[2] = {_mm256_unpacklo_epi8(byte[0], byte[1]),
                              _mm256_unpackhi_epi8(byte[0], byte[1])};
    const __m256i upper[2] = {_mm256_unpacklo_epi8(byte[2], byte[3]),
                              _mm256_unpackhi_epi8(byte[2], byte[3])};
    vf even[2], odd[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
        even[v] = rounded((vf)_mm256_unpacklo_epi16(lower[v], upper[v]) * g->scale[v]);
        odd[v] = rounded((vf)_mm256_unpackhi_epi16(lower[v], upper[v]) * g->scale[v]);
    }
    add_vectors(s, b * BLOCK_VECTORS, BLOCK_VECTORS, a, even, odd, n_rows);
}

ALWAYS_INLINE void add_unit(struct sums *s, const struct expand_product *m, const x_word *a,
                            const uint8_t *codes, const struct decoder *f, const struct grid *g,
                            const int n_rows, const int n_blocks, const enum decoding d,
                            const int has_zeros)
{
    if (d == DECODE_INT4) {
        add_int4(s, m, a, codes, g, n_rows, n_blocks, has_zeros);
        return;
    }
    if (d == DECODE_INT8) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++, a += 2 * n_rows)
            add_int8(s, m, a, codes, p, g, n_rows, n_blocks, has_zeros);
        return;
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++, a += pairs_of_unit(d) * n_rows) {
#pragma GCC unroll 4
        for (int b = 0; b < n_blocks; b++) {
            const uint8_t *from = codes_of(m, codes, b);
            if (d == DECODE_FP8) {
                add_fp8(s, a, from, b, i, n_rows);
            } else {
                const vu u = half_words_bytes(from, i, 0);
                add_table(s, a, u & 0x0f0f0f0fu, b, f, &g[b], n_rows);
                add_table(s, a + 2 * n_rows, u >> 4 & 0x0f0f0f0fu, b, f, &g[b], n_rows);
            }
            __asm__ volatile("" : "+r"(from), "+r"(a));
        }
    }
}
#endif

ALWAYS_INLINE void add_first_pair(struct sums *s, const int b, const int v, const x_word *a, vu u,
                                  const struct decoder *f, const struct grid *g, const int n_rows,
                                  const enum decoding d, const int has_zeros)
{
    add_pair(s, b, v, a, u, 0, f, g, n_rows, d, has_zeros);
}
#endif

/* ---- runs and lanes ---- */

/* n_pairs, fewer than a unit has. */
ALWAYS_INLINE void add_rest(struct sums *s, const struct expand_product *m, const x_word *a,
                            const uint8_t *codes, int64_t n_pairs, const struct decoder *f,
                            const struct grid *g, const int n_rows, const int n_blocks,
                            const enum decoding d, const int has_zeros)
{
#pragma GCC unroll 8
    for (int b = 0; b < n_blocks; b++) {
#pragma GCC unroll 2
        for (int v = 0; v < BLOCK_VECTORS; v++) {
            vu u = load_codes(codes_of(m, codes, b) + v * VF_N * 4);
            for (int64_t p = 0; p < n_pairs; p++, u >>= bits_of(d))
                add_first_pair(s, b, v, a + p * PAIR_WORDS * n_rows, u, f, &g[b], n_rows, d,
                               has_zeros);
        }
    }
}

/* n_k of one group, from unit i of the lane's on. */
ALWAYS_INLINE void add_codes(struct sums *s, const struct expand_product *m,
                             const struct expansion *e, const x_word *a, int64_t n_k, int64_t i,
                             const struct decoder *f, const struct grid *g, const int n_rows,
                             const int n_blocks, const enum decoding d, const int has_zeros)
{
    const int n_pairs = pairs_of_unit(d);
    const uint8_t *codes = e->codes + i * e->unit_bytes;
    int64_t left = (n_k + 1) / 2; // pairs
    for (; left >= n_pairs; left -= n_pairs, codes += e->unit_bytes, i++) {
        fetch_ahead(m, codes, m->codes_left - i * e->unit_bytes, i, n_blocks,
                    fetching_of(n_rows, n_blocks, d));
        add_unit(s, m, a, codes, f, g, n_rows, n_blocks, d, has_zeros);
        a += n_pairs * PAIR_WORDS * n_rows;
    }
    if (left > 0)
        add_rest(s, m, a, codes, left, f, g, n_rows, n_blocks, d, has_zeros);
}

ALWAYS_INLINE void store(const struct sums *s, const struct expand_product *m, const int n_rows,
                         const int n_vectors)
{
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 8
        for (int i = 0; i < n_vectors; i++)
            vf_store(m->c + r * m->c_row + i * VF_N, s->of[r][i]);
    }
}

/* The end of a run of the `group`-th of the lane. */
ALWAYS_INLINE void add_scaled(const struct sums *s, const struct expand_product *m,
                              const struct expansion *e, int64_t group, float factor,
                              const int n_rows, const int n_blocks)
{
#pragma GCC unroll 8
    for (int i = 0; i < n_blocks * BLOCK_VECTORS; i++) {
        const float *scales = block_of(m, e, group, i / BLOCK_VECTORS).scales;
        vf scale = vf_load(scales + i % BLOCK_VECTORS * VF_N) * factor;
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; r++) {
            float *c = m->c + r * m->c_row + i * VF_N;
            vf_store(c, vf_fma(scale, s->of[r][i], vf_load(c)));
        }
    }
}

ALWAYS_INLINE void multiply_as(const struct expand_product *m, const struct expansion *e,
                               float factor, const int n_rows, const int n_blocks,
                               const enum decoding d, const int has_zeros)
{
    const int is_factored = d != DECODE_TABLE, n_vectors = n_blocks * BLOCK_VECTORS;
    const int64_t next = n_strips_of(n_blocks) * m->strip_bytes;
    const int waits = fetching_of(n_rows, n_blocks, d).waits_for_memory;
    const struct decoder f = decoder_of(e, d, has_zeros);
    const x_word *a = m->a;
    struct grid g[PRODUCT_BLOCKS_MAX];
    struct sums s;
    int64_t run = m->first_run, unit = 0;
    clear(&s, n_rows, n_vectors);
    if (is_factored)
        store(&s, m, n_rows, n_vectors);
    for (int64_t left = e->n_k, group = 0; left > 0; left -= run, run = m->run, group++) {
        run = run < left ? run : left;
#pragma GCC unroll 8
        for (int b = 0; b < n_blocks; b++) {
            const struct expansion at = block_of(m, e, group, b);
            grid_init(&g[b], &at, 0, d, has_zeros);
#if DOTS
            if (d == DECODE_TABLE)
                init_values(&g[b], &at);
#endif
            prefetch((const char *)at.scales + next, waits);
        }
        if (is_factored)
            clear(&s, n_rows, n_vectors);
#if CPU_MULTIPLY_FLUSHES
        const unsigned mode = _mm_getcsr();
        set_mode(&s, mode | MXCSR_FLUSH, n_rows, n_vectors);
#endif
        add_codes(&s, m, e, a, run, unit, &f, g, n_rows, n_blocks, d, has_zeros);
#if CPU_MULTIPLY_FLUSHES
        set_mode(&s, mode, n_rows, n_vectors); // the ends of runs do not
#endif
        if (is_factored) {
            __asm__ volatile("" ::: "memory"); // scales are loaded now, not kept until now
            add_scaled(&s, m, e, group, factor, n_rows, n_blocks);
        }
        unit += run / (2 * pairs_of_unit(d));
        a += run / 2 * PAIR_WORDS * n_rows;
    }
    if (!is_factored)
        store(&s, m, n_rows, n_vectors);
}

/* ---- choosing ---- */

/* Blocks that are left over go one by one. */
ALWAYS_INLINE void multiply_blocks(const struct expand_product *m, const struct expansion *e,
                                   float factor, const int n_rows, const int wide,
                                   const enum decoding d, const int has_zeros)
{
    for (int done = 0, n; done < m->n_blocks; done += n) {
        struct expand_product part = *m;
        struct expansion of = *e;
        begin_with(&part, &of, done);
        n = m->n_blocks - done >= wide ? wide : 1;
        if (n == wide)
            multiply_as(&part, &of, factor, n_rows, wide, d, has_zeros);
        else
            multiply_as(&part, &of, factor, n_rows, 1, d, has_zeros);
    }
}

typedef void (*product)(const struct expand_product *m, const struct expansion *e, float factor);

/* Products of a format with as many rows as the tile takes. A function each: compilers take longer
 * than linearly over large ones. */
#define PRODUCT(name, n_rows, d, has_zeros)                                                        \
    static __attribute__((noinline)) void name##_##n_rows(const struct expand_product *m,          \
                                                          const struct expansion *e, float factor) \
    {                                                                                              \
        multiply_blocks(m, e, factor, n_rows, product_blocks(n_rows), d, has_zeros);               \
    }
#define PRODUCTS_6(name, d, has_zeros)                                                             \
    PRODUCT(name, 1, d, has_zeros)                                                                 \
    PRODUCT(name, 2, d, has_zeros)                                                                 \
    PRODUCT(name, 3, d, has_zeros)                                                                 \
    PRODUCT(name, 4, d, has_zeros)                                                                 \
    PRODUCT(name, 5, d, has_zeros)                                                                 \
    PRODUCT(name, 6, d, has_zeros)
#define NAMES_6(name) name##_1, name##_2, name##_3, name##_4, name##_5, name##_6
#if VF_N == 16
#define PRODUCTS(name, d, has_zeros)                                                               \
    PRODUCTS_6(name, d, has_zeros)                                                                 \
    PRODUCT(name, 7, d, has_zeros)                                                                 \
    PRODUCT(name, 8, d, has_zeros)                                                                 \
    PRODUCT(name, 9, d, has_zeros)                                                                 \
    PRODUCT(name, 10, d, has_zeros)                                                                \
    PRODUCT(name, 11, d, has_zeros)                                                                \
    PRODUCT(name, 12, d, has_zeros)                                                                \
    static const product name[] = {NAMES_6(name), name##_7,  name##_8, name##_9,                   \
                                   name##_10,     name##_11, name##_12};
#else
#define PRODUCTS(name, d, has_zeros)                                                               \
    PRODUCTS_6(name, d, has_zeros)                                                                 \
    static const product name[] = {NAMES_6(name)};
#endif

PRODUCTS(int8_products, DECODE_INT8, 0)
PRODUCTS(int8_with_zeros, DECODE_INT8, 1)
PRODUCTS(fp8_products, DECODE_FP8, 0)
PRODUCTS(int4_products, DECODE_INT4, 0)
PRODUCTS(int4_with_zeros, DECODE_INT4, 1)
PRODUCTS(table_products, DECODE_TABLE, 0)

static void multiply(const struct expand_product *m, const struct expansion *e,
                     enum weight_format format)
{
    const int i = m->n_rows - 1;
    switch (format) {
    case WEIGHT_INT8_127:
        return int8_products[i](m, e, INT8_127_FACTOR);
    case WEIGHT_INT8:
        return (e->zeros ? int8_with_zeros : int8_products)[i](m, e, 1);
    case WEIGHT_FP8:
        return fp8_products[i](m, e, 1);
    case WEIGHT_INT4:
        return (e->zeros ? int4_with_zeros : int4_products)[i](m, e, 1);
    default:
        return table_products[i](m, e, 1);
    }
}

const struct cpu_multiply_ops CPU_MULTIPLY_OPS = {
    .strip_blocks = STRIP,
    .takes_bf16 = DOTS,
    .table_panels = DOTS ? 2 : 1,
    .product_blocks = product_blocks,
    .multiply = multiply,
};
