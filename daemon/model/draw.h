/*
 * A step's logits to samples and targets, row by row, by the threads of the back end.
 *
 * A row is one thread's, and what it gives is a function of the row alone (sampler.h): which thread
 * takes it does not matter. Owns each thread's scratch; knows the batch, not the model.
 */
#ifndef INTERNVLD_MODEL_DRAW_H
#define INTERNVLD_MODEL_DRAW_H

#include "daemon/model/sampler.h"
#include "kernels/backend.h"
#include "parallel/batch.h"

#define DRAW_THREADS_MAX 8

/* Logits on the host as shards have them: the first `vocab` of n_shards * part columns count. */
struct logits {
    const float *data; // [n_shards, n, part]
    int n_shards;
    int32_t n;
    int64_t part;
    int32_t vocab;
};

struct drawer {
    struct sampler sampler;
    float *row; // [vocab]
};

struct draw {
    int32_t vocab;
    int n_drawers;
    struct drawer *drawers; // [n_drawers]
};

/* Of up to n_threads threads, at most DRAW_THREADS_MAX. */
uint64_t draw_bytes(int32_t vocab, int n_threads);
void draw_init(struct draw *d, int32_t vocab, int n_threads);
void draw_release(struct draw *d); // accepts a zeroed struct

/* Row j [vocab]: where it lies, or put together in `row` [vocab]. */
const float *logits_row(const struct logits *l, int32_t j, float *row);

/* The temperature for op_top_k() of a row of the batch: its first sample's, 1 where that is greedy.
 */
float draw_temperature(const struct batch *b, int32_t row);
/* Draws the samples of rows [n] of the batch that the best of their rows suffice for, found with
 * temperature [n]; marks them in `drawn` [n_samples of the batch]. Returns 1 when a sample or a
 * target of these rows asks for the whole row. */
int draw_from_best(const struct batch *b, const int32_t *rows, int32_t n, const struct top_k *best,
                   const float *temperature, int32_t vocab, struct sample_result *samples,
                   uint8_t *drawn);

/* How many token_logprobs the targets of these rows [n] of the batch give. */
int32_t draw_n_targets(const struct batch *b, const int32_t *rows, int32_t n);
/* Row j of `l` is row rows[j] of the batch: what it asks for goes to samples[i], for each sample i
 * of the batch in that row that is not yet drawn, and, in order of rows, to `targets`
 * [draw_n_targets()]. */
void draw_rows(struct draw *d, struct backend *backend, const struct batch *b, const int32_t *rows,
               const struct logits *l, const uint8_t *drawn, struct sample_result *samples,
               struct token_logprob *targets);

#endif
