/*
 * The language model: binding of weights, scratch, release (language.h).
 */
#include <stdio.h>
#include <stdlib.h>

#include "daemon/model/language.h"
#include "daemon/model/rope.h"
#include "kernels/log.h"

static int64_t logit_rows(const struct language_limits *limits)
{
    return limits->max_tokens < LANGUAGE_LOGIT_ROWS ? limits->max_tokens : LANGUAGE_LOGIT_ROWS;
}

/* Of the largest step. */
static size_t inputs_bytes(const struct text_config *t, const struct language_limits *limits)
{
    int64_t pages_each = (limits->max_model_len + limits->page_size - 1) / limits->page_size;
    struct step_size size = {limits->max_tokens, limits->max_sequences,
                             limits->max_sequences * pages_each, limits->max_sequences,
                             t->head_dim / 2};
    struct step_inputs in;
    return step_inputs_lay_out(&in, NULL, &size);
}

static void lay_out(struct language_scratch *s, struct carve *c, const struct text_config *t,
                    const struct weight_cut *cut, int n_shards, int is_last,
                    const struct language_limits *limits, enum dtype activation)
{
    size_t size = dtype_size(activation);
    int64_t n = limits->max_tokens, dim = t->hidden_size;
    int64_t d = t->head_dim, q_dim = cut->dense.heads.n * d, kv_dim = cut->dense.kv_heads.n * d;
    int64_t columns = cut->dense.columns.n, rows = is_last ? logit_rows(limits) : 0;
    s->x = carve(c, n * dim, sizeof(float));
    s->normed = carve(c, n * dim, size);
    s->sum = carve(c, n * dim, sizeof(float));
    s->qkv = carve(c, n * (q_dim + 2 * kv_dim), size);
    s->attention = carve(c, n * q_dim, size);
    s->gate_up = carve(c, 2 * n * columns, size);
    s->gated = carve(c, n * columns, size);
    expert_scratch_lay_out(&s->experts, c, t, cut, n, activation);
    s->inputs = carve(c, (int64_t)inputs_bytes(t, limits), 1);
    s->features = carve(c, n * dim, sizeof(float));
    s->logits = carve(c, rows * cut->vocab.n, sizeof(float));
    s->gathered =
        n_shards > 1 ? carve(c, rows * cut->vocab.n * n_shards, sizeof(float)) : s->logits;
    s->best = carve(c, rows, sizeof(*s->best));
    s->drawn = carve(c, is_last ? limits->max_sequences : 0, sizeof(*s->drawn));
}

size_t language_scratch_bytes(const struct text_config *t, const struct weight_cut *cut,
                              int n_shards, int is_last, const struct language_limits *limits,
                              enum dtype activation)
{
    struct language_scratch s;
    struct carve sum = {0};
    lay_out(&s, &sum, t, cut, n_shards, is_last, limits, activation);
    return sum.used_bytes;
}

size_t language_host_bytes(const struct text_config *t, const struct weight_cut *cut, int n_shards,
                           int samples, int downloads, const struct language_limits *limits,
                           int n_threads)
{
    size_t vocab = (size_t)cut->vocab.n * (size_t)n_shards;
    size_t n_bytes = inputs_bytes(t, limits) + (size_t)limits->max_tokens * sizeof(int32_t);
    n_bytes += expert_scratch_host_bytes(t, limits->max_tokens);
    if (samples)
        n_bytes += (downloads ? (size_t)logit_rows(limits) * vocab * sizeof(float) : 0) +
                   (size_t)logit_rows(limits) * sizeof(struct top_k) +
                   draw_bytes(t->vocab_size, n_threads) +
                   (size_t)limits->max_sequences *
                       (sizeof(struct sample_result) + sizeof(struct drawn) + 1);
    return n_bytes;
}

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

int64_t language_widest_input(const struct text_config *t, const struct weight_cut *cut)
{
    int64_t heads = cut->dense.heads.n * t->head_dim;
    int64_t columns = larger(cut->dense.columns.n, t->n_experts ? cut->expert.columns.n : 0);
    return larger(t->hidden_size, larger(heads, columns));
}

static float *vector(struct language_model *m, struct weights *w, const char *prefix,
                     const char *name)
{
    char full[160];
    snprintf(full, sizeof(full), "%s%s", prefix, name);
    return weights_vector(w, m->backend, full);
}

static void bind_layer(struct language_model *m, struct weights *w, enum dtype dtype,
                       struct language_layer *l, int i)
{
    const struct text_config *t = m->config;
    char p[64];
    snprintf(p, sizeof(p), "language_model.model.layers.%d.", i);
    struct weight_parts qkv = {p, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, 1};
    struct weight_parts output = {p, {"self_attn.o_proj"}, 0};
    struct weight_parts gate_up = {p, {"mlp.gate_proj", "mlp.up_proj"}, 1};
    struct weight_parts down = {p, {"mlp.down_proj"}, 0};
    l->input_norm = vector(m, w, p, "input_layernorm.weight");
    weights_linear(w, m->backend, &l->qkv, dtype, &qkv, &m->cut, t, NULL);
    l->q_norm = vector(m, w, p, "self_attn.q_norm.weight");
    l->k_norm = vector(m, w, p, "self_attn.k_norm.weight");
    weights_linear(w, m->backend, &l->output, dtype, &output, &m->cut, t, &m->cut.dense.head_lanes);
    l->output_bias = vector(m, w, p, "self_attn.o_proj.bias");
    l->post_norm = vector(m, w, p, "post_attention_layernorm.weight");
    if (text_config_layer_kind(t, i) == LAYER_MOE) {
        expert_layer_bind(&l->experts, w, m->backend, dtype, p, &m->cut, t);
    } else {
        weights_linear(w, m->backend, &l->gate_up, dtype, &gate_up, &m->cut, t, NULL);
        weights_linear(w, m->backend, &l->down, dtype, &down, &m->cut, t,
                       &m->cut.dense.column_lanes);
    }
    l->down_bias = vector(m, w, p, "mlp.down_proj.bias");
    l->window = t->sliding_window && i >= t->first_window_layer ? t->sliding_window : 0;
}

/* Rows of the embedding as they are, or in fewer bits. */
static void bind_embedding(struct language_model *m, struct weights *w, enum dtype dtype)
{
    static const char name[] = "language_model.model.embed_tokens.weight";
    struct weight_parts parts = {"language_model.model.", {"embed_tokens"}, 0};
    if (weight_list_find(&w->list, name)->format == WEIGHT_FLOAT)
        m->embedding = weights_table(w, m->backend, name, m->cut.vocab, dtype);
    else
        weights_linear(w, m->backend, &m->embedding_codes, dtype, &parts, &m->cut, m->config, NULL);
}

/* lm_head, or the embedding where the checkpoint ties them: of a quantised one the same memory. */
static void bind_lm_head(struct language_model *m, struct weights *w, enum dtype dtype)
{
    struct weight_parts own = {"language_model.", {"lm_head"}, 0};
    struct weight_parts tied = {"language_model.model.", {"embed_tokens"}, 0};
    if (!w->has_lm_head && m->embedding_codes.packed)
        m->lm_head = m->embedding_codes;
    else
        weights_linear(w, m->backend, &m->lm_head, dtype, w->has_lm_head ? &own : &tied, &m->cut,
                       m->config, NULL);
}

static void allocate_host(struct language_model *m)
{
    size_t n = (size_t)m->limits.max_tokens, half = (size_t)m->config->head_dim / 2;
    size_t rows = (size_t)logit_rows(&m->limits), n_samples = (size_t)m->limits.max_sequences;
    m->host_inputs = xcalloc(inputs_bytes(m->config, &m->limits), 1);
    expert_scratch_allocate_host(&m->scratch.experts, m->config, m->limits.max_tokens);
    m->inv_freq = xcalloc(half, sizeof(float));
    m->grown_freq = xcalloc(half, sizeof(float));
    m->rope_scale = rope_frequencies(&m->config->rope, m->config->head_dim, 1, m->inv_freq);
    m->sequence_of = xcalloc(n, sizeof(int32_t));
    if (m->stage != m->n_stages - 1 || m->shard != 0)
        return;
    m->host_logits = m->scratch.gathered;
    if (!m->backend->is_host)
        m->host_logits = op_alloc_host(m->backend, rows * (size_t)m->cut.vocab.n *
                                                       (size_t)m->n_shards * sizeof(float));
    m->host_best = op_alloc_host(m->backend, rows * sizeof(*m->host_best));
    m->host_drawn = op_alloc_host(m->backend, n_samples * sizeof(*m->host_drawn));
    m->is_drawn = xcalloc(n_samples, sizeof(*m->is_drawn));
    m->samples = xcalloc(n_samples, sizeof(*m->samples));
    draw_init(&m->draw, m->config->vocab_size, m->backend->n_threads);
}

void language_init(struct language_model *m, const struct model_config *c, struct weights *w,
                   struct backend *b, enum dtype dtype, const struct topology *t,
                   struct model_comm *comm, const struct language_limits *limits)
{
    const struct text_config *text = &c->text;
    uint64_t before = w->n_bytes;
    struct error err;
    *m = (struct language_model){.config = text,
                                 .backend = b,
                                 .comm = comm,
                                 .limits = *limits,
                                 .stage = t->stage,
                                 .n_stages = t->layout.pipeline_parallel,
                                 .shard = t->shard,
                                 .n_shards = t->layout.tensor_parallel};
    m->layer_range = shard_layers(text->n_layers, m->stage, m->n_stages);
    if (weight_cut_init(&m->cut, text, m->shard, m->n_shards, &err) != 0)
        die("%s", err.msg);
    m->kv_of_head = xcalloc((size_t)m->cut.dense.heads.n, sizeof(int32_t));
    for (int h = 0; h < m->cut.dense.heads.n; h++)
        m->kv_of_head[h] =
            layer_shard_kv_of_head(&m->cut.dense, text->n_heads, text->n_kv_heads, h);
    if (m->stage == 0)
        bind_embedding(m, w, dtype);
    m->layers = xcalloc((size_t)m->layer_range.n + 1, sizeof(*m->layers));
    for (int64_t j = 0; j < m->layer_range.n; j++)
        bind_layer(m, w, dtype, &m->layers[j], (int)(m->layer_range.start + j));
    int is_last = m->stage == m->n_stages - 1;
    if (is_last) {
        m->final_norm = weights_vector(w, b, "language_model.model.norm.weight");
        bind_lm_head(m, w, dtype);
    }
    m->weight_bytes = w->n_bytes - before;
    kv_cache_init(&m->kv, b, (int)m->layer_range.n, (int)m->cut.dense.kv_heads.n, text->head_dim,
                  limits->page_size, limits->n_pages, limits->kv_dtype);
    m->scratch_bytes =
        language_scratch_bytes(text, &m->cut, m->n_shards, is_last, limits, b->activation_dtype);
    m->scratch_base = op_alloc_resident(b, m->scratch_bytes);
    struct carve c2 = {.base = m->scratch_base};
    lay_out(&m->scratch, &c2, text, &m->cut, m->n_shards, is_last, limits, b->activation_dtype);
    allocate_host(m);
}

void language_release(struct language_model *m)
{
    struct backend *b = m->backend;
    if (!b)
        return;
    draw_release(&m->draw);
    void *host[] = {m->is_drawn, m->samples,    m->targets,     m->sequence_of,
                    m->inv_freq, m->grown_freq, m->host_inputs, m->kv_of_head};
    for (size_t i = 0; i < sizeof(host) / sizeof(host[0]); i++)
        free(host[i]);
    if (!b->is_host)
        op_free_host(b, m->host_logits);
    op_free_host(b, m->host_best);
    op_free_host(b, m->host_drawn);
    expert_scratch_free_host(&m->scratch.experts);
    step_graphs_release(&m->graphs, b);
    op_free(b, m->scratch_base);
    kv_cache_release(&m->kv);
    for (int64_t j = 0; j < m->layer_range.n; j++) {
        struct language_layer *l = &m->layers[j];
        float *vectors[] = {l->input_norm, l->post_norm,   l->q_norm,
                            l->k_norm,     l->output_bias, l->down_bias};
        struct linear *linears[] = {&l->qkv, &l->output, &l->gate_up, &l->down};
        int n_linears = l->experts.n_experts ? 2 : 4;
        for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++)
            if (vectors[i])
                op_free(b, vectors[i]);
        for (int i = 0; i < n_linears; i++)
            op_linear_free(b, linears[i]);
        expert_layer_release(&l->experts, b);
    }
    if (m->embedding.data)
        op_free(b, m->embedding.data);
    if (m->final_norm)
        op_free(b, m->final_norm);
    if (m->lm_head.packed && m->lm_head.packed != m->embedding_codes.packed)
        op_linear_free(b, &m->lm_head);
    if (m->embedding_codes.packed)
        op_linear_free(b, &m->embedding_codes);
    free(m->layers);
    *m = (struct language_model){0};
}
