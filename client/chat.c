/*
 * internvl chat: several turns. One message a line; lines that begin with a slash are for us. On a
 * terminal a prompt is shown; on a pipe only answers are printed, so that scripts can talk too.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/answer.h"
#include "client/command.h"
#include "client/conversation.h"
#include "client/interrupt.h"

struct chat {
    struct internvl_client *client;
    const struct command_options *options;
    struct conversation conversation;
    int message_open; // the last message is the user's next one, media are in it
    int interactive;
    int failed; // some turn was
};

static void start_over(struct chat *chat)
{
    conversation_release(&chat->conversation);
    chat->message_open = 0;
    if (chat->options->system) {
        conversation_add_message(&chat->conversation, "system");
        conversation_add_text(&chat->conversation, chat->options->system);
    }
}

static void open_message(struct chat *chat)
{
    if (!chat->message_open)
        conversation_add_message(&chat->conversation, "user");
    chat->message_open = 1;
}

static void add_file(struct chat *chat, const char *path, int is_video)
{
    struct internvl_error err = {0};
    open_message(chat);
    if (conversation_add_file(&chat->conversation, path, is_video, chat->options, &err)) {
        command_fail(chat->options, &err);
        chat->failed = 1;
    }
}

struct turn {
    struct answer answer;
    int streaming;
};

static int turn_event(void *arg, const struct internvl_event *e)
{
    struct turn *t = arg;
    answer_add(&t->answer, e);
    if (t->streaming && e->kind == INTERNVL_DELTA) {
        fputs(e->delta.text, stdout);
        fflush(stdout);
    }
    return ferror(stdout);
}

/* Asks; on failure the user's message is dropped, so that the next one starts clean. */
static void take_turn(struct chat *chat, const char *text)
{
    open_message(chat);
    conversation_add_text(&chat->conversation, text);
    struct turn turn = {.streaming = !chat->options->json};
    struct internvl_error err = {0};
    struct internvl_call_options call = command_call_options(chat->options);
    struct internvl_generate_request request =
        command_generate_request(chat->options, conversation_prompt(&chat->conversation));
    interrupt_set_busy(1);
    int rc = internvl_generate(chat->client, &request, &call, turn_event, &turn, &err);
    interrupt_set_busy(0);
    chat->message_open = 0;
    struct json_out json = {.file = stdout};
    if (rc == 0 && chat->options->json)
        answer_write_json(&turn.answer, &json);
    else if (!chat->options->json && turn.answer.n_candidates)
        putchar('\n');
    fflush(stdout);
    if (rc == 0) {
        conversation_add_message(&chat->conversation, "assistant");
        conversation_add_text(&chat->conversation, answer_text(&turn.answer));
    } else {
        command_fail(chat->options, &err);
        conversation_drop_message(&chat->conversation);
        chat->failed = 1;
    }
    answer_release(&turn.answer);
}

/* What follows `word` and spaces in `line`, or NULL when the line is another command. */
static const char *argument_of(const char *line, const char *word)
{
    size_t n = strlen(word);
    if (strncmp(line, word, n) != 0 || (line[n] != ' ' && line[n] != '\0'))
        return NULL;
    return line + n + strspn(line + n, " ");
}

/* 0 when the line was the last one. */
static int take_line(struct chat *chat, const char *line)
{
    const char *path;
    if (argument_of(line, "/quit") || argument_of(line, "/exit"))
        return 0;
    if (argument_of(line, "/reset"))
        start_over(chat);
    else if ((path = argument_of(line, "/image")))
        add_file(chat, path, 0);
    else if ((path = argument_of(line, "/video")))
        add_file(chat, path, 1);
    else if (*line == '/')
        fprintf(stderr, "internvl: chat: /image FILE, /video FILE, /reset or /quit\n");
    else if (*line)
        take_turn(chat, line);
    return 1;
}

int command_chat(struct internvl_client *c, const struct command_options *o)
{
    if (o->n_arguments)
        return command_usage(o, "chat reads its messages from standard input");
    struct chat chat = {.client = c, .options = o};
    char *line = NULL;
    size_t capacity = 0;
    chat.interactive = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
    start_over(&chat);
    for (size_t i = 0; i < o->n_media; i++)
        add_file(&chat, o->media[i].path, o->media[i].is_video);
    for (int more = !chat.failed; more && !interrupt_seen();) {
        if (chat.interactive) {
            fputs("> ", stdout);
            fflush(stdout);
        }
        ssize_t n = getline(&line, &capacity, stdin);
        if (n < 0)
            break;
        line[strcspn(line, "\r\n")] = '\0';
        more = take_line(&chat, line);
    }
    free(line);
    conversation_release(&chat.conversation);
    return interrupt_seen() ? EXIT_INTERRUPTED : chat.failed ? EXIT_FAILED : EXIT_OK;
}
