/* internvl score: how likely given answers to one question are. */
#include <stdio.h>
#include <stdlib.h>

#include "client/command.h"
#include "client/conversation.h"
#include "client/interrupt.h"
#include "client/json_out.h"

static void print_json(const struct internvl_score_result *r, const char **answers)
{
    struct json_out j = {.file = stdout};
    json_object_begin(&j, NULL);
    json_array_begin(&j, "scores");
    for (size_t i = 0; i < r->n_scores; i++) {
        const struct internvl_score *s = &r->scores[i];
        json_object_begin(&j, NULL);
        json_string(&j, "text", answers[i]);
        json_double(&j, "sum_logprob", s->sum_logprob);
        json_double(&j, "mean_logprob", s->mean_logprob);
        json_array_begin(&j, "token_ids");
        for (size_t k = 0; k < s->n_tokens; k++)
            json_uint(&j, NULL, s->token_ids[k]);
        json_array_end(&j);
        json_array_begin(&j, "token_logprobs");
        for (size_t k = 0; k < s->n_tokens; k++)
            json_float(&j, NULL, s->token_logprobs[k]);
        json_array_end(&j);
        json_array_begin(&j, "token_ranks");
        for (size_t k = 0; k < s->n_tokens; k++)
            json_uint(&j, NULL, s->token_ranks[k]);
        json_array_end(&j);
        json_bool(&j, "is_greedy", s->is_greedy);
        json_object_end(&j);
    }
    json_array_end(&j);
    json_object_end(&j);
    json_end_line(&j);
}

static void print_table(const struct internvl_score_result *r, const char **answers)
{
    printf("%12s %12s %7s %6s  %s\n", "sum", "mean", "tokens", "greedy", "answer");
    for (size_t i = 0; i < r->n_scores; i++)
        printf("%12.6f %12.6f %7zu %6s  %s\n", r->scores[i].sum_logprob, r->scores[i].mean_logprob,
               r->scores[i].n_tokens, r->scores[i].is_greedy ? "yes" : "no", answers[i]);
}

int command_score(struct internvl_client *c, const struct command_options *o)
{
    if (o->n_arguments < 2)
        return command_usage(o, "a question and at least one answer are needed");
    struct internvl_error err = {0};
    struct conversation conversation = {0};
    struct internvl_score_result result = {0};
    struct internvl_call_options call = command_call_options(o);
    size_t n = o->n_arguments - 1;
    struct internvl_continuation *continuations = command_alloc(n, sizeof(*continuations));
    int status = EXIT_OK;
    for (size_t i = 0; i < n; i++)
        continuations[i].text = o->arguments[i + 1];
    if (conversation_from_options(&conversation, o, o->arguments[0], &err)) {
        status = command_fail(o, &err);
        goto out;
    }
    struct internvl_score_request request = {.request_id = o->request_id,
                                             .prompt = conversation_prompt(&conversation),
                                             .continuations = continuations,
                                             .n_continuations = n};
    interrupt_set_busy(1);
    if (internvl_score(c, &request, &call, &result, &err))
        status = command_fail(o, &err);
    else if (o->json)
        print_json(&result, o->arguments + 1);
    else
        print_table(&result, o->arguments + 1);
out:
    internvl_score_result_release(&result);
    conversation_release(&conversation);
    free(continuations);
    return status;
}
