/* Gathers events into one answer, and prints it. Owns copies of all it keeps. */
#include "client/answer.h"

#include <stdlib.h>
#include <string.h>

#include "client/command.h"

#define MAX_CANDIDATES 1024

static void *copy(const void *src, size_t n, size_t size)
{
    void *p = command_alloc(n ? n : 1, size);
    if (n)
        memcpy(p, src, n * size);
    return p;
}

static void copy_logprob(struct answer_logprob *dst, const struct internvl_token_logprob *src)
{
    memset(dst, 0, sizeof(*dst));
    dst->token_id = src->token_id;
    dst->rank = src->rank;
    dst->logprob = src->logprob;
    dst->token = copy(src->token, src->n_token_bytes, 1);
    dst->n_token_bytes = src->n_token_bytes;
}

/* `list` with n more behind its *n_list. */
static struct answer_logprob *add_positions(struct answer_logprob *list, size_t *n_list,
                                            const struct internvl_position_logprobs *positions,
                                            size_t n)
{
    for (size_t i = 0; i < n; i++) {
        list = command_grow(list, *n_list, sizeof(*list));
        struct answer_logprob *l = &list[(*n_list)++];
        copy_logprob(l, &positions[i].chosen);
        l->n_top = positions[i].n_top;
        l->top = command_alloc(l->n_top ? l->n_top : 1, sizeof(*l->top));
        for (size_t k = 0; k < l->n_top; k++)
            copy_logprob(&l->top[k], &positions[i].top[k]);
    }
    return list;
}

static void add_text(struct answer_candidate *c, const char *text)
{
    size_t n = strlen(text);
    if (c->n_text + n + 1 > c->text_capacity) {
        c->text_capacity = 2 * (c->n_text + n + 1);
        char *more = command_alloc(c->text_capacity, 1);
        if (c->n_text)
            memcpy(more, c->text, c->n_text);
        free(c->text);
        c->text = more;
    }
    memcpy(c->text + c->n_text, text, n + 1);
    c->n_text += n;
}

static void add_delta(struct answer *a, const struct internvl_delta *d)
{
    if (d->candidate >= MAX_CANDIDATES)
        return;
    while (a->n_candidates <= d->candidate) {
        a->candidates = command_grow(a->candidates, a->n_candidates, sizeof(*a->candidates));
        memset(&a->candidates[a->n_candidates], 0, sizeof(*a->candidates));
        a->candidates[a->n_candidates].stop_token_id = -1;
        add_text(&a->candidates[a->n_candidates++], "");
    }
    struct answer_candidate *c = &a->candidates[d->candidate];
    add_text(c, d->text);
    for (size_t i = 0; i < d->n_token_ids; i++) {
        c->ids = command_grow(c->ids, c->n_ids, sizeof(*c->ids));
        c->ids[c->n_ids++] = d->token_ids[i];
    }
    c->logprobs = add_positions(c->logprobs, &c->n_logprobs, d->logprobs, d->n_logprobs);
    if (d->has_score) {
        c->has_score = 1;
        c->score = d->score;
    }
    if (d->finish_reason != INTERNVL_FINISH_NONE) {
        c->finish = d->finish_reason;
        c->stop_token_id = d->stop_token_id;
        free(c->stop_string);
        c->stop_string =
            *d->stop_string ? copy(d->stop_string, strlen(d->stop_string) + 1, 1) : NULL;
    }
}

void answer_add(struct answer *a, const struct internvl_event *e)
{
    switch (e->kind) {
    case INTERNVL_STARTED:
        free(a->request_id);
        free(a->media);
        a->request_id = copy(e->started.request_id, strlen(e->started.request_id) + 1, 1);
        a->seed = e->started.seed;
        a->prompt_tokens = e->started.prompt_tokens;
        a->image_tokens = e->started.image_tokens;
        a->media = copy(e->started.media, e->started.n_media, sizeof(*a->media));
        a->n_media = e->started.n_media;
        break;
    case INTERNVL_DELTA:
        add_delta(a, &e->delta);
        break;
    case INTERNVL_DONE:
        a->usage = e->done.usage;
        a->timing = e->done.timing;
        break;
    case INTERNVL_PROMPT:
        a->prompt_logprobs = add_positions(a->prompt_logprobs, &a->n_prompt_logprobs,
                                           e->prompt.positions, e->prompt.n_positions);
        break;
    }
}

const char *answer_text(const struct answer *a)
{
    return a->n_candidates ? a->candidates[0].text : "";
}

static void write_logprob(const struct answer_logprob *l, struct json_out *j)
{
    json_object_begin(j, NULL);
    json_uint(j, "token_id", l->token_id);
    json_bytes(j, "token", l->token, l->n_token_bytes);
    json_float(j, "logprob", l->logprob);
    json_uint(j, "rank", l->rank);
    if (l->n_top) {
        json_array_begin(j, "top");
        for (size_t i = 0; i < l->n_top; i++)
            write_logprob(&l->top[i], j);
        json_array_end(j);
    }
    json_object_end(j);
}

static void write_logprobs(const struct answer_logprob *l, size_t n, const char *name,
                           struct json_out *j)
{
    if (!n)
        return;
    json_array_begin(j, name);
    for (size_t i = 0; i < n; i++)
        write_logprob(&l[i], j);
    json_array_end(j);
}

static void write_candidate(const struct answer_candidate *c, struct json_out *j)
{
    json_object_begin(j, NULL);
    json_string(j, "text", c->text);
    json_array_begin(j, "token_ids");
    for (size_t i = 0; i < c->n_ids; i++)
        json_uint(j, NULL, c->ids[i]);
    json_array_end(j);
    json_string(j, "finish_reason", internvl_finish_name(c->finish));
    if (c->has_score)
        json_double(j, "score", (double)c->score);
    if (c->stop_string)
        json_string(j, "stop_string", c->stop_string);
    if (c->stop_token_id >= 0)
        json_int(j, "stop_token_id", c->stop_token_id);
    write_logprobs(c->logprobs, c->n_logprobs, "logprobs", j);
    json_object_end(j);
}

static void write_media(const struct answer *a, struct json_out *j)
{
    json_array_begin(j, "media");
    for (size_t i = 0; i < a->n_media; i++) {
        const struct internvl_media_plan *m = &a->media[i];
        json_object_begin(j, NULL);
        json_uint(j, "width", m->width);
        json_uint(j, "height", m->height);
        json_uint(j, "grid_columns", m->grid_columns);
        json_uint(j, "grid_rows", m->grid_rows);
        json_uint(j, "tiles", m->tiles);
        json_uint(j, "tokens", m->tokens);
        json_object_end(j);
    }
    json_array_end(j);
}

void answer_write_json(const struct answer *a, struct json_out *j)
{
    json_object_begin(j, NULL);
    json_string(j, "request_id", a->request_id ? a->request_id : "");
    json_uint(j, "seed", a->seed);
    write_logprobs(a->prompt_logprobs, a->n_prompt_logprobs, "prompt_logprobs", j);
    json_array_begin(j, "candidates");
    for (size_t i = 0; i < a->n_candidates; i++)
        write_candidate(&a->candidates[i], j);
    json_array_end(j);
    write_media(a, j);
    json_object_begin(j, "usage");
    json_uint(j, "prompt_tokens", a->usage.prompt_tokens);
    json_uint(j, "image_tokens", a->usage.image_tokens);
    json_uint(j, "completion_tokens", a->usage.completion_tokens);
    json_uint(j, "cached_tokens", a->usage.cached_tokens);
    json_uint(j, "tiles", a->usage.tiles);
    json_uint(j, "cached_tiles", a->usage.cached_tiles);
    json_object_end(j);
    json_object_begin(j, "timing");
    json_uint(j, "queue_us", a->timing.queue_us);
    json_uint(j, "media_us", a->timing.media_us);
    json_uint(j, "vision_us", a->timing.vision_us);
    json_uint(j, "prefill_us", a->timing.prefill_us);
    json_uint(j, "first_token_us", a->timing.first_token_us);
    json_uint(j, "total_us", a->timing.total_us);
    json_uint(j, "preemptions", a->timing.preemptions);
    json_object_end(j);
    json_object_end(j);
    json_end_line(j);
}

/* A token for people: quoted, so that spaces and line ends show. */
static void print_token(const struct answer_logprob *l, FILE *f)
{
    struct json_out j = {.file = f};
    json_bytes(&j, NULL, l->token, l->n_token_bytes);
}

static void print_logprobs(const struct answer_logprob *l, size_t n, const char *what, FILE *f)
{
    if (!n)
        return;
    fprintf(f, "%8s %10s %5s  %s%s\n", "id", "logprob", "rank", what,
            l[0].n_top ? "  (best: token logprob)" : "");
    for (size_t k = 0; k < n; k++, l++) {
        fprintf(f, "%8u %10.4f %5u  ", l->token_id, (double)l->logprob, l->rank);
        print_token(l, f);
        for (size_t t = 0; t < l->n_top; t++) {
            fputs(t ? ", " : "  (", f);
            print_token(&l->top[t], f);
            fprintf(f, " %.4f", (double)l->top[t].logprob);
        }
        fputs(l->n_top ? ")\n" : "\n", f);
    }
}

void answer_write_logprobs(const struct answer *a, FILE *f)
{
    print_logprobs(a->prompt_logprobs, a->n_prompt_logprobs, "token of the prompt", f);
    for (size_t i = 0; i < a->n_candidates; i++)
        print_logprobs(a->candidates[i].logprobs, a->candidates[i].n_logprobs, "token", f);
}

static void release_logprobs(struct answer_logprob *l, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < l[i].n_top; k++)
            free(l[i].top[k].token);
        free(l[i].top);
        free(l[i].token);
    }
    free(l);
}

void answer_release(struct answer *a)
{
    for (size_t i = 0; i < a->n_candidates; i++) {
        release_logprobs(a->candidates[i].logprobs, a->candidates[i].n_logprobs);
        free(a->candidates[i].text);
        free(a->candidates[i].ids);
        free(a->candidates[i].stop_string);
    }
    release_logprobs(a->prompt_logprobs, a->n_prompt_logprobs);
    free(a->candidates);
    free(a->media);
    free(a->request_id);
    memset(a, 0, sizeof(*a));
}
