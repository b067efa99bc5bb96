/*
 * A mixture-of-experts MLP of the language model: Transformers' Qwen3MoeSparseMoeBlock.
 *
 * A router picks n_experts_per_token experts for each token; each is a gated MLP whose intermediate
 * dimension the shards cut. A token's experts fill its slots, in order of expert number; the slots
 * are all-reduced as they are and only then weighted and added, so that the layout does not change
 * a bit. Owns its weights; scratch and communication are the caller's.
 */
#ifndef INTERNVLD_MODEL_EXPERTS_H
#define INTERNVLD_MODEL_EXPERTS_H

#include "daemon/model/carve.h"
#include "daemon/model/weights.h"
#include "kernels/backend.h"

struct expert_layer {
    int n_experts;          // 0: the layer is dense
    struct linear router;   // [n_experts, dim], on every shard
    struct linear *gate_up; // [n_experts] each [2 * columns, dim]
    struct linear *down;    // [n_experts] each [dim, columns], lanes
};

struct expert_scratch { // in back-end memory but for the host's part; n = max_tokens, k = per token
    float *router;      // [n, n_experts]
    void *in;           // [n, dim] rows of one expert; void: of the back end's activation_dtype
    float *out;         // [n, dim] of the same rows
    void *gate_up;      // [n, 2 * columns]
    void *gated;        // [n, columns]
    float *slots;       // [n * k, dim]
    int32_t *rows;      // [n]
    float *host_router; // [n, n_experts]
    float *host_slots;  // [n * k, dim]
    float *host_sum;    // [n, dim]
    float *weights;     // [n, k] of the chosen experts
    int32_t *chosen;    // [n, k] ascending
    int32_t *host_rows; // [2, n] token rows and slot rows of one expert
};

/* Adds to the back end's carve; nothing for a model without experts. */
void expert_scratch_lay_out(struct expert_scratch *s, struct carve *c, const struct text_config *t,
                            const struct weight_cut *cut, int64_t max_tokens,
                            enum dtype activation);
/* What expert_scratch_allocate_host() takes. */
size_t expert_scratch_host_bytes(const struct text_config *t, int64_t max_tokens);
void expert_scratch_allocate_host(struct expert_scratch *s, const struct text_config *t,
                                  int64_t max_tokens);
void expert_scratch_free_host(struct expert_scratch *s); // accepts a zeroed struct

/* prefix: "language_model.model.layers.N.". */
void expert_layer_bind(struct expert_layer *e, struct weights *w, struct backend *b,
                       enum dtype dtype, const char *prefix, const struct weight_cut *cut,
                       const struct text_config *t);
void expert_layer_release(struct expert_layer *e, struct backend *b);

/* Routes x [n, dim] and fills *slots [n * k, dim] with this shard's part of each chosen expert's
 * output. */
void experts_forward(const struct expert_layer *e, struct expert_scratch *s, struct backend *b,
                     const struct text_config *t, const struct tensor *x, struct tensor *slots);
/* y [n, dim] <- the weighted sum of each token's slots, in order of expert number. */
void experts_combine(struct expert_scratch *s, struct backend *b, const struct text_config *t,
                     const struct tensor *slots, struct tensor *y);

/* The k largest of softmax(logits [n]) (float32): ids ascending with their weights, which add up to
 * 1 when `normalise`. Lower ids win ties. */
void experts_choose(const float *logits, int n, int k, int normalise, int32_t *ids, float *weights);

#endif
