/*
 * Weights in fewer bits: what a code means, and how a row of floats becomes codes.
 *
 * A quantised weight is codes, and a scale (and perhaps a zero point) for each group of columns of
 * a row. Its value is a float32, defined here once: quantized_value(). Back ends keep the codes
 * packed their own way. Pure: knows no back end, no file.
 *
 * What a product with one is:
 *   float32 linears    bit for bit the product with the dense weight of these values
 *   bfloat16 linears   the same with the values rounded to bfloat16; or, of the formats that
 *                      weight_format_is_factored(), nothing is rounded: a lane is cut where its
 *                      columns pass from one group to the next, each such run is the dense product
 *                      of x with the multiples, which bfloat16 has exactly, and
 *                      lane = fma(scale, run, lane), one run after the other, from 0. (INT8_127's
 *                      scale is scale * INT8_127_FACTOR.)
 * Which of the two a bfloat16 linear's lane gets depends on its columns and groups alone, never on
 * rows, ranks or instruction sets: on the CPU the second where groups follow each other in order
 * and each run but the last is whole units of 8 columns (codes of 4 bits) or 4 (of 8). CUDA always
 * rounds.
 *
 * With x_format (struct linear) x is rounded too. Those columns of a row of x that one sum takes, a
 * lane's or all, have one scale s:
 *   FP8    s = largest |x| / 448, at least 2^-126, and the codes nearest to x / s, ties to even, no
 *          larger than 448. The sum, of codes of x times codes of the weight in float32, is
 *          multiplied with s and with the weight's scale of the row.
 *   INT8   s = largest |x| / 127 and the whole numbers nearest to x / s, ties to even (s and all
 *          codes 0 where it is below 2^-126; s NaN where an x is not finite). A run of columns of
 *          one group is the whole number of codes of x times multiples of the weight, exact in 32
 *          bits; lane = fma(scale, run, lane), from 0, run after run; the sum is lane * s. Only of
 *          regular lanes of at most INT8_COLUMNS_MAX columns, which keeps sums of 255 * 127 exact.
 *
 * Sources: bitsandbytes (functional.py get_4bit_type, quantize_4bit of its default back end;
 * LLM.int8()), OCP 8-bit floating point E4M3.
 */
#ifndef INTERNVLD_KERNELS_QUANTIZED_H
#define INTERNVLD_KERNELS_QUANTIZED_H

#include <stdint.h>

enum weight_format {
    WEIGHT_FLOAT,    // not quantised
    WEIGHT_INT8,     // (int8 code - zero) * scale
    WEIGHT_INT8_127, // int8 code * scale * (1 / 127): bitsandbytes' LLM.int8()
    WEIGHT_FP8,      // E4M3 code * scale
    WEIGHT_INT4,     // (code 0 … 15 - zero 0 … 16) * scale; without zero points, 8
    WEIGHT_NF4,      // bitsandbytes' NormalFloat table[code] * scale
    WEIGHT_FP4,      // bitsandbytes' FP4 table[code] * scale
    WEIGHT_FORMAT_COUNT,
};

#define INT8_COLUMNS_MAX 65536

/* bitsandbytes' blocksize, over the flattened weight. */
#define BITSANDBYTES_GROUP 64

/* A multiplication where bitsandbytes multiplies (int8_vectorwise_dequant). */
#define INT8_127_FACTOR 7.874015718698502e-3f

/* A quantised weight on the host: W [out_dim, in_dim]. Column k of a row belongs to group
 * group_of[k], or (k + group_phase) / group_size where group_of is NULL. */
struct quantized {
    enum weight_format format;
    int64_t out_dim, in_dim, n_groups; // n_groups of one row
    int64_t group_size, group_phase;   // columns; a shard's first group may have begun before it
    const int32_t *group_of;           // [in_dim] or NULL
    uint8_t *codes;                    // [out_dim, in_dim], one a byte
    float *scales;                     // [out_dim, n_groups]
    int8_t *zeros;                     // [out_dim, n_groups] or NULL
};

const char *weight_format_name(enum weight_format f); // "int8", "nf4", …
int weight_format_bits(enum weight_format f);         // of one code: 4 or 8
/* 1 where every multiple is exact in bfloat16: all but NF4 and FP4. */
int weight_format_is_factored(enum weight_format f);
int weight_format_is_integer(enum weight_format f); // INT8, INT8_127 or INT4
/* The values [16] of the codes of a format of 4 bits, before zero point and scale. */
const float *weight_format_table(enum weight_format f, int has_zeros);

int64_t quantized_group(const struct quantized *q, int64_t k);
/* 1 where columns [first, end) are of one group, or of groups in order that begin at whole units of
 * 8 columns (codes of 4 bits) or 4 (of 8) from `first` on. */
int quantized_is_regular(const struct quantized *q, int64_t first, int64_t end);
/* W[n, k] before its scale. */
float quantized_multiple(const struct quantized *q, int64_t n, int64_t k);
/* W[n, k], rounded once or, with INT8_127, twice. */
float quantized_value(const struct quantized *q, int64_t n, int64_t k);

/* The scale and codes [n] of one group of floats w [n].
 *   INT8  scale = largest |w| / 127, code = w / scale to the nearest integer, ties to even
 *   FP8   scale = largest |w| / 448, code = the nearest to w / scale, ties to even
 *   INT4  scale = the w of largest magnitude / -8, so that all sixteen codes serve
 *   NF4, FP4  scale = largest |w|, code = the nearest of the table, the lower of two as near;
 *         `is_rest`: bitsandbytes divides where it multiplies by the reciprocal elsewhere, in the
 *         last, incomplete group of a weight. */
float quantize_group(enum weight_format f, const float *w, int64_t n, int is_rest, uint8_t *codes);

#endif
