/*
 * What differs between the processor's instruction sets: five small tables of inner loops.
 *
 * cpu_tile.c, cpu_expand.c, cpu_multiply.c, cpu_integer.c and cpu_vector.c are compiled once per
 * instruction set and export one table each; cpu_backend.c picks one of each. Everything above
 * (threads, layouts, pages, lanes) is written once over them. The bits of a result do not depend on
 * the table, with one exception: the products and roundings of AVX-512 BF16 flush denormals, on
 * whichever of its two tiles.
 */
#ifndef INTERNVLD_KERNELS_CPU_ISA_H
#define INTERNVLD_KERNELS_CPU_ISA_H

#include <stdint.h>

#include "kernels/backend.h"

#define LINE_BYTES 64     // of a cache
#define TILE_ROWS_MAX 12  // of any instruction set
#define TILE_ROWS_APART 4 // so few rows of `a` need not lie side by side
#define TILE_BLOCKS_MAX 4 // wide_blocks() of any
#define TILE_FLOATS_MAX (TILE_ROWS_MAX * 2 * 16)

/* Of x86's MXCSR: denormals are 0 as operands and as results, as vdpbf16ps has them. */
#define MXCSR_FLUSH 0x8040

/* How the columns of `b` are stored. */
enum tile_source {
    TILE_F32,        // b[k][16] float32
    TILE_F32_BF16,   // the same of a and b that bfloat16 holds: denormals are treated as its are
    TILE_BF16_PAIRS, // b[k / 2][16][2] bfloat16: rows k and k + 1 of a column lie together
    TILE_I8_PAIRS,   // b[k / 2][2][16] int8, which bfloat16 holds exactly
};

/*
 * c[r][j] = (accumulate ? c[r][j] : 0) + sum over k, in order, of a[k][r] * b[k][j], each step one
 * fused multiply-add in float32. Steps are in elements of their own array. Columns come in blocks
 * of 16. For the two sorts of pairs one step is a pair, the odd k added before the even one (the
 * order of vdpbf16ps), and `a` holds float32 (two rows of a_step a pair) or, where the table says
 * takes_bf16, pairs of bfloat16 as uint32_t.
 */
struct tile_part {
    const void *b;
    const void *ahead; // NULL, or what lies as b does and is fetched on the way
    int64_t n_k;
};

/* c[r][j] is summed run after run of steps, from 0, each run's own sum being added with its scale
 * in one fused multiply-add: that of block i is `factor` times the j-th of the 16 at scales + i *
 * scale_block, which those of the next run follow. */
struct tile_runs {
    int64_t first, n; // steps of the first run, of the others
    const float *scales;
    int64_t scale_block;
    float factor;
    unsigned mode; // 0, or MXCSR while scales are used
};

struct tile {
    const void *a; // row r of step k at k * a_step + r * a_row
    int64_t a_step;
    int64_t a_row; // 1 with more than TILE_ROWS_APART rows
    const void *b; // block i at b + i * b_block, or at blocks[i]; row k of it at k * b_step
    int64_t b_step, b_block;
    const void *const *blocks;       // NULL, or where each block begins
    const void *const *blocks_ahead; // NULL, or the same of what is fetched on the way
    const struct tile_part *parts;   // NULL, or what b and n_k are of each of n_parts, in order
    int n_parts;
    /* Each step also fetches two lines from `ahead` on, which moves by ahead_step bytes then (0:
     * nothing of use), or, where takes_bf16 and with more than TILE_ROWS_APART rows, a line of each
     * of two of blocks_ahead or of a part's `ahead`, as b's are read. */
    const char *ahead;
    int ahead_step;
    float *c; // [n_rows] rows of c_row
    int64_t c_row;
    int64_t n_k; // steps; pairs where b is pairs
    int accumulate;
    const struct tile_runs *runs; // NULL, or of TILE_BF16_PAIRS without parts; nothing accumulates
};

/* The i-th part of a tile's steps, or run, `done` steps having been before it. */
static inline struct tile_part tile_part_at(const struct tile *t, int i, int64_t done,
                                            size_t step_bytes)
{
    if (t->parts)
        return t->parts[i];
    int64_t n = !t->runs ? t->n_k : i == 0 ? t->runs->first : t->runs->n;
    return (struct tile_part){.b = (const char *)t->b + (size_t)done * step_bytes,
                              .n_k = n < t->n_k - done ? n : t->n_k - done};
}

struct cpu_tile_ops {
    int max_rows;                   // largest n_rows of run()
    int takes_bf16;                 // a of pairs is uint32_t pairs
    int products_a_unit;            // of cost (cpu_parallel()): multiply-adds in the time of one
    int (*wide_blocks)(int n_rows); // blocks that run() holds in registers at once
    void (*run)(const struct tile *t, int n_rows, int n_blocks, enum tile_source source);
};

/*
 * The weights of one block of sixteen columns of a quantised weight, k in order, in units of 64
 * bytes: sixteen words, one a column, its lower half having the codes of even k, the upper of odd.
 * A code of 8 bits is byte p of its half, one of 4 bits nibble p, lowest first, of pair p of the
 * unit. Integers of 8 bits are stored with 128 added. Their number of k is rounded up to whole
 * units.
 */
#define UNIT_BYTES 64

struct expansion {
    const uint8_t *codes;
    int64_t unit_bytes;      // from one unit to the next
    const float *scales;     // [n_groups][16]
    const int8_t *zeros;     // [n_groups][16] or NULL
    const float *table;      // [16] of NF4 and FP4
    const int32_t *group_of; // [n_k] or NULL: all k belong to the first group
    int64_t n_k;
};

/* What codes are expanded to. A missing odd k of a last pair is 0. */
enum expand_to {
    EXPAND_F32,       // quantized_value(): [n_k][16]
    EXPAND_BF16,      // the same rounded: [n_k / 2 rounded up][16][2]
    EXPAND_MULTIPLES, // quantized_multiple(), exact, as EXPAND_BF16 lies; without group_of
};

struct cpu_expand_ops {
    void (*run)(void *dst, const struct expansion *e, enum weight_format format, enum expand_to to);
};

/* c[r][j] <- one lane's sum over k of a[k][r] * w[k][j], in the order of TILE_BF16_PAIRS, for
 * blocks of sixteen columns: of the values rounded, or, where weight_format_is_factored(), of the
 * multiples of each run (kernels/quantized.h). The blocks are of one strip, or begin one. The
 * expansion is the first block's; it has no group_of, and its groups follow each other. Up to three
 * bytes past a strip's codes are read. */
#define PRODUCT_BLOCKS_MAX 4
struct expand_product {
    float *c; // [n_rows] rows of c_row
    int64_t c_row;
    const void *a;                   // [n_k or pairs][n_rows], as a tile's of TILE_BF16_PAIRS
    int n_rows, n_blocks;            // n_rows as the tile of the same instruction set takes them
    int64_t first_run, run;          // k of the first run and of those that follow: whole units
    int64_t scale_block, zero_block; // from one block's scales and zeros to the next one's
    int64_t strip_bytes, tail_bytes; // from one strip to the next, and of it after the codes
    int64_t codes_left;              // bytes from the lane's first codes of the strip to its last
    /* As a tile's, which moves once a unit; NULL: what will be read soon is fetched. */
    const char *ahead;
    int ahead_step;
    /* Of products of integers: what each run's sums begin with, and the scales of x. The first is
     * minus the total of the run's codes in `a`, times what stored codes of a column without zero
     * points have too much; with them, each column's zero point as stored is still to come in. */
    const int32_t *begins; // [n_runs][n_rows]
    const float *a_scales; // [n_rows]
};

struct cpu_multiply_ops {
    int strip_blocks;                  // whose codes lie side by side, a unit of each
    int takes_bf16;                    // a, as the tile's
    int table_panels;                  // of rows that are worth decoding NF4 and FP4 for, each
    int (*product_blocks)(int n_rows); // that multiply() takes at once
    void (*multiply)(const struct expand_product *m, const struct expansion *e,
                     enum weight_format format);
};

/*
 * Products of int8 codes of x with codes of 4 or 8 bits, in whole numbers (kernels/quantized.h,
 * x_format). `a` is, for each unit of the weight's codes, unit_words() words of each row, side by
 * side, as lay() makes them of a row's.
 */
struct cpu_integer_ops {
    int (*unit_words)(int bits); // of x, beside a unit of codes of so many bits
    /* words <- codes, of n_units units of `bits`; a multiple of sixteen codes is read, and as many
     * words are written as they fill. */
    void (*lay)(uint32_t *words, const int8_t *codes, int64_t n_units, int bits);
    int32_t (*total)(const int8_t *codes, int64_t n); // their sum
    int (*product_blocks)(int n_rows); // that multiply() takes at once
    void (*multiply)(const struct expand_product *m, const struct expansion *e,
                     enum weight_format format);
};

/* e^(score - m) is 2 to the power of both times log2(e), which is in the `scale` of scores here and
 * below, and so in m. */
#define LOG2_E 1.44269504f

/* One row's running softmax: m the largest score so far, l the sum of e^(score - m). */
struct softmax {
    float m, l;
};

/* How a product takes e^(score - m) as its left factor, key by key. */
enum columns_form {
    COLUMNS_F32,        // as they are
    COLUMNS_ROUNDED,    // rounded to bfloat16, still float32; the odd key of each pair first
    COLUMNS_BF16_PAIRS, // two keys a word
};

/*
 * A softmax that lies key by key: a key's scores of n queries, a multiple of 16, side by side, rows
 * of `row` words in every array. A missing odd key of a last pair has e^(score - m) 0.
 */
struct softmax_columns {
    const float *scores; // [n_keys] rows, of which the first is a multiple of 16
    int64_t n_keys, n, row;
    float scale;
    const float *m; // [n] the largest scaled score of each query
    float *sums;    // [16] rows: of each query's keys i % 16, added to
    void *p;        // <- e^(score - m): [n_keys] rows, or [n_keys / 2 rounded up]
    enum columns_form form;
};

/* y <- residual + scale * act(x + bias) * (up + up_bias), of rows of n columns. What is NULL is
 * left out. */
struct finish {
    void *y; // float32, or bfloat16 where `rounds`
    const float *x, *up, *residual;
    int64_t y_row, x_row, residual_row; // elements from one row to the next; x_row is up's, too
    int64_t n_rows, n;
    const float *bias, *up_bias, *scale; // [n]
    enum activation act;
    int rounds;
};

struct cpu_vector_ops {
    void (*finish)(const struct finish *f);
    void (*add)(float *y, const float *x, int64_t n);             // y += x
    void (*multiply)(float *y, float x, int64_t n);               // y *= x
    void (*divide)(float *y, const float *x, float d, int64_t n); // y = x / d
    void (*rms_norm)(float *y, const float *x, const float *weight, int64_t n, float eps);
    void (*layer_norm)(float *y, const float *x, const float *weight, const float *bias, int64_t n,
                       float eps);
    /* x1, x2 [n] <- x1 cos - x2 sin, x2 cos + x1 sin */
    void (*rotate)(float *x1, float *x2, const float *cos, const float *sin, int64_t n);
    /* Each row r takes in its scores [lo[r], hi[r]) times `scale` > 0 and replaces them by
     * e^(score - m); correction[r] is e^(old m - new m), what its older sums are to be multiplied
     * with (1 where lo = hi). Scores are read and written in whole blocks of 16; those of a row's
     * blocks that are outside its range become 0. n_rows <= TILE_ROWS_MAX. */
    void (*softmax_step)(float *scores, int64_t row_stride, int n_rows, const int64_t *lo,
                         const int64_t *hi, float scale, struct softmax *s, float *correction);
    /* The same by columns: largest[j] <- the larger of it and x[i][j], of n_rows rows of x_row
     * floats; e^(score - m) and its sixteen sums; their total, which is left in the first row. The
     * bits are those of softmax_step(). */
    void (*columns_largest)(float *largest, const float *x, int64_t x_row, int64_t n_rows,
                            int64_t n);
    void (*columns_exp)(const struct softmax_columns *c);
    void (*columns_total)(float *sums, int64_t row, int64_t n);
    void (*to_bf16)(uint16_t *dst, const float *src, int64_t n);
    /* dst[i] <- even[i] in the lower half, odd[i] (NULL: 0) in the upper one, rounded. */
    void (*pair_bf16)(uint32_t *dst, const float *even, const float *odd, int64_t n);
    void (*round_bf16)(float *dst, const float *src, int64_t n); // rounded, still float32
    /* The same, the odd one of each pair first; where n is odd it is 0. */
    void (*round_bf16_odd_first)(float *dst, const float *src, int64_t n);
    /* dst[j][r] <- src[r][j] for n_rows rows of n words of 4 bytes. */
    void (*transpose)(uint32_t *dst, int64_t dst_row, const uint32_t *src, int64_t src_row,
                      int64_t n_rows, int64_t n);
    void (*exp)(float *y, const float *x, int64_t n);
    void (*exp2_falling)(float *y, const float *x, int64_t n); // 2^x, each x at most 0 or a NaN
    void (*multiply_by)(float *x, const float *by, int64_t n); // x[i] *= by[i]
    /* The scale of a vector of int8 codes, n values of float32 or bfloat16, and codes of n >= 1 of
     * them, with zeros to whole sixteens: struct kv_pages. */
    float (*code_scale)(const void *x, enum dtype dtype, int64_t n);
    void (*codes)(int8_t *dst, const void *x, enum dtype dtype, int64_t n, float scale);
};

extern const struct cpu_tile_ops cpu_tile_scalar, cpu_tile_avx2, cpu_tile_avx512,
    cpu_tile_avx512bf16, cpu_tile_avx512bf16fma;
extern const struct cpu_expand_ops cpu_expand_scalar, cpu_expand_avx2, cpu_expand_avx512,
    cpu_expand_avx512bf16;
extern const struct cpu_multiply_ops cpu_multiply_avx2, cpu_multiply_avx512,
    cpu_multiply_avx512bf16, cpu_multiply_avx512bf16fma;
extern const struct cpu_integer_ops cpu_integer_scalar, cpu_integer_avx2, cpu_integer_avx512,
    cpu_integer_avx512vnni;
extern const struct cpu_vector_ops cpu_vector_scalar, cpu_vector_avx2, cpu_vector_avx512,
    cpu_vector_avx512bf16;

#endif
