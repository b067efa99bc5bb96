/*
 * Tokenize: text to ids, a conversation to ids, ids to text. On a processor thread, like all that
 * reads text of a client.
 */
#include <stdlib.h>
#include <string.h>

#include "daemon/gateway/gateway_state.h"
#include "daemon/gateway/reply.h"
#include "kernels/log.h"

struct tokenize_job {
    struct gateway *gateway;
    struct rpc_call *call;
};

struct tokens { // what an answer is made of, in one arena
    const int32_t *ids;
    int64_t n_ids;
    const char *text; // NULL: the ids decoded
    const struct media_plan *media;
    int n_media;
};

static int tokenize_text(struct gateway *g, const char *text, struct arena *a, struct tokens *out,
                         struct error *err)
{
    int32_t *ids = NULL;

    if (tokenizer_encode(processor_tokenizer(g->processor), text, strlen(text),
                         g->convert.limits.max_prompt_tokens, a, &ids, &out->n_ids, err))
        return -1;
    out->ids = ids;
    return 0;
}

static int tokenize_chat(struct gateway *g, const Internvl__V1__ChatPrompt *wire, struct arena *a,
                         struct tokens *out, struct error *err)
{
    struct conversation conversation;
    struct media_pins pins;
    struct prompt prompt = {0};
    size_t n_bytes;

    if (conversation_read(g, wire, a, &pins, &conversation, err) == 0 &&
        processor_prepare(g->processor, &conversation, a, &prompt, err) == 0)
        out->text = processor_render(g->processor, &conversation, a, &n_bytes, err);
    media_pins_release(&pins);
    out->ids = prompt.ids;
    out->n_ids = prompt.n_ids;
    out->media = prompt.media;
    out->n_media = prompt.n_media;
    return out->text ? 0 : -1;
}

static int take_ids(struct gateway *g, const Internvl__V1__TokenIds *wire, struct arena *a,
                    struct tokens *out, struct error *err)
{
    int64_t n = (int64_t)wire->n_ids;
    int64_t vocab_size = g->model->text.vocab_size;
    int32_t *ids;

    if (n > g->convert.limits.max_prompt_tokens)
        return error_set(err, ERROR_INVALID_ARGUMENT, "token_ids has %lld ids; the limit is %lld",
                         (long long)n, (long long)g->convert.limits.max_prompt_tokens);
    ids = arena_alloc(a, wire->n_ids, sizeof(*ids));
    if (!ids)
        return request_out_of_memory(err);
    for (int64_t i = 0; i < n; i++) {
        if (wire->ids[i] >= vocab_size)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "token_ids[%lld] is %u; the vocabulary has %lld ids", (long long)i,
                             wire->ids[i], (long long)vocab_size);
        ids[i] = (int32_t)wire->ids[i];
    }
    out->ids = ids;
    out->n_ids = n;
    return 0;
}

static int tokenize_read(struct gateway *g, const Internvl__V1__TokenizeRequest *wire,
                         struct arena *a, struct tokens *out, struct error *err)
{
    switch (wire->input_case) {
    case INTERNVL__V1__TOKENIZE_REQUEST__INPUT_TEXT:
        return tokenize_text(g, wire->text, a, out, err);
    case INTERNVL__V1__TOKENIZE_REQUEST__INPUT_CHAT:
        return tokenize_chat(g, wire->chat, a, out, err);
    case INTERNVL__V1__TOKENIZE_REQUEST__INPUT_TOKEN_IDS:
        return take_ids(g, wire->token_ids, a, out, err);
    default:
        return error_set(err, ERROR_INVALID_ARGUMENT, "give text, chat or token_ids");
    }
}

static int answer(struct gateway *g, struct rpc_call *c, const struct tokens *t, int skip_special,
                  struct arena *a, struct error *err)
{
    const struct tokenizer *tokenizer = processor_tokenizer(g->processor);
    Internvl__V1__TokenizeResponse response = INTERNVL__V1__TOKENIZE_RESPONSE__INIT;
    size_t n = (size_t)t->n_ids;
    size_t n_media = (size_t)t->n_media;
    size_t n_bytes;
    ProtobufCBinaryData *tokens = arena_alloc(a, n, sizeof(*tokens));
    Internvl__V1__MediaPlan *plans = arena_alloc(a, n_media, sizeof(*plans));
    Internvl__V1__MediaPlan **pointers = arena_alloc(a, n_media, sizeof(*pointers));
    const char *text =
        t->text ? t->text
                : tokenizer_decode(tokenizer, t->ids, t->n_ids, skip_special, a, &n_bytes);

    if (!tokens || !plans || !pointers || !text)
        return request_out_of_memory(err);
    for (size_t i = 0; i < n; i++)
        tokens[i].data =
            (uint8_t *)(uintptr_t)tokenizer_token_bytes(tokenizer, t->ids[i], &tokens[i].len);
    for (size_t i = 0; i < n_media; i++) {
        reply_media_plan(&plans[i], &t->media[i], g->model->n_features_per_tile);
        pointers[i] = &plans[i];
    }
    response.n_token_ids = n;
    response.token_ids = (uint32_t *)(uintptr_t)t->ids;
    response.text = (char *)(uintptr_t)text;
    response.n_tokens = n;
    response.tokens = tokens;
    response.n_media = n_media;
    response.media = pointers;
    rpc_finish(c, NULL, &response.base);
    return 0;
}

static void tokenize_run(void *arg)
{
    struct tokenize_job *job = arg;
    struct gateway *g = job->gateway;
    struct arena scratch = {0};
    struct arena arena;
    struct error err = {0};
    struct tokens tokens = {0};
    const Internvl__V1__TokenizeRequest *wire;

    arena_init(&arena, convert_request_budget(&g->convert));
    if (rpc_check_waiting(job->call, &err))
        goto out;
    wire = (Internvl__V1__TokenizeRequest *)rpc_take_message(
        job->call, &internvl__v1__tokenize_request__descriptor, convert_max_elements(&g->convert),
        &scratch, &err);
    if (!wire || tokenize_read(g, wire, &arena, &tokens, &err))
        goto out;
    answer(g, job->call, &tokens, wire->_skip_special_tokens_case && wire->skip_special_tokens,
           &arena, &err);
out:
    if (err.code)
        rpc_finish(job->call, &err, NULL);
    arena_release(&scratch);
    arena_release(&arena);
    rpc_call_unref(job->call);
    free(job);
}

void tokenize_message(void *arg, struct rpc_call *c)
{
    struct gateway *g = arg;
    struct tokenize_job *job = xcalloc(1, sizeof(*job));
    struct error err;

    job->gateway = g;
    job->call = rpc_call_ref(c);
    if (work_queue_submit(g->work, tokenize_run, job, rpc_message_bytes(c), &err)) {
        rpc_finish(c, &err, NULL);
        rpc_call_unref(c);
        free(job);
    }
}
