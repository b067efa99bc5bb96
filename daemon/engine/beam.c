/* The arithmetic of beam.h; the names of the parts are Transformers'. */
#include "daemon/engine/beam.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

#define FAR_BELOW (-1.0e9f) // Transformers' score of what must not be chosen

struct continuation { // beam `parent` going on with `id`
    float score;
    int32_t parent, id;
    int is_end, is_last; // by a token; because max_tokens is reached
};

int32_t beams_needed(int32_t n_beams, int32_t n_end_tokens)
{
    return n_beams * (n_end_tokens > 1 ? 1 + n_end_tokens : 2);
}

struct beam_search *beam_search_new(const struct beam_settings *s)
{
    if (s->n_beams < 2 || s->n_beams > BEAMS_MAX || s->n_best < 2 * s->n_beams ||
        s->n_best > TOP_LOGPROBS_MAX || s->max_tokens < 1)
        BUG("%d beams of %d candidates", s->n_beams, s->n_best);
    struct beam_search *b = xcalloc(1, sizeof(*b));
    b->settings = *s;
    b->can_improve = 1;
    for (int32_t i = 0; i < s->n_beams; i++)
        b->finished[i].score = FAR_BELOW;
    return b;
}

void beam_search_free(struct beam_search *b)
{
    if (!b)
        return;
    for (int32_t i = 0; i < b->settings.n_beams; i++)
        free(b->finished[i].ids);
    free(b);
}

/* Puts `c` into best[0 … *n), which is sorted, ties by order of arrival; at most n_max stay. */
static void insert(struct continuation *best, int32_t *n, int32_t n_max,
                   const struct continuation *c)
{
    if (*n == n_max && !(c->score > best[*n - 1].score))
        return;
    int32_t at = *n < n_max ? (*n)++ : n_max - 1;
    for (; at > 0 && c->score > best[at - 1].score; at--)
        best[at] = best[at - 1];
    best[at] = *c;
}

/* _get_top_k_continuations: the n_best of all, by accumulated score. Beams come in order, and the
 * tokens of each best first, lower id first among equals. */
static int32_t choose(const struct beam_search *b, int32_t n_rows, struct continuation *best)
{
    int32_t n = 0;
    for (int32_t i = 0; i < n_rows; i++)
        for (int32_t k = 0; k < b->rows[i].n_top; k++) {
            const struct token_logprob *t = &b->rows[i].top[k];
            struct continuation c = {.score = t->logprob + b->scores[i], .parent = i, .id = t->id};
            insert(best, &n, b->settings.n_best, &c);
        }
    return n;
}

/* _get_running_beams_for_next_iteration */
static void go_on(struct beam_search *b, const struct continuation *best, int32_t n)
{
    struct continuation next[BEAMS_MAX];
    int32_t n_next = 0;
    for (int32_t i = 0; i < n; i++) {
        struct continuation c = best[i];
        if (c.is_end || c.is_last)
            c.score += FAR_BELOW;
        insert(next, &n_next, b->settings.n_beams, &c);
    }
    for (int32_t i = 0; i < b->settings.n_beams; i++) {
        const struct continuation *c = &next[i < n_next ? i : n_next - 1];
        b->scores[i] = i < n_next ? c->score : FAR_BELOW;
        b->parents[i] = c->parent;
        b->tokens[i] = c->id;
    }
}

static int all_finished(const struct beam_search *b)
{
    int all = 1;
    for (int32_t i = 0; i < b->settings.n_beams; i++)
        all &= b->finished[i].is_complete;
    return all;
}

static void insert_finished(struct beam_search *b, const struct continuation *c, float score,
                            const int32_t *output)
{
    struct beam_finished *f = b->finished;
    int32_t at = b->settings.n_beams - 1;
    if (!(score > f[at].score))
        return;
    free(f[at].ids);
    for (; at > 0 && score > f[at - 1].score; at--)
        f[at] = f[at - 1];
    f[at] = (struct beam_finished){
        .score = score, .is_complete = 1, .ends_by_token = c->is_end, .n_ids = b->n_tokens + 1};
    f[at].ids = xcalloc((size_t)f[at].n_ids, sizeof(*f[at].ids));
    if (b->n_tokens > 0)
        memcpy(f[at].ids, output, (size_t)b->n_tokens * sizeof(*output));
    f[at].ids[b->n_tokens] = c->id;
}

/* _update_finished_beams: of the first n_beams only. What may not enter any more has a score so far
 * below that it would only fill an empty place, where it would not count. */
static void finish(struct beam_search *b, const struct continuation *best, int32_t n,
                   const int32_t *const *outputs)
{
    const struct beam_settings *s = &b->settings;
    if (!b->can_improve || (s->early_stopping == EARLY_STOPPING_TRUE && all_finished(b)))
        return;
    float length = (float)pow(b->n_tokens + 1, s->length_penalty);
    for (int32_t i = 0; i < n && i < s->n_beams; i++)
        if (best[i].is_end || best[i].is_last)
            insert_finished(b, &best[i], best[i].score / length, outputs[best[i].parent]);
}

/* _check_early_stop_heuristic */
static int may_improve(const struct beam_search *b)
{
    const struct beam_settings *s = &b->settings;
    int32_t length = s->early_stopping == EARLY_STOPPING_NEVER && s->length_penalty > 0
                         ? s->max_tokens
                         : b->n_tokens;
    float best = b->scores[0] / (float)pow(length, s->length_penalty);
    float worst = b->finished[s->n_beams - 1].score;
    return best > (all_finished(b) ? worst : FAR_BELOW);
}

int beam_search_step(struct beam_search *b, int32_t n_rows, const int32_t *const *outputs,
                     int (*is_end)(const void *arg, int32_t id), const void *arg)
{
    const struct beam_settings *s = &b->settings;
    struct continuation best[TOP_LOGPROBS_MAX];
    int32_t n = choose(b, n_rows, best), n_ended = 0;
    if (n == 0)
        BUG("a beam search step of %d rows without candidates", n_rows);
    for (int32_t i = 0; i < n; i++) {
        best[i].is_end = is_end(arg, best[i].id);
        best[i].is_last = b->n_tokens + 1 >= s->max_tokens;
        n_ended += best[i].is_end || best[i].is_last;
    }
    go_on(b, best, n);
    finish(b, best, n, outputs);
    b->n_tokens++;
    b->can_improve &= may_improve(b);
    memset(b->has_row, 0, sizeof(b->has_row));
    return !b->can_improve || n_ended == n ||
           (s->early_stopping == EARLY_STOPPING_TRUE && all_finished(b));
}
