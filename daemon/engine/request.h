/*
 * What a client asked: immutable from the moment it is submitted. Owner: the rpc side until
 * engine_submit(), then the engine; freed by the engine's last reference. The one thing others may
 * touch is `cancelled`.
 */
#ifndef INTERNVLD_ENGINE_REQUEST_H
#define INTERNVLD_ENGINE_REQUEST_H

#include <stdatomic.h>
#include <stdint.h>

#include "daemon/engine/beam.h"
#include "daemon/engine/digest.h"
#include "kernels/arena.h"
#include "kernels/tensor.h"
#include "parallel/batch.h"

struct stream;

enum finish_reason {
    FINISH_NONE,
    FINISH_STOP,      // an end token, a stop token id, or a stop string
    FINISH_LENGTH,    // max_tokens, or the context is full
    FINISH_CANCELLED, // the client went away or cancelled
    FINISH_ERROR,     // see the stream's error (deadline, not finite, rank lost)
};

struct stop_string {
    const char *bytes;
    int n_bytes;
};

struct request {
    struct arena arena; // everything below points into it
    char id[65];
    int32_t *ids; // [n_ids] prompt
    int32_t n_ids;
    int32_t image_token_id; // the k-th such id of the prompt takes feature row k
    int32_t n_image_tokens;
    const float *inputs_embeds; // [n_ids, dim] in place of the embeddings of `ids`; NULL: none
    enum dtype pixel_dtype;     // U8 tiles, or F32 already normalised (Forward)
    const void *pixels;         // [n_tiles, channels, height, width]
    int32_t n_tiles, channels, height, width;
    int32_t n_features_per_tile; // of tiles of another size than the model's; -1: they are of that
    int32_t n_mask;              // patches of a tile, or 0
    const uint8_t *mask;         // [n_tiles, n_mask] bool_masked_pos of the vision tower
    struct digest *tile_digests; // [n_tiles] of pixels, shape, type, salt: by engine_submit()
    const char *cache_salt;      // pages and features are shared with those of the same; NULL: none

    struct sampling sampling;
    int32_t n;       // candidates
    int32_t n_beams; // above 1: beam search, whose n best are the candidates
    float length_penalty;
    enum early_stopping early_stopping;
    int32_t max_tokens, min_tokens;
    int ignore_eos;
    const int32_t *stop_token_ids;
    int32_t n_stop_token_ids;
    const struct stop_string *stop_strings;
    int32_t n_stop_strings;
    int include_stop_str;
    int skip_special_tokens;
    const int32_t *bias_ids; // logit_bias
    const float *bias_values;
    int32_t n_bias;

    /* Forward: nothing is generated (max_tokens 0); tensors are taken on the way */
    uint32_t captures, vision_captures;
    int want_image_features; // the engine pushes "image_features" [n_tiles * tokens a tile, dim],
                             // n_tiles tiles, to the stream
    const uint8_t *want_logits; // [n_ids], or NULL

    /* log-probabilities of given ids: of labels, of a continuation, of the prompt's own */
    const int32_t *targets; // [n_ids] as batch.targets, or NULL
    int32_t n_target_top;   // and of so many of the best at each of them

    int32_t priority;              // smaller first, then arrival
    uint64_t deadline_ns;          // CLOCK_MONOTONIC, 0: none
    uint64_t arrival_ns, media_ns; // when the RPC began; spent decoding media
    struct stream *stream;         // one reference
    atomic_int cancelled;
};

/* Tokens of the language model that one of its tiles becomes; of_model: a tile of the model's size.
 */
static inline int32_t request_features_per_tile(const struct request *r, int32_t of_model)
{
    return r->n_features_per_tile < 0 ? of_model : r->n_features_per_tile;
}

/* Its features depend on more than the pixels, or are not as many as a cache expects. */
static inline int request_has_odd_tiles(const struct request *r)
{
    return r->n_features_per_tile >= 0 || r->mask != NULL;
}

struct request *request_new(size_t arena_budget_bytes);
void request_free(struct request *r); // drops the stream reference too
/* What to say when an arena has no room within its budget: RESOURCE_EXHAUSTED, returns -1. */
int request_out_of_memory(struct error *err);

#endif
