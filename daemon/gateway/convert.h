/*
 * Wire messages become what the processor and the engine take: conversations, sampling parameters,
 * struct request. Pure: no calls, no threads, no gRPC; every value of a client is checked here and
 * refused with one sentence that names the field, the value and the limit.
 *
 * Names and defaults are vLLM's (SamplingParams), with generation_config.json's values where it has
 * them; errors are INVALID_ARGUMENT unless said otherwise.
 */
#ifndef INTERNVLD_GATEWAY_CONVERT_H
#define INTERNVLD_GATEWAY_CONVERT_H

#include <stdint.h>

#include "daemon/engine/request.h"
#include "daemon/model/config.h"
#include "daemon/processor/processor.h"
#include "internvl/v1/internvl.pb-c.h"
#include "kernels/arena.h"
#include "kernels/error.h"

/* Bounds of one request, published by GetModel. */
#define LIMIT_N 16
#define LIMIT_STOP_STRINGS 16
#define LIMIT_STOP_BYTES 256
#define LIMIT_STOP_TOKEN_IDS 64
#define LIMIT_LOGIT_BIAS 1024
#define LIMIT_OUTPUTS 16
#define LIMIT_CONTINUATIONS 64
#define LIMIT_FORWARD_BYTES ((int64_t)2 << 30) // of all tensors of one Forward

/* What conversion must know; immutable, shared by all threads. */
struct convert {
    const struct model_config *model;
    struct processor_limits limits;
    int32_t max_model_len; // tokens
    int64_t max_message_bytes;
};

/* Where the bytes of a media_id are; find() is as media_store_pin(). */
struct media_source {
    int (*find)(void *state, const char *id, enum part_kind kind, struct media_bytes *out,
                struct error *err);
    void *state;
};

/* Names of ForwardRequest.outputs. */
enum output {
    OUTPUT_LOGITS = 1,
    OUTPUT_HIDDEN_STATES = 2,
    OUTPUT_INPUTS_EMBEDS = 4,
    OUTPUT_IMAGE_FEATURES = 8,
    OUTPUT_LAST_HIDDEN_STATE = 16,
    OUTPUT_PAST_KEY_VALUES = 32,
    OUTPUT_VISION_HIDDEN_STATES = 64,
    OUTPUT_VISION_LAYER0 = 128,
    OUTPUT_VISION_ATTENTIONS = 256,
    OUTPUT_PROJECTOR = 512,
    OUTPUT_LAST_TOKEN = 1024, // of Embed alone
    OUTPUT_MEAN = 2048,
    OUTPUT_TILE_MEAN = 4096,
    OUTPUT_IMAGE_MEAN = 8192,
    OUTPUT_ATTENTIONS = 16384,
    OUTPUT_VISION_LAST_HIDDEN_STATE = 32768,
    OUTPUT_VISION_POOLER = 65536,
};

/* Elements a message may have, and the memory one request may take. */
size_t convert_max_elements(const struct convert *c);
size_t convert_request_budget(const struct convert *c);

/* `wire` into id: at most 64 of [A-Za-z0-9._-]; an empty one is made up. */
int convert_request_id(const char *wire, char id[65], struct error *err);
/* GenerateRequest.cache_salt, copied into r's arena. */
int convert_cache_salt(const char *wire, struct request *r, struct error *err);
/* Arrays in `a`; texts and bytes are borrowed from `wire` and from `media`. */
int convert_conversation(const Internvl__V1__ChatPrompt *wire, const struct media_source *media,
                         struct arena *a, struct conversation *out, struct error *err);
/* A prompt of ids, with pixels or without: ids, pixels and their counts of `r`, in its arena. */
int convert_token_prompt(const struct convert *c, const Internvl__V1__TokenPrompt *wire,
                         struct request *r, struct error *err);
/* A prepared chat prompt: checks its length, fills the same fields (the arrays are taken over). */
int convert_prepared_prompt(const struct convert *c, const struct prompt *p, struct request *r,
                            struct error *err);
/* Sampling parameters of a request whose prompt is known; `wire` NULL: all defaults. A seed that is
 * not given is drawn from the system. */
int convert_sampling(const struct convert *c, const Internvl__V1__SamplingParams *wire,
                     struct request *r, struct error *err);
/* Outputs, labels and rows of a Forward whose prompt is known; *outputs gets enum output. Tensors
 * past LIMIT_FORWARD_BYTES: RESOURCE_EXHAUSTED. */
int convert_forward(const struct convert *c, const Internvl__V1__ForwardRequest *wire,
                    struct request *r, uint32_t *outputs, struct error *err);
/* targets of `r` from the labels of its prompt; none: NULL. */
int convert_labels(const struct convert *c, const int32_t *labels, size_t n_labels,
                   struct request *r, struct error *err);
/* The same for an Embed. */
int convert_embed(const struct convert *c, const Internvl__V1__EmbedRequest *wire,
                  struct request *r, uint32_t *outputs, struct error *err);

#endif
