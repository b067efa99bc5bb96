/*
 * One step: which sequences take part with which of their tokens, and the same as a struct batch.
 *
 * The scheduler decides the items; step_batch() only writes down what follows from them (ids,
 * positions, feature rows, pages, sample rows). A step is alive from scheduler_step() to
 * scheduler_update(); the batch's arrays belong to the builder and live until the next one is
 * built. Knows no policy.
 */
#ifndef INTERNVLD_ENGINE_STEP_H
#define INTERNVLD_ENGINE_STEP_H

#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/sequence.h"
#include "parallel/batch.h"

struct step_item {
    struct sequence *sequence;
    int32_t start, n_new; // tokens [start, start + n_new) of the sequence
    int32_t n_images;     // image tokens among them that take a feature row
    int32_t n_targets;    // log-probabilities of its targets and the best there, in the result
    int32_t first_sample, n_samples; // in the batch; more than one where candidates will fork
};

struct step {
    uint64_t step_id;        // 0: the slot is free
    struct step_item *items; // [n_items] index = sequence of the batch
    int32_t n_items, n_tokens, n_samples, n_copies;
    int32_t *copy_src, *copy_dst; // [n_copies] pages; each source is held until the step is back
    int has_captures;
    int32_t n_targets; // the sum of the items'
};

void step_init(struct step *p, int32_t max_items);
void step_release(struct step *p); // accepts a zeroed struct

/* Arrays of a struct batch that can be written, grown as needed and kept. */
struct batch_builder {
    int32_t max_tokens, max_sequences, feature_dim;
    const int32_t *eos_ids; // [n_eos] borrowed
    int32_t n_eos;
    int32_t *token_ids, *feature_rows, *targets;
    float *positions;
    uint8_t *want_logits, *target_tops;
    int32_t *query_start, *context_len, *rope_len, *page_start;
    uint32_t *captures;
    struct sample_row *samples;
    int32_t *pages, *history, *banned, *bias_ids;
    float *bias_values, *features;
    size_t pages_capacity, history_capacity, banned_capacity, bias_capacity, features_capacity;
    struct batch batch;
};

void batch_builder_init(struct batch_builder *b, int32_t max_tokens, int32_t max_sequences,
                        int32_t feature_dim, const int32_t *eos_ids, int32_t n_eos);
void batch_builder_release(struct batch_builder *b); // accepts a zeroed struct

/* The batch of `p`, whose items carry sequence, start and n_new; fills in n_images, first_sample,
 * n_samples and the sums. Borrowed until the next call. */
const struct batch *step_batch(struct step *p, struct batch_builder *b);

#endif
