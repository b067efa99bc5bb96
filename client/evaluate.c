/*
 * internvl evaluate: questions with known answers, many in flight, accuracy per category.
 *
 * One thread and one queue: a question is read, started, and forgotten until its end. A daemon that
 * is not there, drains or is full is asked again after a pause that grows; its address may have
 * changed meanwhile (--endpoint-file). Questions, scoring, the results' file and the reports are
 * eval_*.c; this file owns who is asked when.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/answer.h"
#include "client/command.h"
#include "client/conversation.h"
#include "client/eval_report.h"
#include "client/eval_results.h"
#include "client/eval_set.h"
#include "client/interrupt.h"
#include "client/progress.h"
#include "client/rpc.h"

#define PAUSE_FIRST_MS 100
#define PAUSE_MAX_MS 5000
#define WAIT_MS 250
#define TRIES_MAX 8 // of a question that is too much for the daemon even alone

struct asked { // one question in flight
    struct evaluation *evaluation;
    size_t question;
    struct answer answer;
};

struct evaluation {
    const struct command_options *options;
    struct internvl_client *client;
    int owns_client; // one of our own, made when the endpoint changed
    struct command_endpoint endpoint;
    struct internvl_queue *queue;
    struct internvl_sampling sampling;
    struct eval_set set;
    struct eval_results results;
    char settings[512];
    size_t *todo;     // [n_todo] questions, the next one last
    uint8_t *n_tries; // [set.n_questions] that were too much
    size_t n_todo, n_total, n_earlier, n_in_flight, n_done, n_failed;
    double score;
    struct internvl_error first_error;
    int stop;                 // nothing more is started
    int64_t pause_ms;         // the last pause; 0 after a success
    int64_t resume_ms;        // nothing is started before
    int64_t trouble_since_ms; // 0: the last call went well
};

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* ---- what is asked ---- */

/* Words that answers depend on; sampling that is not greedy gives other answers anyway. */
static void write_settings(struct evaluation *e)
{
    const struct internvl_sampling *s = &e->sampling;
    const struct internvl_tiling *t = &e->options->tiling;
    const struct internvl_video *v = &e->options->video;
    int n = snprintf(
        e->settings, sizeof(e->settings),
        "%x %u %u %.9g %.9g %u %.9g %.9g %.9g %.9g %llu %d | %x %u %u %d | %x %u %.17g", s->set,
        s->max_tokens, s->min_tokens, (double)s->temperature, (double)s->top_p, s->top_k,
        (double)s->min_p, (double)s->repetition_penalty, (double)s->presence_penalty,
        (double)s->frequency_penalty, (unsigned long long)s->seed, s->ignore_eos, t->set,
        t->min_patches, t->max_patches, t->crop_to_patches, v->set, v->num_frames, v->fps);
    for (size_t i = 0; i < s->n_stop && n < (int)sizeof(e->settings); i++)
        n += snprintf(e->settings + n, sizeof(e->settings) - (size_t)n, " | %s", s->stop[i]);
}

/* "1/4": the questions 1, 5, 9, …; -1 when it is no such thing. */
static int parse_shard(const char *text, unsigned *index, unsigned *n)
{
    char end;
    *index = 0;
    *n = 1;
    if (!text)
        return 0;
    return sscanf(text, "%u/%u%c", index, n, &end) == 2 && *index < *n ? 0 : -1;
}

static void make_todo(struct evaluation *e, unsigned shard, unsigned n_shards)
{
    e->todo = command_alloc(e->set.n_questions, sizeof(*e->todo));
    e->n_tries = command_alloc(e->set.n_questions, sizeof(*e->n_tries));
    for (size_t i = e->set.n_questions; i-- > 0;) {
        const struct eval_result *x = &e->results.results[i];
        if (x->is_done) {
            e->n_earlier++;
            e->score += x->score;
        } else if (i % n_shards == shard) {
            e->todo[e->n_todo++] = i;
        }
    }
    e->n_total = e->n_todo;
}

/* ---- ends ---- */

/* Will another try, later, do better? A full daemon passes; a question too large for it does not.
 */
static int is_passing(struct evaluation *e, size_t question, int code)
{
    if (code == INTERNVL_RESOURCE_EXHAUSTED)
        return e->n_in_flight > 0 || ++e->n_tries[question] < TRIES_MAX;
    return code == INTERNVL_UNAVAILABLE;
}

/* After all others. */
static void ask_last(struct evaluation *e, size_t question)
{
    memmove(e->todo + 1, e->todo, e->n_todo++ * sizeof(*e->todo));
    e->todo[0] = question;
}

static void pause_for_trouble(struct evaluation *e, const struct internvl_error *why)
{
    int64_t now = now_ms();
    if (e->trouble_since_ms == 0)
        e->trouble_since_ms = now;
    if (now - e->trouble_since_ms >= (int64_t)(e->options->retry_for_s * 1000)) {
        e->stop = 1;
        if (e->first_error.code == INTERNVL_OK)
            e->first_error = *why;
        return;
    }
    if (now < e->resume_ms) /* one of many that failed together */
        return;
    if (e->pause_ms == 0 && why->code == INTERNVL_UNAVAILABLE)
        fprintf(stderr, "internvl: evaluate: %s; trying again for %.0f s\n", why->msg,
                e->options->retry_for_s);
    e->pause_ms = e->pause_ms ? 2 * e->pause_ms : PAUSE_FIRST_MS;
    if (e->pause_ms > PAUSE_MAX_MS)
        e->pause_ms = PAUSE_MAX_MS;
    /* Many clients that lost one daemon should not come back at one moment. */
    e->resume_ms = now + e->pause_ms / 2 + rand() % (int)(e->pause_ms / 2 + 1);
}

static void finish_question(struct evaluation *e, size_t question, const struct answer *answer,
                            const struct internvl_error *status)
{
    struct internvl_error err;
    e->n_done++;
    if (eval_results_add(&e->results, question, answer, status, &err)) {
        e->stop = 1;
        e->first_error = err;
    }
    e->score += e->results.results[question].score;
    if (answer) {
        e->pause_ms = e->trouble_since_ms = 0;
        return;
    }
    if (e->n_failed++ == 0)
        e->first_error = *status;
}

static void question_over(struct evaluation *e, size_t question, const struct answer *answer,
                          const struct internvl_error *status)
{
    if (status->code == INTERNVL_OK) {
        finish_question(e, question, answer, status);
    } else if (interrupt_seen()) {
        e->stop = 1;
    } else if (status->code == INTERNVL_UNAUTHENTICATED || status->code == INTERNVL_UNIMPLEMENTED) {
        e->stop = 1; /* what the next question would meet as well */
        e->first_error = *status;
    } else if (is_passing(e, question, status->code)) {
        ask_last(e, question);
        pause_for_trouble(e, status);
    } else {
        finish_question(e, question, NULL, status);
    }
}

/* ---- running ---- */

static int question_event(void *arg, const struct internvl_event *event)
{
    struct asked *a = arg;
    answer_add(&a->answer, event);
    return 0;
}

static void question_end(void *arg, const struct internvl_error *status)
{
    struct asked *a = arg;
    struct evaluation *e = a->evaluation;
    e->n_in_flight--;
    question_over(e, a->question, &a->answer, status);
    answer_release(&a->answer);
    free(a);
}

static void start_question(struct evaluation *e, size_t question)
{
    struct conversation conversation = {0};
    struct internvl_error err = {0};
    struct internvl_call_options call = command_call_options(e->options);
    struct asked *a = command_alloc(1, sizeof(*a));
    *a = (struct asked){.evaluation = e, .question = question};
    int rc = eval_set_conversation(&e->set, &e->set.questions[question], &conversation, e->options,
                                   &err);
    if (rc == 0) {
        struct internvl_generate_request request =
            command_generate_request(e->options, conversation_prompt(&conversation));
        request.sampling = e->sampling;
        rc = internvl_generate_start(e->queue, &request, &call, question_event, question_end, a,
                                     &err);
    }
    if (rc) {
        free(a);
        question_over(e, question, NULL, &err);
    } else {
        e->n_in_flight++;
    }
    conversation_release(&conversation);
}

/* While nothing is in flight: the daemon may be somewhere else by now. */
static void look_for_endpoint(struct evaluation *e)
{
    struct command_endpoint now = {0};
    struct internvl_error err;
    if (!e->options->endpoint_file || command_endpoint_read(e->options, &now, &err))
        return;
    if (command_endpoint_equal(&now, &e->endpoint)) {
        command_endpoint_release(&now);
        return;
    }
    struct internvl_client *client = command_connect(&now, &err);
    if (!client) {
        command_endpoint_release(&now);
        return;
    }
    internvl_queue_close(e->queue);
    if (e->owns_client)
        internvl_close(e->client);
    command_endpoint_release(&e->endpoint);
    e->endpoint = now;
    e->client = client;
    e->owns_client = 1;
    e->queue = internvl_queue_open(client);
}

static void run(struct evaluation *e, struct progress *progress)
{
    while (e->n_in_flight > 0 || (!e->stop && e->n_todo > 0)) {
        int may_start = !e->stop && !interrupt_seen() && now_ms() >= e->resume_ms;
        if (may_start && e->trouble_since_ms && e->n_in_flight == 0)
            look_for_endpoint(e);
        /* After trouble one question goes ahead. */
        size_t most = e->trouble_since_ms ? 1 : e->options->concurrency;
        while (may_start && !e->stop && e->n_todo > 0 && e->n_in_flight < most) {
            start_question(e, e->todo[--e->n_todo]);
            may_start = now_ms() >= e->resume_ms;
        }
        if (e->n_in_flight > 0)
            internvl_queue_poll(e->queue, WAIT_MS);
        else if (!e->stop && e->n_todo > 0)
            poll(NULL, 0, 20);
        if (interrupt_seen())
            e->stop = 1;
        char note[64];
        size_t n = e->n_earlier + e->n_done;
        snprintf(note, sizeof(note), "accuracy %.3f", n ? e->score / (double)n : 0);
        progress_show(progress, e->n_done, note);
    }
}

/* ---- the command ---- */

static int prepare(struct evaluation *e, struct internvl_error *err)
{
    const struct command_options *o = e->options;
    enum eval_scorer scorer = SCORE_AUTO;
    unsigned shard, n_shards;
    if (o->score && eval_scorer_parse(o->score, &scorer))
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT,
                         "--score %s is not auto, exact, choice, number or anls", o->score);
    if (parse_shard(o->shard, &shard, &n_shards))
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "--shard %s is not I/N with I below N",
                         o->shard);
    if (eval_set_load(&e->set, o->arguments[0], o->limit, scorer, err))
        return -1;
    write_settings(e);
    eval_results_init(&e->results, &e->set, e->settings, o->tolerance);
    for (size_t i = 0; i < o->n_results; i++)
        if (eval_results_read(&e->results, o->results[i], err))
            return -1;
    if (o->output && eval_results_open(&e->results, o->output, err))
        return -1;
    make_todo(e, shard, n_shards);
    return 0;
}

static int report(struct evaluation *e, double seconds, struct internvl_error *err)
{
    const struct command_options *o = e->options;
    struct eval_run run = {seconds, e->n_done, o->concurrency};
    if (eval_results_finish(&e->results, err))
        return -1;
    if (o->json)
        eval_report_json(stdout, &e->results, &run);
    else
        eval_report_table(stdout, &e->results, &run);
    return o->html ? eval_report_html(o->html, o->arguments[0], &e->results, &run, o, err) : 0;
}

static int evaluate(struct evaluation *e, struct internvl_error *err)
{
    struct progress progress;
    if (prepare(e, err))
        return -1;
    e->queue = internvl_queue_open(e->client);
    progress_begin(&progress, "evaluate", e->n_total);
    interrupt_set_busy(1);
    run(e, &progress);
    progress_end(&progress);
    if (report(e, progress_elapsed_s(&progress), err))
        return -1;
    if (e->n_failed)
        return rpc_error(err, e->first_error.code,
                         "%zu of %zu questions failed, the first with: %s", e->n_failed,
                         e->set.n_questions, e->first_error.msg);
    if (e->n_todo && !interrupt_seen())
        return rpc_error(err, e->first_error.code, "%zu of %zu questions are not answered: %s",
                         e->n_todo, e->set.n_questions, e->first_error.msg);
    return 0;
}

int command_evaluate(struct internvl_client *c, const struct command_options *o)
{
    if (o->n_arguments != 1)
        return command_usage(o, "one file of questions is needed");
    if (o->concurrency < 1 || o->concurrency > 4096)
        return command_usage(o, "option --concurrency: %u is not between 1 and 4096",
                             o->concurrency);
    struct evaluation e = {.options = o, .client = c, .sampling = o->sampling};
    struct internvl_error err = {0};
    int status = EXIT_OK;
    if (!(o->sampling.set & INTERNVL_TEMPERATURE))
        e.sampling.temperature = 0;
    if (!(o->sampling.set & INTERNVL_MAX_TOKENS))
        e.sampling.max_tokens = 64;
    e.sampling.set |= INTERNVL_TEMPERATURE | INTERNVL_MAX_TOKENS;
    if (evaluate(&e, &err))
        status = command_fail(o, &err);
    if (interrupt_seen())
        status = EXIT_INTERRUPTED;
    internvl_queue_close(e.queue);
    if (e.owns_client)
        internvl_close(e.client);
    command_endpoint_release(&e.endpoint);
    eval_results_release(&e.results);
    eval_set_release(&e.set);
    free(e.todo);
    free(e.n_tries);
    return status;
}
