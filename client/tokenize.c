/* internvl tokenize: text to ids, a conversation to ids, or ids to text. */
#include <stdio.h>
#include <stdlib.h>

#include "client/command.h"
#include "client/conversation.h"
#include "client/interrupt.h"
#include "client/json_out.h"

static void print_json(const struct internvl_tokenize_result *r)
{
    struct json_out j = {.file = stdout};
    json_object_begin(&j, NULL);
    json_array_begin(&j, "token_ids");
    for (size_t i = 0; i < r->n_token_ids; i++)
        json_uint(&j, NULL, r->token_ids[i]);
    json_array_end(&j);
    json_string(&j, "text", r->text);
    json_array_begin(&j, "tokens");
    for (size_t i = 0; i < r->n_tokens; i++)
        json_bytes(&j, NULL, r->tokens[i].data, r->tokens[i].n_bytes);
    json_array_end(&j);
    json_array_begin(&j, "media");
    for (size_t i = 0; i < r->n_media; i++) {
        json_object_begin(&j, NULL);
        json_uint(&j, "width", r->media[i].width);
        json_uint(&j, "height", r->media[i].height);
        json_uint(&j, "grid_columns", r->media[i].grid_columns);
        json_uint(&j, "grid_rows", r->media[i].grid_rows);
        json_uint(&j, "tiles", r->media[i].tiles);
        json_uint(&j, "tokens", r->media[i].tokens);
        json_object_end(&j);
    }
    json_array_end(&j);
    json_object_end(&j);
    json_end_line(&j);
}

/* One line a token: id, bytes. Runs of one id (a picture's tokens) are one line with their count.
 */
static void print_table(const struct internvl_tokenize_result *r)
{
    for (size_t i = 0, next; i < r->n_token_ids; i = next) {
        for (next = i + 1; next < r->n_token_ids && r->token_ids[next] == r->token_ids[i]; next++)
            ;
        struct json_out j = {.file = stdout};
        printf("%7u  ", r->token_ids[i]);
        if (i < r->n_tokens)
            json_bytes(&j, NULL, r->tokens[i].data, r->tokens[i].n_bytes);
        if (next - i > 1)
            printf("  x %zu", next - i);
        putchar('\n');
    }
    for (size_t i = 0; i < r->n_media; i++)
        printf("media %zu: %u x %u pixels, grid %u x %u, %u tiles, %u tokens\n", i,
               r->media[i].width, r->media[i].height, r->media[i].grid_columns,
               r->media[i].grid_rows, r->media[i].tiles, r->media[i].tokens);
    printf("%zu tokens\n", r->n_token_ids);
}

int command_tokenize(struct internvl_client *c, const struct command_options *o)
{
    if (o->n_arguments != (o->ids ? 0 : 1))
        return command_usage(o, o->ids ? "either a text or --ids" : "one text is needed");
    struct internvl_error err = {0};
    struct conversation conversation = {0};
    struct internvl_tokenize_request request = {0};
    struct internvl_tokenize_result result = {0};
    struct internvl_prompt prompt;
    struct internvl_call_options call = command_call_options(o);
    uint32_t *ids = NULL;
    int status = EXIT_OK;
    if (o->ids) {
        int64_t *list = command_parse_list(o->ids, 0, UINT32_MAX, &request.n_token_ids);
        if (!list)
            return command_usage(o, "--ids: '%s' is not a list of token ids", o->ids);
        ids = command_alloc(request.n_token_ids, sizeof(*ids));
        for (size_t i = 0; i < request.n_token_ids; i++)
            ids[i] = (uint32_t)list[i];
        free(list);
        request.token_ids = ids;
    } else if (o->chat || o->n_media || o->system) {
        if (conversation_from_options(&conversation, o, o->arguments[0], &err)) {
            status = command_fail(o, &err);
            goto out;
        }
        prompt = conversation_prompt(&conversation);
        request.prompt = &prompt;
    } else {
        request.text = o->arguments[0];
    }
    interrupt_set_busy(1);
    if (internvl_tokenize(c, &request, &call, &result, &err))
        status = command_fail(o, &err);
    else if (o->json)
        print_json(&result);
    else if (o->ids)
        printf("%s\n", result.text);
    else
        print_table(&result);
out:
    internvl_tokenize_result_release(&result);
    conversation_release(&conversation);
    free(ids);
    return status;
}
