/*
 * What this machine can do at most, measured beside the ops: how fast its memory is read, and how
 * many products its registers take, of floats and of whole numbers.
 *
 * The loops are written here, not borrowed from the kernels they judge: a plain read of a buffer
 * far larger than the caches, and multiply-adds on registers alone, on the team of threads that the
 * ops have. Knows nothing of ops and models.
 */
#ifndef INTERNVLD_TESTS_BENCH_OP_LIMITS_H
#define INTERNVLD_TESTS_BENCH_OP_LIMITS_H

#include "kernels/backend.h"

/* What is multiplied and added up. */
enum arithmetic {
    ARITHMETIC_F32,
    ARITHMETIC_BF16, // in float32
    ARITHMETIC_INT8, // in 32 bits
    ARITHMETIC_COUNT,
};

struct limits {
    struct backend *b; // borrowed
    const char *isa;
    float *memory; // the buffer that is read, a part a round
    int64_t n_bytes, at;
};

/* One round's figures. */
struct limits_rates {
    double bytes_per_s; // read from memory
    /* Operations, a multiply-add being two; of narrower factors never fewer than of float32. */
    double ops_per_s[ARITHMETIC_COUNT];
    uint64_t duration_ns; // that measuring took
};

/* `isa` as backend_cpu_open() takes it, but not "auto". */
void limits_open(struct limits *l, struct backend *b, const char *isa);
struct limits_rates limits_measure(struct limits *l);
void limits_close(struct limits *l);

#endif
