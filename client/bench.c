/*
 * internvl bench: how fast a daemon answers, and how evenly.
 *
 * Closed loop (--concurrency requests always in flight) or open loop (--request-rate, Poisson
 * arrivals that wait for nobody). Requests come from a file of evaluate's format, or are made up:
 * every one has other words, so that no cache of prompts helps. Times are this client's, from the
 * call's start; requests of the warm-up count for nothing. Owns the clock and the figures; calls
 * are the library's.
 */
#include <errno.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/command.h"
#include "client/conversation.h"
#include "client/eval_set.h"
#include "client/interrupt.h"
#include "client/json_out.h"
#include "client/progress.h"
#include "client/rpc.h"

#define WAIT_MS 100

struct series {     // milliseconds
    double *values; // [n]
    size_t n;
};

struct bench {
    const struct command_options *options;
    struct internvl_queue *queue;
    struct internvl_sampling sampling;
    struct eval_set set; // empty: made-up requests
    struct series first_token, gap, per_token, total;
    size_t n_started, n_in_flight, n_over, n_failed, n_all;
    uint64_t n_prompt_tokens, n_tokens; // of measured requests
    int64_t begin_ns, end_ns;           // of the measured part
    struct internvl_error first_error;
};

struct timed { // one request in flight
    struct bench *bench;
    int is_measured;
    int64_t start_ns, first_ns, last_ns;
    uint32_t n_prompt_tokens;
    uint64_t n_tokens;
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void series_add(struct series *s, int64_t ns)
{
    s->values = command_grow(s->values, s->n, sizeof(*s->values));
    s->values[s->n++] = (double)ns / 1e6;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Of a sorted series: the smallest value that a share p of all does not exceed. */
static double percentile(const struct series *s, double p)
{
    if (s->n == 0)
        return 0;
    size_t i = (size_t)ceil(p * (double)s->n);
    return s->values[i > 0 ? i - 1 : 0];
}

static double mean(const struct series *s)
{
    double sum = 0;
    for (size_t i = 0; i < s->n; i++)
        sum += s->values[i];
    return s->n ? sum / (double)s->n : 0;
}

/* ---- one request ---- */

static int on_event(void *arg, const struct internvl_event *event)
{
    struct timed *t = arg;
    if (event->kind == INTERNVL_STARTED)
        t->n_prompt_tokens = event->started.prompt_tokens;
    if (event->kind != INTERNVL_DELTA || event->delta.n_token_ids == 0)
        return 0;
    int64_t now = now_ns();
    if (t->first_ns == 0)
        t->first_ns = now;
    else if (t->is_measured)
        series_add(&t->bench->gap, now - t->last_ns);
    t->last_ns = now;
    t->n_tokens += event->delta.n_token_ids;
    return 0;
}

static void on_end(void *arg, const struct internvl_error *status)
{
    struct timed *t = arg;
    struct bench *b = t->bench;
    int64_t now = now_ns();
    b->n_in_flight--;
    b->n_over++;
    if (status->code != INTERNVL_OK) {
        if (b->n_failed++ == 0)
            b->first_error = *status;
    } else if (t->is_measured) {
        b->n_prompt_tokens += t->n_prompt_tokens;
        b->n_tokens += t->n_tokens;
        series_add(&b->total, now - t->start_ns);
        if (t->first_ns)
            series_add(&b->first_token, t->first_ns - t->start_ns);
        if (t->n_tokens > 1)
            series_add(&b->per_token, (t->last_ns - t->first_ns) / (int64_t)(t->n_tokens - 1));
        b->end_ns = now;
    }
    free(t);
}

/* Words that no other request has: the first one is the request's number. */
static int make_up(const struct bench *b, struct conversation *c, struct internvl_error *err)
{
    size_t n_words = b->options->input_len, n = 0, capacity = 16 * (n_words + 1);
    char *text = command_alloc(capacity, 1);
    for (size_t i = 0; i < n_words; i++)
        n += (size_t)snprintf(text + n, capacity - n, "%s%zu", i ? " " : "",
                              b->n_started * 7919 % 100003 + i);
    int rc = conversation_from_options(c, b->options, text, err);
    free(text);
    return rc;
}

static int start_request(struct bench *b, struct internvl_error *err)
{
    struct conversation conversation = {0};
    struct internvl_call_options call = command_call_options(b->options);
    int rc =
        b->set.n_questions
            ? eval_set_conversation(&b->set, &b->set.questions[b->n_started % b->set.n_questions],
                                    &conversation, b->options, err)
            : make_up(b, &conversation, err);
    if (rc == 0) {
        struct internvl_generate_request request =
            command_generate_request(b->options, conversation_prompt(&conversation));
        request.sampling = b->sampling;
        struct timed *t = command_alloc(1, sizeof(*t));
        *t = (struct timed){
            .bench = b, .is_measured = b->n_started >= b->options->warm_up, .start_ns = now_ns()};
        if (t->is_measured && b->begin_ns == 0)
            b->begin_ns = t->start_ns;
        rc = internvl_generate_start(b->queue, &request, &call, on_event, on_end, t, err);
        if (rc)
            free(t);
    }
    conversation_release(&conversation);
    b->n_started++;
    b->n_in_flight += rc == 0;
    return rc;
}

/* ---- the load ---- */

/* Seconds between two arrivals of a Poisson process. */
static int64_t next_gap_ns(double rate)
{
    return (int64_t)(-log(1 - drand48()) / rate * 1e9);
}

static int run(struct bench *b, struct progress *progress, struct internvl_error *err)
{
    double rate = b->options->request_rate;
    int64_t next_ns = now_ns();
    srand48(1); // the same arrivals every time
    while ((b->n_started < b->n_all || b->n_in_flight > 0) && !interrupt_seen()) {
        while (b->n_started < b->n_all &&
               (rate > 0 ? now_ns() >= next_ns : b->n_in_flight < b->options->concurrency)) {
            if (start_request(b, err))
                return -1;
            next_ns += rate > 0 ? next_gap_ns(rate) : 0;
        }
        int64_t wait_ms = WAIT_MS;
        if (rate > 0 && b->n_started < b->n_all && (next_ns - now_ns()) / 1000000 < wait_ms)
            wait_ms = next_ns > now_ns() ? (next_ns - now_ns()) / 1000000 : 0;
        if (b->n_in_flight > 0)
            internvl_queue_poll(b->queue, (int)wait_ms);
        else
            poll(NULL, 0, (int)wait_ms);
        progress_show(progress, b->n_over, "");
    }
    return 0;
}

/* ---- figures ---- */

static const double shares[] = {0.5, 0.9, 0.99};
static const char *const share_names[] = {"p50", "p90", "p99"};
#define N_SHARES (sizeof(shares) / sizeof(shares[0]))

struct row {
    const char *name, *key;
    struct series *series;
};
#define N_ROWS 4

static void make_rows(struct bench *b, struct row rows[N_ROWS])
{
    const struct row all[N_ROWS] = {{"time to first token", "ttft_ms", &b->first_token},
                                    {"between messages", "itl_ms", &b->gap},
                                    {"per output token", "tpot_ms", &b->per_token},
                                    {"end to end", "e2e_ms", &b->total}};
    memcpy(rows, all, sizeof(all));
    for (int i = 0; i < N_ROWS; i++)
        if (rows[i].series->n)
            qsort(rows[i].series->values, rows[i].series->n, sizeof(double), compare_doubles);
}

static double seconds(const struct bench *b)
{
    return b->end_ns > b->begin_ns ? (double)(b->end_ns - b->begin_ns) / 1e9 : 0;
}

static double per_second(const struct bench *b, double n)
{
    return seconds(b) > 0 ? n / seconds(b) : 0;
}

static void write_table(const struct bench *b, const struct row rows[N_ROWS])
{
    printf("%zu requests in %.2f s, %zu failed: %.2f requests/s, %.1f output tokens/s, "
           "%.1f prompt tokens/s\n",
           b->total.n, seconds(b), b->n_failed, per_second(b, (double)b->total.n),
           per_second(b, (double)b->n_tokens), per_second(b, (double)b->n_prompt_tokens));
    printf("%-22s %10s %10s %10s %10s\n", "milliseconds", "mean", "p50", "p90", "p99");
    for (int i = 0; i < N_ROWS; i++) {
        printf("%-22s %10.2f", rows[i].name, mean(rows[i].series));
        for (size_t k = 0; k < N_SHARES; k++)
            printf(" %10.2f", percentile(rows[i].series, shares[k]));
        printf("\n");
    }
}

static void write_json(const struct bench *b, const struct row rows[N_ROWS])
{
    struct json_out j = {.file = stdout};
    json_object_begin(&j, NULL);
    json_uint(&j, "concurrency", b->options->concurrency);
    json_double(&j, "request_rate", b->options->request_rate);
    json_uint(&j, "requests", b->total.n);
    json_uint(&j, "failed", b->n_failed);
    json_double(&j, "seconds", seconds(b));
    json_uint(&j, "prompt_tokens", b->n_prompt_tokens);
    json_uint(&j, "output_tokens", b->n_tokens);
    json_double(&j, "requests_per_second", per_second(b, (double)b->total.n));
    json_double(&j, "output_tokens_per_second", per_second(b, (double)b->n_tokens));
    for (int i = 0; i < N_ROWS; i++) {
        json_object_begin(&j, rows[i].key);
        json_double(&j, "mean", mean(rows[i].series));
        for (size_t k = 0; k < N_SHARES; k++)
            json_double(&j, share_names[k], percentile(rows[i].series, shares[k]));
        json_object_end(&j);
    }
    json_object_end(&j);
    json_end_line(&j);
}

/* Adds a line, after a header where the file is new. */
static int write_csv(const struct bench *b, const struct row rows[N_ROWS],
                     struct internvl_error *err)
{
    FILE *f = fopen(b->options->csv, "a");
    if (f && ftell(f) == 0) {
        fprintf(f, "concurrency,request_rate,requests,failed,seconds,requests_per_second,"
                   "output_tokens_per_second");
        for (int i = 0; i < N_ROWS; i++)
            for (size_t k = 0; k < N_SHARES; k++)
                fprintf(f, ",%s_%s", rows[i].key, share_names[k]);
        fprintf(f, "\n");
    }
    if (f) {
        fprintf(f, "%u,%g,%zu,%zu,%.3f,%.3f,%.2f", b->options->concurrency,
                b->options->request_rate, b->total.n, b->n_failed, seconds(b),
                per_second(b, (double)b->total.n), per_second(b, (double)b->n_tokens));
        for (int i = 0; i < N_ROWS; i++)
            for (size_t k = 0; k < N_SHARES; k++)
                fprintf(f, ",%.3f", percentile(rows[i].series, shares[k]));
        fprintf(f, "\n");
    }
    if (!f || fclose(f) != 0)
        return rpc_error(err, INTERNVL_INTERNAL, "%s: %s", b->options->csv, strerror(errno));
    return 0;
}

/* ---- the command ---- */

static int measure(struct bench *b, struct internvl_error *err)
{
    const struct command_options *o = b->options;
    struct progress progress;
    struct row rows[N_ROWS];
    if (o->n_arguments && eval_set_load(&b->set, o->arguments[0], o->limit, SCORE_AUTO, err))
        return -1;
    progress_begin(&progress, "bench", b->n_all);
    interrupt_set_busy(1);
    int rc = run(b, &progress, err);
    progress_end(&progress);
    if (rc)
        return rc;
    make_rows(b, rows);
    if (o->json)
        write_json(b, rows);
    else
        write_table(b, rows);
    if (o->csv && write_csv(b, rows, err))
        return -1;
    if (b->n_failed)
        return rpc_error(err, b->first_error.code, "%zu of %zu requests failed, the first with: %s",
                         b->n_failed, b->n_all, b->first_error.msg);
    return 0;
}

int command_bench(struct internvl_client *c, const struct command_options *o)
{
    struct bench b = {.options = o, .sampling = o->sampling};
    struct internvl_error err = {0};
    int status = EXIT_OK;
    if (o->n_arguments > 1)
        return command_usage(o, "at most one file of requests");
    if (o->concurrency < 1 || o->concurrency > 4096)
        return command_usage(o, "option --concurrency: %u is not between 1 and 4096",
                             o->concurrency);
    if (o->input_len > 1000000 || o->num_requests < 1 || !(o->request_rate >= 0))
        return command_usage(o, "--input-len, --num-requests or --request-rate is out of range");
    if (!(o->sampling.set & INTERNVL_TEMPERATURE))
        b.sampling.temperature = 0;
    b.sampling.set |= INTERNVL_TEMPERATURE | INTERNVL_MAX_TOKENS;
    if (o->output_len) { // exactly so many
        b.sampling.max_tokens = o->output_len;
        b.sampling.ignore_eos = 1;
    } else if (!(o->sampling.set & INTERNVL_MAX_TOKENS)) {
        b.sampling.max_tokens = 64;
    }
    b.n_all = (size_t)o->num_requests + o->warm_up;
    b.queue = internvl_queue_open(c);
    if (measure(&b, &err))
        status = command_fail(o, &err);
    if (interrupt_seen())
        status = EXIT_INTERRUPTED;
    internvl_queue_close(b.queue);
    eval_set_release(&b.set);
    free(b.first_token.values);
    free(b.gap.values);
    free(b.per_token.values);
    free(b.total.values);
    return status;
}
