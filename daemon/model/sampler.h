/*
 * From one row of logits to one token.
 *
 * Pure C on host memory. What is drawn is a function of (logits, settings, seed, candidate,
 * position): one number of a counter-based generator (Philox4x32-10), so it does not depend on the
 * batch, the layout or what was drawn before.
 *
 * Order, as vLLM's Sampler (vllm/v1/sample/sampler.py): log-probabilities of the model's own
 * distribution; banned ids and logit_bias; repetition, frequency, presence penalties; greedy if
 * temperature is 0; temperature; min_p; top_k; top_p; draw.
 */
#ifndef INTERNVLD_MODEL_SAMPLER_H
#define INTERNVLD_MODEL_SAMPLER_H

#include <stdint.h>

#include "kernels/backend.h"
#include "parallel/batch.h"

struct sampler_candidate {
    double weight; // probability relative to the most likely token's
    int32_t id;
};

struct sampler { // scratch of one thread
    int32_t vocab_size;
    float *work;                          // [vocab_size]
    int32_t *counts;                      // [vocab_size] zeros between draws
    uint8_t *seen;                        // [vocab_size] zeros between draws
    struct sampler_candidate *candidates; // [vocab_size]
};

uint64_t sampler_bytes(int32_t vocab_size);
void sampler_init(struct sampler *s, int32_t vocab_size);
void sampler_release(struct sampler *s); // accepts a zeroed struct

/* Draws for `row` (or, with n_beam_best, ranks what beam search chooses from), whose history,
 * banned ids and biases are in `b` (ids outside the vocabulary are ignored). logits [vocab_size].
 */
void sampler_draw(struct sampler *s, struct sample_result *out, const float *logits,
                  const struct sample_row *row, const struct batch *b);

/* How op_draw() is to draw for `row` from the best of the place-th row of logits, found with its
 * temperature; .row is -1 where that cannot be, and only sampler_draw() can tell. The token is then
 * sampler_draw()'s, but for the last bits of sums that were added in another order. */
struct draw_params sampler_draw_params(const struct sample_row *row, int32_t place);
/* out <- what was drawn so, not DRAWN_TOO_FEW. `best` is read where the row wants the best too. */
void sampler_take(struct sample_result *out, const struct sample_row *row, const struct drawn *d,
                  const struct top_k *best);

/* out[0] is `id`, out[1 … k] are the k best of logits [n], k <= n; of the model's own distribution.
 * NaN, all of them, when a logit is NaN or infinite or `id` is outside the vocabulary. */
void sampler_score(struct token_logprob *out, int32_t k, const float *logits, int32_t n,
                   int32_t id);

/* log(sum(exp(logits))) in double; *finite 0 when a logit is NaN or infinite. */
double sampler_log_sum_exp(const float *logits, int32_t n, int *finite);

/* Uniform in [0, 1) with 53 bits: a pure function of its arguments. */
double sampler_uniform(uint64_t seed, uint32_t candidate, uint32_t position);

#endif
