/*
 * A step's logits to samples and targets, row by row: by op_draw() where the back end has it and
 * the best of the row suffice, else by the threads of the back end from the whole row.
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

/* For op_top_k() and op_draw() over rows [n] of the batch, ascending, which are all that it draws
 * from: temperature [n] of each row's first sample, 1 where that is greedy; params [n_samples of
 * the batch], .row the place in `rows`, or -1 where the whole row is needed. */
void draw_prepare(const struct batch *b, const int32_t *rows, int32_t n, float *temperature,
                  struct draw_params *params);
/* What the samples of rows [n], a run of those, want of the device. */
enum draw_wish {
    DRAW_NOTHING,
    DRAW_TOKENS,
    DRAW_TOKENS_AND_BEST, // for n_logprobs
};
enum draw_wish draw_wants(const struct batch *b, const int32_t *rows, int32_t n,
                          const struct draw_params *params);
/* Takes what op_draw() gave for the samples of rows [n], a run of those that begins with the
 * first-th, and their best [n] where draw_wants() them; marks in is_drawn [n_samples of the batch]
 * who has a token. */
void draw_take(const struct batch *b, const int32_t *rows, int32_t first, int32_t n,
               const struct draw_params *params, const struct drawn *drawn,
               const struct top_k *best, struct sample_result *samples, uint8_t *is_drawn);
/* 1 when a target of this row, or a sample of it without a token yet, asks for all of it. */
int draw_wants_row(const struct batch *b, int32_t row, const uint8_t *is_drawn);

/* How many token_logprobs the targets of these rows [n] of the batch give. */
int32_t draw_n_targets(const struct batch *b, const int32_t *rows, int32_t n);
/* Row j of `l` is row rows[j] of the batch: what it asks for goes to samples[i], for each sample i
 * of the batch in that row that is not yet drawn, and, in order of rows, to `targets`
 * [draw_n_targets()]. */
void draw_rows(struct draw *d, struct backend *backend, const struct batch *b, const int32_t *rows,
               const struct logits *l, const uint8_t *is_drawn, struct sample_result *samples,
               struct token_logprob *targets);

#endif
