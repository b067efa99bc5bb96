/*
 * What the tests of the CUDA ops share: random values, device tensors made from them, and
 * comparison with the naive loops of tests/op/op_naive.h.
 *
 * A value that goes to a bfloat16 tensor is rounded first, so that the naive loop sees the same
 * numbers. Everything made here lives until case_clear().
 */
#ifndef INTERNVLD_TESTS_CUDA_OP_CASE_H
#define INTERNVLD_TESTS_CUDA_OP_CASE_H

#include "kernels/cuda_backend.h"

/* 1: a few cases that still reach every kernel, for the slow variants (--small). */
extern int case_small;

void case_seed(uint32_t seed);
int case_integer(int n);
/* Uniform in [-scale, scale), representable in t. Host memory. */
float *case_floats(int64_t n, float scale, enum dtype t);
/* The same values on the device, as float32. */
float *case_upload(struct backend *b, const float *host, int64_t n);
int32_t *case_upload_ids(struct backend *b, const int32_t *host, int64_t n);

/* Host values and the device tensor that holds them; rows `pad` elements further apart. */
struct case_matrix {
    float *host; // [m, n]
    struct tensor device;
};
struct case_matrix case_matrix_new(struct backend *b, enum dtype t, int64_t m, int64_t n, int pad);
/* Values of a device tensor, contiguous. */
float *case_download(struct backend *b, const struct tensor *t);
void case_compare(struct backend *b, const char *op, const struct tensor *got, const float *want,
                  double bound);
/* Bitwise, over the values of two device tensors of one shape and type. */
void case_same(struct backend *b, const struct tensor *x, const struct tensor *y, const char *what);
void case_clear(struct backend *b);
void case_report(void);

/* A linear to pack, with lanes that begin at multiples of eight, as a model's do. */
struct linear case_linear(int64_t n, int64_t k, int n_lanes, enum dtype dtype);

struct backend *case_open(enum dtype activation_dtype, int deterministic);

int cuda_matmul_tests(void);
int cuda_quantized_tests(void);
int cuda_fp8_tests(void);
int cuda_row_tests(void);
int cuda_attention_tests(void);
int cuda_all_reduce_tests(void);
int cuda_top_k_tests(void);
int cuda_draw_tests(void);

#endif
