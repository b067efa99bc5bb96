/*
 * libinternvl: the C client of internvld.
 *
 * A client is one connection (a gRPC channel, which reconnects by itself) and may be used by any
 * number of threads at once. A call either blocks (internvl_generate, internvl_forward, …) or is
 * started on a queue (internvl_queue_open, internvl_generate_start, internvl_queue_poll), which
 * belongs to one thread and carries any number of calls. There are no globals besides gRPC's own
 * reference count.
 *
 * Ownership: everything passed in is borrowed until the function returns (the request is serialised
 * before the first byte leaves). What a callback is shown lives until the callback returns. Results
 * are released by their _release function, which accepts a zeroed struct.
 *
 * Unset is never the same as 0: structs with optional fields have a `set` mask, so `= {0}` means
 * "the server's defaults" everywhere. Field meanings, units and defaults are those of
 * proto/internvl/v1/internvl.proto.
 */
#ifndef INTERNVL_CLIENT_H
#define INTERNVL_CLIENT_H

#include <stddef.h>
#include <stdint.h>

/* ---- errors ---- */

/* gRPC's status codes under their own numbers; the rest of the list is in gRPC's documentation. */
enum internvl_code {
    INTERNVL_OK = 0,
    INTERNVL_CANCELLED = 1,
    INTERNVL_UNKNOWN = 2,
    INTERNVL_INVALID_ARGUMENT = 3,
    INTERNVL_DEADLINE_EXCEEDED = 4,
    INTERNVL_NOT_FOUND = 5,
    INTERNVL_PERMISSION_DENIED = 7,
    INTERNVL_RESOURCE_EXHAUSTED = 8,
    INTERNVL_FAILED_PRECONDITION = 9,
    INTERNVL_OUT_OF_RANGE = 11,
    INTERNVL_UNIMPLEMENTED = 12,
    INTERNVL_INTERNAL = 13,
    INTERNVL_UNAVAILABLE = 14,
    INTERNVL_UNAUTHENTICATED = 16,
};

struct internvl_error {
    int code;      // enum internvl_code, or any other number that the server sent
    char msg[512]; // one sentence; "" when code is INTERNVL_OK
};

/* "UNAVAILABLE" and so on; "UNKNOWN" for a number that is none. Borrowed, for ever. */
const char *internvl_code_name(int code);

/* ---- connection ---- */

struct internvl_client;

struct internvl_options {
    const char *address;      // "host:port" or "unix:/path"
    const char *token;        // bearer token, or NULL
    size_t max_message_bytes; // of one received message; 0: 64 MiB
};

/* Never waits: the connection is made by the first call, and a server that is not there shows as
 * that call's UNAVAILABLE. NULL and INVALID_ARGUMENT for an empty address or a token with bytes
 * that no header may carry. */
struct internvl_client *internvl_connect(const struct internvl_options *o,
                                         struct internvl_error *err);
/* After every call and queue of the client has ended. NULL is accepted. */
void internvl_close(struct internvl_client *c);
const char *internvl_version(void);

/* A handle that ends calls from another thread. It may cover several calls, at once or one after
 * the other; once cancelled it stays so, and a call started with it ends CANCELLED at once. Free it
 * after the calls have ended. Not for signal handlers: wait for the signal in a thread. */
struct internvl_cancel;
struct internvl_cancel *internvl_cancel_new(void);
void internvl_cancel_free(struct internvl_cancel *c);
void internvl_cancel(struct internvl_cancel *c);

struct internvl_call_options { // NULL or {0}: no deadline, no handle
    int64_t timeout_ms;        // from the start of the call; 0: none
    struct internvl_cancel *cancel;
};

/* ---- prompts ---- */

enum internvl_tiling_field {
    INTERNVL_CROP_TO_PATCHES = 1 << 0,
    INTERNVL_MIN_PATCHES = 1 << 1,
    INTERNVL_MAX_PATCHES = 1 << 2,
    INTERNVL_USE_THUMBNAIL = 1 << 3,
};
struct internvl_tiling {
    uint32_t set; // of enum internvl_tiling_field
    int crop_to_patches;
    uint32_t min_patches, max_patches;
    int use_thumbnail;
};

enum internvl_video_field {
    INTERNVL_NUM_FRAMES = 1 << 0,
    INTERNVL_FPS = 1 << 1,
    INTERNVL_INITIAL_SHIFT = 1 << 2,
    INTERNVL_SAMPLE_FRAMES = 1 << 3,
};
struct internvl_video {
    uint32_t set; // of enum internvl_video_field
    uint32_t num_frames;
    double fps;
    double initial_shift;
    int sample_frames;
};

enum internvl_part_kind { INTERNVL_TEXT, INTERNVL_IMAGE, INTERNVL_VIDEO };
struct internvl_part {
    enum internvl_part_kind kind;
    const char *text; // INTERNVL_TEXT: UTF-8, NUL-terminated
    const void *data; // INTERNVL_IMAGE, INTERNVL_VIDEO: the file's bytes [n_bytes]
    size_t n_bytes;
    const char *media_id;         // instead of data: of internvl_upload_media(); NULL: none
    const struct internvl_frame { // INTERNVL_VIDEO instead of data: picture files [n_frames]
        const void *data;
        size_t n_bytes;
    } * frames;
    size_t n_frames;
    struct internvl_tiling tiling; // INTERNVL_IMAGE
    struct internvl_video video;   // INTERNVL_VIDEO
};

struct internvl_message {
    const char *role; // "system", "user" or "assistant"
    const struct internvl_part *parts;
    size_t n_parts;
};

/* Either messages, or (with n_messages 0) token ids as the processor would make them. */
struct internvl_prompt {
    const struct internvl_message *messages;
    size_t n_messages;
    int continue_final_message;
    const uint32_t *token_ids;
    size_t n_token_ids;
    const float *pixel_values; // normalised, shape pixel_shape; NULL: none
    uint64_t pixel_shape[4];   // n_tiles, channels, height, width
};

/* ---- generate ---- */

enum internvl_sampling_field {
    INTERNVL_TEMPERATURE = 1 << 0,
    INTERNVL_TOP_P = 1 << 1,
    INTERNVL_TOP_K = 1 << 2,
    INTERNVL_MIN_P = 1 << 3,
    INTERNVL_REPETITION_PENALTY = 1 << 4,
    INTERNVL_PRESENCE_PENALTY = 1 << 5,
    INTERNVL_FREQUENCY_PENALTY = 1 << 6,
    INTERNVL_SEED = 1 << 7,
    INTERNVL_N = 1 << 8,
    INTERNVL_MAX_TOKENS = 1 << 9,
    INTERNVL_MIN_TOKENS = 1 << 10,
    INTERNVL_SKIP_SPECIAL_TOKENS = 1 << 11,
    INTERNVL_LOGPROBS = 1 << 12,
    INTERNVL_NUM_BEAMS = 1 << 13,
    INTERNVL_LENGTH_PENALTY = 1 << 14,
    INTERNVL_PROMPT_LOGPROBS = 1 << 15,
};
enum internvl_early_stopping {
    INTERNVL_EARLY_STOPPING_FALSE = 0,
    INTERNVL_EARLY_STOPPING_TRUE = 1,
    INTERNVL_EARLY_STOPPING_NEVER = 2,
};
struct internvl_logit_bias {
    uint32_t token_id;
    float bias;
};
struct internvl_sampling {
    uint32_t set; // of enum internvl_sampling_field
    float temperature, top_p;
    uint32_t top_k;
    float min_p, repetition_penalty, presence_penalty, frequency_penalty;
    uint64_t seed;
    uint32_t n, max_tokens, min_tokens;
    int skip_special_tokens;
    uint32_t logprobs, prompt_logprobs;
    uint32_t num_beams; // above 1: beam search, see the .proto
    float length_penalty;
    uint32_t early_stopping; // of enum internvl_early_stopping
    int ignore_eos, include_stop_str_in_output;
    const char *const *stop; // [n_stop]
    size_t n_stop;
    const uint32_t *stop_token_ids; // [n_stop_token_ids]
    size_t n_stop_token_ids;
    const struct internvl_logit_bias *logit_bias; // [n_logit_bias]
    size_t n_logit_bias;
};

struct internvl_generate_request {
    const char *request_id; // NULL: made by the server
    struct internvl_prompt prompt;
    struct internvl_sampling sampling;
    int32_t priority;
    const char
        *cache_salt; // cached prompts and pictures are shared within it; NULL: the common ones
};

struct internvl_media_plan {
    uint32_t width, height, grid_columns, grid_rows;
    uint32_t tiles; // frames of a video
    uint32_t tokens;
};
struct internvl_usage {
    uint32_t prompt_tokens, image_tokens, completion_tokens, cached_tokens, tiles;
    uint32_t cached_tiles; // of tiles, those that were not encoded for this request
};
struct internvl_timing { // microseconds; see Timing in the .proto
    uint64_t queue_us, media_us, vision_us, prefill_us, first_token_us, total_us;
    uint32_t preemptions;
};

struct internvl_token_logprob {
    uint32_t token_id;
    float logprob;
    uint32_t rank;
    const uint8_t *token; // [n_token_bytes], need not be UTF-8
    size_t n_token_bytes;
};
struct internvl_position_logprobs {
    struct internvl_token_logprob chosen;
    const struct internvl_token_logprob *top; // [n_top]
    size_t n_top;
};

enum internvl_finish_reason {
    INTERNVL_FINISH_NONE = 0,
    INTERNVL_FINISH_STOP = 1,
    INTERNVL_FINISH_LENGTH = 2,
};
/* "stop", "length"; "" while running. Borrowed, for ever. */
const char *internvl_finish_name(enum internvl_finish_reason r);

/* INTERNVL_PROMPT are the prompt's log-probabilities, before the first delta. */
enum internvl_event_kind { INTERNVL_STARTED, INTERNVL_DELTA, INTERNVL_DONE, INTERNVL_PROMPT };
struct internvl_started {
    const char *request_id;
    uint32_t prompt_tokens, image_tokens;
    uint64_t seed;
    const struct internvl_media_plan *media; // [n_media]
    size_t n_media;
};
struct internvl_delta {
    uint32_t candidate;
    const char *text; // whole code points
    const uint32_t *token_ids;
    size_t n_token_ids;
    const struct internvl_position_logprobs *logprobs; // [n_logprobs]
    size_t n_logprobs;
    enum internvl_finish_reason finish_reason;
    const char *stop_string; // "": none
    int64_t stop_token_id;   // -1: none
    float score;             // of a sequence of beam search, where has_score
    int has_score;
};
struct internvl_prompt_logprobs { // of the prompt's tokens [first_position, + n_positions)
    uint32_t first_position;
    const struct internvl_position_logprobs *positions; // [n_positions]
    size_t n_positions;
};
struct internvl_done {
    struct internvl_usage usage;
    struct internvl_timing timing;
};
struct internvl_event {
    enum internvl_event_kind kind;
    union {
        struct internvl_started started;
        struct internvl_delta delta;
        struct internvl_done done;
        struct internvl_prompt_logprobs prompt;
    };
};

/* Called for every message of the stream, on the thread that runs the call. Non-zero ends the call
 * with CANCELLED. It may start other calls. */
typedef int (*internvl_on_event)(void *arg, const struct internvl_event *e);

/* Runs one generation to its end. 0, or -1 and `err` (which may be NULL). Any thread. */
int internvl_generate(struct internvl_client *c, const struct internvl_generate_request *r,
                      const struct internvl_call_options *o, internvl_on_event on_event, void *arg,
                      struct internvl_error *err);

/* ---- several calls from one thread ---- */

struct internvl_queue;
/* Called once, when the call is over; status->code is INTERNVL_OK when all went well. The call
 * counts as in flight until it returns; it may start the next. */
typedef void (*internvl_on_end)(void *arg, const struct internvl_error *status);

struct internvl_queue *internvl_queue_open(struct internvl_client *c);
/* Cancels what is in flight, runs its callbacks, frees. NULL is accepted. */
void internvl_queue_close(struct internvl_queue *q);
/* 0: the call is under way and on_end will be called, from internvl_queue_poll() alone. -1 and
 * `err`: it is not, and will not. */
int internvl_generate_start(struct internvl_queue *q, const struct internvl_generate_request *r,
                            const struct internvl_call_options *o, internvl_on_event on_event,
                            internvl_on_end on_end, void *arg, struct internvl_error *err);
/* Waits for at most timeout_ms (-1: no limit) until something has happened, runs callbacks for all
 * that has, and returns the number of calls still in flight (0: nothing to wait for). A stream is
 * read no faster than it is polled. */
int internvl_queue_poll(struct internvl_queue *q, int timeout_ms);

/* ---- forward ---- */

struct internvl_forward_request {
    const char *request_id;
    struct internvl_prompt prompt;
    const char *const *outputs; // [n_outputs] names as in the .proto
    size_t n_outputs;
    uint32_t logits_to_keep; // 0: all
    const uint32_t *logits_positions;
    size_t n_logits_positions;
    const int32_t *labels; // [n_labels] as many as prompt tokens, -100 is ignored; NULL: no loss
    size_t n_labels;
    const uint8_t *bool_masked_pos; // a byte for each patch of each tile, 1: masked; NULL: none
    size_t n_bool_masked_pos;
};

#define INTERNVL_MAX_DIMS 8
struct internvl_tensor {
    char *name;
    int n_dims;
    uint64_t shape[INTERNVL_MAX_DIMS];
    size_t n_elements;
    float *data; // [n_elements] row-major
};
struct internvl_forward_result {
    struct internvl_tensor *tensors; // [n_tensors]
    size_t n_tensors;
    int has_loss;
    double loss;
    float *token_logprobs; // [n_token_logprobs]
    size_t n_token_logprobs;
    uint32_t *token_ids; // [n_token_ids] the prompt as it was run
    size_t n_token_ids;
    struct internvl_usage usage;
    struct internvl_timing timing;
};
/* Gathers every tensor into memory. 0, or -1 and `err` (`out` is then zeroed). */
int internvl_forward(struct internvl_client *c, const struct internvl_forward_request *r,
                     const struct internvl_call_options *o, struct internvl_forward_result *out,
                     struct internvl_error *err);
void internvl_forward_result_release(struct internvl_forward_result *r);

/* ---- score, embed ---- */

struct internvl_continuation { // one of: text, token_ids
    const char *text;
    const uint32_t *token_ids; // [n_token_ids]
    size_t n_token_ids;
};
struct internvl_score_request {
    const char *request_id;
    struct internvl_prompt prompt;
    const struct internvl_continuation *continuations; // [n_continuations]
    size_t n_continuations;
    const int32_t *labels; // instead [n_labels]: as many as prompt tokens, -100 is ignored
    size_t n_labels;
};
struct internvl_score {
    uint32_t *token_ids;   // [n_tokens]
    float *token_logprobs; // [n_tokens]
    uint32_t *token_ranks; // [n_tokens] 1: the likeliest token there
    size_t n_tokens;
    double sum_logprob, mean_logprob;
    int is_greedy; // every rank is 1
};
struct internvl_score_result {
    struct internvl_score *scores; // [n_scores] in the order asked for
    size_t n_scores;
    int has_loss; // with labels
    double loss;
    struct internvl_usage usage;
    struct internvl_timing timing;
};
/* Log-probabilities of given continuations. 0, or -1 and `err` (`out` is then zeroed). */
int internvl_score(struct internvl_client *c, const struct internvl_score_request *r,
                   const struct internvl_call_options *o, struct internvl_score_result *out,
                   struct internvl_error *err);
void internvl_score_result_release(struct internvl_score_result *r);

struct internvl_embed_request {
    const char *request_id;
    struct internvl_prompt prompt;
    const char *const *outputs; // [n_outputs] names as in the .proto
    size_t n_outputs;
};
/* Features of pictures and text; the result is Forward's, without loss. */
int internvl_embed(struct internvl_client *c, const struct internvl_embed_request *r,
                   const struct internvl_call_options *o, struct internvl_forward_result *out,
                   struct internvl_error *err);

/* ---- tokens ---- */

/* One of: text (no template), prompt (through the template and the processor), token_ids. */
struct internvl_tokenize_request {
    const char *text;
    const struct internvl_prompt *prompt;
    const uint32_t *token_ids;
    size_t n_token_ids;
    int skip_special_tokens; // of the returned text
};
struct internvl_tokenize_result {
    uint32_t *token_ids; // [n_token_ids]
    size_t n_token_ids;
    char *text;
    struct internvl_bytes {
        uint8_t *data;
        size_t n_bytes;
    } * tokens; // [n_tokens] bytes of each token
    size_t n_tokens;
    struct internvl_media_plan *media; // [n_media]
    size_t n_media;
};
int internvl_tokenize(struct internvl_client *c, const struct internvl_tokenize_request *r,
                      const struct internvl_call_options *o, struct internvl_tokenize_result *out,
                      struct internvl_error *err);
void internvl_tokenize_result_release(struct internvl_tokenize_result *r);

/* ---- media that several requests use ---- */

struct internvl_upload {
    enum internvl_part_kind kind; // INTERNVL_IMAGE or INTERNVL_VIDEO
    const void *data;             // the file's bytes [n_bytes]
    size_t n_bytes;
    const char *sha256; // what the content must have, 64 hexadecimal digits; NULL: not compared
};
#define INTERNVL_MEDIA_ID_BYTES 128
struct internvl_upload_result {
    char media_id[INTERNVL_MEDIA_ID_BYTES]; // for internvl_part.media_id
    uint64_t n_bytes, ttl_seconds;          // since the last use
};
/* Leaves a picture or video with the server, in pieces. 0, or -1 and `err`: RESOURCE_EXHAUSTED when
 * it is larger than max_media_bytes or there is no room, FAILED_PRECONDITION when the server keeps
 * none, INVALID_ARGUMENT for another content. A later request with an id that is no longer known
 * ends NOT_FOUND. */
int internvl_upload_media(struct internvl_client *c, const struct internvl_upload *r,
                          const struct internvl_call_options *o, struct internvl_upload_result *out,
                          struct internvl_error *err);

/* ---- model and health ---- */

struct internvl_rank {
    uint32_t rank;
    char *role, *host, *device;
    uint64_t weight_bytes, kv_bytes, scratch_bytes, rss_bytes, load_ms;
};
struct internvl_limits {
    uint64_t max_message_bytes, max_image_pixels, max_forward_bytes, max_text_bytes,
        max_media_bytes;
    uint32_t max_media, max_tiles, max_frames, max_model_len, max_num_seqs, max_num_batched_tokens,
        max_queued_requests, max_n, max_logprobs, max_stop_strings, max_stop_token_ids,
        max_logit_bias, max_stop_string_bytes, max_continuations, max_num_beams, max_uploads;
};
struct internvl_load {
    uint32_t running, waiting, kv_pages_used, kv_pages;
    uint64_t uptime_ms;
};
struct internvl_model {
    char *name, *version, *architecture, *dtype, *quantization, *kv_cache_dtype;
    uint32_t vocab_size, text_layers, vision_layers, tile_height, tile_width, tokens_per_tile;
    uint32_t tensor_parallel_size, pipeline_parallel_size, vision_ranks, page_size;
    struct internvl_rank *ranks; // [n_ranks]
    size_t n_ranks;
    struct internvl_limits limits;
    struct internvl_load load;
};
int internvl_get_model(struct internvl_client *c, const struct internvl_call_options *o,
                       struct internvl_model *out, struct internvl_error *err);
void internvl_model_release(struct internvl_model *m);

/* grpc.health.v1's Check. */
enum internvl_health {
    INTERNVL_HEALTH_UNKNOWN = 0,
    INTERNVL_HEALTH_SERVING = 1,
    INTERNVL_HEALTH_NOT_SERVING = 2,
};
int internvl_check_health(struct internvl_client *c, const char *service,
                          const struct internvl_call_options *o, enum internvl_health *out,
                          struct internvl_error *err);

#endif
