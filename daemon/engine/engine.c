/*
 * The engine thread: it owns scheduler, vision stage and the gateway's end of control, and turns
 * what they say into messages and stream pushes. See engine.h.
 *
 * One round of the loop: take in new requests, end the cancelled and the late, deal out tiles, send
 * steps while there are free slots, push the tokens that could wait for that, publish figures,
 * sleep in epoll, take in what workers sent.
 * Everything below `struct engine`'s mutex comment is touched by the thread alone. It must not know
 * gRPC, models, or what a policy is.
 */
#include "daemon/engine/engine.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "daemon/engine/scheduler.h"
#include "daemon/engine/ticket_report.h"
#include "daemon/engine/vision_stage.h"
#include "kernels/clock.h"
#include "kernels/log.h"
#include "kernels/trace.h"
#include "parallel/batch.h"

#define WAIT_MAX_MS 500                          // control wakes us more often than that
#define STOP_WAIT_NS ((uint64_t)10 * 1000000000) // for batches in flight when closing
#define FEATURE_BYTES_MAX ((int64_t)4 << 30)     // of requests that wait or run

/* A submitted step until its last result is back. Same index as the scheduler's step. */
struct flight {
    int n_left;                // results that have not come
    struct step_result result; // of the last stage; points into `message`
    struct message *message;
};

struct engine {
    struct engine_config config;
    struct scheduler_config limits;
    struct topology topology;
    struct control *control;
    void (*on_lost)(void *arg, int rank);
    void *on_lost_arg;
    pthread_t thread;
    int event_fd, epoll_fd;

    pthread_mutex_t mutex; // guards the next block
    pthread_cond_t all_done;
    struct request **inbox; // [n_inbox] capacity max_queued_requests
    int32_t n_inbox, n_unstarted, n_live;
    int draining, closing, ending_all, lost;
    struct engine_stats stats;
    struct observations published; // a copy of `observed`

    struct scheduler scheduler;
    struct vision_stage vision;
    struct flight *flights; // [n_batches_in_flight]
    struct flight late;     // events of the scheduler's latest update are still to be pushed
    uint64_t n_finished, n_tiles;
    struct observations observed;
};

static void wake(struct engine *e)
{
    uint64_t one = 1;
    if (write(e->event_fd, &one, sizeof(one)) < 0 && errno != EAGAIN)
        die("eventfd: %s", strerror(errno));
}

/* ---- the end of a request ---- */

/* All at once, because tiles that were known come in no order. */
static void push_image_features(struct engine *e, const struct ticket *t)
{
    int32_t n_rows =
        t->n_tiles * request_features_per_tile(t->request, e->config.n_features_per_tile);
    stream_push_rows(t->request->stream, "image_features", t->n_tiles, 0, n_rows, n_rows,
                     e->config.feature_dim, t->features);
}

static void push_late(struct engine *e);

/* The ticket's last moment: pages go back, the stream ends, the request is freed. err NULL: all
 * went well. */
static void end_request(struct engine *e, struct ticket *t, const struct error *err)
{
    push_late(e);
    struct usage u;
    struct timing m;
    enum finish_reason finish = t->finish;
    if (t->vision_start_ns != 0)
        histogram_add(&e->observed.vision_queue,
                      (double)since_us(t->request->arrival_ns, t->vision_start_ns) / 1e6);
    ticket_measure(t, clock_now_ns(), &u, &m);
    if (!err && t->request->want_image_features && t->n_tiles > 0)
        push_image_features(e, t);
    ticket_trace(t);
    vision_stage_forget(&e->vision, t);
    struct request *r = scheduler_remove(&e->scheduler, t);
    stream_finish(r->stream, err, &u, &m);
    request_log(r, &u, &m, finish, err);
    if (err)
        finish = err->code == ERROR_CANCELLED ? FINISH_CANCELLED : FINISH_ERROR;
    observations_add_request(&e->observed, finish, r->n_tiles, &m);
    request_free(r);
    e->n_finished++;

    pthread_mutex_lock(&e->mutex);
    e->n_live--;
    if (e->n_live == 0)
        pthread_cond_broadcast(&e->all_done);
    pthread_mutex_unlock(&e->mutex);
}

static void end_all(struct engine *e, enum error_code code, const char *sentence)
{
    struct error err;
    error_set(&err, code, "%s", sentence);
    while (e->scheduler.first)
        end_request(e, e->scheduler.first, &err);
}

/* ---- one round: in, out ---- */

static void take_inbox(struct engine *e)
{
    pthread_mutex_lock(&e->mutex);
    int32_t n = e->n_inbox;
    struct request **requests = n > 0 ? xcalloc((size_t)n, sizeof(struct request *)) : NULL;
    if (n > 0)
        memcpy(requests, e->inbox, (size_t)n * sizeof(struct request *));
    e->n_inbox = 0;
    e->n_unstarted += n;
    pthread_mutex_unlock(&e->mutex);
    for (int32_t i = 0; i < n; i++) {
        struct ticket *t = scheduler_add(&e->scheduler, requests[i]);
        vision_stage_add(&e->vision, t, clock_now_ns());
        stream_push_started(requests[i]->stream);
    }
    free(requests);
}

/* Ends the cancelled and those past their deadline; returns the next deadline, 0: none. */
static uint64_t sweep(struct engine *e)
{
    struct error cancelled, late;
    error_set(&cancelled, ERROR_CANCELLED, "the request was cancelled");
    error_set(&late, ERROR_DEADLINE_EXCEEDED, "the deadline passed before the answer was complete");
    uint64_t now = clock_now_ns(), next_deadline = 0;
    for (struct ticket *t = e->scheduler.first, *next; t; t = next) {
        next = t->next;
        uint64_t deadline = t->request->deadline_ns;
        if (atomic_load(&t->request->cancelled))
            end_request(e, t, &cancelled);
        else if (deadline != 0 && deadline <= now)
            end_request(e, t, &late);
        else if (deadline != 0 && (next_deadline == 0 || deadline < next_deadline))
            next_deadline = deadline;
    }
    return next_deadline;
}

static size_t feature_floats(const struct engine *e)
{
    return (size_t)e->config.n_features_per_tile * (size_t)e->config.feature_dim;
}

static size_t tile_bytes(const struct request *r)
{
    return (size_t)r->channels * (size_t)r->height * (size_t)r->width * dtype_size(r->pixel_dtype);
}

/* The pixels of each tile come from the request that made it a tile of the job. */
static struct message *pack_job(const struct vision_job *job)
{
    const struct request *first = job->tiles[0].waiters[0].ticket->request;
    const void **pixels = xcalloc((size_t)job->n_tiles, sizeof(*pixels));
    const uint8_t **masks = xcalloc((size_t)job->n_tiles, sizeof(*masks));
    const struct tile_batch tiles = {.job_id = job->job_id,
                                     .n_tiles = job->n_tiles,
                                     .channels = first->channels,
                                     .height = first->height,
                                     .width = first->width,
                                     .dtype = first->pixel_dtype,
                                     .captures = first->vision_captures,
                                     .n_mask = first->n_mask};
    for (int32_t i = 0; i < job->n_tiles; i++) {
        const struct tile_waiter *w = &job->tiles[i].waiters[0];
        const struct request *r = w->ticket->request;
        pixels[i] = (const uint8_t *)r->pixels + (size_t)w->tile * tile_bytes(r);
        masks[i] = r->mask ? r->mask + (size_t)w->tile * (size_t)r->n_mask : NULL;
    }
    struct message *m = tile_batch_pack(&tiles, pixels, masks);
    free(pixels);
    free(masks);
    return m;
}

static void send_tiles(struct engine *e)
{
    const struct vision_job *job;
    while ((job = vision_stage_next(&e->vision, clock_now_ns())) != NULL) {
        uint64_t begin_ns = trace_begin();
        control_send(e->control, topology_vision_rank(&e->topology, job->vision_index),
                     pack_job(job));
        trace_end("send tiles", begin_ns, "tiles", job->n_tiles);
    }
}

/* To every language rank; only the first stage's message carries features. */
static void send_batch(struct engine *e, const struct batch *b)
{
    const struct layout *l = &e->topology.layout;
    struct message *first = batch_pack(b, 1);
    struct message *others =
        b->n_features > 0 && l->pipeline_parallel > 1 ? batch_pack(b, 0) : message_ref(first);
    for (int stage = 0; stage < l->pipeline_parallel; stage++)
        for (int shard = 0; shard < l->tensor_parallel; shard++)
            control_send(e->control, topology_language_rank(&e->topology, stage, shard),
                         message_ref(stage == 0 ? first : others));
    message_unref(first);
    message_unref(others);
}

static void send_steps(struct engine *e)
{
    struct step *p;
    uint64_t begin_ns = trace_begin();
    while ((p = scheduler_step(&e->scheduler, clock_now_ns())) != NULL) {
        /* The last stage's shard 0 says the tokens; the others' answers matter when they capture.
         */
        struct flight *f = &e->flights[p - e->scheduler.steps];
        f->n_left = p->has_captures ? e->topology.layout.pipeline_parallel : 1;
        send_batch(e, e->scheduler.batch);
        trace_end("send step", begin_ns, "tokens", p->n_tokens);
        begin_ns = trace_begin();
    }
}

static void publish(struct engine *e)
{
    const struct scheduler *s = &e->scheduler;
    pthread_mutex_lock(&e->mutex);
    e->n_unstarted = s->n_unstarted;
    observations_copy(&e->published, &e->observed);
    e->stats = (struct engine_stats){.n_running = s->n_tickets - s->n_unstarted,
                                     .n_waiting = s->n_unstarted,
                                     .n_pages_used = scheduler_n_pages_used(s),
                                     .n_pages = s->pool.n_pages,
                                     .n_steps = s->n_steps,
                                     .n_finished = e->n_finished,
                                     .n_preempted = s->n_preempted,
                                     .n_generated_tokens = s->n_generated_tokens,
                                     .n_prompt_tokens = s->n_prompt_tokens,
                                     .n_tiles = e->n_tiles,
                                     .n_prefix_queries_tokens = s->n_prefix_queries,
                                     .n_prefix_hits_tokens = s->n_prefix_hits,
                                     .n_vision_queries = e->vision.n_queries,
                                     .n_vision_hits = e->vision.n_hits};
    pthread_mutex_unlock(&e->mutex);
}

/* ---- what workers send ---- */

/* Tensors of the vision stage: a captured tensor is one tile's, whole, and for one request. */
static void push_vision_tensors(const struct vision_job *job, const struct feature_result *f)
{
    for (int32_t i = 0; i < f->n_captured; i++) {
        const struct captured *c = &f->captured[i];
        if (c->owner >= job->n_tiles)
            die("a captured tensor of tile %d of %d", c->owner, job->n_tiles);
        const struct tile_waiter *w = &job->tiles[c->owner].waiters[0];
        if (!w->ticket)
            continue;
        int32_t n_tiles = w->ticket->n_tiles;
        stream_push_rows(w->ticket->request->stream, c->name, n_tiles,
                         w->tile * c->n_rows + c->first_row, n_tiles * c->n_rows, c->n_rows,
                         c->n_cols, c->data);
    }
}

static void fail_not_finite(struct engine *e, struct ticket *t)
{
    struct error err;
    error_set(&err, ERROR_INTERNAL, "the model produced a value that is not finite");
    end_request(e, t, &err);
}

static void take_features(struct engine *e, const struct message *m)
{
    struct feature_result f;
    feature_result_unpack(&f, m);
    struct vision_job *job = vision_stage_find(&e->vision, f.job_id);
    if (!job || f.n_tiles != job->n_tiles)
        die("rank %d sent features of %d tiles for job %llu, which is not under way", m->rank,
            f.n_tiles, (unsigned long long)f.job_id);
    if ((int64_t)f.n_tokens_per_tile * f.dim != job->n_tile_floats ||
        f.dim != e->config.feature_dim)
        die("rank %d sent features [%d, %d] a tile, expected %lld numbers", m->rank,
            f.n_tokens_per_tile, f.dim, (long long)job->n_tile_floats);
    uint64_t now = clock_now_ns();
    e->n_tiles += (uint64_t)f.n_tiles;
    stage_times_add(&e->observed.vision[job->vision_index], now, f.compute_ns, 0);
    push_vision_tensors(job, &f);
    for (int32_t i = 0; i < f.n_tiles; i++) {
        struct vision_tile *tile = &job->tiles[i];
        if (!f.not_finite[i]) {
            vision_stage_deliver(&e->vision, tile, f.features + (int64_t)i * job->n_tile_floats,
                                 now);
            continue;
        }
        for (int32_t w = 0; w < tile->n_waiters; w++)
            if (tile->waiters[w].ticket)
                fail_not_finite(e, tile->waiters[w].ticket);
    }
    vision_stage_end(&e->vision, job);
    feature_result_release(&f);
}

/* How many of the prompt's rows before `row` have their logits taken. */
static int32_t n_wanted_before(const struct request *r, int32_t row)
{
    int32_t n = 0;
    for (int32_t i = 0; i < row; i++)
        n += r->want_logits[i] != 0;
    return n;
}

/* The new tokens' rows of every head's square [n_ids, n_ids]; `c` has them head by head. */
static void push_attentions(const struct request *r, const struct step_item *item,
                            const struct captured *c)
{
    int32_t n = item->n_new, n_heads = c->n_rows / n;
    for (int32_t h = 0; h < n_heads; h++)
        stream_push_rows(r->stream, c->name, 0, h * r->n_ids + item->start, n_heads * r->n_ids, n,
                         c->n_cols, c->data + (int64_t)h * n * c->n_cols);
}

/* Tensors of the language model: rows of the sequence's new tokens, except "logits", where only
 * the wanted rows exist, and "attentions.i". */
static void push_language_tensors(const struct step *p, const struct step_result *result)
{
    for (int32_t i = 0; i < result->n_captured; i++) {
        const struct captured *c = &result->captured[i];
        if (c->owner < 0 || c->owner >= p->n_items)
            die("a captured tensor of sequence %d of %d", c->owner, p->n_items);
        const struct step_item *item = &p->items[c->owner];
        const struct request *r = item->sequence->ticket->request;
        if (!r)
            continue;
        if (strncmp(c->name, "attentions.", strlen("attentions.")) == 0) {
            push_attentions(r, item, c);
            continue;
        }
        int32_t first = item->start + c->first_row, n_rows = r->n_ids;
        if (strcmp(c->name, "logits") == 0 && r->want_logits) {
            first = n_wanted_before(r, first);
            n_rows = n_wanted_before(r, r->n_ids);
        }
        stream_push_rows(r->stream, c->name, 0, first, n_rows, c->n_rows, c->n_cols, c->data);
    }
}

/* Values that the targets of the prompt's rows before `row` have. */
static int32_t n_targets_before(const struct request *r, int32_t row)
{
    int32_t n = 0;
    for (int32_t i = 0; i < row; i++)
        n += r->targets[i] >= 0;
    return n * (1 + r->n_target_top);
}

static int are_finite(const struct token_logprob *values, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        if (!isfinite(values[i].logprob))
            return 0;
    return 1;
}

static void push_targets(struct engine *e, const struct step *p, const struct step_result *result)
{
    const struct token_logprob *next = result->targets;
    for (int32_t i = 0; i < p->n_items; i++) {
        const struct step_item *item = &p->items[i];
        struct ticket *t = item->sequence->ticket;
        const struct request *r = t->request;
        if (r && item->n_targets > 0) {
            if (are_finite(next, item->n_targets))
                stream_push_targets(r->stream, n_targets_before(r, item->start), item->n_targets,
                                    next);
            else
                fail_not_finite(e, t);
        }
        next += item->n_targets;
    }
}

/* A token was drawn: the first of its request, or one after another of its candidate. */
static void observe_token(struct engine *e, const struct token_event *event, uint64_t now)
{
    struct ticket *t = event->ticket;
    struct sequence *q = &t->sequences[event->candidate];
    if (q->last_token_ns)
        histogram_add(&e->observed.inter_token, (double)(now - q->last_token_ns) / 1e9);
    else if (event->candidate == 0)
        histogram_add(&e->observed.first_token,
                      (double)since_us(t->request->arrival_ns, now) / 1e6);
    q->last_token_ns = now;
}

/* All of a result of beam search at once: until the end it may still be replaced. */
static void push_beam(struct stream *s, int32_t candidate, const struct beam_finished *f)
{
    for (int32_t i = 0; i < f->n_ids; i++) {
        struct sample_result token = {.token.id = f->ids[i]};
        stream_push(s, candidate, &token, f->ends_by_token && i + 1 == f->n_ids);
    }
    stream_set_score(s, candidate, f->score);
}

static void push_event(struct engine *e, const struct token_event *event, uint64_t now)
{
    struct ticket *t = event->ticket;
    if (!t->request) // another candidate's value was not finite
        return;
    if (event->finish == FINISH_ERROR && !event->sample) {
        struct error err;
        error_set(&err, ERROR_INVALID_ARGUMENT,
                  "beam search finished fewer sequences than asked for: with this length_penalty "
                  "their scores are below -1e9");
        end_request(e, t, &err);
        return;
    }
    if (event->finish == FINISH_ERROR) {
        fail_not_finite(e, t);
        return;
    }
    struct stream *stream = t->request->stream;
    enum finish_reason finish = event->finish;
    if (event->sample)
        observe_token(e, event, now);
    if (event->sample &&
        stream_push(stream, event->candidate, event->sample, event->is_end) == FINISH_STOP) {
        scheduler_finish(&e->scheduler, t, event->candidate);
        finish = FINISH_STOP;
    }
    if (t->beams && finish != FINISH_NONE)
        push_beam(stream, event->candidate, &t->beams->finished[event->candidate]);
    if (finish != FINISH_NONE) {
        t->finish = finish;
        stream_finish_candidate(stream, event->candidate, finish);
    }
}

static void release_flight(struct flight *f)
{
    step_result_release(&f->result);
    message_unref(f->message);
    *f = (struct flight){0};
}

/* A token that ends nothing, and whose text cannot, changes no plan: its stream may have it when
 * the next step is on its way. */
static int can_wait(const struct token_event *event)
{
    return event->sample && event->finish == FINISH_NONE && event->ticket->request &&
           event->ticket->request->n_stop_strings == 0;
}

/* Before a ticket of the latest update may be freed, and before the next update. */
static void push_late(struct engine *e)
{
    struct flight late = e->late;
    uint64_t now = clock_now_ns();
    if (!late.message)
        return;
    e->late = (struct flight){0};
    for (int32_t i = 0; i < e->scheduler.n_events; i++)
        if (can_wait(&e->scheduler.events[i]))
            push_event(e, &e->scheduler.events[i], now);
    trace_end("push tokens", now, "step", (int64_t)late.result.step_id);
    release_flight(&late);
}

/* All results of a step are there: ended requests leave, tokens go to their streams. */
static void complete_step(struct engine *e, struct step *p, struct flight *f)
{
    struct scheduler *s = &e->scheduler;
    push_late(e);
    if (f->result.n_samples != p->n_samples)
        die("step %llu came back with %d samples of %d", (unsigned long long)p->step_id,
            f->result.n_samples, p->n_samples);
    uint64_t now = clock_now_ns();
    histogram_add(&e->observed.iteration_tokens, p->n_tokens);
    scheduler_update(s, p, f->result.samples, f->result.n_samples, now);
    e->late = *f;
    *f = (struct flight){0};
    for (int32_t i = 0; i < s->n_events; i++)
        if (!can_wait(&s->events[i]))
            push_event(e, &s->events[i], now);
    for (int32_t i = 0; i < s->n_events; i++)
        if (s->events[i].ticket->request && s->events[i].ticket->n_unfinished == 0)
            end_request(e, s->events[i].ticket, NULL);
}

static void take_result(struct engine *e, struct message *m)
{
    struct step_result result;
    step_result_unpack(&result, m);
    int n_stages = e->topology.layout.pipeline_parallel, is_last = result.stage == n_stages - 1;
    if (result.stage < 0 || result.stage >= n_stages)
        die("rank %d sent a result of stage %d of %d", m->rank, result.stage, n_stages);
    stage_times_add(&e->observed.language[result.stage], clock_now_ns(), result.compute_ns,
                    result.wait_ns);
    struct step *p = result.step_id ? scheduler_find_step(&e->scheduler, result.step_id) : NULL;
    if (!is_last && (!p || !p->has_captures)) { // nobody waits for it
        step_result_release(&result);
        return;
    }
    if (!p)
        die("rank %d sent a result for step %llu, which is not under way", m->rank,
            (unsigned long long)result.step_id);
    struct flight *f = &e->flights[p - e->scheduler.steps];
    push_language_tensors(p, &result);
    if (is_last) {
        if (result.n_targets != p->n_targets)
            die("step %llu came back with %d target log-probabilities of %d",
                (unsigned long long)p->step_id, result.n_targets, p->n_targets);
        push_targets(e, p, &result);
        f->result = result;
        f->message = message_ref(m);
    } else {
        step_result_release(&result);
    }
    if (--f->n_left == 0)
        complete_step(e, p, f);
}

static void take_trace(const struct message *m)
{
    const struct trace_span *spans = (const struct trace_span *)(const void *)m->payload;
    if (m->n_bytes % sizeof(*spans) != 0)
        die("rank %d sent %llu bytes of timeline", m->rank, (unsigned long long)m->n_bytes);
    trace_rank(m->rank, spans, (int)(m->n_bytes / sizeof(*spans)));
}

static void take_loss(struct engine *e, int rank)
{
    char who[64], sentence[128];
    pthread_mutex_lock(&e->mutex);
    int first = !e->lost;
    e->lost = 1;
    pthread_mutex_unlock(&e->mutex);
    if (!first)
        return;
    snprintf(sentence, sizeof(sentence), "rank %d (%s) was lost", rank,
             topology_describe(&e->topology, rank, who, sizeof(who)));
    log_error("engine", "%s", sentence);
    if (e->on_lost) // before a drain can end because nothing is left
        e->on_lost(e->on_lost_arg, rank);
    take_inbox(e);
    end_all(e, ERROR_UNAVAILABLE, sentence);
    publish(e);
}

static void receive(struct engine *e)
{
    struct message *m;
    while ((m = control_next(e->control)) != NULL) {
        if (m->type == CONTROL_LOST)
            take_loss(e, m->rank);
        else if (e->lost)
            ; // what others still send is of no use
        else if (m->type == CONTROL_FEATURES)
            take_features(e, m);
        else if (m->type == CONTROL_RESULT)
            take_result(e, m);
        else if (m->type == CONTROL_TRACE)
            take_trace(m);
        else
            die("rank %d sent message type %d to the engine", m->rank, (int)m->type);
        message_unref(m);
    }
}

/* ---- the thread ---- */

/* Sleeps until something happens, a deadline passes, or control wants to ping. */
static void wait_for_events(struct engine *e, uint64_t next_deadline_ns)
{
    int timeout_ms = WAIT_MAX_MS;
    if (next_deadline_ns != 0) {
        uint64_t now = clock_now_ns();
        uint64_t left_ms = next_deadline_ns > now ? (next_deadline_ns - now + 999999) / 1000000 : 0;
        if (left_ms < (uint64_t)timeout_ms)
            timeout_ms = (int)left_ms;
    }
    struct epoll_event events[2];
    if (epoll_wait(e->epoll_fd, events, 2, timeout_ms) < 0 && errno != EINTR)
        die("epoll_wait: %s", strerror(errno));
    uint64_t count;
    if (read(e->event_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        die("eventfd: %s", strerror(errno));
}

/* Lets batches in flight come back, tells the workers to leave, and sees that they are told. */
static void stop_workers(struct engine *e)
{
    uint64_t until = clock_now_ns() + STOP_WAIT_NS;
    while (!e->lost && e->scheduler.n_in_flight + e->vision.n_jobs > 0 && clock_now_ns() < until) {
        wait_for_events(e, until);
        receive(e);
    }
    struct message *stop = message_new(CONTROL_STOP, 0);
    for (int rank = 1; rank < e->topology.world; rank++)
        control_send(e->control, rank, message_ref(stop));
    message_unref(stop);
    for (int rank = 1; rank < e->topology.world; rank++)
        while (control_queued_bytes(e->control, rank) > 0 && clock_now_ns() < until) {
            wait_for_events(e, until);
            struct message *m;
            while ((m = control_next(e->control)) != NULL) { // those who have left already
                if (m->type == CONTROL_TRACE)
                    take_trace(m);
                message_unref(m);
            }
        }
}

static void *run(void *arg)
{
    struct engine *e = arg;
    trace_name_thread("engine");
    for (;;) {
        pthread_mutex_lock(&e->mutex);
        int closing = e->closing, ending_all = e->ending_all;
        pthread_mutex_unlock(&e->mutex);
        take_inbox(e);
        if (ending_all)
            end_all(e, ERROR_UNAVAILABLE, "the daemon is stopping");
        if (closing)
            break;
        uint64_t next_deadline = sweep(e);
        send_tiles(e);
        send_steps(e);
        push_late(e);
        publish(e);
        wait_for_events(e, next_deadline);
        receive(e);
    }
    stop_workers(e);
    push_late(e); // of a step whose tickets have ended
    publish(e);
    return NULL;
}

static void watch(struct engine *e, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(e->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

struct engine *engine_open(const struct engine_config *c, const struct topology *t,
                           struct control *control, void (*on_lost)(void *arg, int rank), void *arg)
{
    if (c->max_queued_requests < 1 || c->max_vision_tiles < 1 || c->feature_dim < 1 ||
        c->n_features_per_tile < 1)
        die("the engine's settings must be positive");
    struct engine *e = xcalloc(1, sizeof(*e));
    e->config = *c;
    e->limits = (struct scheduler_config){.page_size = c->page_size,
                                          .n_pages = c->n_pages,
                                          .max_model_len = c->max_model_len,
                                          .max_num_seqs = c->max_num_seqs,
                                          .max_num_batched_tokens = c->max_num_batched_tokens,
                                          .n_batches_in_flight = c->n_batches_in_flight,
                                          .feature_dim = c->feature_dim,
                                          .rope_dynamic_from = c->rope_dynamic_from,
                                          .eos_ids = c->eos_ids,
                                          .n_eos = c->n_eos,
                                          .enable_prefix_caching = c->enable_prefix_caching,
                                          .n_features_per_tile = c->n_features_per_tile};
    e->topology = *t;
    e->control = control;
    e->on_lost = on_lost;
    e->on_lost_arg = arg;
    e->inbox = xcalloc((size_t)c->max_queued_requests, sizeof(struct request *));
    scheduler_init(&e->scheduler, &e->limits);
    int64_t n_floats = (int64_t)feature_floats(e);
    vision_stage_init(&e->vision, t->layout.n_vision, c->max_vision_tiles,
                      FEATURE_BYTES_MAX / (n_floats * (int64_t)sizeof(float)), n_floats,
                      c->vision_cache_bytes);
    e->flights = xcalloc((size_t)c->n_batches_in_flight, sizeof(*e->flights));
    e->stats.n_pages = c->n_pages;
    observations_init(&e->observed, t->layout.pipeline_parallel, t->layout.n_vision);
    observations_init(&e->published, t->layout.pipeline_parallel, t->layout.n_vision);

    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&e->mutex, NULL);
    pthread_cond_init(&e->all_done, &attributes);
    pthread_condattr_destroy(&attributes);

    e->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    e->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (e->event_fd < 0 || e->epoll_fd < 0)
        die("eventfd, epoll: %s", strerror(errno));
    watch(e, e->event_fd);
    watch(e, control_fd(control));
    int status = pthread_create(&e->thread, NULL, run, e);
    if (status != 0)
        die("pthread_create: %s", strerror(status));
    return e;
}

/* ---- other threads ---- */

/* Each image token of the prompt must find its feature row. */
static int check_tiles(const struct engine *e, const struct request *r, struct error *err)
{
    if (r->n_tiles == 0)
        return 0;
    int64_t n_tokens = 0, n_features = (int64_t)r->n_tiles *
                                       request_features_per_tile(r, e->config.n_features_per_tile);
    for (int32_t i = 0; i < r->n_ids; i++)
        n_tokens += r->ids[i] == r->image_token_id;
    if (n_tokens != n_features)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "the prompt has %lld image tokens and its %d tiles give %lld features",
                         (long long)n_tokens, r->n_tiles, (long long)n_features);
    return 0;
}

/* Names each tile by its content; -1 past the request's memory. */
static int name_tiles(struct request *r, struct error *err)
{
    size_t n_salt = r->cache_salt ? strlen(r->cache_salt) : 0;
    const int32_t format[] = {(int32_t)r->pixel_dtype, r->channels, r->height, r->width,
                              (int32_t)n_salt};
    size_t n_bytes = tile_bytes(r);
    if (r->n_tiles == 0)
        return 0;
    r->tile_digests = arena_alloc(&r->arena, (size_t)r->n_tiles, sizeof(*r->tile_digests));
    if (!r->tile_digests)
        return request_out_of_memory(err);
    struct hasher *h = hasher_new();
    for (int32_t i = 0; i < r->n_tiles; i++) {
        hasher_begin(h);
        hasher_add(h, format, sizeof(format));
        hasher_add(h, r->cache_salt, n_salt);
        hasher_add(h, (const uint8_t *)r->pixels + (size_t)i * n_bytes, n_bytes);
        hasher_end(h, &r->tile_digests[i]);
    }
    hasher_free(h);
    return 0;
}

int engine_submit(struct engine *e, struct request *r, struct error *err)
{
    if (!r->stream)
        BUG("a request without a stream");
    if (scheduler_check(&e->limits, r, err) < 0 || check_tiles(e, r, err) < 0 ||
        name_tiles(r, err) < 0)
        return -1;
    int status = 0;
    pthread_mutex_lock(&e->mutex);
    if (e->lost) {
        status = error_set(err, ERROR_UNAVAILABLE, "a rank of the daemon was lost");
    } else if (e->draining || e->closing) {
        status = error_set(err, ERROR_UNAVAILABLE, "the daemon is stopping");
    } else if (e->n_inbox + e->n_unstarted >= e->config.max_queued_requests) {
        status = error_set(err, ERROR_RESOURCE_EXHAUSTED, "the queue is full (%d requests)",
                           e->config.max_queued_requests);
    } else {
        e->inbox[e->n_inbox++] = r;
        e->n_live++;
    }
    pthread_mutex_unlock(&e->mutex);
    if (status == 0)
        wake(e);
    return status;
}

void engine_cancel(struct engine *e, struct stream *s)
{
    stream_cancel(s);
    wake(e);
}

void engine_stats(struct engine *e, struct engine_stats *out)
{
    pthread_mutex_lock(&e->mutex);
    *out = e->stats;
    out->n_waiting = e->n_unstarted + e->n_inbox;
    pthread_mutex_unlock(&e->mutex);
}

void engine_observe(struct engine *e, struct engine_stats *stats, struct observations *o)
{
    observations_init(o, e->topology.layout.pipeline_parallel, e->topology.layout.n_vision);
    pthread_mutex_lock(&e->mutex);
    *stats = e->stats;
    stats->n_waiting = e->n_unstarted + e->n_inbox;
    observations_copy(o, &e->published);
    pthread_mutex_unlock(&e->mutex);
}

int engine_drain(struct engine *e, int timeout_ms)
{
    uint64_t until = clock_now_ns() + (uint64_t)(timeout_ms > 0 ? timeout_ms : 0) * 1000000u;
    struct timespec deadline = {.tv_sec = (time_t)(until / 1000000000u),
                                .tv_nsec = (long)(until % 1000000000u)};
    int status = 0;
    pthread_mutex_lock(&e->mutex);
    e->draining = 1;
    while (e->n_live > 0 && status == 0)
        status = pthread_cond_timedwait(&e->all_done, &e->mutex, &deadline);
    int finished = e->n_live == 0;
    e->ending_all = !finished;
    pthread_mutex_unlock(&e->mutex);
    if (finished)
        return 1;
    wake(e);
    pthread_mutex_lock(&e->mutex);
    while (e->n_live > 0)
        pthread_cond_wait(&e->all_done, &e->mutex);
    pthread_mutex_unlock(&e->mutex);
    return 0;
}

void engine_close(struct engine *e)
{
    if (!e)
        return;
    pthread_mutex_lock(&e->mutex);
    e->draining = e->closing = e->ending_all = 1;
    pthread_mutex_unlock(&e->mutex);
    wake(e);
    pthread_join(e->thread, NULL);
    for (int32_t i = 0; i < e->config.n_batches_in_flight; i++)
        release_flight(&e->flights[i]);
    free(e->flights);
    scheduler_release(&e->scheduler);
    vision_stage_release(&e->vision);
    observations_release(&e->observed);
    observations_release(&e->published);
    free(e->inbox);
    close(e->epoll_fd);
    close(e->event_fd);
    pthread_mutex_destroy(&e->mutex);
    pthread_cond_destroy(&e->all_done);
    free(e);
}
