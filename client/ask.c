/* internvl ask: one question, the answer printed as it comes. */
#include <stdio.h>
#include <string.h>

#include "client/answer.h"
#include "client/command.h"
#include "client/conversation.h"
#include "client/interrupt.h"

struct ask_state {
    struct answer answer;
    int streaming; // text is printed as it comes
    int at_line_start;
};

static int ask_event(void *arg, const struct internvl_event *e)
{
    struct ask_state *s = arg;
    answer_add(&s->answer, e);
    if (s->streaming && e->kind == INTERNVL_DELTA && *e->delta.text) {
        fputs(e->delta.text, stdout);
        fflush(stdout);
        s->at_line_start = e->delta.text[strlen(e->delta.text) - 1] == '\n';
    }
    return ferror(stdout); // nobody reads: the daemon need not go on
}

static void print_answer(const struct ask_state *s, const struct command_options *o)
{
    struct json_out json = {.file = stdout};
    if (o->json) {
        answer_write_json(&s->answer, &json);
        return;
    }
    if (s->streaming && !s->at_line_start)
        putchar('\n');
    for (size_t i = 0; !s->streaming && i < s->answer.n_candidates; i++)
        printf("[%zu] %s\n", i, s->answer.candidates[i].text);
    if (o->sampling.set & (INTERNVL_LOGPROBS | INTERNVL_PROMPT_LOGPROBS))
        answer_write_logprobs(&s->answer, stdout);
}

int command_ask(struct internvl_client *c, const struct command_options *o)
{
    if (o->n_arguments != 1)
        return command_usage(o, o->n_arguments ? "one question is enough: put it in quotes"
                                               : "no question given");
    struct internvl_error err = {0};
    struct conversation conversation = {0};
    int several = (o->sampling.set & INTERNVL_N) && o->sampling.n > 1;
    struct ask_state state = {.streaming = !o->json && !several};
    struct internvl_call_options call = command_call_options(o);
    int status = EXIT_OK;
    if (conversation_from_options(&conversation, o, o->arguments[0], &err)) {
        status = command_fail(o, &err);
        goto out;
    }
    struct internvl_generate_request request =
        command_generate_request(o, conversation_prompt(&conversation));
    interrupt_set_busy(1);
    int rc = internvl_generate(c, &request, &call, ask_event, &state, &err);
    interrupt_set_busy(0);
    if (rc == 0) {
        print_answer(&state, o);
    } else {
        if (state.streaming && state.answer.n_candidates && !state.at_line_start)
            putchar('\n'); // the error starts a line of its own
        fflush(stdout);
        status = command_fail(o, &err);
    }
out:
    answer_release(&state.answer);
    conversation_release(&conversation);
    return status;
}
