/*
 * A mixture-of-experts MLP (experts.h).
 */
#include "daemon/model/experts.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

void expert_scratch_lay_out(struct expert_scratch *s, struct carve *c, const struct text_config *t,
                            const struct weight_cut *cut, int64_t max_tokens, enum dtype activation)
{
    size_t size = dtype_size(activation);
    int64_t n = max_tokens, dim = t->hidden_size, columns = cut->expert.columns.n;
    if (!t->n_experts)
        return;
    s->router = carve(c, n * t->n_experts, sizeof(float));
    s->in = carve(c, n * dim, size);
    s->out = carve(c, n * dim, sizeof(float));
    s->gate_up = carve(c, 2 * n * columns, size);
    s->gated = carve(c, n * columns, size);
    s->slots = carve(c, n * t->n_experts_per_token * dim, sizeof(float));
    s->rows = carve(c, n, sizeof(int32_t));
}

size_t expert_scratch_host_bytes(const struct text_config *t, int64_t max_tokens)
{
    size_t n = (size_t)max_tokens, k = (size_t)t->n_experts_per_token, dim = (size_t)t->hidden_size;
    if (!t->n_experts)
        return 0;
    return n * sizeof(float) * ((size_t)t->n_experts + (k + 1) * dim + 2 * k + 2);
}

void expert_scratch_allocate_host(struct expert_scratch *s, const struct text_config *t,
                                  int64_t max_tokens)
{
    size_t n = (size_t)max_tokens, k = (size_t)t->n_experts_per_token, dim = (size_t)t->hidden_size;
    if (!t->n_experts)
        return;
    s->host_router = xcalloc(n * (size_t)t->n_experts, sizeof(float));
    s->host_slots = xcalloc(n * k * dim, sizeof(float));
    s->host_sum = xcalloc(n * dim, sizeof(float));
    s->weights = xcalloc(n * k, sizeof(float));
    s->chosen = xcalloc(n * k, sizeof(int32_t));
    s->host_rows = xcalloc(2 * n, sizeof(int32_t));
}

void expert_scratch_free_host(struct expert_scratch *s)
{
    void *host[] = {s->host_router, s->host_slots, s->host_sum,
                    s->weights,     s->chosen,     s->host_rows};
    for (size_t i = 0; i < sizeof(host) / sizeof(host[0]); i++)
        free(host[i]);
    *s = (struct expert_scratch){0};
}

void expert_layer_bind(struct expert_layer *e, struct weights *w, struct backend *b,
                       enum dtype dtype, const char *prefix, const struct weight_cut *cut,
                       const struct text_config *t)
{
    struct weight_parts router = {prefix, {"mlp.gate"}, 0};
    size_t n = (size_t)t->n_experts;
    e->n_experts = t->n_experts;
    e->gate_up = xcalloc(n, sizeof(*e->gate_up));
    e->down = xcalloc(n, sizeof(*e->down));
    weights_linear(w, b, &e->router, dtype, &router, cut, t, NULL);
    for (int i = 0; i < e->n_experts; i++) {
        char p[96];
        snprintf(p, sizeof(p), "%smlp.experts.%d.", prefix, i);
        struct weight_parts gate_up = {p, {"gate_proj", "up_proj"}, 0};
        struct weight_parts down = {p, {"down_proj"}, 0};
        weights_linear(w, b, &e->gate_up[i], dtype, &gate_up, cut, t, NULL);
        weights_linear(w, b, &e->down[i], dtype, &down, cut, t, &cut->expert.column_lanes);
    }
}

void expert_layer_release(struct expert_layer *e, struct backend *b)
{
    if (!e->n_experts)
        return;
    for (int i = 0; i < e->n_experts; i++) {
        op_linear_free(b, &e->down[i]);
        op_linear_free(b, &e->gate_up[i]);
    }
    op_linear_free(b, &e->router);
    free(e->down);
    free(e->gate_up);
    *e = (struct expert_layer){0};
}

static int by_id(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return x < y ? -1 : x > y;
}

void experts_choose(const float *logits, int n, int k, int normalise, int32_t *ids, float *weights)
{
    float max = -INFINITY, sum = 0, kept = 0;
    for (int i = 0; i < n; i++)
        max = logits[i] > max ? logits[i] : max;
    for (int i = 0; i < n; i++)
        sum += expf(logits[i] - max);
    for (int j = 0; j < k; j++) { // k is small: one pass for each
        int best = -1;
        for (int i = 0; i < n; i++) {
            int taken = 0;
            for (int t = 0; t < j; t++)
                taken |= ids[t] == i;
            if (!taken && (best < 0 || logits[i] > logits[best]))
                best = i;
        }
        ids[j] = best;
        kept += expf(logits[best] - max) / sum;
    }
    qsort(ids, (size_t)k, sizeof(*ids), by_id);
    for (int j = 0; j < k; j++)
        weights[j] = expf(logits[ids[j]] - max) / sum / (normalise ? kept : 1);
}

/* Tokens of expert `id`: their rows, and the slots its output goes to. Returns how many. */
static int32_t rows_of_expert(struct expert_scratch *s, int64_t n, int k, int32_t id)
{
    int32_t *tokens = s->host_rows, *slots = s->host_rows + n, count = 0;
    for (int64_t i = 0; i < n * k; i++)
        if (s->chosen[i] == id) {
            tokens[count] = (int32_t)(i / k);
            slots[count++] = (int32_t)i;
        }
    return count;
}

static void run_expert(const struct expert_layer *e, struct expert_scratch *s, struct backend *b,
                       const struct text_config *t, int id, const struct tensor *x,
                       struct tensor *slots)
{
    int64_t n_tokens = x->shape[0], columns = e->down[id].in_dim, dim = t->hidden_size;
    int32_t n = rows_of_expert(s, n_tokens, t->n_experts_per_token, id);
    if (n == 0)
        return;
    size_t n_bytes = (size_t)n * sizeof(int32_t);
    struct tensor in = tensor_2d(s->in, b->activation_dtype, n, dim);
    struct tensor gate_up = tensor_2d(s->gate_up, b->activation_dtype, n, 2 * columns);
    struct tensor gated = tensor_2d(s->gated, e->down[id].dtype, n, columns);
    struct tensor out = tensor_2d(s->out, DTYPE_F32, n, dim);
    op_upload(b, s->rows, s->host_rows, n_bytes);
    op_gather_rows(b, &in, x, s->rows);
    op_matmul_gated(b, &gated, &gate_up, &in, &e->gate_up[id], t->hidden_act);
    op_matmul(b, &out, &gated, &e->down[id], NULL);
    op_upload(b, s->rows, s->host_rows + n_tokens, n_bytes);
    op_scatter_rows(b, slots, &out, s->rows);
}

void experts_forward(const struct expert_layer *e, struct expert_scratch *s, struct backend *b,
                     const struct text_config *t, const struct tensor *x, struct tensor *slots)
{
    int64_t n = x->shape[0];
    int k = t->n_experts_per_token;
    struct tensor router = tensor_2d(s->router, DTYPE_F32, n, e->n_experts);
    *slots = tensor_2d(s->slots, DTYPE_F32, n * k, t->hidden_size);
    op_matmul(b, &router, x, &e->router, NULL);
    op_download(b, s->host_router, router.data, (size_t)(n * e->n_experts) * sizeof(float));
    for (int64_t i = 0; i < n; i++)
        experts_choose(s->host_router + i * e->n_experts, e->n_experts, k, t->norm_topk_prob,
                       s->chosen + i * k, s->weights + i * k);
    for (int id = 0; id < e->n_experts; id++)
        run_expert(e, s, b, t, id, x, slots);
}

void experts_combine(struct expert_scratch *s, struct backend *b, const struct text_config *t,
                     const struct tensor *slots, struct tensor *y)
{
    int64_t n = y->shape[0], dim = t->hidden_size;
    int k = t->n_experts_per_token;
    op_download(b, s->host_slots, slots->data, (size_t)(n * k * dim) * sizeof(float));
    memset(s->host_sum, 0, (size_t)(n * dim) * sizeof(float));
    for (int64_t i = 0; i < n * k; i++) {
        const float *from = s->host_slots + i * dim;
        float *to = s->host_sum + i / k * dim;
        for (int64_t d = 0; d < dim; d++)
            to[d] += from[d] * s->weights[i];
    }
    op_upload(b, y->data, s->host_sum, (size_t)(n * dim) * sizeof(float));
}
