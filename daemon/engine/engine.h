/*
 * The engine: one thread that owns the scheduler, the sequences, the page pool and the gateway's
 * end of control. Requests come in through a bounded queue and an eventfd; answers leave through
 * each request's stream.
 */
#ifndef INTERNVLD_ENGINE_ENGINE_H
#define INTERNVLD_ENGINE_ENGINE_H

#include <stdint.h>

#include "daemon/engine/observations.h"
#include "daemon/engine/request.h"
#include "daemon/engine/stream.h"
#include "kernels/error.h"
#include "parallel/control.h"
#include "parallel/topology.h"

struct engine;

struct engine_config {
    int32_t page_size;              // tokens
    int32_t n_pages;                // of the pool, the same on every language rank
    int32_t max_model_len;          // tokens of prompt and answer together
    int32_t max_num_seqs;           // sequences in one batch
    int32_t max_num_batched_tokens; // token budget of one batch
    int32_t max_queued_requests;    // waiting, not running
    int32_t n_batches_in_flight;    // pipeline stages
    int32_t max_vision_tiles;       // tiles of one message to a vision rank
    uint64_t vision_cache_bytes;    // of features of tiles that are kept; 0: none
    int32_t feature_dim;            // hidden size of the language model
    int32_t n_features_per_tile;
    int32_t rope_dynamic_from; // tokens; past it rope depends on the length ("dynamic"). 0: never
    const int32_t *eos_ids;    // borrowed for the engine's life
    int32_t n_eos;
    int enable_prefix_caching;
};

struct engine_stats { // a snapshot, taken under a lock
    int32_t n_running, n_waiting, n_pages_used, n_pages;
    uint64_t n_steps, n_finished, n_preempted, n_generated_tokens, n_prompt_tokens, n_tiles;
    uint64_t n_prefix_queries_tokens, n_prefix_hits_tokens; // prompt tokens looked up, found
    uint64_t n_vision_queries, n_vision_hits; // tiles looked up, that needed no encoding
};

/* Starts the thread. `on_lost` is called once, from it, when a rank is gone; right after it every
 * stream ends with UNAVAILABLE (the gateway lets replies leave and ends the job). */
struct engine *engine_open(const struct engine_config *c, const struct topology *t,
                           struct control *control, void (*on_lost)(void *arg, int rank),
                           void *arg);
/* Hands the request over (r->stream must be set). RESOURCE_EXHAUSTED at once when the queue is full
 * or the KV cache is too small for the prompt, INVALID_ARGUMENT when the prompt exceeds the context
 * or its image tokens do not fit its tiles, UNAVAILABLE while draining: then the request still
 * belongs to the caller. Any thread. */
int engine_submit(struct engine *e, struct request *r, struct error *err);
/* Sets the flag and wakes the engine: the slot is free within one step. Any thread; `r` must not
 * have been freed: call it only between submit and the stream's end (the stream keeps the request
 * alive until then). */
void engine_cancel(struct engine *e, struct stream *s);
void engine_stats(struct engine *e, struct engine_stats *out);
/* Both of one moment. `o` is initialised here, for the caller to release. Any thread. */
void engine_observe(struct engine *e, struct engine_stats *stats, struct observations *o);
/* No new requests; returns 1 when all have finished within timeout_ms, else ends the rest with
 * UNAVAILABLE and returns 0. Any thread but the engine's. */
int engine_drain(struct engine *e, int timeout_ms);
/* Ends what runs (UNAVAILABLE), waits for the batches in flight (10 s at most, not at all when a
 * rank was lost), sends CONTROL_STOP to every worker, ends the thread, frees. `control` stays open.
 */
void engine_close(struct engine *e);

#endif
