/*
 * Attention probabilities on the host, for those who ask to see them (Forward's "attentions").
 *
 * The kernels never write probabilities down. Here they are computed a second time, from the
 * queries of a step and the keys in the cache, away from the hot path. Knows one head of one
 * sequence, and neither shards nor the batch.
 */
#ifndef INTERNVLD_MODEL_ATTENTION_PROBS_H
#define INTERNVLD_MODEL_ATTENTION_PROBS_H

#include "kernels/backend.h"

/* probs [n, n_cols] (host) <- softmax(q k^T / sqrt(head_dim)) of the last n of context_len
 * positions, 0 at keys that a query does not see; context_len <= n_cols. q [n, head_dim] float32
 * after rope, kv and its `pages` (host array, in position order) with this step's keys written: in
 * back-end memory. window as op_paged_attention's. Source: eager_attention_forward of Transformers'
 * modeling_qwen2.py. */
void attention_probs(float *probs, int32_t n_cols, struct backend *b, const struct tensor *q,
                     const struct kv_pages *kv, const int32_t *pages, int32_t kv_head,
                     int32_t context_len, int32_t window);

#endif
