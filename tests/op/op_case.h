/*
 * What the op tests share: random values, the walk over instruction sets, comparison with a bound.
 */
#ifndef INTERNVLD_TESTS_OP_CASE_H
#define INTERNVLD_TESTS_OP_CASE_H

#include "kernels/backend.h"

extern const char *const op_isas[];
extern const int op_n_isas;

int op_case_has(const char *isa); // does this processor have it? Prints it when not
/* Opens the back end, or prints why not and returns NULL. */
struct backend *op_case_open(const char *isa, int n_threads);

void op_case_seed(uint32_t seed);
float op_case_random(void);                          // uniform in [-1, 1)
int op_case_integer(int n);                          // uniform in [0, n)
float *op_case_floats(int64_t n, float scale);       // caller frees
struct tensor op_case_matrix(int64_t m, int64_t n);  // random, contiguous; caller frees .data
struct tensor op_case_strided(int64_t m, int64_t n); // random, rows further apart than n

/* Not packed; n_lanes lanes of about equal, but mostly odd and different, lengths. */
struct linear op_case_linear(int64_t out_dim, int64_t in_dim, enum dtype dtype, int n_lanes);

/* Normalised mean square error of `got` [m, n] (any stride) against `want`, contiguous; fails past
 * `bound` and remembers the largest per op for op_case_report(). */
void op_case_compare(const char *op, const struct tensor *got, const float *want, double bound);
void op_case_same(const void *a, const void *b, size_t n_bytes, const char *what); // bitwise
void op_case_report(void); // prints one line an op and clears

/* op_matmul_gated() gives the bits of op_matmul() and op_gated_activation(), float32 and rounded,
 * on m random rows; l's packed rows are gate then up. */
void op_case_check_gated(struct backend *b, const struct linear *l, int64_t m);

/* test_*.c */
int op_matmul_tests(void);
int op_quantized_tests(void);
int op_integer_tests(void);
int op_attention_tests(void);
int op_row_tests(void);

#endif
