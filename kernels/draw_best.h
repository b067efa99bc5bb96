/*
 * From the best logits of a row (struct top_k) to one token: the one definition, read as C and as
 * CUDA. cuda_draw.cu draws by it on the device; tests hold it to the sampler that draws from whole
 * rows (daemon/model/sampler.h has the order: temperature, min_p, top_k, top_p, draw).
 *
 * All is float64 arithmetic in one fixed order, so that the same weights give the same token
 * everywhere; of weights exp() may differ in its last bit from one machine to another.
 */
#ifndef INTERNVLD_KERNELS_DRAW_BEST_H
#define INTERNVLD_KERNELS_DRAW_BEST_H

#include <math.h>

#include "kernels/backend.h"

#ifdef __CUDACC__
#define DRAW_FN static __host__ __device__ inline
#else
#define DRAW_FN static inline
#endif

/* The candidates so far, by (weight descending, id ascending); `closed`: there are no others. */
struct draw_list {
    double weights[TOP_K];
    int32_t places[TOP_K]; // among the best
    double total;          // of the weights of all candidates, listed or not
    int32_t n;
    int closed;
};

/* Of the k-th of the best: its probability relative to the first's. temperature > 0. */
DRAW_FN double draw_weight(const struct top_k *best, int32_t k, float temperature)
{
    float largest = best->values[0] / temperature;
    return exp((double)(best->values[k] / temperature) - (double)largest);
}

DRAW_FN void draw_close(struct draw_list *c, int32_t n)
{
    c->n = n;
    c->closed = 1;
    c->total = 0;
    for (int32_t i = 0; i < n; i++)
        c->total += c->weights[i];
}

/* The best in order: logits apart may have equal weights, which stand by id. Of those equal to the
 * last, others may be missing: they are left out. */
DRAW_FN void draw_sort(struct draw_list *c, const struct draw_params *p, const struct top_k *best,
                       int32_t vocab)
{
    int32_t n = 0;
    for (; n < best->n; n++) {
        double weight = c->weights[n];
        int32_t at = n;
        if (!(weight > 0) || weight < p->min_p)
            break;
        for (; at > 0 &&
               (weight > c->weights[at - 1] ||
                (weight == c->weights[at - 1] && best->ids[n] < best->ids[c->places[at - 1]]));
             at--) {
            c->weights[at] = c->weights[at - 1];
            c->places[at] = c->places[at - 1];
        }
        c->weights[at] = weight;
        c->places[at] = n;
    }
    if (n < best->n || n == vocab) {
        draw_close(c, n);
        return;
    }
    for (double last = c->weights[n - 1]; n > 0 && c->weights[n - 1] == last;)
        n--;
    c->n = n;
    c->total = best->weight_sum;
    c->closed = 0;
}

/* The list after min_p and top_k, where those equal to the last one kept are kept too. Returns 0
 * when that takes more than the best. */
DRAW_FN int draw_shorten(struct draw_list *c, const struct draw_params *p, const struct top_k *best,
                         int32_t vocab)
{
    int32_t k = p->top_k;
    draw_sort(c, p, best, vocab);
    if (!c->closed && p->min_p > 0)
        return 0;
    if (k <= 0 || (c->closed && k >= c->n))
        return 1;
    if (k >= c->n)
        return 0;
    while (k < c->n && c->weights[k] == c->weights[k - 1])
        k++;
    draw_close(c, k);
    return 1;
}

/* Place among the best, or -1 when it takes more than these. */
DRAW_FN int32_t draw_place(struct draw_list *c, const struct draw_params *p,
                           const struct top_k *best, int32_t vocab)
{
    double sum = 0;
    if (!draw_shorten(c, p, best, vocab))
        return -1;
    if (p->top_p < 1) { // the nucleus: tokens with less than top_p before them
        int32_t n = 0;
        while (n < c->n && (n == 0 || sum < p->top_p * c->total))
            sum += c->weights[n++];
        if (!c->closed && (n == 0 || sum < p->top_p * c->total))
            return -1;
        draw_close(c, n);
    }
    sum = 0;
    for (int32_t i = 0; i < c->n; i++) {
        sum += c->weights[i];
        if (sum > p->u * c->total)
            return c->places[i];
    }
    return c->closed && c->n > 0 ? c->places[c->n - 1] : -1;
}

/* What op_draw() gives for p, whose row's best these are. c->weights [best->n] are draw_weight()'s,
 * unless p is greedy; the rest of c is scratch. */
DRAW_FN struct drawn draw_best(struct draw_list *c, const struct draw_params *p,
                               const struct top_k *best, int32_t vocab)
{
    struct drawn d = {DRAWN_NOT_FINITE, 0, 0};
    if (!best->finite)
        return d;
    int32_t place = p->temperature == 0 ? 0 : draw_place(c, p, best, vocab);
    d.id = DRAWN_TOO_FEW;
    if (place < 0)
        return d;
    d.id = best->ids[place];
    d.rank = place + 1;
    d.logprob = (float)(best->values[place] - best->log_sum);
    return d;
}

#endif
