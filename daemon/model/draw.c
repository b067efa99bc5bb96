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

float draw_temperature(const struct batch *b, int32_t row)
{
    for (int32_t i = 0; i < b->n_samples; i++)
        if (b->samples[i].row == row && b->samples[i].sampling.temperature > 0)
            return b->samples[i].sampling.temperature;
    return 1;
}

int draw_from_best(const struct batch *b, const int32_t *rows, int32_t n, const struct top_k *best,
                   const float *temperature, int32_t vocab, struct sample_result *samples,
                   uint8_t *drawn)
{
    int more = 0;
    for (int32_t j = 0; j < n; j++) {
        more |= b->targets[rows[j]] >= 0;
        for (int32_t i = 0; i < b->n_samples; i++) {
            const struct sample_row *row = &b->samples[i];
            float t = row->sampling.temperature;
            if (row->row != rows[j])
                continue;
            drawn[i] = (uint8_t)((t == 0 || t == temperature[j]) &&
                                 sampler_draw_best(&samples[i], &best[j], vocab, row));
            more |= !drawn[i];
        }
    }
    return more;
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
    const uint8_t *drawn;
    struct sample_result *samples;
    struct token_logprob *targets;
    atomic_int next;
};

static void draw_row(const struct rows_job *job, struct drawer *d, int32_t j)
{
    const struct batch *b = job->batch;
    int32_t row = job->rows[j], vocab = job->draw->vocab;
    const float *logits = logits_row(job->logits, j, d->row);
    if (b->targets[row] >= 0) {
        int32_t k = b->target_tops[row];
        if (k > vocab)
            die("%d best of %d tokens are asked for", k, vocab);
        sampler_score(job->targets + draw_n_targets(b, job->rows, j), k, logits, vocab,
                      b->targets[row]);
    }
    for (int32_t i = 0; i < b->n_samples; i++)
        if (b->samples[i].row == row && !job->drawn[i])
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
               const struct logits *l, const uint8_t *drawn, struct sample_result *samples,
               struct token_logprob *targets)
{
    struct rows_job job = {.draw = d,
                           .batch = b,
                           .rows = rows,
                           .logits = l,
                           .drawn = drawn,
                           .samples = samples,
                           .targets = targets};
    if (l->n == 1 || (int64_t)l->n * l->vocab < PARALLEL_MIN_LOGITS)
        draw_work(&job, 0, 1);
    else
        op_parallel(backend, draw_work, &job);
}
