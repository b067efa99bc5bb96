/*
 * Score: log-probabilities of given continuations. One teacher-forced pass a continuation, all of
 * one prompt, whose tiles are decoded once and shared.
 *
 * The first pass runs alone (its pictures are encoded once and cached by content), the others up to
 * PASSES_AT_ONCE together, so that one call neither fills the queue nor waits for each. Made on the
 * completion thread, filled in by a processor thread, then the completion thread's; frees itself.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/gateway/gateway_state.h"
#include "daemon/gateway/reply.h"
#include "kernels/log.h"

#define PASSES_AT_ONCE 8

struct pass {
    int32_t *ids, *targets; // [n_ids] in the prompt's arena
    int32_t n_ids, n_scored;
    struct stream *stream; // NULL: not begun
    int is_done;
    uint32_t *scored_ids; // [n_scored] in the prompt's arena
    float *logprobs;      // [n_scored]
    uint32_t *ranks;      // [n_scored]
    int32_t n_taken;
};

struct score {
    struct gateway *gateway;
    struct rpc_call *call;
    atomic_int is_handed; // the processor thread is done with it: what follows may be read

    struct request *prompt; // never submitted: ids, tiles and everything else lives in its arena
    struct pass *passes;    // [n_passes]
    int n_passes, has_labels;
    size_t request_bytes; // counted in the gateway's

    /* the completion thread's */
    int n_begun, n_done, is_closed, is_finished;
    struct usage usage; // of the last pass
    struct timing timing;
};

static void score_free(struct score *s)
{
    rpc_call_listen(s->call, NULL, NULL);
    for (int i = 0; i < s->n_begun; i++) {
        stream_mute(s->passes[i].stream);
        stream_unref(s->passes[i].stream);
    }
    atomic_fetch_sub(&s->gateway->request_bytes, s->request_bytes);
    request_free(s->prompt);
    rpc_call_unref(s->call);
    free(s);
}

/* ---- the processor thread: from the message to passes ---- */

/* Ids of one continuation. */
static int continuation_ids(const struct gateway *g, const Internvl__V1__Continuation *w, int index,
                            struct arena *a, int32_t **ids, int64_t *n_ids, struct error *err)
{
    *n_ids = 0;
    if (w->input_case == INTERNVL__V1__CONTINUATION__INPUT_TEXT) {
        if (tokenizer_encode(processor_tokenizer(g->processor), w->text, strlen(w->text),
                             g->convert.max_model_len, a, ids, n_ids, err)) {
            if (err->code == ERROR_OUT_OF_RANGE)
                error_set(err, ERROR_INVALID_ARGUMENT,
                          "continuations[%d] has more than %d tokens (--max-model-len)", index,
                          g->convert.max_model_len);
            return -1;
        }
    } else if (w->input_case == INTERNVL__V1__CONTINUATION__INPUT_TOKEN_IDS) {
        *n_ids = (int64_t)w->token_ids->n_ids;
        *ids = arena_alloc(a, w->token_ids->n_ids, sizeof(**ids));
        if (!*ids)
            return request_out_of_memory(err);
        for (int64_t i = 0; i < *n_ids; i++) {
            if (w->token_ids->ids[i] >= (uint32_t)g->model->text.vocab_size)
                return error_set(err, ERROR_INVALID_ARGUMENT,
                                 "continuations[%d].token_ids[%lld] is %u; the vocabulary has %d "
                                 "ids",
                                 index, (long long)i, w->token_ids->ids[i],
                                 g->model->text.vocab_size);
            (*ids)[i] = (int32_t)w->token_ids->ids[i];
        }
    }
    if (*n_ids == 0)
        return error_set(err, ERROR_INVALID_ARGUMENT, "continuations[%d] is empty", index);
    return 0;
}

static int pass_alloc(struct pass *p, int32_t n_ids, int32_t n_scored, struct arena *a,
                      struct error *err)
{
    p->n_ids = n_ids;
    p->n_scored = n_scored;
    p->ids = arena_alloc(a, (size_t)n_ids, sizeof(*p->ids));
    p->targets = arena_alloc(a, (size_t)n_ids, sizeof(*p->targets));
    p->scored_ids = arena_alloc(a, (size_t)n_scored, sizeof(*p->scored_ids));
    p->logprobs = arena_alloc(a, (size_t)n_scored, sizeof(*p->logprobs));
    p->ranks = arena_alloc(a, (size_t)n_scored, sizeof(*p->ranks));
    if (!p->ids || !p->targets || !p->scored_ids || !p->logprobs || !p->ranks)
        return request_out_of_memory(err);
    return 0;
}

/* The prompt, then all of the continuation but its last token: row i predicts token i + 1. */
static int make_pass(const struct gateway *g, const Internvl__V1__Continuation *w, int index,
                     struct request *prompt, struct arena *scratch, struct pass *p,
                     struct error *err)
{
    int32_t n_prompt = prompt->n_ids, *ids = NULL;
    int64_t n;

    if (continuation_ids(g, w, index, scratch, &ids, &n, err))
        return -1;
    if (n > g->convert.max_model_len - n_prompt)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "continuations[%d] has %lld tokens and the prompt %d; together they may "
                         "be %d (--max-model-len)",
                         index, (long long)n, n_prompt, g->convert.max_model_len);
    if (pass_alloc(p, n_prompt + (int32_t)n - 1, (int32_t)n, &prompt->arena, err))
        return -1;
    memcpy(p->ids, prompt->ids, (size_t)n_prompt * sizeof(*p->ids));
    memcpy(p->ids + n_prompt, ids, (size_t)(n - 1) * sizeof(*p->ids));
    for (int32_t i = 0; i < n_prompt - 1; i++)
        p->targets[i] = -1;
    memcpy(p->targets + n_prompt - 1, ids, (size_t)n * sizeof(*p->targets));
    for (int64_t i = 0; i < n; i++)
        p->scored_ids[i] = (uint32_t)ids[i];
    return 0;
}

static int make_label_pass(const struct request *prompt, struct arena *a, struct pass *p,
                           struct error *err)
{
    int32_t n_scored = 0;

    for (int32_t i = 0; i < prompt->n_ids; i++)
        n_scored += prompt->targets[i] >= 0;
    if (n_scored == 0)
        return error_set(err, ERROR_INVALID_ARGUMENT, "labels are all -100, or only the first");
    if (pass_alloc(p, prompt->n_ids, n_scored, a, err))
        return -1;
    memcpy(p->ids, prompt->ids, (size_t)p->n_ids * sizeof(*p->ids));
    memcpy(p->targets, prompt->targets, (size_t)p->n_ids * sizeof(*p->targets));
    for (int32_t i = 0, k = 0; i < p->n_ids; i++)
        if (p->targets[i] >= 0)
            p->scored_ids[k++] = (uint32_t)p->targets[i];
    return 0;
}

static int make_passes(struct score *s, const Internvl__V1__ScoreRequest *wire,
                       struct arena *scratch, struct error *err)
{
    struct gateway *g = s->gateway;
    struct request *r = s->prompt;
    size_t n = wire->n_continuations;

    if (n && wire->n_labels)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "continuations and labels exclude each other");
    if (!n && !wire->n_labels)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "there is nothing to score: give "
                         "continuations or labels");
    if (n > LIMIT_CONTINUATIONS)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "there are %zu continuations; the limit is %d", n, LIMIT_CONTINUATIONS);
    s->has_labels = n == 0;
    s->n_passes = n ? (int)n : 1;
    s->passes = arena_alloc(&r->arena, (size_t)s->n_passes, sizeof(*s->passes));
    if (!s->passes)
        return request_out_of_memory(err);
    if (s->has_labels)
        return convert_labels(&g->convert, wire->labels, wire->n_labels, r, err) ||
                       make_label_pass(r, &r->arena, &s->passes[0], err)
                   ? -1
                   : 0;
    for (int i = 0; i < s->n_passes; i++)
        if (make_pass(g, wire->continuations[i], i, r, scratch, &s->passes[i], err))
            return -1;
    return 0;
}

static int take_room(struct score *s, struct error *err)
{
    atomic_size_t *total = &s->gateway->request_bytes;
    size_t n_bytes = s->prompt->arena.used_bytes;

    if (atomic_fetch_add(total, n_bytes) + n_bytes > MAX_REQUEST_BYTES) {
        atomic_fetch_sub(total, n_bytes);
        return error_set(err, ERROR_RESOURCE_EXHAUSTED,
                         "the prompts of all open requests together need more than %zu MiB",
                         MAX_REQUEST_BYTES >> 20);
    }
    s->request_bytes = n_bytes;
    return 0;
}

static void hand_over(struct score *s)
{
    struct rpc_call *c = rpc_call_ref(s->call); // the completion thread may free s at once

    atomic_store(&s->is_handed, 1);
    rpc_wake(c);
    rpc_call_unref(c);
}

static void score_refuse(struct score *s, const struct error *err)
{
    s->is_finished = 1;
    rpc_finish(s->call, err, NULL);
    hand_over(s);
}

/* A pass is made of ids. */
static int check_has_ids(const struct request *prompt, struct error *err)
{
    if (prompt->inputs_embeds)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "Score needs the prompt's ids; Forward takes inputs_embeds with labels");
    return 0;
}

static void score_prepare(void *arg)
{
    struct score *s = arg;
    struct gateway *g = s->gateway;
    struct arena scratch = {0};
    struct error err = {0};
    struct media_plan *media;
    int n_media;
    const Internvl__V1__ScoreRequest *wire;

    if (rpc_check_waiting(s->call, &err))
        goto out;
    wire = (Internvl__V1__ScoreRequest *)rpc_take_message(
        s->call, &internvl__v1__score_request__descriptor, convert_max_elements(&g->convert),
        &scratch, &err);
    if (!wire)
        goto out;
    s->prompt = request_new(convert_request_budget(&g->convert));
    if (convert_request_id(wire->request_id, s->prompt->id, &err) ||
        prompt_prepare(g, wire->prompt, &scratch, s->prompt, &media, &n_media, &err) ||
        check_has_ids(s->prompt, &err) || make_passes(s, wire, &scratch, &err) ||
        take_room(s, &err))
        goto out;
out:
    arena_release(&scratch);
    if (err.code)
        score_refuse(s, &err);
    else
        hand_over(s);
}

/* ---- the completion thread: passes to the engine, and back ---- */

static int begin_pass(struct score *s, struct pass *p, struct error *err)
{
    const struct request *prompt = s->prompt;
    size_t n_bytes = (size_t)p->n_ids * sizeof(*p->ids);
    struct request *r = request_new(64 * n_bytes + ((size_t)1 << 20));

    memcpy(r->id, prompt->id, sizeof(r->id));
    r->ids = p->ids; // these outlive the pass: the prompt's arena goes last
    r->targets = p->targets;
    r->n_ids = p->n_ids;
    r->image_token_id = prompt->image_token_id;
    r->n_image_tokens = prompt->n_image_tokens;
    r->pixel_dtype = prompt->pixel_dtype;
    r->pixels = prompt->pixels;
    r->n_tiles = prompt->n_tiles;
    r->channels = prompt->channels;
    r->height = prompt->height;
    r->width = prompt->width;
    r->n_features_per_tile = prompt->n_features_per_tile;
    r->max_tokens = 0;
    r->media_ns = prompt->media_ns;
    r->arrival_ns = rpc_call_arrival_ns(s->call);
    r->deadline_ns = rpc_call_deadline_ns(s->call);
    r->stream = stream_new(r, NULL, rpc_wake, s->call);
    p->stream = stream_ref(r->stream);
    s->n_begun++;
    if (engine_submit(s->gateway->engine, r, err)) {
        request_free(r);
        p->is_done = 1;
        s->n_done++;
        return -1;
    }
    return 0;
}

static int take_logprobs(struct pass *p, const struct stream_delta *d, struct error *err)
{
    if (d->error.code) {
        *err = d->error;
        return -1;
    }
    for (int32_t i = 0; i < d->n_targets && p->n_taken < p->n_scored; i++) {
        p->logprobs[p->n_taken] = d->targets[i].logprob;
        p->ranks[p->n_taken++] = (uint32_t)d->targets[i].rank;
    }
    if (d->done && p->n_taken != p->n_scored)
        return error_set(err, ERROR_INTERNAL, "%d of %d tokens were scored", p->n_taken,
                         p->n_scored);
    return 0;
}

/* Takes what the streams have. */
static int drain_passes(struct score *s, struct error *err)
{
    struct stream_delta d;
    int rc = 0;

    for (int i = 0; i < s->n_begun; i++) {
        struct pass *p = &s->passes[i];

        while (!p->is_done && stream_drain(p->stream, &d)) {
            if (d.done) {
                p->is_done = 1;
                s->n_done++;
                s->usage = d.usage;
                s->timing = d.timing;
            }
            if (rc == 0)
                rc = take_logprobs(p, &d, err);
            stream_delta_release(&d);
        }
    }
    return rc;
}

static void wire_pass(const struct pass *p, Internvl__V1__ContinuationScore *out)
{
    internvl__v1__continuation_score__init(out);
    out->n_token_ids = out->n_token_logprobs = out->n_token_ranks = (size_t)p->n_scored;
    out->token_ids = p->scored_ids;
    out->token_logprobs = p->logprobs;
    out->token_ranks = p->ranks;
    out->is_greedy = 1;
    for (int32_t i = 0; i < p->n_scored; i++) {
        out->sum_logprob += p->logprobs[i];
        out->is_greedy &= p->ranks[i] == 1;
    }
    out->mean_logprob = out->sum_logprob / p->n_scored;
}

static void score_finish(struct score *s)
{
    Internvl__V1__ScoreResponse response = INTERNVL__V1__SCORE_RESPONSE__INIT;
    size_t n = (size_t)s->n_passes;
    Internvl__V1__ContinuationScore *scores = xcalloc(n, sizeof(*scores));
    Internvl__V1__ContinuationScore **pointers = xcalloc(n, sizeof(*pointers));
    Internvl__V1__Usage usage;
    Internvl__V1__Timing timing;

    s->usage.prompt_tokens = s->prompt->n_ids;
    s->usage.completion_tokens = 0;
    for (size_t i = 0; i < n; i++) {
        wire_pass(&s->passes[i], &scores[i]);
        pointers[i] = &scores[i];
        s->usage.completion_tokens += s->passes[i].n_scored;
    }
    response.request_id = s->prompt->id;
    response.n_scores = n;
    response.scores = pointers;
    if (s->has_labels) {
        response._loss_case = INTERNVL__V1__SCORE_RESPONSE___LOSS_LOSS;
        response.loss = -scores[0].mean_logprob;
    }
    reply_usage(&usage, &s->usage);
    reply_timing(&timing, &s->timing);
    response.usage = &usage;
    response.timing = &timing;
    s->is_finished = 1;
    rpc_finish(s->call, NULL, &response.base);
    free(pointers);
    free(scores);
}

static void cancel_passes(struct score *s)
{
    for (int i = 0; i < s->n_begun; i++)
        if (!s->passes[i].is_done)
            engine_cancel(s->gateway->engine, s->passes[i].stream);
}

static void score_step(void *state)
{
    struct score *s = state;
    struct error err = {0};
    int rc;

    if (!atomic_load(&s->is_handed))
        return;
    rc = drain_passes(s, &err);
    while (rc == 0 && !s->is_closed && !s->is_finished && s->n_begun < s->n_passes &&
           s->n_begun - s->n_done < (s->n_done ? PASSES_AT_ONCE : 1))
        rc = begin_pass(s, &s->passes[s->n_begun], &err);
    if (rc && !s->is_finished) {
        s->is_finished = 1;
        rpc_finish(s->call, &err, NULL);
        cancel_passes(s);
    }
    if (!s->is_finished && !s->is_closed && s->n_done == s->n_passes)
        score_finish(s);
    if (!s->is_closed)
        return;
    if (s->n_done < s->n_begun) { // wait for their end, of which the streams will tell
        cancel_passes(s);
        return;
    }
    rpc_finish(s->call, NULL, NULL);
    score_free(s);
}

static void score_closed(void *state, enum error_code why)
{
    struct score *s = state;

    (void)why;
    s->is_closed = 1;
    score_step(s);
}

void score_message(void *arg, struct rpc_call *c)
{
    static const struct rpc_events events = {score_step, score_closed};
    struct gateway *g = arg;
    struct score *s = xcalloc(1, sizeof(*s));
    struct error err;

    s->gateway = g;
    s->call = rpc_call_ref(c);
    atomic_init(&s->is_handed, 0);
    rpc_call_listen(c, &events, s);
    if (work_queue_submit(g->work, score_prepare, s, rpc_message_bytes(c), &err))
        score_refuse(s, &err);
}
