/*
 * From one row of logits to one token (sampler.h).
 */
#include "daemon/model/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

uint64_t sampler_bytes(int32_t vocab_size)
{
    return (uint64_t)vocab_size *
           (sizeof(float) + sizeof(int32_t) + 1 + sizeof(struct sampler_candidate));
}

/* Zeros that are there: nothing becomes resident in a step (plan.h). */
static void *zeros(int32_t n, size_t size)
{
    return memset(xcalloc((size_t)n, size), 0, (size_t)n * size);
}

void sampler_init(struct sampler *s, int32_t vocab_size)
{
    s->vocab_size = vocab_size;
    s->work = zeros(vocab_size, sizeof(*s->work));
    s->counts = zeros(vocab_size, sizeof(*s->counts));
    s->seen = zeros(vocab_size, sizeof(*s->seen));
    s->candidates = zeros(vocab_size, sizeof(*s->candidates));
}

void sampler_release(struct sampler *s)
{
    free(s->candidates);
    free(s->seen);
    free(s->counts);
    free(s->work);
    *s = (struct sampler){0};
}

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). */
static void philox(uint32_t ctr[4], uint32_t k0, uint32_t k1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * ctr[0], p1 = (uint64_t)0xCD9E8D57u * ctr[2];
        uint32_t next[4] = {(uint32_t)(p1 >> 32) ^ ctr[1] ^ k0, (uint32_t)p1,
                            (uint32_t)(p0 >> 32) ^ ctr[3] ^ k1, (uint32_t)p0};
        memcpy(ctr, next, sizeof(next));
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

double sampler_uniform(uint64_t seed, uint32_t candidate, uint32_t position)
{
    uint32_t ctr[4] = {position, candidate, 0, 0};
    philox(ctr, (uint32_t)seed, (uint32_t)(seed >> 32));
    uint64_t bits = (uint64_t)ctr[0] << 32 | ctr[1];
    return (double)(bits >> 11) * 0x1p-53;
}

double sampler_log_sum_exp(const float *logits, int32_t n, int *finite)
{
    float max = -INFINITY;
    int ok = 1;
    for (int32_t i = 0; i < n; i++) {
        ok &= isfinite(logits[i]) != 0;
        max = logits[i] > max ? logits[i] : max;
    }
    *finite = ok;
    if (!ok)
        return NAN;
    double sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += exp((double)logits[i] - max);
    return max + log(sum);
}

/* Lowest id among the largest, as torch.argmax. NaN never wins. The largest of many lanes first,
 * which a compiler makes vectors of, then where it is. */
static int32_t argmax(const float *x, int32_t n)
{
    enum { LANES = 32 };
    float lanes[LANES], max = -INFINITY;
    int32_t i = 0;
    for (int k = 0; k < LANES; k++)
        lanes[k] = -INFINITY;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++)
            lanes[k] = x[i + k] > lanes[k] ? x[i + k] : lanes[k];
    for (int k = 0; k < LANES; k++)
        max = lanes[k] > max ? lanes[k] : max;
    for (; i < n; i++)
        max = x[i] > max ? x[i] : max;
    for (i = 0; i < n; i++)
        if (x[i] == max)
            return i;
    return 0;
}

/* The k best raw logits by (value descending, id ascending). */
static int32_t top_logprobs(struct token_logprob *top, int32_t k, const float *logits, int32_t n,
                            double log_sum)
{
    int32_t n_top = 0;
    for (int32_t i = 0; i < n; i++) {
        if (n_top == k && (k == 0 || logits[i] <= logits[top[k - 1].id]))
            continue;
        int32_t at = n_top < k ? n_top++ : k - 1;
        for (; at > 0 && logits[i] > logits[top[at - 1].id]; at--)
            top[at] = top[at - 1];
        top[at].id = i;
    }
    for (int32_t i = 0; i < n_top; i++) {
        top[i].logprob = (float)(logits[top[i].id] - log_sum);
        top[i].rank = i + 1;
    }
    return n_top;
}

static int32_t rank_of(int32_t id, const float *logits, int32_t n)
{
    int32_t rank = 1;
    for (int32_t i = 0; i < n; i++)
        rank += logits[i] > logits[id] || (logits[i] == logits[id] && i < id);
    return rank;
}

void sampler_score(struct token_logprob *out, int32_t k, const float *logits, int32_t n, int32_t id)
{
    int finite;
    double log_sum = sampler_log_sum_exp(logits, n, &finite);
    if (!finite || id < 0 || id >= n) {
        for (int32_t i = 0; i <= k; i++)
            out[i] = (struct token_logprob){.id = id, .logprob = NAN};
        return;
    }
    out[0] = (struct token_logprob){id, (float)(logits[id] - log_sum), rank_of(id, logits, n)};
    top_logprobs(out + 1, k, logits, n, log_sum);
}

/* vllm/model_executor/layers/utils.py apply_penalties(): repetition over prompt and output ids
 * (divide what is positive, multiply what is not), then frequency and presence over output ids. */
static void apply_penalties(struct sampler *s, const struct sample_row *row, const struct batch *b)
{
    const struct sampling *p = &row->sampling;
    int32_t n = row->n_prompt + row->n_output;
    const int32_t *ids = b->history + row->history_start;
    if (p->repetition_penalty == 1 && p->frequency_penalty == 0 && p->presence_penalty == 0)
        return;
    for (int32_t i = 0; i < n; i++) {
        int32_t id = ids[i];
        if (id < 0 || id >= s->vocab_size)
            continue;
        s->counts[id] += i >= row->n_prompt;
        if (!s->seen[id] && p->repetition_penalty != 1)
            s->work[id] = s->work[id] > 0 ? s->work[id] / p->repetition_penalty
                                          : s->work[id] * p->repetition_penalty;
        s->seen[id] = 1;
    }
    for (int32_t i = 0; i < n; i++) {
        int32_t id = ids[i];
        if (id < 0 || id >= s->vocab_size)
            continue;
        if (s->counts[id] > 0) {
            s->work[id] -= p->frequency_penalty * (float)s->counts[id];
            s->work[id] -= p->presence_penalty;
        }
        s->counts[id] = 0;
        s->seen[id] = 0;
    }
}

static void apply_bias_and_bans(struct sampler *s, const struct sample_row *row,
                                const struct batch *b)
{
    for (int32_t i = 0; i < row->n_banned; i++) {
        int32_t id = b->banned[row->banned_start + i];
        if (id >= 0 && id < s->vocab_size)
            s->work[id] = -INFINITY;
    }
    for (int32_t i = 0; i < row->n_bias; i++) {
        int32_t id = b->bias_ids[row->bias_start + i];
        if (id >= 0 && id < s->vocab_size)
            s->work[id] += b->bias_values[row->bias_start + i];
    }
}

/* More likely first, then lower id. */
static int before(const struct sampler_candidate *a, const struct sampler_candidate *b)
{
    return a->weight != b->weight ? a->weight > b->weight : a->id < b->id;
}

static void sift_down(struct sampler_candidate *heap, int32_t n, int32_t at)
{
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= n)
            return;
        if (child + 1 < n && before(&heap[child + 1], &heap[child]))
            child++;
        if (!before(&heap[child], &heap[at]))
            return;
        struct sampler_candidate t = heap[at];
        heap[at] = heap[child];
        heap[child] = t;
        at = child;
    }
}

/* Moves the best of heap[0, *n) to heap[--*n] and returns it: what was taken lies sorted behind. */
static const struct sampler_candidate *take_best(struct sampler_candidate *heap, int32_t *n)
{
    struct sampler_candidate best = heap[0];
    heap[0] = heap[--*n];
    heap[*n] = best;
    sift_down(heap, *n, 0);
    return &heap[*n];
}

/* What a token is drawn from: the logits, or, where the request changes them, `work`. */
static const float *adjusted(struct sampler *s, const float *logits, const struct sample_row *row,
                             const struct batch *b)
{
    const struct sampling *p = &row->sampling;
    if (row->n_banned == 0 && row->n_bias == 0 && p->repetition_penalty == 1 &&
        p->frequency_penalty == 0 && p->presence_penalty == 0)
        return logits;
    memcpy(s->work, logits, (size_t)s->vocab_size * sizeof(float));
    apply_bias_and_bans(s, row, b);
    apply_penalties(s, row, b);
    return s->work;
}

/* Candidates after temperature and min_p, as a heap; *total is the sum of their weights. */
static int32_t make_candidates(struct sampler *s, const struct sampling *p, const float *logits,
                               double *total)
{
    float max = logits[argmax(logits, s->vocab_size)] / p->temperature;
    int32_t n = 0;
    *total = 0;
    for (int32_t i = 0; i < s->vocab_size; i++) {
        double weight = exp((double)(logits[i] / p->temperature) - max);
        if (!(weight > 0) || weight < p->min_p)
            continue;
        s->candidates[n++] = (struct sampler_candidate){weight, i};
        *total += weight;
    }
    for (int32_t i = n / 2; i-- > 0;)
        sift_down(s->candidates, n, i);
    return n;
}

/* Takes the top_k best out of the heap, and those equal to the last of them (vLLM keeps ties), and
 * makes them the heap. */
static int32_t keep_top_k(struct sampler_candidate *c, int32_t n, int32_t top_k, double *total)
{
    int32_t left = n;
    double last = 0;
    *total = 0;
    while (left > 0 && (n - left < top_k || c[0].weight == last)) {
        last = take_best(c, &left)->weight;
        *total += last;
    }
    for (int32_t i = 0; i < n - left; i++) // sorted behind, best last: best first is a heap too
        if (i < n - 1 - i) {
            struct sampler_candidate t = c[i];
            c[i] = c[n - 1 - i];
            c[n - 1 - i] = t;
        }
    return n - left;
}

/* One draw: the first candidate, best first, at which the running sum passes u * total. */
static int32_t draw(struct sampler *s, const float *logits, const struct sample_row *row)
{
    const struct sampling *p = &row->sampling;
    struct sampler_candidate *c = s->candidates;
    double total = 0, sum = 0;
    int32_t n = make_candidates(s, p, logits, &total);
    if (p->top_k > 0 && p->top_k < n)
        n = keep_top_k(c, n, p->top_k, &total);
    double u =
        sampler_uniform(row->sampling.seed, (uint32_t)row->candidate, (uint32_t)row->position);
    int32_t left = n, id = argmax(logits, s->vocab_size);
    if (p->top_p < 1) { // the nucleus: tokens with less than top_p before them
        while (left > 0 && (left == n || sum < p->top_p * total))
            sum += take_best(c, &left)->weight;
        total = sum;
        sum = 0;
        for (int32_t i = n; i-- > left;) {
            id = c[i].id;
            sum += c[i].weight;
            if (sum > u * total)
                break;
        }
        return id;
    }
    while (left > 0) {
        const struct sampler_candidate *best = take_best(c, &left);
        id = best->id;
        sum += best->weight;
        if (sum > u * total)
            break;
    }
    return id;
}

/* Transformers' order in beam search: log_softmax, then the processors. */
static void rank_for_beams(struct sampler *s, struct sample_result *out, const float *logits,
                           double log_sum, const struct sample_row *row, const struct batch *b)
{
    int32_t k = row->sampling.n_beam_best, n = s->vocab_size;
    for (int32_t i = 0; i < n; i++)
        s->work[i] = (float)(logits[i] - log_sum);
    apply_bias_and_bans(s, row, b);
    apply_penalties(s, row, b);
    k = k < TOP_LOGPROBS_MAX ? k : TOP_LOGPROBS_MAX;
    out->n_top = top_logprobs(out->top, k < n ? k : n, s->work, n, 0);
    out->token = out->top[0];
}

void sampler_draw(struct sampler *s, struct sample_result *out, const float *logits,
                  const struct sample_row *row, const struct batch *b)
{
    const struct sampling *p = &row->sampling;
    int finite = 1;
    memset(out, 0, sizeof(*out));
    out->sequence = row->sequence;
    double log_sum = 0;
    if (p->n_logprobs >= 0 || p->n_beam_best > 0)
        log_sum = sampler_log_sum_exp(logits, s->vocab_size, &finite);
    else
        for (int32_t i = 0; i < s->vocab_size; i++)
            finite &= isfinite(logits[i]) != 0;
    if (!finite) {
        out->not_finite = 1;
        return;
    }
    if (p->n_beam_best > 0) {
        rank_for_beams(s, out, logits, log_sum, row, b);
        return;
    }
    const float *chosen = adjusted(s, logits, row, b);
    int32_t id = p->temperature == 0 ? argmax(chosen, s->vocab_size) : draw(s, chosen, row);
    out->token.id = id;
    if (p->n_logprobs < 0)
        return;
    int32_t k = p->n_logprobs < TOP_LOGPROBS_MAX ? p->n_logprobs : TOP_LOGPROBS_MAX;
    out->token.logprob = (float)(logits[id] - log_sum);
    out->token.rank = rank_of(id, logits, s->vocab_size);
    out->n_top = top_logprobs(out->top, k < s->vocab_size ? k : s->vocab_size, logits,
                              s->vocab_size, log_sum);
}

/* ---- from the best alone ---- */

struct draw_params sampler_draw_params(const struct sample_row *row, int32_t place)
{
    const struct sampling *p = &row->sampling;
    int is_plain = !row->n_banned && !row->n_bias && p->n_beam_best <= 0 &&
                   p->repetition_penalty == 1 && p->frequency_penalty == 0 &&
                   p->presence_penalty == 0;
    return (struct draw_params){
        .u = sampler_uniform(p->seed, (uint32_t)row->candidate, (uint32_t)row->position),
        .temperature = p->temperature,
        .top_p = p->top_p,
        .min_p = p->min_p,
        .top_k = p->top_k,
        .row = is_plain ? place : -1};
}

void sampler_take(struct sample_result *out, const struct sample_row *row, const struct drawn *d,
                  const struct top_k *best)
{
    const struct sampling *p = &row->sampling;
    memset(out, 0, sizeof(*out));
    out->sequence = row->sequence;
    if (d->id == DRAWN_NOT_FINITE) {
        out->not_finite = 1;
        return;
    }
    out->token.id = d->id;
    if (p->n_logprobs < 0)
        return;
    out->token.logprob = d->logprob;
    out->token.rank = d->rank;
    int32_t k = p->n_logprobs < TOP_LOGPROBS_MAX ? p->n_logprobs : TOP_LOGPROBS_MAX;
    for (int32_t i = 0; i < k && i < best->n; i++)
        out->top[out->n_top++] =
            (struct token_logprob){best->ids[i], (float)(best->values[i] - best->log_sum), i + 1};
}
