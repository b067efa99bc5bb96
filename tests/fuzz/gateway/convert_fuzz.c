/*
 * Any request through conversion: no crash, and what is accepted keeps the promises the engine
 * builds on.
 */
#include <stdint.h>
#include <stdlib.h>

#include "daemon/engine/request.h"
#include "daemon/engine/stream.h"
#include "daemon/gateway/convert.h"
#include "daemon/gateway/wire_check.h"
#include "internvl/v1/internvl.pb-c.h"

#define MAX_ELEMENTS 4096
#define CONTEXT 256

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* Requests made here have no stream. */
void stream_detach(struct stream *s)
{
    (void)s;
    abort();
}

void stream_unref(struct stream *s)
{
    (void)s;
    abort();
}

static const struct model_config model = {
    .vision = {.hidden_size = 8,
               .n_layers = 2,
               .n_heads = 2,
               .image_height = 2,
               .image_width = 2,
               .patch_height = 1,
               .patch_width = 1,
               .n_channels = 1,
               .n_patches = 4,
               .use_mask_token = 1},
    .text = {.hidden_size = 8,
             .n_layers = 2,
             .n_heads = 2,
             .n_kv_heads = 1,
             .head_dim = 4,
             .vocab_size = 300},
    .image_token_id = 2,
    .downsample_k = 2,
    .n_features_per_tile = 1,
    .temperature = 1,
    .top_p = 1,
    .repetition_penalty = 1,
    .do_sample = 1,
};

static void require(int condition)
{
    if (!condition)
        abort();
}

static void check_request(const struct request *r)
{
    require(r->n >= 1 && r->n <= LIMIT_N);
    require(r->max_tokens >= 0 && r->n_ids + r->max_tokens <= CONTEXT);
    require(r->min_tokens >= 0 && r->min_tokens <= r->max_tokens);
    require(r->sampling.temperature >= 0 && r->sampling.top_p > 0 && r->sampling.top_p <= 1);
    require(r->sampling.n_logprobs >= -1 && r->sampling.n_logprobs <= TOP_LOGPROBS_MAX);
    for (int32_t i = 0; i < r->n_bias; i++)
        require(r->bias_ids[i] >= 0 && r->bias_ids[i] < model.text.vocab_size);
    for (int32_t i = 0; i < r->n_stop_token_ids; i++)
        require(r->stop_token_ids[i] >= 0 && r->stop_token_ids[i] < model.text.vocab_size);
    for (int32_t i = 0; i < r->n_stop_strings; i++)
        require(r->stop_strings[i].n_bytes > 0 && r->stop_strings[i].n_bytes <= LIMIT_STOP_BYTES);
    for (int32_t i = 0; r->targets && i < r->n_ids; i++)
        require(r->targets[i] >= -1 && r->targets[i] < model.text.vocab_size);
    require(r->n_target_top >= 0 && r->n_target_top <= TOP_LOGPROBS_MAX);
}

/* What an id stands for: nothing, or a byte. */
static int find_media(void *state, const char *id, enum part_kind kind, struct media_bytes *out,
                      struct error *err)
{
    (void)state;
    (void)kind;
    if (id[0] != 's')
        return error_set(err, ERROR_NOT_FOUND, "%s", id);
    *out = (struct media_bytes){(const uint8_t *)"x", 1};
    return 0;
}

static const struct media_source media = {find_media, NULL};

/* 1 when r has a prompt. A chat stands for ten tokens here: the processor has its own fuzz target.
 */
static int read_prompt(const struct convert *c, const Internvl__V1__Prompt *p, struct arena *a,
                       struct request *r, struct error *err)
{
    struct conversation conversation;

    if (p && p->input_case == INTERNVL__V1__PROMPT__INPUT_CHAT) {
        if (convert_conversation(p->chat, &media, a, &conversation, err))
            return 0;
        r->n_ids = 10;
        r->ids = arena_alloc(&r->arena, 10, sizeof(*r->ids));
        return r->ids != NULL;
    }
    return p && p->input_case == INTERNVL__V1__PROMPT__INPUT_TOKENS &&
           convert_token_prompt(c, p->tokens, r, err) == 0;
}

static void try_generate(const struct convert *c, const Internvl__V1__GenerateRequest *q,
                         struct arena *a)
{
    struct request *r = request_new(1 << 20);
    struct error err = {0};

    if (convert_request_id(q->request_id, r->id, &err) == 0 &&
        read_prompt(c, q->prompt, a, r, &err) && convert_sampling(c, q->sampling, r, &err) == 0)
        check_request(r);
    request_free(r);
}

static void try_forward(const struct convert *c, const Internvl__V1__ForwardRequest *q,
                        struct arena *a)
{
    struct request *r = request_new(1 << 20);
    struct error err = {0};
    uint32_t outputs;

    if (read_prompt(c, q->prompt, a, r, &err) && convert_forward(c, q, r, &outputs, &err) == 0)
        check_request(r);
    request_free(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct convert c = {.model = &model, .max_model_len = CONTEXT, .max_message_bytes = 1 << 20};
    struct arena a;
    struct error err = {0};
    ProtobufCMessage *m;

    if (n == 0)
        return 0;
    c.limits.max_tiles = 4;
    arena_init(&a, wire_budget_bytes(n));
    m = wire_unpack(data[0] & 1 ? &internvl__v1__forward_request__descriptor
                                : &internvl__v1__generate_request__descriptor,
                    data + 1, n - 1, MAX_ELEMENTS, &a, &err);
    if (m && data[0] & 1)
        try_forward(&c, (Internvl__V1__ForwardRequest *)m, &a);
    else if (m)
        try_generate(&c, (Internvl__V1__GenerateRequest *)m, &a);
    arena_release(&a);
    return 0;
}
