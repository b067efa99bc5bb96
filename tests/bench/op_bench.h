/*
 * What the files of op_bench share: the shapes of a model, one case, and how it is measured.
 */
#ifndef INTERNVLD_TESTS_BENCH_OP_BENCH_H
#define INTERNVLD_TESTS_BENCH_OP_BENCH_H

#include "kernels/backend.h"
#include "tests/bench/op_limits.h"

/* One language shard and one vision rank of a model. */
struct shapes {
    const char *model;
    int64_t dim, n_heads, n_kv_heads, head_dim, inner, vocab; // the shard's own
    int n_lanes;                                              // of its row-parallel products
    int64_t v_dim, v_heads, v_inner;
};

#define BENCH_LAYERS_MAX 80

struct bench {
    struct backend *b;
    struct limits limits;
    const struct shapes *shapes;
    int n_rounds, n_layers;
    const char *only_op, *only_format; // NULL: all
    int64_t only_rows;                 // of products; 0: all
    FILE *csv;                         // or NULL
};

struct op_case {
    const char *op, *what; // "matmul", "gate_up"
    const char *format;    // of the weight or of the pages; "float32" for what has neither
    int64_t rows;
    double flops, bytes; // of one call: operations; what has to cross the memory bus
    enum arithmetic arithmetic;
    void (*run)(void *arg);
    void *arg;
};

/* Whether --op and --format let this one be measured: asked before anything is made for it. */
int bench_wants(const struct bench *bench, const char *op, const char *format);
/* Rounds of the limits and the op in turn; prints a line, and one of CSV. */
void bench_measure(const struct bench *bench, const struct op_case *c);

/* Back-end memory of n_bytes that is no denormal anywhere, whatever type it is read as: floats and
 * bfloat16 of magnitude about 1 for `dtype`. The caller frees it with op_free(). */
void *bench_values(const struct bench *bench, enum dtype dtype, int64_t n);
struct tensor bench_matrix(const struct bench *bench, enum dtype dtype, int64_t m, int64_t n);

void bench_matmul(const struct bench *bench); // op_bench_matmul.c
void bench_others(const struct bench *bench); // op_bench_others.c

#endif
