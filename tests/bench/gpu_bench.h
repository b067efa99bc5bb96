/*
 * What the files of gpu_bench share: what is measured, one case, and the formats of weights.
 */
#ifndef INTERNVLD_TESTS_BENCH_GPU_BENCH_H
#define INTERNVLD_TESTS_BENCH_GPU_BENCH_H

#include <stdio.h>

#include "daemon/model/config.h"
#include "tests/bench/gpu_limits.h"

/* What weights are measured in, one after the other: as loaded, then as codes. */
struct gpu_format {
    const char *name;
    struct quantization quantization;
};
extern const struct gpu_format gpu_formats[];
extern const int n_gpu_formats;

struct gpu_bench {
    struct backend *b;
    struct gpu_limits limits;
    const char *device; // its name
    const char *dir;    // of the model's config.json
    struct model_config config;
    int n_shards, n_rounds, is_small;
    const char *only_part, *only_format; // NULL: all
    FILE *csv;                           // or NULL
};

struct gpu_case {
    const char *part, *what, *format; // "language", "decode", "int4"
    int64_t n, context;               // sequences and tokens of each; or new tokens; or tiles
    int n_layers;
    /* Of one run: float operations, those of products in FP8 apart; what has to cross the memory
     * bus. */
    double flops, fp8_flops, bytes;
    void (*run)(void *arg);
    void *arg;
};

/* Rounds of the limits and the case in turn; prints a line, and one of CSV. */
void gpu_bench_measure(struct gpu_bench *bench, const struct gpu_case *c);
/* Whether --format and the device let this one be measured. */
int gpu_bench_wants(const struct gpu_bench *bench, const struct gpu_format *f);

/* Adds one product with `rows` rows to the case: its operations, and its weight's bytes. */
void gpu_case_add(struct gpu_case *c, const struct linear *l, int64_t rows);

/* Holds `l`, whose values are given up, in the codes that `f` has for such a weight: random ones,
 * none of them a NaN. Nothing happens where it has none. */
void gpu_codes_hold(struct backend *b, struct linear *l, const struct gpu_format *f,
                    enum weight_kind kind);

void gpu_bench_language(struct gpu_bench *bench); // gpu_bench_language.c
void gpu_bench_vision(struct gpu_bench *bench);   // gpu_bench_vision.c

#endif
