/*
 * The way back: from the engine (pushes tokens) to one RPC (drains). Its mutex owns its state; two
 * references, one a side. The engine never blocks here; a slow reader makes deltas gather (they are
 * coalesced), bounded by max_tokens and the prompt's targets.
 *
 * Text is made here at push time, so that a stop string ends a candidate within the step that
 * completed it: each candidate has its detokenizer, and text that may be the beginning of a stop
 * string is held back.
 */
#ifndef INTERNVLD_ENGINE_STREAM_H
#define INTERNVLD_ENGINE_STREAM_H

#include <stdint.h>

#include "daemon/engine/request.h"
#include "daemon/processor/tokenizer.h"

#define STREAM_TENSOR_BYTES_MAX ((size_t)2 << 30)

/* Called by the engine thread, without the stream's mutex, when a drained stream has something
 * again. It must not block and must not call into the engine: the gateway only wakes its own thread
 * with it. */
typedef void (*stream_notify)(void *arg);

struct usage {
    int32_t prompt_tokens, image_tokens, completion_tokens, cached_tokens, tiles, cached_tiles;
};
struct timing {          // microseconds, all from arrival unless said otherwise
    uint64_t queue_us;   // waiting for its first step
    uint64_t media_us;   // decoding files
    uint64_t vision_us;  // tiles sent to features back
    uint64_t prefill_us; // first step to last prompt token
    uint64_t first_token_us, total_us;
    uint32_t preemptions;
};

/* What one drain hands over; arrays live until stream_delta_release(). */
struct candidate_delta {
    int32_t candidate;
    char *text; // NUL-terminated UTF-8, may be ""
    size_t n_text_bytes;
    int32_t *ids;
    int32_t n_ids; // 0 … : text may come without ids (held back text) and ids without text
    struct sample_result *logprobs; // [n_ids] when asked for, else NULL
    enum finish_reason finish;      // FINISH_NONE while it runs
    int32_t stop_token_id;          // of FINISH_STOP by a token; -1
    int32_t stop_string;            // index into the request's stop_strings; -1
    int32_t completion_tokens;      // so far
    float score;                    // of a result of beam search, where has_score
    int has_score;
};
struct stream_tensor { // Forward: one captured tensor, whole
    char name[CAPTURE_NAME_MAX];
    int32_t n_rows, n_cols; // vision tensors: rows of all tiles, tile after tile
    int32_t n_tiles;        // 0 for language tensors
    float *data;
};
struct stream_delta {
    struct candidate_delta *candidates;
    int n_candidates;
    int started;        // prompt accepted by the scheduler since the last drain
    int done;           // nothing will follow
    struct error error; // code ERROR_OK unless the request failed
    struct usage usage; // with done
    struct timing timing;
    struct stream_tensor *tensors; // with done, Forward
    int n_tensors;
    struct token_logprob *targets; // [n_targets] of each target in its order: itself, then the
    int32_t n_targets;             // request's n_target_top best; those since the last drain
};

/* Of a filled-in request (stop strings and flags are copied). One reference, meant for r->stream;
 * take the gateway's with stream_ref(). Without a tokenizer (NULL) there are ids but no text. */
struct stream *stream_new(const struct request *r, const struct tokenizer *t, stream_notify notify,
                          void *arg);
/* Before the first push: a candidate's tokens are news when n_tokens >= 1 of them have gathered;
 * its first one and its end always are. 1 unless set. */
void stream_set_interval(struct stream *s, int32_t n_tokens);
struct stream *stream_ref(struct stream *s);
void stream_unref(struct stream *s);
/* Sets the request's `cancelled` flag while there is a request, else nothing. Any thread with a
 * reference, at any time. engine_cancel() is what also wakes the engine. */
void stream_cancel(struct stream *s);
/* request_free() says that the request is gone. */
void stream_detach(struct stream *s);
/* After this returns notify is not running and is never called again: call it before freeing `arg`,
 * without any lock that notify takes. */
void stream_mute(struct stream *s);

/* Gateway side. Takes everything that has gathered; 0 when there are no news. */
int stream_drain(struct stream *s, struct stream_delta *out);
void stream_delta_release(struct stream_delta *d);

/* Engine side. stream_push() returns FINISH_STOP when a stop string was completed, else
 * FINISH_NONE; `is_end` says that the token ends the candidate (its text is not shown unless
 * include_stop_str). Of several stop strings the one that is complete first counts, of those the
 * longest; none counts before min_tokens (vLLM's rule: it must end past them). The caller then ends
 * the candidate with stream_finish_candidate(). */
void stream_push_started(struct stream *s);
enum finish_reason stream_push(struct stream *s, int32_t candidate,
                               const struct sample_result *token, int is_end);
/* Beam search: what the candidate's sequence is worth; before its finish. */
void stream_set_score(struct stream *s, int32_t candidate, float score);
void stream_finish_candidate(struct stream *s, int32_t candidate, enum finish_reason reason);
/* Writes rows of a named tensor (created at first sight, zeroed, n_rows_total rows); the same rows
 * may come twice (a prompt computed again). Past STREAM_TENSOR_BYTES_MAX of one stream they are
 * dropped and the request ends RESOURCE_EXHAUSTED. Rows out of range or of another width: BUG(). */
void stream_push_rows(struct stream *s, const char *name, int32_t n_tiles, int32_t first_row,
                      int32_t n_rows_total, int32_t n_rows, int32_t n_cols, const float *data);
/* Values [first, first + n) of the request's targets, counted from its first one's; ones that came
 * before (a prompt computed again) are left out, a gap is a BUG(). */
void stream_push_targets(struct stream *s, int32_t first, int32_t n,
                         const struct token_logprob *values);
/* The last call: error code ERROR_OK (or NULL) for success. Later pushes are ignored. */
void stream_finish(struct stream *s, const struct error *error, const struct usage *u,
                   const struct timing *t);

#endif
