/*
 * The slow part of a call, on a processor thread: media decoded, text tokenised.
 */
#include <string.h>

#include "daemon/gateway/gateway_state.h"
#include "kernels/clock.h"

struct media_pin {
    struct media *media;
    struct media_pin *next;
};

/* media_source.find: the bytes stay until media_pins_release(). */
static int pin_media(void *state, const char *id, enum part_kind kind, struct media_bytes *out,
                     struct error *err)
{
    struct media_pins *p = state;
    struct media_pin *pin = arena_alloc(p->arena, 1, sizeof(*pin));

    if (!pin)
        return request_out_of_memory(err);
    pin->media = media_store_pin(p->store, id, kind, clock_now_ns(), out, err);
    if (!pin->media)
        return -1;
    pin->next = p->first;
    p->first = pin;
    return 0;
}

int conversation_read(struct gateway *g, const Internvl__V1__ChatPrompt *wire, struct arena *a,
                      struct media_pins *pins, struct conversation *out, struct error *err)
{
    struct media_source source = {pin_media, pins};

    *pins = (struct media_pins){.store = g->media, .arena = a};
    return convert_conversation(wire, &source, a, out, err);
}

void media_pins_release(struct media_pins *pins)
{
    for (struct media_pin *p = pins->first; p; p = p->next)
        media_store_unpin(pins->store, p->media, clock_now_ns());
    pins->first = NULL;
}

static int prepare_chat(struct gateway *g, const Internvl__V1__ChatPrompt *wire,
                        struct arena *scratch, struct request *r, struct media_plan **media,
                        int *n_media, struct error *err)
{
    struct conversation conversation;
    struct media_pins pins;
    struct prompt prompt = {0};
    int status = conversation_read(g, wire, scratch, &pins, &conversation, err);

    if (!status)
        status = processor_prepare(g->processor, &conversation, &r->arena, &prompt, err);
    media_pins_release(&pins);
    if (status) {
        if (err->code == ERROR_OUT_OF_RANGE) // it stopped counting
            error_set(err, ERROR_INVALID_ARGUMENT,
                      "the prompt has more than %lld tokens; prompt and answer together may have "
                      "%d (--max-model-len)",
                      (long long)g->convert.limits.max_prompt_tokens, g->convert.max_model_len);
        return -1;
    }
    *media = prompt.media;
    *n_media = prompt.n_media;
    return convert_prepared_prompt(&g->convert, &prompt, r, err);
}

int prompt_prepare(struct gateway *g, const Internvl__V1__Prompt *wire, struct arena *scratch,
                   struct request *r, struct media_plan **media, int *n_media, struct error *err)
{
    *media = NULL;
    *n_media = 0;
    if (wire && wire->input_case == INTERNVL__V1__PROMPT__INPUT_CHAT)
        return prepare_chat(g, wire->chat, scratch, r, media, n_media, err);
    if (wire && wire->input_case == INTERNVL__V1__PROMPT__INPUT_TOKENS)
        return convert_token_prompt(&g->convert, wire->tokens, r, err);
    return error_set(err, ERROR_INVALID_ARGUMENT, "prompt is missing: give chat or tokens");
}
