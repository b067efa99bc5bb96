/*
 * The step as plain data: what the gateway sends to workers and what they send back.
 *
 * Flat arrays, no pointers inside the packed form, packable by one function and printable by one
 * function. A worker's step is a function of (batch, weights, KV pages) and of nothing else.
 * *_pack() makes a message; *_unpack() makes a view whose arrays point into the message (which must
 * outlive it) after checking every count and index against the payload's size and each other: an
 * inconsistent message is die(), since peers are ours.
 */
#ifndef INTERNVLD_PARALLEL_BATCH_H
#define INTERNVLD_PARALLEL_BATCH_H

#include <stdint.h>
#include <stdio.h>

#include "kernels/tensor.h"
#include "parallel/control.h"

/* Captures of the language model, per sequence (Forward). */
enum capture {
    CAPTURE_EMBEDS = 1, // "inputs_embeds" [n, dim], after the scatter of features
    CAPTURE_HIDDEN_STATES =
        2, // "hidden_states.i" [n, dim], i = 0 … n_layers; the last one after the final norm
    CAPTURE_LOGITS = 4,             // "logits" [n, vocab_size], the rows whose `want_logits` is set
    CAPTURE_LAST_HIDDEN_STATE = 16, // of "hidden_states.i" the last one alone
    CAPTURE_CACHE = 8, // "cache.i.key" / ".value" [n_kv_heads * head_dim] a row, keys after rope
    CAPTURE_ATTENTIONS = 32, // "attentions.i" [heads * n, rope_len]: head by head, after softmax
};

/* How one token is drawn; vLLM's names. Plain data. */
struct sampling {
    float temperature;        // 0: greedy
    float top_p;              // 1: off
    int32_t top_k;            // 0: off
    float min_p;              // 0: off
    float repetition_penalty; // 1: off
    float presence_penalty;   // 0: off
    float frequency_penalty;  // 0: off
    uint64_t seed;
    int32_t n_logprobs;  // -1: none, 0: the chosen token only, k: and the k best
    int32_t n_beam_best; // 0, or beam search: nothing is drawn, `top` are the best by
                         // log-probability after bias, bans and penalties (of log-probabilities, as
                         // Transformers has it), which is what their `logprob` says
};

/* One row of the batch whose next token is drawn. */
struct sample_row {
    int32_t row;      // token row of the batch (the last new token of its sequence)
    int32_t sequence; // index in the batch
    struct sampling sampling;
    int32_t candidate; // index among a request's n: second word of the random counter
    int32_t position;  // of the token to be drawn, in generated tokens from 0: third word
    int32_t history_start, n_prompt,
        n_output; // into `history`: prompt then output ids; 0, 0, 0 without penalties
    int32_t banned_start,
        n_banned;               // into `banned`: ids with probability 0 in this step (min_tokens)
    int32_t bias_start, n_bias; // into bias_ids / bias_values (logit_bias)
};

struct batch {
    uint64_t step_id;
    int32_t n_sequences, n_tokens, n_pages, n_features, n_samples, n_history, n_banned, n_bias,
        n_copies;
    int32_t feature_dim;
    const int32_t *token_ids;    // [n_tokens]
    const float *positions;      // [n_tokens] rope positions (floats: V2PE)
    const int32_t *feature_rows; // [n_tokens] row of `features` that replaces the embedding, or -1
    const int32_t *targets; // [n_tokens] id whose log-probability after this row is wanted, or -1
    const uint8_t *target_tops; // [n_tokens] of a row with a target: and of so many of the best
    const uint8_t *want_logits; // [n_tokens] 1: the row's logits are captured (with CAPTURE_LOGITS)
    const int32_t *query_start; // [n_sequences + 1]
    const int32_t *context_len; // [n_sequences] tokens in the cache once this step's are written
    const int32_t
        *rope_len; // [n_sequences] length that "dynamic" rope scaling sees (max position + 1 of the
                   //   call in Transformers: the whole prompt in prefill, then growing)
    const uint32_t *captures;  // [n_sequences] of enum capture
    const int32_t *page_start; // [n_sequences + 1]
    const int32_t *pages;      // [n_pages]
    const int32_t *copy_src,
        *copy_dst; // [n_copies] pages copied before anything else (copy-on-write)
    const struct sample_row *samples; // [n_samples]
    const int32_t *history;           // [n_history]
    const int32_t *banned;            // [n_banned]
    const int32_t *bias_ids;          // [n_bias]
    const float *bias_values;         // [n_bias]
    const float *features; // [n_features, feature_dim]; only stage 0's message carries them
};

/* with_features 0 leaves them out (n_features and feature_dim still travel). */
struct message *batch_pack(const struct batch *b, int with_features);
void batch_unpack(struct batch *b, const struct message *m);
void batch_print(FILE *f, const struct batch *b);

#define TOP_LOGPROBS_MAX 20
struct token_logprob {
    int32_t id;
    float logprob; // natural log, of the model's own distribution (before temperature, penalties
                   // and filters)
    int32_t rank;  // 1 = most likely
};
struct sample_result {
    int32_t sequence;
    int32_t not_finite; // 1: the logits held a NaN or infinity; token is then meaningless
    struct token_logprob token;
    int32_t n_top;
    struct token_logprob top[TOP_LOGPROBS_MAX];
};

/* A named tensor taken on the way: rows [first_row, first_row + n_rows) of one sequence (or tile).
 * float32. */
#define CAPTURE_NAME_MAX 48
struct captured {
    char name[CAPTURE_NAME_MAX];
    int32_t owner;     // index of the sequence in the batch, or of the tile in the tile batch
    int32_t first_row; // row within the sequence's new tokens
    int32_t n_rows, n_cols;
    const float *data; // [n_rows, n_cols]
};

struct step_result {
    uint64_t step_id;
    int32_t stage;
    int32_t n_samples, n_targets, n_captured;
    uint64_t compute_ns, wait_ns;        // of this worker's step; wait_ns inside collectives
    const struct sample_result *samples; // [n_samples]
    /* [n_targets] of each row with a target, in their order: the target, then its target_tops best;
     * NaN where a logit is not finite */
    const struct token_logprob *targets;
    const struct captured
        *captured; // [n_captured] after unpack: allocated, freed by step_result_release()
};
struct message *step_result_pack(const struct step_result *r);
void step_result_unpack(struct step_result *r, const struct message *m);
void step_result_release(struct step_result *r);

/* Captures of the vision stage, per job (Forward). */
enum vision_capture {
    VISION_CAPTURE_HIDDEN_STATES =
        1, // "vision.hidden_states.i" i = 0 … n_layers, "vision.last_hidden_state"
    VISION_CAPTURE_LAYER0 =
        2, // "vision.embed.patches", "vision.layer0.{layernorm_before,q_proj,k_proj,v_proj,
           //   q_norm,k_norm,attention_output}"
    VISION_CAPTURE_PROJECTOR = 4,  // "projector.{selected,pixel_shuffled,layer_norm,linear_1}"
    VISION_CAPTURE_ATTENTIONS = 8, // "vision.attentions.i" rows = heads * T, cols = T
    VISION_CAPTURE_LAST = 16,      // "vision.last_hidden_state" alone
};
struct tile_batch {
    uint64_t job_id;
    int32_t n_tiles, channels, height, width; // pixels
    enum dtype dtype;    // U8 (normalised on the vision rank) or F32 (already normalised)
    uint32_t captures;   // of enum vision_capture
    const void *pixels;  // [n_tiles, channels, height, width]
    int32_t n_mask;      // 0, or the patches of a tile
    const uint8_t *mask; // [n_tiles, n_mask] 1: the patch gives way to the mask token
};
/* Of tiles [channels, height, width], and masks [n_mask] where there are any, that need not lie
 * together; t->pixels and t->mask are what tile_batch_unpack() sets, and are ignored here. */
struct message *tile_batch_pack(const struct tile_batch *t, const void *const *pixels,
                                const uint8_t *const *masks);
void tile_batch_unpack(struct tile_batch *t, const struct message *m);

struct feature_result {
    uint64_t job_id;
    int32_t n_tiles, n_tokens_per_tile, dim;
    int32_t n_captured;
    uint64_t compute_ns;
    const uint8_t *not_finite;       // [n_tiles] 1: one of the tile's features is NaN or infinite
    const float *features;           // [n_tiles * n_tokens_per_tile, dim]
    const struct captured *captured; // as in step_result
};
struct message *feature_result_pack(const struct feature_result *r);
void feature_result_unpack(struct feature_result *r, const struct message *m);
void feature_result_release(struct feature_result *r);

/* What a worker says when its weights are loaded. */
struct rank_info {
    int32_t rank;
    char host[64], device[96]; // device: backend describe()
    uint64_t weight_bytes, kv_bytes, scratch_bytes, rss_bytes, load_ms;
};
struct message *rank_info_pack(const struct rank_info *r);
void rank_info_unpack(struct rank_info *r, const struct message *m);

#endif
