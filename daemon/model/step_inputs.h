/*
 * What a step of the language model is given besides features, as one block: laid out alike on the
 * host, where it is filled, and in back-end memory, where ops read it, so that one upload brings
 * it.
 *
 * Pure. Where an array that layers read begins is a function of the numbers of tokens and sequences
 * alone: recorded steps of so many find theirs whatever the pages. Knows no model, owns no memory.
 */
#ifndef INTERNVLD_MODEL_STEP_INPUTS_H
#define INTERNVLD_MODEL_STEP_INPUTS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/backend.h"

struct step_size {
    int64_t n_tokens, n_sequences; // with the padding of recorded steps
    int64_t n_pages, n_samples;
    int64_t half; // head_dim / 2
};

struct step_inputs {
    int32_t *ids;                           // [n_tokens]
    float *cos, *sin;                       // [n_tokens, half]
    int32_t *feature_tokens, *feature_from; // [n_tokens] rows that are features, and of which
    int32_t *needed;           // [n_tokens] rows whose logits somebody wants, ascending
    float *temperature;        // [n_tokens] of each of these
    int32_t *query_start;      // [n_sequences + 1]
    int32_t *context_len;      // [n_sequences]
    int32_t *page_start;       // [n_sequences + 1]
    int32_t *pages;            // [n_pages]
    struct draw_params *draws; // [n_samples] of the batch
};

/* Points into `base`, or nowhere where that is NULL. Returns the bytes of the block, which are no
 * fewer for more of anything. */
size_t step_inputs_lay_out(struct step_inputs *in, void *base, const struct step_size *size);

#endif
