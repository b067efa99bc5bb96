/*
 * The language model: one shard of one pipeline stage, over the tokens of one batch.
 *
 *     first stage   ids -> embedding rows, image rows replaced by features
 *     each layer    x += o_proj(attention(rope(norm(x) qkv)));  x += down(act(gate) * up)(norm(x))
 *     last stage    norm -> lm_head on the rows that need it -> target log-probabilities, samples
 *                   (nor does its last layer compute more of other rows than keys and values)
 *
 * Prefill and decode are this one path. Owns its weights, scratch and KV bytes; a step is a
 * function of (batch, weights, KV pages). The residual stream is float32 and whole on every shard,
 * as are the sums that are added to it and the logits; what products read has the back end's type.
 * the two row-parallel products end in an all-reduce that is the upper part of the lanes' tree, so
 * every T gives the same bits. Source: Transformers Qwen2Model, Qwen3Model, Qwen3MoeModel,
 * LlamaModel.
 */
#ifndef INTERNVLD_MODEL_LANGUAGE_H
#define INTERNVLD_MODEL_LANGUAGE_H

#include "daemon/model/capture.h"
#include "daemon/model/carve.h"
#include "daemon/model/config.h"
#include "daemon/model/draw.h"
#include "daemon/model/experts.h"
#include "daemon/model/kv_cache.h"
#include "daemon/model/model_comm.h"
#include "daemon/model/step_graphs.h"
#include "daemon/model/step_inputs.h"
#include "daemon/model/weights.h"
#include "kernels/backend.h"
#include "parallel/batch.h"

struct language_limits {
    int32_t max_tokens, max_sequences; // of one batch, which has no more samples than sequences
    int32_t max_model_len;             // tokens of one sequence
    int32_t page_size, n_pages;
    enum dtype kv_dtype; // of the pages
};

struct language_layer {
    float *input_norm, *post_norm;  // [dim]
    float *q_norm, *k_norm;         // [head_dim] or NULL
    struct linear qkv;              // [(heads + 2 * kv heads) * head_dim, dim] of this shard
    struct linear output;           // [dim, heads * head_dim], lanes
    struct linear gate_up;          // [2 * columns, dim]
    struct linear down;             // [dim, columns], lanes
    struct expert_layer experts;    // in place of gate_up and down where n_experts > 0
    float *output_bias, *down_bias; // [dim] or NULL: added once, after the all-reduce
    int32_t window;                 // tokens, 0: none
};

struct language_scratch { // void: of the back end's activation_dtype
    float *x;             // [max_tokens, dim] the residual stream
    void *normed;         // [max_tokens, dim]
    float *sum;           // [max_tokens, dim] what an all-reduce sums
    void *qkv;            // [max_tokens, (heads + 2 kv heads) * head_dim]
    void *attention;      // [max_tokens, heads * head_dim]
    void *gate_up;        // [max_tokens, 2 * columns]
    void *gated;          // [max_tokens, columns]
    struct expert_scratch experts;
    void *inputs;        // struct step_inputs of the largest step
    float *features;     // [max_tokens, dim]
    float *logits;       // [n_logit_rows, vocab.n] of this shard
    float *gathered;     // [T, n_logit_rows, vocab.n]; of one shard, its logits
    struct top_k *best;  // [n_logit_rows]
    struct drawn *drawn; // [max_sequences]
};

struct language_model {
    const struct text_config *config;
    struct backend *backend;
    struct model_comm *comm; // borrowed; NULL: alone
    struct language_limits limits;
    int stage, n_stages, shard, n_shards;
    struct range layer_range; // of the model's layers
    struct weight_cut cut;
    int32_t *kv_of_head; // [heads of this shard] local kv head

    struct tensor embedding;       // [vocab.n, dim] on the first stage
    struct linear embedding_codes; // the same instead, where it is quantised
    struct language_layer *layers; // [layer_range.n]
    float *final_norm;             // [dim] on the last stage
    struct linear lm_head;         // [vocab.n, dim] on the last stage; may be embedding_codes
    struct kv_cache kv;

    struct step_graphs graphs; // of the layers
    void *scratch_base;
    struct language_scratch scratch;
    size_t scratch_bytes, weight_bytes;

    /* Host memory of a step. */
    void *host_inputs;             // as scratch.inputs
    float *inv_freq, *grown_freq;  // [head_dim / 2] of short sequences; of one long one
    float rope_scale;              // of cos and sin
    float *host_logits;            // as scratch.gathered, which it is on the host
    struct top_k *host_best;       // [n_logit_rows]
    struct drawn *host_drawn;      // [max_sequences]
    uint8_t *is_drawn;             // [max_sequences] 1: the sample has its token
    struct token_logprob *targets; // [targets_capacity]
    int32_t targets_capacity;
    int32_t *sequence_of;          // [max_tokens]
    struct sample_result *samples; // [max_sequences]
    struct draw draw;
};

/* What a step gives; borrowed from the model until the next step (captures: from the caller). */
struct language_output {
    int32_t n_samples, n_targets;
    const struct sample_result *samples; // [n_samples] in the order of the batch's
    const struct token_logprob *targets; // [n_targets] as in step_result
};

/* Rows that lm_head takes at once. */
#define LANGUAGE_LOGIT_ROWS 64

/* Back-end scratch of one shard of a stage, on a back end with activations of `activation`. */
size_t language_scratch_bytes(const struct text_config *t, const struct weight_cut *cut,
                              int n_shards, int is_last, const struct language_limits *limits,
                              enum dtype activation);

/* Host memory of the same; `samples`: of the rank that draws the tokens, with n_threads;
 * `downloads`: the back end is not on the host. */
size_t language_host_bytes(const struct text_config *t, const struct weight_cut *cut, int n_shards,
                           int samples, int downloads, const struct language_limits *limits,
                           int n_threads);
/* The widest input of the shard's products, with as many rows as a step has tokens. */
int64_t language_widest_input(const struct text_config *t, const struct weight_cut *cut);

/* Binds this rank's part. Dies when T does not divide the heads (checked earlier by plan_make()).
 */
void language_init(struct language_model *m, const struct model_config *c, struct weights *w,
                   struct backend *b, enum dtype dtype, const struct topology *t,
                   struct model_comm *comm, const struct language_limits *limits);
void language_release(struct language_model *m); // accepts a zeroed struct
/* On a back end that replays: records the decode steps of a few sizes, which language_forward()
 * replays from then on, to the same bits; nothing where layers have experts. Collective over the
 * stage's shards, before the first step. */
void language_record(struct language_model *m);

/* One step. Collective over the stage's shards, and stage to stage. On shard 0 of the last stage
 * `out` holds samples and targets; captures are on shard 0 of the stage that has the tensor. A
 * batch past the limits is die(): peers are ours. */
void language_forward(struct language_model *m, const struct batch *batch,
                      struct language_output *out, struct capture_list *captures);

#endif
