/*
 * What a GPU can do at most, measured beside the models: how fast its memory is copied, and how
 * fast cuBLASLt multiplies large matrices, in bfloat16 and where the device has_fp8 in E4M3, when
 * it may choose how.
 *
 * Calls the CUDA libraries itself, not the kernels it judges. Knows nothing of ops and models.
 */
#ifndef INTERNVLD_TESTS_BENCH_GPU_LIMITS_H
#define INTERNVLD_TESTS_BENCH_GPU_LIMITS_H

#include "kernels/backend.h"

struct gpu_limits {
    struct backend *b; // borrowed; work goes on its stream
    size_t copy_bytes; // of each of `from` and `to`
    int64_t side;      // of the square matrices x, w and y
    void *from, *to, *x, *w, *y;
    void *workspace;
    struct gpu_product *bfloat16, *fp8; // cuBLASLt's descriptions of y = x w^T; fp8 or NULL
};

struct gpu_limits_rates {
    double bytes_per_s;     // read and written, together
    double flops_per_s;     // two a multiply-add
    double fp8_flops_per_s; // 0 without
};

/* On the CUDA back end `b`: buffers of copy_bytes, matrices [side, side]. Dies when the device has
 * no memory for them. */
void gpu_limits_open(struct gpu_limits *l, struct backend *b, size_t copy_bytes, int64_t side);
/* One round, a few milliseconds of each. */
struct gpu_limits_rates gpu_limits_measure(struct gpu_limits *l);
void gpu_limits_close(struct gpu_limits *l);

#endif
