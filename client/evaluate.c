/*
 * internvl evaluate: questions with known answers, many in flight, accuracy per category.
 *
 * One thread and one queue: a question is read, started, and forgotten until its end. Results are
 * written in the file's order whatever order they come in. Owns the questions; the format is that
 * of tests/data/demo-eval/README.md.
 */
#include <cjson/cJSON.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/answer.h"
#include "client/command.h"
#include "client/conversation.h"
#include "client/interrupt.h"
#include "client/json_out.h"
#include "client/progress.h"
#include "client/rpc.h"

struct category {
    const char *name; // borrowed from a question
    size_t n_questions, n_done, n_correct, n_failed;
};

struct question {
    struct evaluation *evaluation;
    cJSON *root;
    const char *id, *expected; // borrowed from root
    size_t category;
    struct answer answer;
    int done, correct;
    struct internvl_error error;
};

struct evaluation {
    const struct command_options *options;
    struct internvl_queue *queue;
    struct internvl_sampling sampling;
    char *folder; // of the file, with its slash; "" for the current one
    struct question *questions;
    size_t n_questions;
    struct category *categories;
    size_t n_categories;
    size_t n_started, n_done, n_correct, n_failed, n_written;
    struct internvl_error first_error;
    int stop; // the daemon is gone, or Ctrl-C: nothing more is started
    FILE *output;
};

/* ---- the file ---- */

static const char *text_member(const cJSON *object, const char *name)
{
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
}

static size_t category_index(struct evaluation *e, const char *name)
{
    for (size_t i = 0; i < e->n_categories; i++)
        if (strcmp(e->categories[i].name, name) == 0)
            return i;
    e->categories = command_grow(e->categories, e->n_categories, sizeof(*e->categories));
    e->categories[e->n_categories] = (struct category){.name = name};
    return e->n_categories++;
}

static int add_question(struct evaluation *e, const char *line, struct internvl_error *err)
{
    cJSON *root = cJSON_Parse(line);
    const char *expected = text_member(root, "answer");
    if (!root || !expected || !cJSON_IsArray(cJSON_GetObjectItemCaseSensitive(root, "messages"))) {
        const char *what = !root ? "not JSON" : "no \"answer\" or no \"messages\"";
        cJSON_Delete(root);
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "%s", what);
    }
    const char *category = text_member(root, "category"), *id = text_member(root, "id");
    e->questions = command_grow(e->questions, e->n_questions, sizeof(*e->questions));
    e->questions[e->n_questions++] =
        (struct question){.evaluation = e,
                          .root = root,
                          .id = id ? id : "",
                          .expected = expected,
                          .category = category_index(e, category ? category : "all")};
    e->categories[e->questions[e->n_questions - 1].category].n_questions++;
    return 0;
}

static int load_questions(struct evaluation *e, const char *path, struct internvl_error *err)
{
    size_t n_bytes, line_number = 0;
    char *text = read_file(path, &n_bytes, err), *rest = text, *line;
    if (!text)
        return -1;
    int rc = 0;
    while (rc == 0 && (line = strsep(&rest, "\n"))) {
        struct internvl_error why;
        line_number++;
        if (line[strspn(line, " \t\r")] == '\0')
            continue;
        if (e->options->limit && e->n_questions == e->options->limit)
            break;
        if (add_question(e, line, &why))
            rc = rpc_error(err, why.code, "%s:%zu: %s", path, line_number, why.msg);
    }
    free(text);
    if (rc == 0 && e->n_questions == 0)
        rc = rpc_error(err, INTERNVL_INVALID_ARGUMENT, "%s holds no question", path);
    const char *slash = strrchr(path, '/');
    e->folder = slash ? strndup(path, (size_t)(slash - path) + 1) : strdup("");
    return rc;
}

/* ---- scoring ---- */

/* Equal after stripping white space and lowercasing (ASCII), without partial credit. */
static int is_correct(const char *reply, const char *expected)
{
    while (isspace((unsigned char)*reply))
        reply++;
    while (isspace((unsigned char)*expected))
        expected++;
    size_t n = strlen(reply), m = strlen(expected);
    while (n && isspace((unsigned char)reply[n - 1]))
        n--;
    while (m && isspace((unsigned char)expected[m - 1]))
        m--;
    if (n != m)
        return 0;
    for (size_t i = 0; i < n; i++)
        if (tolower((unsigned char)reply[i]) != tolower((unsigned char)expected[i]))
            return 0;
    return 1;
}

static void write_result(const struct evaluation *e, const struct question *q)
{
    struct json_out json = {.file = e->output}, *j = &json;
    json_object_begin(j, NULL);
    json_string(j, "id", q->id);
    json_string(j, "category", e->categories[q->category].name);
    json_string(j, "answer", q->expected);
    if (q->error.code != INTERNVL_OK) {
        json_string(j, "error", internvl_code_name(q->error.code));
        json_string(j, "message", q->error.msg);
    } else {
        json_string(j, "reply", answer_text(&q->answer));
        json_array_begin(j, "token_ids");
        for (size_t i = 0; q->answer.n_candidates && i < q->answer.candidates[0].n_ids; i++)
            json_uint(j, NULL, q->answer.candidates[0].ids[i]);
        json_array_end(j);
        json_uint(j, "prompt_tokens", q->answer.usage.prompt_tokens);
        json_uint(j, "total_us", q->answer.timing.total_us);
    }
    json_bool(j, "correct", q->correct);
    json_object_end(j);
    json_end_line(j);
}

/* Results that are next in the file's order. */
static void write_results(struct evaluation *e)
{
    for (; e->n_written < e->n_questions && e->questions[e->n_written].done; e->n_written++) {
        struct question *q = &e->questions[e->n_written];
        if (e->output)
            write_result(e, q);
        answer_release(&q->answer);
    }
}

/* ---- running ---- */

static int question_event(void *arg, const struct internvl_event *event)
{
    struct question *q = arg;
    answer_add(&q->answer, event);
    return 0;
}

static void question_end(void *arg, const struct internvl_error *status)
{
    struct question *q = arg;
    struct evaluation *e = q->evaluation;
    struct category *category = &e->categories[q->category];
    q->done = 1;
    q->error = *status;
    e->n_done++;
    category->n_done++;
    if (status->code == INTERNVL_OK) {
        q->correct = is_correct(answer_text(&q->answer), q->expected);
        e->n_correct += q->correct;
        category->n_correct += q->correct;
    } else {
        if (e->n_failed++ == 0)
            e->first_error = *status;
        category->n_failed++;
    }
    /* What the next question would meet as well. */
    if (status->code == INTERNVL_UNAVAILABLE || status->code == INTERNVL_UNAUTHENTICATED ||
        status->code == INTERNVL_UNIMPLEMENTED || interrupt_seen())
        e->stop = 1;
}

static void start_question(struct evaluation *e, struct question *q)
{
    struct conversation conversation = {0};
    struct internvl_error err = {0};
    struct internvl_call_options call = command_call_options(e->options);
    int rc =
        conversation_from_json(&conversation, cJSON_GetObjectItemCaseSensitive(q->root, "messages"),
                               e->folder, e->options, &err);
    if (rc == 0) {
        struct internvl_generate_request request = {.prompt = conversation_prompt(&conversation),
                                                    .sampling = e->sampling,
                                                    .priority = e->options->priority};
        rc = internvl_generate_start(e->queue, &request, &call, question_event, question_end, q,
                                     &err);
    }
    if (rc)
        question_end(q, &err);
    conversation_release(&conversation);
}

static void run(struct evaluation *e, struct progress *progress)
{
    int n_in_flight = 0;
    do {
        while (!e->stop && e->n_started < e->n_questions &&
               e->n_started - e->n_done < e->options->concurrency)
            start_question(e, &e->questions[e->n_started++]);
        n_in_flight = internvl_queue_poll(e->queue, 250);
        write_results(e);
        char note[64];
        snprintf(note, sizeof(note), "accuracy %.3f",
                 e->n_done ? (double)e->n_correct / (double)e->n_done : 0);
        progress_show(progress, e->n_done, note);
    } while (n_in_flight > 0 || (!e->stop && e->n_started < e->n_questions));
}

/* ---- the report ---- */

static double accuracy(size_t n_correct, size_t n_done)
{
    return n_done ? (double)n_correct / (double)n_done : 0;
}

static void print_table(const struct evaluation *e, double seconds)
{
    int width = (int)strlen("category");
    for (size_t i = 0; i < e->n_categories; i++)
        if ((int)strlen(e->categories[i].name) > width)
            width = (int)strlen(e->categories[i].name);
    printf("%-*s  %9s  %7s  %8s\n", width, "category", "questions", "correct", "accuracy");
    for (size_t i = 0; i < e->n_categories; i++) {
        const struct category *c = &e->categories[i];
        printf("%-*s  %9zu  %7zu  %8.4f\n", width, c->name, c->n_done, c->n_correct,
               accuracy(c->n_correct, c->n_done));
    }
    printf("%-*s  %9zu  %7zu  %8.4f\n", width, "overall", e->n_done, e->n_correct,
           accuracy(e->n_correct, e->n_done));
    printf("%.1f s, %.1f questions a second, %u in flight\n", seconds,
           seconds > 0 ? (double)e->n_done / seconds : 0, e->options->concurrency);
}

static void write_accuracy(struct json_out *j, const char *key, size_t n_done, size_t n_correct,
                           size_t n_failed)
{
    json_object_begin(j, key);
    json_uint(j, "questions", n_done);
    json_uint(j, "correct", n_correct);
    json_uint(j, "failed", n_failed);
    json_double(j, "accuracy", accuracy(n_correct, n_done));
    json_object_end(j);
}

static void write_json(const struct evaluation *e, double seconds)
{
    struct json_out json = {.file = stdout}, *j = &json;
    json_object_begin(j, NULL);
    write_accuracy(j, "overall", e->n_done, e->n_correct, e->n_failed);
    json_object_begin(j, "categories");
    for (size_t i = 0; i < e->n_categories; i++) {
        const struct category *c = &e->categories[i];
        write_accuracy(j, c->name, c->n_done, c->n_correct, c->n_failed);
    }
    json_object_end(j);
    json_double(j, "seconds", seconds);
    json_uint(j, "concurrency", e->options->concurrency);
    json_object_end(j);
    json_end_line(j);
}

static void release(struct evaluation *e)
{
    internvl_queue_close(e->queue);
    for (size_t i = 0; i < e->n_questions; i++) {
        answer_release(&e->questions[i].answer);
        cJSON_Delete(e->questions[i].root);
    }
    free(e->questions);
    free(e->categories);
    free(e->folder);
}

/* Opens --output; 0, or -1 and `err`. */
static int open_output(struct evaluation *e, const char *path, struct internvl_error *err)
{
    if (!path)
        return 0;
    e->output = fopen(path, "w");
    if (!e->output)
        return rpc_error(err, INTERNVL_NOT_FOUND, "%s: %s", path, strerror(errno));
    return 0;
}

static int close_output(struct evaluation *e, const char *path, struct internvl_error *err)
{
    if (!e->output)
        return 0;
    int failed = ferror(e->output);
    if (fclose(e->output) != 0 || failed)
        return rpc_error(err, INTERNVL_INTERNAL, "%s could not be written", path);
    return 0;
}

int command_evaluate(struct internvl_client *c, const struct command_options *o)
{
    if (o->n_arguments != 1)
        return command_usage(o, "one file of questions is needed");
    if (o->concurrency < 1 || o->concurrency > 4096)
        return command_usage(o, "option --concurrency: %u is not between 1 and 4096",
                             o->concurrency);
    struct evaluation e = {.options = o, .sampling = o->sampling};
    struct internvl_error err = {0};
    struct progress progress;
    int status = EXIT_OK;
    if (!(o->sampling.set & INTERNVL_TEMPERATURE))
        e.sampling.temperature = 0;
    if (!(o->sampling.set & INTERNVL_MAX_TOKENS))
        e.sampling.max_tokens = 64;
    e.sampling.set |= INTERNVL_TEMPERATURE | INTERNVL_MAX_TOKENS;
    if (load_questions(&e, o->arguments[0], &err) || open_output(&e, o->output, &err)) {
        status = command_fail(o, &err);
        goto out;
    }
    e.queue = internvl_queue_open(c);
    progress_begin(&progress, "evaluate", e.n_questions);
    interrupt_set_busy(1);
    run(&e, &progress);
    progress_end(&progress);
    if (o->json)
        write_json(&e, progress_elapsed_s(&progress));
    else
        print_table(&e, progress_elapsed_s(&progress));
    if (close_output(&e, o->output, &err))
        status = command_fail(o, &err);
    if (interrupt_seen()) {
        status = EXIT_INTERRUPTED;
    } else if (e.n_failed) {
        rpc_error(&err, e.first_error.code, "%zu of %zu questions failed, the first with: %s",
                  e.n_failed, e.n_questions, e.first_error.msg);
        status = command_fail(o, &err);
    }
out:
    release(&e);
    return status;
}
