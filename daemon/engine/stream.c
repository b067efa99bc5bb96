/*
 * Tokens become text and gather until the reader takes them; see stream.h.
 *
 * Per candidate: ids → detokenizer → `pending` (may begin a stop string) → `text` (safe to show).
 * One mutex for everything; `notify_mutex` is held around the notify call alone, so that
 * stream_mute() can wait for it. Knows no scheduler and no RPC.
 */
#include "daemon/engine/stream.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

struct buffer { // growing bytes
    char *bytes;
    size_t n, capacity;
};

struct candidate {
    struct detokenizer detokenizer;
    struct buffer pending, text;
    int32_t *ids;                   // [n_ids] since the last drain
    struct sample_result *logprobs; // [n_ids] when asked for
    int32_t n_ids, ids_capacity;
    int32_t n_tokens; // since the beginning
    enum finish_reason finish;
    int32_t stop_token_id, stop_string; // -1: none
    float score;                        // where has_score
    int has_score, has_news;
};

struct stream {
    pthread_mutex_t mutex, notify_mutex;
    atomic_int n_refs;
    stream_notify notify;
    void *notify_arg;
    atomic_int *cancelled; // of the request; NULL once it is gone

    const struct tokenizer *tokenizer;
    struct stop_string *stops; // [n_stops] bytes owned
    int32_t n_stops, min_tokens, interval;
    int include_stop_str, want_logprobs;

    struct candidate *candidates; // [n_candidates]
    int32_t n_candidates;
    int has_news, started, done;
    struct error error;
    struct usage usage;
    struct timing timing;
    struct stream_tensor *tensors;
    int n_tensors;
    size_t tensor_bytes;
    int tensors_too_large;
    struct token_logprob *targets; // [n_targets] since the last drain
    int32_t n_targets, targets_capacity, n_targets_so_far;
};

static void buffer_reserve(struct buffer *b, size_t n_more)
{
    if (b->capacity - b->n >= n_more)
        return;
    b->capacity = b->n + n_more + b->capacity / 2 + 32;
    b->bytes = xrealloc(b->bytes, b->capacity, 1);
}

static void buffer_append(struct buffer *b, const char *bytes, size_t n)
{
    if (n == 0)
        return;
    buffer_reserve(b, n);
    memcpy(b->bytes + b->n, bytes, n);
    b->n += n;
}

static void copy_stops(struct stream *s, const struct request *r)
{
    s->stops = xcalloc((size_t)r->n_stop_strings, sizeof(*s->stops));
    s->n_stops = r->n_stop_strings;
    for (int32_t i = 0; i < s->n_stops; i++) {
        char *bytes = xcalloc((size_t)r->stop_strings[i].n_bytes + 1, 1);
        memcpy(bytes, r->stop_strings[i].bytes, (size_t)r->stop_strings[i].n_bytes);
        s->stops[i] = (struct stop_string){bytes, r->stop_strings[i].n_bytes};
    }
}

struct stream *stream_new(const struct request *r, const struct tokenizer *t, stream_notify notify,
                          void *arg)
{
    struct stream *s = xcalloc(1, sizeof(*s));
    pthread_mutex_init(&s->mutex, NULL);
    pthread_mutex_init(&s->notify_mutex, NULL);
    atomic_init(&s->n_refs, 1);
    s->notify = notify;
    s->notify_arg = arg;
    s->cancelled = (atomic_int *)&r->cancelled; // the one field of a request that may change
    s->tokenizer = t;
    copy_stops(s, r);
    s->min_tokens = r->min_tokens;
    s->include_stop_str = r->include_stop_str;
    s->want_logprobs = r->sampling.n_logprobs >= 0;
    s->interval = 1;
    s->n_candidates = r->n;
    s->candidates = xcalloc((size_t)r->n, sizeof(*s->candidates));
    for (int32_t i = 0; i < r->n; i++) {
        if (t)
            detokenizer_init(&s->candidates[i].detokenizer, t, r->skip_special_tokens);
        s->candidates[i].stop_token_id = s->candidates[i].stop_string = -1;
    }
    return s;
}

void stream_set_interval(struct stream *s, int32_t n_tokens)
{
    s->interval = n_tokens;
}

struct stream *stream_ref(struct stream *s)
{
    atomic_fetch_add_explicit(&s->n_refs, 1, memory_order_relaxed);
    return s;
}

static void free_tensors(struct stream_tensor *tensors, int n)
{
    for (int i = 0; i < n; i++)
        free(tensors[i].data);
    free(tensors);
}

void stream_unref(struct stream *s)
{
    if (!s || atomic_fetch_sub_explicit(&s->n_refs, 1, memory_order_acq_rel) != 1)
        return;
    for (int32_t i = 0; i < s->n_candidates; i++) {
        free(s->candidates[i].pending.bytes);
        free(s->candidates[i].text.bytes);
        free(s->candidates[i].ids);
        free(s->candidates[i].logprobs);
    }
    free(s->candidates);
    for (int32_t i = 0; i < s->n_stops; i++)
        free((char *)s->stops[i].bytes);
    free(s->stops);
    free_tensors(s->tensors, s->n_tensors);
    free(s->targets);
    pthread_mutex_destroy(&s->mutex);
    pthread_mutex_destroy(&s->notify_mutex);
    free(s);
}

void stream_cancel(struct stream *s)
{
    pthread_mutex_lock(&s->mutex);
    if (s->cancelled)
        atomic_store(s->cancelled, 1);
    pthread_mutex_unlock(&s->mutex);
}

void stream_detach(struct stream *s)
{
    pthread_mutex_lock(&s->mutex);
    s->cancelled = NULL;
    pthread_mutex_unlock(&s->mutex);
}

void stream_mute(struct stream *s)
{
    pthread_mutex_lock(&s->notify_mutex);
    s->notify = NULL;
    pthread_mutex_unlock(&s->notify_mutex);
}

/* Unlocks the stream, and tells the reader when it has been drained and has something again. */
static void unlock_with_news(struct stream *s)
{
    int tell = !s->has_news;
    s->has_news = 1;
    pthread_mutex_unlock(&s->mutex);
    if (!tell)
        return;
    pthread_mutex_lock(&s->notify_mutex);
    if (s->notify)
        s->notify(s->notify_arg);
    pthread_mutex_unlock(&s->notify_mutex);
}

/* ---- engine side ---- */

void stream_push_started(struct stream *s)
{
    pthread_mutex_lock(&s->mutex);
    if (s->done) {
        pthread_mutex_unlock(&s->mutex);
        return;
    }
    s->started = 1;
    unlock_with_news(s);
}

static void append_id(struct stream *s, struct candidate *c, const struct sample_result *token)
{
    if (c->n_ids == c->ids_capacity) {
        c->ids_capacity = c->ids_capacity < 16 ? 16 : 2 * c->ids_capacity;
        c->ids = xrealloc(c->ids, (size_t)c->ids_capacity, sizeof(*c->ids));
        if (s->want_logprobs)
            c->logprobs = xrealloc(c->logprobs, (size_t)c->ids_capacity, sizeof(*c->logprobs));
    }
    c->ids[c->n_ids] = token->token.id;
    if (s->want_logprobs)
        c->logprobs[c->n_ids] = *token;
    c->n_ids++;
    c->n_tokens++;
}

/* The first stop string to be complete in pending[0 … end) with end > n_old, the longest of
 * several: its index, with its place in *begin, *end. -1: none. */
static int32_t find_stop(const struct stream *s, const struct buffer *pending, size_t n_old,
                         size_t *begin, size_t *end)
{
    for (size_t e = n_old + 1; e <= pending->n; e++) {
        int32_t best = -1;
        for (int32_t i = 0; i < s->n_stops; i++) {
            size_t n = (size_t)s->stops[i].n_bytes;
            if (n == 0 || n > e || memcmp(pending->bytes + e - n, s->stops[i].bytes, n) != 0)
                continue;
            if (best < 0 || n > (size_t)s->stops[best].n_bytes)
                best = i;
        }
        if (best >= 0) {
            *end = e;
            *begin = e - (size_t)s->stops[best].n_bytes;
            return best;
        }
    }
    return -1;
}

/* Length of the longest end of `pending` that is a beginning, not the whole, of a stop string. */
static size_t held_back(const struct stream *s, const struct buffer *pending)
{
    size_t longest = 0;
    for (int32_t i = 0; i < s->n_stops; i++) {
        size_t n = (size_t)s->stops[i].n_bytes;
        n = n > 0 ? n - 1 : 0;
        if (n > pending->n)
            n = pending->n;
        for (; n > longest; n--)
            if (memcmp(pending->bytes + pending->n - n, s->stops[i].bytes, n) == 0)
                longest = n;
    }
    return longest;
}

/* Moves the first n pending bytes to the text; the rest is kept, or dropped. */
static void release_text(struct candidate *c, size_t n, int keep_rest)
{
    buffer_append(&c->text, c->pending.bytes, n);
    size_t n_rest = keep_rest ? c->pending.n - n : 0;
    if (n_rest > 0 && n > 0)
        memmove(c->pending.bytes, c->pending.bytes + n, n_rest);
    c->pending.n = n_rest;
}

static void append_text(struct stream *s, struct candidate *c, int32_t id)
{
    if (!s->tokenizer)
        return;
    buffer_reserve(&c->pending, detokenizer_max_bytes(&c->detokenizer, id));
    c->pending.n += detokenizer_push(&c->detokenizer, id, c->pending.bytes + c->pending.n);
}

enum finish_reason stream_push(struct stream *s, int32_t candidate,
                               const struct sample_result *token, int is_end)
{
    if (candidate < 0 || candidate >= s->n_candidates)
        BUG("candidate %d of %d", candidate, s->n_candidates);
    pthread_mutex_lock(&s->mutex);
    struct candidate *c = &s->candidates[candidate];
    if (s->done || c->finish != FINISH_NONE) {
        pthread_mutex_unlock(&s->mutex);
        return FINISH_NONE;
    }
    append_id(s, c, token);
    c->has_news = 1;
    if (is_end)
        c->stop_token_id = token->token.id;

    size_t n_old = c->pending.n, begin = 0, end = 0;
    if (!is_end || s->include_stop_str)
        append_text(s, c, token->token.id);
    if (!is_end && c->n_tokens > s->min_tokens)
        c->stop_string = find_stop(s, &c->pending, n_old, &begin, &end);
    if (c->stop_string >= 0)
        release_text(c, s->include_stop_str ? end : begin, 0);
    else
        release_text(c, c->pending.n - held_back(s, &c->pending), 1);
    enum finish_reason result = c->stop_string >= 0 ? FINISH_STOP : FINISH_NONE;
    if (c->n_tokens == 1 || c->n_ids >= s->interval)
        unlock_with_news(s);
    else
        pthread_mutex_unlock(&s->mutex);
    return result;
}

void stream_set_score(struct stream *s, int32_t candidate, float score)
{
    if (candidate < 0 || candidate >= s->n_candidates)
        BUG("candidate %d of %d", candidate, s->n_candidates);
    pthread_mutex_lock(&s->mutex);
    s->candidates[candidate].score = score;
    s->candidates[candidate].has_score = 1;
    pthread_mutex_unlock(&s->mutex);
}

void stream_finish_candidate(struct stream *s, int32_t candidate, enum finish_reason reason)
{
    if (candidate < 0 || candidate >= s->n_candidates)
        BUG("candidate %d of %d", candidate, s->n_candidates);
    pthread_mutex_lock(&s->mutex);
    struct candidate *c = &s->candidates[candidate];
    if (s->done || c->finish != FINISH_NONE) {
        pthread_mutex_unlock(&s->mutex);
        return;
    }
    c->finish = reason;
    c->has_news = 1;
    if (c->stop_string < 0 && s->tokenizer) { // what was held back will not become a stop string
        buffer_reserve(&c->pending, sizeof(c->detokenizer.held) * 2);
        c->pending.n += detokenizer_flush(&c->detokenizer, c->pending.bytes + c->pending.n);
        release_text(c, c->pending.n, 0);
    }
    unlock_with_news(s);
}

static struct stream_tensor *find_tensor(struct stream *s, const char *name, int32_t n_tiles,
                                         int32_t n_rows, int32_t n_cols)
{
    for (int i = 0; i < s->n_tensors; i++)
        if (strcmp(s->tensors[i].name, name) == 0)
            return &s->tensors[i];
    size_t n_bytes;
    if (__builtin_mul_overflow((size_t)n_rows, (size_t)n_cols * sizeof(float), &n_bytes) ||
        n_bytes > STREAM_TENSOR_BYTES_MAX - s->tensor_bytes) {
        s->tensors_too_large = 1;
        return NULL;
    }
    s->tensor_bytes += n_bytes;
    s->tensors = xrealloc(s->tensors, (size_t)s->n_tensors + 1, sizeof(*s->tensors));
    struct stream_tensor *t = &s->tensors[s->n_tensors++];
    *t = (struct stream_tensor){.n_rows = n_rows, .n_cols = n_cols, .n_tiles = n_tiles};
    strncpy(t->name, name, sizeof(t->name) - 1);
    t->data = xcalloc((size_t)n_rows * (size_t)n_cols, sizeof(float));
    return t;
}

void stream_push_rows(struct stream *s, const char *name, int32_t n_tiles, int32_t first_row,
                      int32_t n_rows_total, int32_t n_rows, int32_t n_cols, const float *data)
{
    if (first_row < 0 || n_rows < 0 || n_cols < 1 || first_row > n_rows_total - n_rows)
        BUG("rows %d … %d of tensor %s [%d, %d]", first_row, first_row + n_rows, name, n_rows_total,
            n_cols);
    pthread_mutex_lock(&s->mutex);
    if (!s->done && !s->tensors_too_large) {
        struct stream_tensor *t = find_tensor(s, name, n_tiles, n_rows_total, n_cols);
        if (t && (t->n_cols != n_cols || t->n_rows != n_rows_total))
            BUG("tensor %s is [%d, %d], not [%d, %d]", name, t->n_rows, t->n_cols, n_rows_total,
                n_cols);
        if (t)
            memcpy(t->data + (size_t)first_row * (size_t)n_cols, data,
                   (size_t)n_rows * (size_t)n_cols * sizeof(float));
    }
    pthread_mutex_unlock(&s->mutex);
}

void stream_push_targets(struct stream *s, int32_t first, int32_t n,
                         const struct token_logprob *values)
{
    pthread_mutex_lock(&s->mutex);
    int32_t known = s->n_targets_so_far - first, n_new = n - known;
    if (first < 0 || n < 0 || known < 0)
        BUG("target log-probabilities %d … %d after %d", first, first + n, s->n_targets_so_far);
    if (s->done || n_new <= 0) {
        pthread_mutex_unlock(&s->mutex);
        return;
    }
    if (s->targets_capacity - s->n_targets < n_new) {
        s->targets_capacity = s->n_targets + s->n_targets / 2 + n_new;
        s->targets = xrealloc(s->targets, (size_t)s->targets_capacity, sizeof(*s->targets));
    }
    memcpy(s->targets + s->n_targets, values + known, (size_t)n_new * sizeof(*values));
    s->n_targets += n_new;
    s->n_targets_so_far += n_new;
    unlock_with_news(s);
}

void stream_finish(struct stream *s, const struct error *error, const struct usage *u,
                   const struct timing *t)
{
    pthread_mutex_lock(&s->mutex);
    if (s->done) {
        pthread_mutex_unlock(&s->mutex);
        return;
    }
    s->done = 1;
    if (error)
        s->error = *error;
    if (s->error.code == ERROR_OK && s->tensors_too_large)
        error_set(&s->error, ERROR_RESOURCE_EXHAUSTED,
                  "the tensors asked for are larger than %zu MiB", STREAM_TENSOR_BYTES_MAX >> 20);
    s->usage = *u;
    s->timing = *t;
    unlock_with_news(s);
}

/* ---- gateway side ---- */

static void take_candidate(struct candidate *c, int32_t index, struct candidate_delta *out)
{
    buffer_reserve(&c->text, 1);
    c->text.bytes[c->text.n] = '\0';
    *out = (struct candidate_delta){.candidate = index,
                                    .text = c->text.bytes,
                                    .n_text_bytes = c->text.n,
                                    .ids = c->ids,
                                    .n_ids = c->n_ids,
                                    .logprobs = c->logprobs,
                                    .finish = c->finish,
                                    .stop_token_id = c->stop_token_id,
                                    .stop_string = c->stop_string,
                                    .completion_tokens = c->n_tokens,
                                    .score = c->score,
                                    .has_score = c->has_score};
    c->text = (struct buffer){0};
    c->ids = NULL;
    c->logprobs = NULL;
    c->n_ids = c->ids_capacity = 0;
    c->has_news = 0;
}

int stream_drain(struct stream *s, struct stream_delta *out)
{
    memset(out, 0, sizeof(*out));
    pthread_mutex_lock(&s->mutex);
    if (!s->has_news) {
        pthread_mutex_unlock(&s->mutex);
        return 0;
    }
    s->has_news = 0;
    out->candidates = xcalloc((size_t)s->n_candidates, sizeof(*out->candidates));
    for (int32_t i = 0; i < s->n_candidates; i++)
        if (s->candidates[i].has_news)
            take_candidate(&s->candidates[i], i, &out->candidates[out->n_candidates++]);
    out->targets = s->targets;
    out->n_targets = s->n_targets;
    s->targets = NULL;
    s->n_targets = s->targets_capacity = 0;
    out->started = s->started;
    s->started = 0;
    out->done = s->done;
    if (s->done) {
        out->error = s->error;
        out->usage = s->usage;
        out->timing = s->timing;
        out->tensors = s->tensors;
        out->n_tensors = s->n_tensors;
        s->tensors = NULL;
        s->n_tensors = 0;
    }
    pthread_mutex_unlock(&s->mutex);
    return 1;
}

void stream_delta_release(struct stream_delta *d)
{
    for (int i = 0; i < d->n_candidates; i++) {
        free(d->candidates[i].text);
        free(d->candidates[i].ids);
        free(d->candidates[i].logprobs);
    }
    free(d->candidates);
    free_tensors(d->tensors, d->n_tensors);
    free(d->targets);
    memset(d, 0, sizeof(*d));
}
