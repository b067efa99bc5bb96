/*
 * Random quantised weights for the op tests of every back end, and the dense weight they stand for.
 */
#ifndef INTERNVLD_TESTS_OP_QUANTIZED_CASE_H
#define INTERNVLD_TESTS_OP_QUANTIZED_CASE_H

#include "kernels/backend.h"

struct quantized_shape {
    int m, n, k, n_lanes;
    int group_size, group_phase; // columns; 0: the whole row
};
extern const struct quantized_shape quantized_shapes[];
extern const int n_quantized_shapes;

enum { WITH_ZEROS = 1, WITH_ORDER = 2, QUANTIZED_VARIANTS = 4 };

/* 1 when the format can have what the variant asks for. */
int quantized_case_takes(enum weight_format f, int variant);
/* W [s->n, s->k]: codes of every value the format has, scales of both signs. `integer` draws from
 * [0, n). */
struct quantized quantized_case(const struct quantized_shape *s, enum weight_format f, int variant,
                                int (*integer)(int n));
/* What the shard that owns columns [start, start + n_columns) has of q, whose groups are in order;
 * the caller releases it; and the shard's linear: lanes [first, first + n_lanes) of l's. */
struct quantized quantized_case_columns(const struct quantized *q, int64_t start,
                                        int64_t n_columns);
struct linear quantized_case_lanes(const struct linear *l, int first, int n_lanes);
void quantized_case_release(struct quantized *q);
float *quantized_case_values(const struct quantized *q); // [out_dim, in_dim]; caller frees
/* y [m, out_dim] <- x W^T in a bfloat16 linear of l's lanes, as kernels/quantized.h defines it. */
void quantized_case_product(float *y, const struct tensor *x, const struct quantized *q,
                            const struct linear *l);
/* The same of integers whose groups are in order, with x rounded to int8. */
void quantized_case_integer_product(float *y, const struct tensor *x, const struct quantized *q,
                                    const struct linear *l);
/* 1 where such a lane sums runs of multiples. */
int quantized_case_is_factored(const struct quantized *q, const struct linear *l, int lane);

#endif
