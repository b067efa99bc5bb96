/*
 * Streams to wire messages. See reply.h.
 *
 *   reply_step()        whatever woke us: cancel, write, or free
 *   reply_write_next()  one message a time: started, deltas, tensors
 *   reply_finish()      the last message and the status
 */
#include "daemon/gateway/reply.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/gateway/gateway_state.h"
#include "kernels/log.h"
#include "kernels/trace.h"

#define TRACE_FROM_NS 1000 // most looks at a stream find nothing new: no spans of the timeline
#define CHUNK_BYTES ((size_t)1 << 20) // of a tensor, in one message
#define CHUNK_LOGPROBS 2048           // of a prompt, the best included, in one message

struct outgoing { // a tensor on its way
    const struct stream_tensor *tensor;
    const char *name;
    float *pooled; // [n_pooled, the tensor's columns] means of its rows, sent in its place; or NULL
    int n_pooled;
};

struct reply {
    struct gateway *gateway;
    struct rpc_call *call;
    enum reply_kind kind;
    atomic_int is_handed; // the processor thread is done with it: what follows may be read

    struct stream *stream; // NULL: refused
    struct arena arena;    // of what follows
    char id[65];
    uint64_t seed;
    struct media_plan *media; // [n_media]
    int n_media;
    char **stops;           // [n_stops]
    uint32_t outputs;       // enum output
    int32_t *ids, *targets; // [n_ids]; targets NULL without labels
    int32_t n_ids, n_image_tokens, n_target_top;
    float *token_logprobs; // [n_ids] with targets, for Forward: of targets[i]; 0 where none
    size_t request_bytes;  // counted in the gateway's

    /* the completion thread's */
    int is_closed, is_started_sent, is_done; // is_done: the stream has nothing more
    int has_delta, next, is_header_sent;     // `next` candidate or tensor of the delta
    int32_t next_value;                      // of the delta's targets
    int32_t next_position;                   // of the prompt, whose target comes next
    size_t offset;                           // bytes of that tensor already sent
    struct stream_delta delta;
    struct outgoing *tensors; // [n_tensors]
    int n_tensors;
};

static void reply_step(void *state);

static void reply_closed(void *state, enum error_code why)
{
    struct reply *r = state;

    (void)why;
    r->is_closed = 1;
    reply_step(r);
}

struct reply *reply_new(struct gateway *g, struct rpc_call *c, enum reply_kind kind)
{
    static const struct rpc_events events = {reply_step, reply_closed};
    struct reply *r = xcalloc(1, sizeof(*r));

    r->gateway = g;
    r->call = rpc_call_ref(c);
    r->kind = kind;
    atomic_init(&r->is_handed, 0);
    rpc_call_listen(c, &events, r);
    return r;
}

struct gateway *reply_gateway(const struct reply *r)
{
    return r->gateway;
}

struct rpc_call *reply_call(const struct reply *r)
{
    return r->call;
}

static void reply_free(struct reply *r)
{
    rpc_call_listen(r->call, NULL, NULL);
    if (r->stream)
        stream_mute(r->stream);
    stream_unref(r->stream);
    if (r->has_delta)
        stream_delta_release(&r->delta);
    for (int i = 0; i < r->n_tensors; i++)
        free(r->tensors[i].pooled);
    free(r->tensors);
    atomic_fetch_sub(&r->gateway->request_bytes, r->request_bytes);
    arena_release(&r->arena);
    rpc_call_unref(r->call);
    free(r);
}

/* ---- the processor thread's side ---- */

static void hand_over(struct reply *r)
{
    struct rpc_call *c = rpc_call_ref(r->call); // the completion thread may free r at once

    atomic_store(&r->is_handed, 1);
    rpc_wake(c);
    rpc_call_unref(c);
}

void reply_refuse(struct reply *r, const struct error *err)
{
    rpc_finish(r->call, err, NULL);
    hand_over(r);
}

/* What the answer needs of a request that will belong to the engine. */
static void keep_request(struct reply *r, const struct request *q, const struct media_plan *media,
                         int n_media)
{
    struct arena *a = &r->arena;
    size_t n_ids = (size_t)q->n_ids;

    arena_init(a, SIZE_MAX / 4); // of sizes that the request's own budget has bounded
    memcpy(r->id, q->id, sizeof(r->id));
    r->seed = q->sampling.seed;
    r->n_ids = q->n_ids;
    r->n_image_tokens = q->n_image_tokens;
    r->media = arena_alloc(a, (size_t)n_media, sizeof(*r->media));
    if (n_media)
        memcpy(r->media, media, (size_t)n_media * sizeof(*media));
    r->n_media = n_media;
    r->stops = arena_alloc(a, (size_t)q->n_stop_strings, sizeof(*r->stops));
    for (int i = 0; i < q->n_stop_strings; i++)
        r->stops[i] =
            arena_strndup(a, q->stop_strings[i].bytes, (size_t)q->stop_strings[i].n_bytes);
    if (r->kind == REPLY_FORWARD && !q->inputs_embeds) {
        r->ids = arena_alloc(a, n_ids, sizeof(*r->ids));
        memcpy(r->ids, q->ids, n_ids * sizeof(*r->ids));
    }
    if (q->targets) {
        r->targets = arena_alloc(a, n_ids, sizeof(*r->targets));
        memcpy(r->targets, q->targets, n_ids * sizeof(*r->targets));
        r->token_logprobs = arena_alloc(a, n_ids, sizeof(*r->token_logprobs));
        memset(r->token_logprobs, 0, n_ids * sizeof(*r->token_logprobs));
        r->n_target_top = q->n_target_top;
    }
}

/* What a reader that does not read can make gather in the stream, before the first token. */
static size_t targets_bytes(const struct request *q)
{
    size_t n_each = 1 + (size_t)q->n_target_top;

    return q->targets ? (size_t)q->n_ids * n_each * sizeof(struct token_logprob) : 0;
}

/* Room for the request among all others; given back by reply_free(). */
static int take_room(struct reply *r, size_t n_bytes, struct error *err)
{
    atomic_size_t *total = &r->gateway->request_bytes;

    if (atomic_fetch_add(total, n_bytes) + n_bytes > MAX_REQUEST_BYTES) {
        atomic_fetch_sub(total, n_bytes);
        return error_set(err, ERROR_RESOURCE_EXHAUSTED,
                         "the prompts of all open requests together need more than %zu MiB",
                         MAX_REQUEST_BYTES >> 20);
    }
    r->request_bytes = n_bytes;
    return 0;
}

void reply_submit(struct reply *r, struct request *request, const struct media_plan *media,
                  int n_media, uint32_t outputs)
{
    struct gateway *g = r->gateway;
    struct error err = {0};

    keep_request(r, request, media, n_media);
    r->outputs = outputs;
    request->arrival_ns = rpc_call_arrival_ns(r->call);
    request->deadline_ns = rpc_call_deadline_ns(r->call);
    request->stream = stream_new(request, processor_tokenizer(g->processor), rpc_wake, r->call);
    stream_set_interval(request->stream, g->options->stream_interval);
    r->stream = stream_ref(request->stream);
    if (take_room(r, request->arena.used_bytes + targets_bytes(request), &err) ||
        engine_submit(g->engine, request, &err)) {
        request_free(request);
        stream_mute(r->stream);
        stream_unref(r->stream);
        r->stream = NULL;
        rpc_finish(r->call, &err, NULL);
    }
    hand_over(r);
}

/* ---- Generate ---- */

void reply_media_plan(Internvl__V1__MediaPlan *out, const struct media_plan *plan,
                      int tokens_per_tile)
{
    internvl__v1__media_plan__init(out);
    out->width = (uint32_t)plan->width;
    out->height = (uint32_t)plan->height;
    out->grid_columns = (uint32_t)plan->n_columns;
    out->grid_rows = (uint32_t)plan->n_rows;
    out->tiles = (uint32_t)plan->n_tiles;
    out->tokens = (uint32_t)(plan->n_tiles * tokens_per_tile);
}

static void write_started(struct reply *r)
{
    Internvl__V1__GenerateResponse response = INTERNVL__V1__GENERATE_RESPONSE__INIT;
    Internvl__V1__GenerateStarted started = INTERNVL__V1__GENERATE_STARTED__INIT;
    size_t n_media = (size_t)r->n_media;
    Internvl__V1__MediaPlan *plans = xcalloc(n_media, sizeof(*plans));
    Internvl__V1__MediaPlan **pointers = xcalloc(n_media, sizeof(*pointers));

    for (size_t i = 0; i < n_media; i++) {
        reply_media_plan(&plans[i], &r->media[i], r->gateway->model->n_features_per_tile);
        pointers[i] = &plans[i];
    }
    started.request_id = r->id;
    started.prompt_tokens = (uint32_t)r->n_ids;
    started.image_tokens = (uint32_t)r->n_image_tokens;
    started.seed = r->seed;
    started.n_media = n_media;
    started.media = pointers;
    response.event_case = INTERNVL__V1__GENERATE_RESPONSE__EVENT_STARTED;
    response.started = &started;
    rpc_write(r->call, &response.base);
    free(pointers);
    free(plans);
}

static void wire_logprob(const struct reply *r, Internvl__V1__TokenLogprob *out,
                         const struct token_logprob *t)
{
    size_t n = 0;
    const char *bytes =
        tokenizer_token_bytes(processor_tokenizer(r->gateway->processor), t->id, &n);

    internvl__v1__token_logprob__init(out);
    out->token_id = (uint32_t)t->id;
    out->logprob = t->logprob;
    out->rank = (uint32_t)t->rank;
    out->token.data = (uint8_t *)(uintptr_t)bytes;
    out->token.len = n;
}

static Internvl__V1__PositionLogprobs *wire_position(const struct reply *r,
                                                     const struct token_logprob *token,
                                                     const struct token_logprob *top, size_t n_top,
                                                     struct arena *a)
{
    Internvl__V1__PositionLogprobs *p = arena_alloc(a, 1, sizeof(*p));
    Internvl__V1__TokenLogprob *tokens = arena_alloc(a, n_top + 1, sizeof(*tokens));

    internvl__v1__position_logprobs__init(p);
    wire_logprob(r, &tokens[n_top], token);
    p->chosen = &tokens[n_top];
    p->n_top = n_top;
    p->top = arena_alloc(a, n_top, sizeof(*p->top));
    for (size_t k = 0; k < n_top; k++) {
        wire_logprob(r, &tokens[k], &top[k]);
        p->top[k] = &tokens[k];
    }
    return p;
}

static Internvl__V1__PositionLogprobs **
wire_logprobs(const struct reply *r, const struct candidate_delta *c, struct arena *a)
{
    Internvl__V1__PositionLogprobs **positions =
        arena_alloc(a, (size_t)c->n_ids, sizeof(*positions));

    for (int32_t i = 0; i < c->n_ids; i++) {
        const struct sample_result *s = &c->logprobs[i];

        positions[i] = wire_position(r, &s->token, s->top, (size_t)s->n_top, a);
    }
    return positions;
}

/* Writes the next of the prompt's log-probabilities in the delta; 0 when none is left. */
static int write_next_targets(struct reply *r)
{
    Internvl__V1__GenerateResponse response = INTERNVL__V1__GENERATE_RESPONSE__INIT;
    Internvl__V1__PromptLogprobs message = INTERNVL__V1__PROMPT_LOGPROBS__INIT;
    int32_t n_each = 1 + r->n_target_top, n = (r->delta.n_targets - r->next_value) / n_each;
    struct arena a;

    if (n == 0)
        return 0;
    n = n < CHUNK_LOGPROBS / n_each ? n : CHUNK_LOGPROBS / n_each;
    arena_init(&a, SIZE_MAX / 4);
    message.first_position = (uint32_t)r->next_position + 1;
    message.n_positions = (size_t)n;
    message.positions = arena_alloc(&a, (size_t)n, sizeof(*message.positions));
    for (int32_t i = 0; i < n; i++) {
        const struct token_logprob *t = r->delta.targets + r->next_value;

        message.positions[i] = wire_position(r, t, t + 1, (size_t)r->n_target_top, &a);
        r->next_value += n_each;
    }
    r->next_position += n;
    response.event_case = INTERNVL__V1__GENERATE_RESPONSE__EVENT_PROMPT_LOGPROBS;
    response.prompt_logprobs = &message;
    rpc_write(r->call, &response.base);
    arena_release(&a);
    return 1;
}

static void write_candidate(struct reply *r, const struct candidate_delta *c)
{
    Internvl__V1__GenerateResponse response = INTERNVL__V1__GENERATE_RESPONSE__INIT;
    Internvl__V1__GenerateDelta delta = INTERNVL__V1__GENERATE_DELTA__INIT;
    struct arena a;

    arena_init(&a, SIZE_MAX / 4);
    delta.candidate = (uint32_t)c->candidate;
    delta.text = c->text;
    delta.n_token_ids = (size_t)c->n_ids;
    delta.token_ids = (uint32_t *)c->ids;
    if (c->logprobs) {
        delta.n_logprobs = (size_t)c->n_ids;
        delta.logprobs = wire_logprobs(r, c, &a);
    }
    if (c->finish == FINISH_STOP)
        delta.finish_reason = INTERNVL__V1__FINISH_REASON__FINISH_REASON_STOP;
    else if (c->finish == FINISH_LENGTH)
        delta.finish_reason = INTERNVL__V1__FINISH_REASON__FINISH_REASON_LENGTH;
    if (c->stop_string >= 0)
        delta.stop_string = r->stops[c->stop_string];
    if (c->finish == FINISH_STOP && c->stop_token_id >= 0) {
        delta._stop_token_id_case = INTERNVL__V1__GENERATE_DELTA___STOP_TOKEN_ID_STOP_TOKEN_ID;
        delta.stop_token_id = (uint32_t)c->stop_token_id;
    }
    response.event_case = INTERNVL__V1__GENERATE_RESPONSE__EVENT_DELTA;
    if (c->has_score) {
        delta._score_case = INTERNVL__V1__GENERATE_DELTA___SCORE_SCORE;
        delta.score = c->score;
    }
    response.delta = &delta;
    rpc_write(r->call, &response.base);
    arena_release(&a);
}

/* Writes the next candidate of the delta that has something; 0 when none is left. */
static int write_next_candidate(struct reply *r)
{
    while (r->next < r->delta.n_candidates) {
        const struct candidate_delta *c = &r->delta.candidates[r->next++];

        if (c->n_ids || c->n_text_bytes || c->finish != FINISH_NONE) {
            write_candidate(r, c);
            return 1;
        }
    }
    return 0;
}

/* ---- Forward ---- */

static int begins_with(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

static int is_asked_for(uint32_t outputs, const char *name)
{
    static const struct {
        const char *prefix;
        uint32_t outputs;
    } table[] = {
        {"logits", OUTPUT_LOGITS},
        {"inputs_embeds", OUTPUT_INPUTS_EMBEDS},
        {"hidden_states.", OUTPUT_HIDDEN_STATES},
        {"cache.", OUTPUT_PAST_KEY_VALUES},
        {"attentions.", OUTPUT_ATTENTIONS},
        {"image_features", OUTPUT_IMAGE_FEATURES},
        {"vision.hidden_states.", OUTPUT_VISION_HIDDEN_STATES},
        {"vision.last_hidden_state", OUTPUT_VISION_HIDDEN_STATES | OUTPUT_VISION_LAST_HIDDEN_STATE},
        {"vision.layer0.", OUTPUT_VISION_LAYER0},
        {"vision.embed.", OUTPUT_VISION_LAYER0},
        {"vision.attentions.", OUTPUT_VISION_ATTENTIONS},
        {"projector.", OUTPUT_PROJECTOR},
    };

    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
        if (begins_with(name, table[i].prefix))
            return (outputs & table[i].outputs) != 0;
    return 0;
}

#define N_POOLED_MAX 8

struct row_range {
    int first, n; // n 0: to the end
};

/* Adds the mean over `rows` of each of n_groups equal parts of `t`, summed in double in their
 * order.
 */
static void add_mean(struct reply *r, const struct stream_tensor *t, const char *name, int n_groups,
                     struct row_range rows)
{
    size_t n_cols = (size_t)t->n_cols;
    int n_in_group = t->n_rows / n_groups, n = rows.n ? rows.n : n_in_group - rows.first;
    double *sum = xcalloc(n_cols, sizeof(*sum));
    float *out = xcalloc((size_t)n_groups * n_cols, sizeof(*out));

    for (int g = 0; g < n_groups; g++) {
        const float *from = t->data + (size_t)(g * n_in_group + rows.first) * n_cols;

        memset(sum, 0, n_cols * sizeof(*sum));
        for (size_t i = 0; i < (size_t)n; i++)
            for (size_t k = 0; k < n_cols; k++)
                sum[k] += from[i * n_cols + k];
        for (size_t k = 0; k < n_cols; k++)
            out[(size_t)g * n_cols + k] = (float)(sum[k] / n);
    }
    free(sum);
    r->tensors[r->n_tensors++] = (struct outgoing){t, name, out, n_groups};
}

static void choose_last_hidden(struct reply *r, const struct stream_tensor *t)
{
    if (r->outputs & OUTPUT_LAST_HIDDEN_STATE)
        r->tensors[r->n_tensors++] = (struct outgoing){t, "last_hidden_state", NULL, 0};
    if (r->outputs & OUTPUT_LAST_TOKEN)
        add_mean(r, t, "last_token", 1, (struct row_range){t->n_rows - 1, 1});
    if (r->outputs & OUTPUT_MEAN)
        add_mean(r, t, "mean", 1, (struct row_range){0, 0});
}

static void choose_features(struct reply *r, const struct stream_tensor *t)
{
    if (r->outputs & OUTPUT_TILE_MEAN)
        add_mean(r, t, "tile_mean", t->n_tiles, (struct row_range){0, 0});
    if (r->outputs & OUTPUT_IMAGE_MEAN)
        add_mean(r, t, "image_mean", 1, (struct row_range){0, 0});
}

/* The pooling that InternVLVisionConfig.use_mean_pooling names, of each tile. */
static void choose_pooler(struct reply *r, const struct stream_tensor *t)
{
    int n_rows = t->n_rows / t->n_tiles, first = r->gateway->model->vision.use_mean_pooling ? 1 : 0;
    struct row_range rows = {first, first ? n_rows - 1 : 1};

    if (r->outputs & OUTPUT_VISION_POOLER)
        add_mean(r, t, "vision.pooler_output", t->n_tiles, rows);
}

/* The tensors of the delta that are sent, in the order they were taken. */
static void choose_tensors(struct reply *r)
{
    char last[CAPTURE_NAME_MAX];

    snprintf(last, sizeof(last), "hidden_states.%d", r->gateway->model->text.n_layers);
    r->tensors = xcalloc((size_t)r->delta.n_tensors + N_POOLED_MAX, sizeof(*r->tensors));
    for (int i = 0; i < r->delta.n_tensors; i++) {
        const struct stream_tensor *t = &r->delta.tensors[i];

        if (is_asked_for(r->outputs, t->name))
            r->tensors[r->n_tensors++] = (struct outgoing){t, t->name, NULL, 0};
        if (strcmp(t->name, last) == 0)
            choose_last_hidden(r, t);
        if (strcmp(t->name, "image_features") == 0)
            choose_features(r, t);
        if (strcmp(t->name, "vision.last_hidden_state") == 0)
            choose_pooler(r, t);
    }
}

/* Shape as the reference has it, without the batch dimension; returns the number of dimensions. */
static size_t wire_shape(const struct reply *r, const struct outgoing *o, uint64_t shape[4])
{
    const struct stream_tensor *t = o->tensor;
    const struct model_config *m = r->gateway->model;
    size_t n = 0;

    if (o->pooled) {
        if (o->n_pooled > 1 || strcmp(o->name, "tile_mean") == 0 ||
            strcmp(o->name, "vision.pooler_output") == 0)
            shape[n++] = (uint64_t)o->n_pooled;
        shape[n++] = (uint64_t)t->n_cols;
        return n;
    }
    if (t->n_tiles) {
        shape[n++] = (uint64_t)t->n_tiles;
        if (begins_with(t->name, "vision.attentions."))
            shape[n++] = (uint64_t)m->vision.n_heads;
        shape[n] = (uint64_t)(t->n_rows / t->n_tiles);
        if (n == 2)
            shape[n] /= shape[1];
        n++;
    } else if (begins_with(t->name, "attentions.")) {
        shape[n++] = (uint64_t)m->text.n_heads;
        shape[n++] = (uint64_t)t->n_rows / shape[0];
        shape[n++] = (uint64_t)t->n_cols;
        return n;
    } else {
        shape[n++] = (uint64_t)t->n_rows;
        if (begins_with(t->name, "cache."))
            shape[n++] = (uint64_t)m->text.n_kv_heads;
    }
    shape[n] = (uint64_t)t->n_cols;
    if (!t->n_tiles && n == 2)
        shape[n] /= shape[1];
    return n + 1;
}

/* Writes the next header or chunk; 0 when no tensor is left. */
static int write_next_chunk(struct reply *r)
{
    Internvl__V1__ForwardResponse response = INTERNVL__V1__FORWARD_RESPONSE__INIT;
    Internvl__V1__TensorHeader header = INTERNVL__V1__TENSOR_HEADER__INIT;
    uint64_t shape[4];

    if (r->next == r->n_tensors)
        return 0;
    const struct outgoing *o = &r->tensors[r->next];
    const float *data = o->pooled ? o->pooled : o->tensor->data;
    size_t n_rows = (size_t)(o->pooled ? o->n_pooled : o->tensor->n_rows);
    size_t n_bytes = n_rows * (size_t)o->tensor->n_cols * sizeof(float);

    if (!r->is_header_sent) {
        r->is_header_sent = 1;
        header.name = (char *)(uintptr_t)o->name;
        header.n_shape = wire_shape(r, o, shape);
        header.shape = shape;
        header.dtype = "float32";
        response.part_case = INTERNVL__V1__FORWARD_RESPONSE__PART_HEADER;
        response.header = &header;
    } else {
        size_t n = n_bytes - r->offset < CHUNK_BYTES ? n_bytes - r->offset : CHUNK_BYTES;

        response.part_case = INTERNVL__V1__FORWARD_RESPONSE__PART_DATA;
        response.data.data = (uint8_t *)(uintptr_t)data + r->offset;
        response.data.len = n;
        r->offset += n;
    }
    if (r->offset == n_bytes) {
        r->next++;
        r->offset = 0;
        r->is_header_sent = 0;
    }
    rpc_write(r->call, &response.base);
    return 1;
}

/* ---- the end ---- */

void reply_usage(Internvl__V1__Usage *out, const struct usage *u)
{
    internvl__v1__usage__init(out);
    out->prompt_tokens = (uint32_t)u->prompt_tokens;
    out->image_tokens = (uint32_t)u->image_tokens;
    out->completion_tokens = (uint32_t)u->completion_tokens;
    out->cached_tokens = (uint32_t)u->cached_tokens;
    out->tiles = (uint32_t)u->tiles;
    out->cached_tiles = (uint32_t)u->cached_tiles;
}

void reply_timing(Internvl__V1__Timing *out, const struct timing *t)
{
    internvl__v1__timing__init(out);
    out->queue_us = t->queue_us;
    out->media_us = t->media_us;
    out->vision_us = t->vision_us;
    out->prefill_us = t->prefill_us;
    out->first_token_us = t->first_token_us;
    out->total_us = t->total_us;
    out->preemptions = t->preemptions;
}

static void finish_generate(struct reply *r)
{
    Internvl__V1__GenerateResponse response = INTERNVL__V1__GENERATE_RESPONSE__INIT;
    Internvl__V1__GenerateDone done = INTERNVL__V1__GENERATE_DONE__INIT;
    Internvl__V1__Usage usage;
    Internvl__V1__Timing timing;

    reply_usage(&usage, &r->delta.usage);
    reply_timing(&timing, &r->delta.timing);
    done.usage = &usage;
    done.timing = &timing;
    response.event_case = INTERNVL__V1__GENERATE_RESPONSE__EVENT_DONE;
    response.done = &done;
    rpc_finish(r->call, NULL, &response.base);
}

/* loss = -mean of the log-probabilities of labels that are not ignored. */
static void wire_loss(const struct reply *r, Internvl__V1__ForwardDone *done)
{
    double sum = 0;
    int64_t n = 0;

    for (int32_t i = 0; r->targets && i < r->n_ids; i++)
        if (r->targets[i] >= 0) {
            sum += r->token_logprobs[i];
            n++;
        }
    done->n_token_logprobs = r->targets ? (size_t)r->n_ids : 0;
    done->token_logprobs = r->token_logprobs;
    if (n) {
        done->_loss_case = INTERNVL__V1__FORWARD_DONE___LOSS_LOSS;
        done->loss = -sum / (double)n;
    }
}

static void finish_forward(struct reply *r)
{
    Internvl__V1__ForwardResponse response = INTERNVL__V1__FORWARD_RESPONSE__INIT;
    Internvl__V1__ForwardDone done = INTERNVL__V1__FORWARD_DONE__INIT;
    Internvl__V1__Usage usage;
    Internvl__V1__Timing timing;

    reply_usage(&usage, &r->delta.usage);
    reply_timing(&timing, &r->delta.timing);
    wire_loss(r, &done);
    done.n_token_ids = r->ids ? (size_t)r->n_ids : 0;
    done.token_ids = (uint32_t *)r->ids;
    done.usage = &usage;
    done.timing = &timing;
    response.part_case = INTERNVL__V1__FORWARD_RESPONSE__PART_DONE;
    response.done = &done;
    rpc_finish(r->call, NULL, &response.base);
}

static void reply_finish(struct reply *r)
{
    const struct error *e = &r->delta.error;

    if (e->code != ERROR_OK)
        rpc_finish(r->call, e, NULL);
    else if (r->kind == REPLY_GENERATE)
        finish_generate(r);
    else
        finish_forward(r);
}

/* A Forward's log-probabilities wait for its end. */
static void keep_targets(struct reply *r)
{
    for (int32_t i = 0; i < r->delta.n_targets; r->next_position++)
        if (r->targets[r->next_position] >= 0)
            r->token_logprobs[r->next_position] = r->delta.targets[i++].logprob;
}

/* The next delta of the stream; 0 when there is none now. */
static int take_delta(struct reply *r)
{
    if (r->is_done || !stream_drain(r->stream, &r->delta))
        return 0;
    r->has_delta = 1;
    r->next = r->next_value = 0;
    r->is_done = r->delta.done;
    if (r->kind == REPLY_FORWARD)
        keep_targets(r);
    if (r->kind == REPLY_FORWARD && r->is_done && r->delta.error.code == ERROR_OK)
        choose_tensors(r);
    return 1;
}

static void drop_delta(struct reply *r)
{
    stream_delta_release(&r->delta);
    r->has_delta = 0;
}

/* Writes until a write is under way, the stream is empty, or the call is finished. */
static void reply_write_next(struct reply *r)
{
    while (rpc_can_write(r->call)) {
        if (!r->has_delta && !take_delta(r))
            return;
        if (r->delta.error.code != ERROR_OK) {
            reply_finish(r);
            return;
        }
        if (r->kind == REPLY_GENERATE && !r->is_started_sent) {
            r->is_started_sent = 1;
            write_started(r);
        } else if (r->kind == REPLY_GENERATE ? !write_next_targets(r) && !write_next_candidate(r)
                                             : !write_next_chunk(r)) {
            if (r->is_done) {
                reply_finish(r);
                return;
            }
            drop_delta(r);
        }
    }
}

static void reply_go_on(struct reply *r)
{
    if (!atomic_load(&r->is_handed))
        return;
    if (r->stream && !r->is_closed)
        reply_write_next(r);
    if (!r->is_closed)
        return;
    if (r->has_delta)
        drop_delta(r);
    while (r->stream && !r->is_done && take_delta(r))
        drop_delta(r);
    if (r->stream && !r->is_done) { // wait for its end, of which the stream will tell
        engine_cancel(r->gateway->engine, r->stream);
        return;
    }
    rpc_finish(r->call, NULL, NULL);
    reply_free(r);
}

static void reply_step(void *state)
{
    uint64_t begin_ns = trace_begin();

    reply_go_on(state);
    if (trace_begin() - begin_ns >= TRACE_FROM_NS)
        trace_end("write reply", begin_ns, "", 0);
}
