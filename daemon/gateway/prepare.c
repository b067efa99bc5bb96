/*
 * The slow part of a call, on a processor thread: media decoded, text tokenised.
 */
#include <string.h>

#include "daemon/gateway/gateway_state.h"

static int prepare_chat(struct gateway *g, const Internvl__V1__ChatPrompt *wire,
                        struct arena *scratch, struct request *r, struct media_plan **media,
                        int *n_media, struct error *err)
{
    struct conversation conversation;
    struct prompt prompt = {0};

    if (convert_conversation(wire, scratch, &conversation, err))
        return -1;
    if (processor_prepare(g->processor, &conversation, &r->arena, &prompt, err)) {
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
