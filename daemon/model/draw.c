/*
 * A step's logits to samples and targets. See draw.h.
 */
#include "daemon/model/draw.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

/* Fewer logits than this are done before other threads are awake. */
#define PARALLEL_MIN_LOGITS 65536

static int n_drawers(int n_threads)
{
    return n_threads < DRAW_THREADS_MAX ? n_threads : DRAW_THREADS_MAX;
}

uint64_t draw_bytes(int32_t vocab, int n_threads)
{
    return (uint64_t)n_drawers(n_threads) *
           (sampler_bytes(vocab) + (uint64_t)vocab * sizeof(float));
}

void draw_init(struct draw *d, int32_t vocab, int n_threads)
{
    *d = (struct draw){.vocab = vocab, .n_drawers = n_drawers(n_threads)};
    d->drawers = xcalloc((size_t)d->n_drawers, sizeof(*d->drawers));
    for (int i = 0; i < d->n_drawers; i++) {
        sampler_init(&d->drawers[i].sampler, vocab);
        d->drawers[i].row = xcalloc((size_t)vocab, sizeof(float));
        memset(d->drawers[i].row, 0, (size_t)vocab * sizeof(float)); // resident, as the sampler's
    }
}

void draw_release(struct draw *d)
{
    for (int i = 0; i < d->n_drawers; i++) {
        sampler_release(&d->drawers[i].sampler);
        free(d->drawers[i].row);
    }
    free(d->drawers);
    *d = (struct draw){0};
}

const float *logits_row(const struct logits *l, int32_t j, float *row)
{
    if (l->n_shards == 1)
        return l->data + j * l->part;
    for (int t = 0; t < l->n_shards; t++) {
        int64_t start = t * l->part, have = l->vocab - start < l->part ? l->vocab - start : l->part;
        if (have > 0)
            memcpy(row + start, l->data + (t * (int64_t)l->n + j) * l->part,
                   (size_t)have * sizeof(float));
    }
    return row;
}

static int by_number(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

void draw_prepare(const struct batch *b, const int32_t *rows, int32_t n, float *temperature,
                  struct draw_params *params)
{
    for (int32_t j = 0; j < n; j++)
        temperature[j] = 0;
    for (int32_t i = 0; i < b->n_samples; i++) {
        const struct sample_row *row = &b->samples[i];
        const int32_t *at = bsearch(&row->row, rows, (size_t)n, sizeof(*rows), by_number);
        int32_t j = (int32_t)(at - rows);
        float t = row->sampling.temperature;
        params[i] = sampler_draw_params(row, j);
        if (t > 0 && temperature[j] == 0)
            temperature[j] = t;
        if (t > 0 && temperature[j] != t)
            params[i].row = -1;
    }
    for (int32_t j = 0; j < n; j++)
        temperature[j] = temperature[j] > 0 ? temperature[j] : 1;
}

static int is_of(const struct sample_row *row, const int32_t *rows, int32_t n)
{
    return row->row >= rows[0] && row->row <= rows[n - 1];
}

enum draw_wish draw_wants(const struct batch *b, const int32_t *rows, int32_t n,
                          const struct draw_params *params)
{
    enum draw_wish most = DRAW_NOTHING;
    for (int32_t i = 0; i < b->n_samples; i++) {
        if (!is_of(&b->samples[i], rows, n) || params[i].row < 0)
            continue;
        if (b->samples[i].sampling.n_logprobs > 0)
            return DRAW_TOKENS_AND_BEST;
        most = DRAW_TOKENS;
    }
    return most;
}

void draw_take(const struct batch *b, const int32_t *rows, int32_t first, int32_t n,
               const struct draw_params *params, const struct drawn *drawn,
               const struct top_k *best, struct sample_result *samples, uint8_t *is_drawn)
{
    for (int32_t i = 0; i < b->n_samples; i++) {
        if (!is_of(&b->samples[i], rows, n))
            continue;
        is_drawn[i] = params[i].row >= 0 && drawn[i].id != DRAWN_TOO_FEW;
        if (is_drawn[i])
            sampler_take(&samples[i], &b->samples[i], &drawn[i], &best[params[i].row - first]);
    }
}

int draw_wants_row(const struct batch *b, int32_t row, const uint8_t *is_drawn)
{
    int wants = b->targets[row] >= 0;
    for (int32_t i = 0; i < b->n_samples; i++)
        wants |= b->samples[i].row == row && !is_drawn[i];
    return wants;
}

int32_t draw_n_targets(const struct batch *b, const int32_t *rows, int32_t n)
{
    int32_t n_targets = 0;
    for (int32_t j = 0; j < n; j++)
        if (b->targets[rows[j]] >= 0)
            n_targets += 1 + b->target_tops[rows[j]];
    return n_targets;
}

/* What the threads share. */
struct rows_job {
    struct draw *draw;
    const struct batch *batch;
    const int32_t *rows;
    const struct logits *logits;
    const uint8_t *is_drawn;
    struct sample_result *samples;
    struct token_logprob *targets;
    atomic_int next;
};

static void draw_row(const struct rows_job *job, struct drawer *d, int32_t j)
{
    const struct batch *b = job->batch;
    int32_t row = job->rows[j], vocab = job->draw->vocab;
    if (!draw_wants_row(b, row, job->is_drawn))
        return;
    const float *logits = logits_row(job->logits, j, d->row);
    if (b->targets[row] >= 0) {
        int32_t k = b->target_tops[row];
        if (k > vocab)
            die("%d best of %d tokens are asked for", k, vocab);
        sampler_score(job->targets + draw_n_targets(b, job->rows, j), k, logits, vocab,
                      b->targets[row]);
    }
    for (int32_t i = 0; i < b->n_samples; i++)
        if (b->samples[i].row == row && !job->is_drawn[i])
            sampler_draw(&d->sampler, &job->samples[i], logits, &b->samples[i], b);
}

static void draw_work(void *arg, int thread, int n_threads)
{
    struct rows_job *job = arg;
    (void)n_threads;
    if (thread >= job->draw->n_drawers)
        return;
    for (int j; (j = atomic_fetch_add(&job->next, 1)) < job->logits->n;)
        draw_row(job, &job->draw->drawers[thread], j);
}

void draw_rows(struct draw *d, struct backend *backend, const struct batch *b, const int32_t *rows,
               const struct logits *l, const uint8_t *is_drawn, struct sample_result *samples,
               struct token_logprob *targets)
{
    struct rows_job job = {.draw = d,
                           .batch = b,
                           .rows = rows,
                           .logits = l,
                           .is_drawn = is_drawn,
                           .samples = samples,
                           .targets = targets};
    if (l->n == 1 || (int64_t)l->n * l->vocab < PARALLEL_MIN_LOGITS)
        draw_work(&job, 0, 1);
    else
        op_parallel(backend, draw_work, &job);
}
