/*
 * The language model: the forward pass (language.h). Binding and scratch are in language_init.c.
 */
#include "daemon/model/language.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/attention_probs.h"
#include "daemon/model/rope.h"
#include "kernels/clock.h"
#include "kernels/log.h"
#include "kernels/trace.h"

/* One step on its way. */
struct step {
    struct language_model *m;
    const struct batch *batch;
    struct language_output *out;
    struct capture_list *captures;
    struct step_inputs inputs, host; // in back-end memory; where they are filled
    struct paged_layout layout;      // of the inputs
    int64_t n;                       // tokens
    int is_first, is_last;
    int32_t n_from_features, n_needed; // rows
    int drops_rows;                    // that are not needed, in the model's last layer
    uint32_t any_capture;              // of all sequences together
    struct graph *graph;               // of the layers, for so many rows and keys; NULL: op by op
    struct tensor x, normed, sum;
};

/* ---- communication: NULL groups are groups of one ---- */

static void all_reduce(struct step *s, struct tensor *x)
{
    if (s->m->comm && s->m->comm->shards)
        comm_all_reduce(s->m->comm->shards, x->data, (size_t)tensor_n_elements(x));
}

/* dst [n_shards, n] <- src [n] of every shard; float32 in back-end memory. */
static void all_gather(struct language_model *m, float *dst, const float *src, int64_t n)
{
    struct tensor to = tensor_1d(dst, DTYPE_F32, n), from = tensor_1d((float *)src, DTYPE_F32, n);
    if (m->comm && m->comm->shards)
        comm_all_gather(m->comm->shards, dst, src, (size_t)n * sizeof(float));
    else
        op_copy(m->backend, &to, &from);
}

/* ---- captures: shard 0 of the stage that has the tensor ---- */

/* `kind`: any of these. */
static void capture_rows(struct step *s, uint32_t kind, const struct tensor *x, const char *name)
{
    const struct batch *b = s->batch;
    if (!(s->any_capture & kind) || s->m->shard != 0)
        return;
    for (int32_t i = 0; i < b->n_sequences; i++) {
        if (!(b->captures[i] & kind))
            continue;
        int32_t first = b->query_start[i], n = b->query_start[i + 1] - first;
        struct tensor rows = tensor_rows(x, first, n);
        capture_tensor(s->captures, s->m->backend, name, i, 0, &rows);
    }
}

static void capture_hidden(struct step *s, const struct tensor *x, int i)
{
    char name[CAPTURE_NAME_MAX];
    snprintf(name, sizeof(name), "hidden_states.%d", i);
    uint32_t kinds = CAPTURE_HIDDEN_STATES;
    if (i == s->m->config->n_layers)
        kinds |= CAPTURE_LAST_HIDDEN_STATE;
    capture_rows(s, kinds, x, name);
}

/* The heads of any shard of the stage. */
static struct layer_shard part_of(const struct language_model *m, int shard)
{
    struct weight_cut cut;
    struct error err;
    if (weight_cut_init(&cut, m->config, shard, m->n_shards, &err) != 0)
        BUG("shard %d of %d: %s", shard, m->n_shards, err.msg);
    return cut.dense;
}

/* Keys or values of all the stage's shards, put together in the order of the model's kv heads
 * (replicated heads once). Every shard takes part in the gather. */
static void capture_cache(struct step *s, const struct tensor *x, int layer, const char *what)
{
    struct language_model *m = s->m;
    const struct text_config *t = m->config;
    const struct batch *b = s->batch;
    int64_t local = x->shape[1], d = t->head_dim, width = (int64_t)t->n_kv_heads * d;
    char name[CAPTURE_NAME_MAX];
    if (!(s->any_capture & CAPTURE_CACHE))
        return;
    size_t n_bytes = (size_t)(s->n * local) * (size_t)m->n_shards * sizeof(float);
    float *all = xcalloc(n_bytes, 1);
    float *whole = xcalloc((size_t)(s->n * width), sizeof(float));
    float *gathered = op_alloc(m->backend, n_bytes), *mine = op_alloc(m->backend, n_bytes);
    struct tensor packed = tensor_2d(mine, DTYPE_F32, s->n, local);
    op_copy(m->backend, &packed, x);
    all_gather(m, gathered, mine, s->n * local);
    op_download(m->backend, all, gathered, n_bytes);
    op_free(m->backend, gathered);
    op_free(m->backend, mine);
    for (int shard = 0; shard < m->n_shards; shard++) {
        struct layer_shard part = part_of(m, shard);
        if (part.kv_heads.n * d != local)
            BUG("shards with different numbers of kv heads");
        for (int64_t r = 0; r < s->n; r++)
            memcpy(whole + r * width + part.kv_heads.start * d, all + (shard * s->n + r) * local,
                   (size_t)local * sizeof(float));
    }
    snprintf(name, sizeof(name), "cache.%d.%s", layer, what);
    for (int32_t i = 0; i < b->n_sequences && m->shard == 0; i++) {
        int32_t first = b->query_start[i], n = b->query_start[i + 1] - first;
        if (b->captures[i] & CAPTURE_CACHE)
            memcpy(capture_add(s->captures, name, i, 0, n, (int32_t)width), whole + first * width,
                   (size_t)(n * width) * sizeof(float));
    }
    free(whole);
    free(all);
}

/* out [n_heads, n, n_cols], on shard 0 alone, <- what the n new queries of sequence i look at. Head
 * by head: every shard takes part in every gather, with zeros where it has fewer heads. */
static void gather_attentions(struct step *s, float *out, int32_t n_cols, const struct tensor *q,
                              const struct kv_pages *kv, int32_t i, int32_t window)
{
    struct language_model *m = s->m;
    const struct batch *b = s->batch;
    int64_t d = m->config->head_dim, n_rounds = 0;
    size_t n_floats = (size_t)q->shape[0] * (size_t)n_cols, n_bytes = n_floats * sizeof(float);
    float *probs = xcalloc(n_floats, sizeof(float)), *mine = op_alloc(m->backend, n_bytes);
    float *gathered = op_alloc(m->backend, n_bytes * (size_t)m->n_shards);
    for (int shard = 0; shard < m->n_shards; shard++) {
        int64_t n_heads = part_of(m, shard).heads.n;
        n_rounds = n_heads > n_rounds ? n_heads : n_rounds;
    }
    for (int64_t h = 0; h < n_rounds; h++) {
        memset(probs, 0, n_bytes);
        if (h < m->cut.dense.heads.n) {
            struct tensor head = tensor_columns(q, h * d, d);
            attention_probs(probs, n_cols, m->backend, &head, kv, b->pages + b->page_start[i],
                            m->kv_of_head[h], b->context_len[i], window);
        }
        op_upload(m->backend, mine, probs, n_bytes);
        all_gather(m, gathered, mine, (int64_t)n_floats);
        for (int shard = 0; out && shard < m->n_shards; shard++) {
            struct range heads = part_of(m, shard).heads;
            if (h < heads.n)
                op_download(m->backend, out + (size_t)(heads.start + h) * n_floats,
                            gathered + (size_t)shard * n_floats, n_bytes);
        }
    }
    op_free(m->backend, gathered);
    op_free(m->backend, mine);
    free(probs);
}

static void capture_attentions(struct step *s, const struct tensor *q, const struct kv_pages *kv,
                               int layer, int32_t window)
{
    const struct batch *b = s->batch;
    char name[CAPTURE_NAME_MAX];
    if (!(s->any_capture & CAPTURE_ATTENTIONS))
        return;
    snprintf(name, sizeof(name), "attentions.%d", layer);
    for (int32_t i = 0; i < b->n_sequences; i++) {
        if (!(b->captures[i] & CAPTURE_ATTENTIONS))
            continue;
        int32_t first = b->query_start[i], n = b->query_start[i + 1] - first;
        int32_t n_cols = b->rope_len[i]; // the whole prompt, of which later parts are yet to come
        struct tensor rows = tensor_rows(q, first, n);
        float *out = NULL;
        if (s->m->shard == 0)
            out = capture_add(s->captures, name, i, 0, s->m->config->n_heads * n, n_cols);
        gather_attentions(s, out, n_cols, &rows, kv, i, window);
    }
}

/* ---- the step's arrays ---- */

static void check_limits(const struct language_model *m, const struct batch *b)
{
    int64_t pages_each = (m->limits.max_model_len + m->limits.page_size - 1) / m->limits.page_size;
    if (b->n_tokens > m->limits.max_tokens || b->n_sequences > m->limits.max_sequences ||
        b->n_pages > pages_each * m->limits.max_sequences || b->n_features > m->limits.max_tokens ||
        b->n_samples > m->limits.max_sequences)
        die("batch %llu: %d tokens, %d sequences, %d pages, %d features, %d samples are past this "
            "rank's limits (%d tokens, %d sequences)",
            (unsigned long long)b->step_id, b->n_tokens, b->n_sequences, b->n_pages, b->n_features,
            b->n_samples, m->limits.max_tokens, m->limits.max_sequences);
    if (b->n_features && b->feature_dim != m->config->hidden_size)
        die("batch %llu: features of %d columns, the model takes %d",
            (unsigned long long)b->step_id, b->feature_dim, m->config->hidden_size);
}

static void set_tensors(struct step *s)
{
    const struct language_scratch *t = &s->m->scratch;
    int64_t dim = s->m->config->hidden_size;
    s->x = tensor_2d(t->x, DTYPE_F32, s->n, dim);
    s->normed = tensor_2d(t->normed, s->m->backend->activation_dtype, s->n, dim);
    s->sum = tensor_2d(t->sum, DTYPE_F32, s->n, dim);
}

/* Where the inputs of so large a step are. Returns their bytes. */
static size_t set_inputs(struct step *s, int32_t n_tokens, int32_t n_sequences, int32_t n_pages,
                         int32_t n_samples, int32_t max_context_len)
{
    struct language_model *m = s->m;
    const struct step_size size = {n_tokens, n_sequences, n_pages, n_samples,
                                   m->config->head_dim / 2};
    step_inputs_lay_out(&s->inputs, m->scratch.inputs, &size);
    s->layout = (struct paged_layout){n_sequences,           n_tokens,
                                      max_context_len,       s->inputs.query_start,
                                      s->inputs.context_len, s->inputs.page_start,
                                      s->inputs.pages};
    return step_inputs_lay_out(&s->host, m->host_inputs, &size);
}

/* cos and sin of every token, in float32 as Transformers. Frequencies depend on the sequence only
 * with dynamic scaling, past the original length. */
static void fill_rope(struct step *s)
{
    struct language_model *m = s->m;
    const struct batch *b = s->batch;
    const struct rope_config *rope = &m->config->rope;
    int half = m->config->head_dim / 2;
    for (int32_t i = 0; i < b->n_sequences; i++) {
        const float *freq = m->inv_freq;
        if (rope->type == ROPE_DYNAMIC && b->rope_len[i] > rope->original_max_positions) {
            rope_frequencies(rope, m->config->head_dim, b->rope_len[i], m->grown_freq);
            freq = m->grown_freq;
        }
        for (int32_t r = b->query_start[i]; r < b->query_start[i + 1]; r++)
            rope_angles(freq, m->rope_scale, m->config->head_dim, b->positions[r],
                        s->host.cos + (int64_t)r * half, s->host.sin + (int64_t)r * half);
    }
}

/* Rows whose logits somebody wants, ascending; and how tokens are drawn from them, where the device
 * draws. */
static void fill_needed(struct step *s)
{
    const struct batch *b = s->batch;
    int32_t n = 0, *needed = s->host.needed;
    memset(needed, 0, (size_t)s->n * sizeof(*needed)); // marks first
    for (int32_t i = 0; i < b->n_samples; i++)
        needed[b->samples[i].row] = 1;
    for (int32_t r = 0; r < b->n_tokens; r++) {
        int captured = b->want_logits[r] && (b->captures[s->m->sequence_of[r]] & CAPTURE_LOGITS);
        if (needed[r] || captured || b->targets[r] >= 0)
            needed[n++] = r; // n <= r: only marks already read are overwritten
    }
    if (s->m->backend->ops->draw)
        draw_prepare(b, needed, n, s->host.temperature, s->host.draws);
    s->n_needed = n;
}

/* A block of n_sequences that may be more than the batch has: their rows are nobody's. */
static void fill_inputs(struct step *s, int64_t n_sequences)
{
    const struct batch *b = s->batch;
    const struct step_inputs *in = &s->host;
    memcpy(in->ids, b->token_ids, (size_t)s->n * sizeof(*in->ids));
    memcpy(in->query_start, b->query_start, (size_t)(b->n_sequences + 1) * sizeof(int32_t));
    for (int64_t i = b->n_sequences + 1; i <= n_sequences; i++)
        in->query_start[i] = b->n_tokens;
    memcpy(in->context_len, b->context_len, (size_t)b->n_sequences * sizeof(int32_t));
    memcpy(in->page_start, b->page_start, (size_t)(b->n_sequences + 1) * sizeof(int32_t));
    memcpy(in->pages, b->pages, (size_t)b->n_pages * sizeof(int32_t));
    for (int32_t r = 0; r < b->n_tokens; r++)
        if (b->feature_rows[r] >= 0) {
            in->feature_tokens[s->n_from_features] = r;
            in->feature_from[s->n_from_features++] = b->feature_rows[r];
        }
    fill_rope(s);
    if (s->is_last)
        fill_needed(s);
}

/* Chooses the graph of a decode step, and brings the inputs, padded to its size. */
static void begin(struct step *s)
{
    struct language_model *m = s->m;
    const struct batch *b = s->batch;
    int32_t max_context_len = 0, n_padded = b->n_sequences;
    check_limits(m, b);
    s->n = b->n_tokens;
    s->is_first = m->stage == 0;
    s->is_last = m->stage == m->n_stages - 1;
    for (int32_t i = 0; i < b->n_sequences; i++) {
        s->any_capture |= b->captures[i];
        if (b->context_len[i] > max_context_len)
            max_context_len = b->context_len[i];
        for (int32_t r = b->query_start[i]; r < b->query_start[i + 1]; r++)
            m->sequence_of[r] = i;
    }
    if (b->n_tokens == b->n_sequences && !s->any_capture)
        s->graph = step_graphs_find(&m->graphs, b->n_sequences, max_context_len, &n_padded);
    size_t n_bytes = set_inputs(s, s->graph ? n_padded : b->n_tokens, n_padded, b->n_pages,
                                b->n_samples, max_context_len);
    fill_inputs(s, n_padded);
    op_upload(m->backend, m->scratch.inputs, m->host_inputs, n_bytes);
    set_tensors(s);
    s->drops_rows = s->is_last && s->n_needed < s->n && !s->graph &&
                    !(s->any_capture & (CAPTURE_HIDDEN_STATES | CAPTURE_LAST_HIDDEN_STATE));
    kv_cache_copy_pages(&m->kv, b->copy_src, b->copy_dst, b->n_copies);
}

/* ---- the model ---- */

/* Embedding rows (each id lives on one shard, the others give zeros), then features over the rows
 * of image tokens. */
static void embed(struct step *s)
{
    struct language_model *m = s->m;
    struct backend *b = m->backend;
    const struct batch *batch = s->batch;
    int64_t dim = m->config->hidden_size;
    int32_t n = s->n_from_features, first_row = (int32_t)m->cut.vocab.start;
    if (m->embedding_codes.packed)
        op_embed_quantized(b, &s->x, &m->embedding_codes, s->inputs.ids, first_row);
    else
        op_embed(b, &s->x, &m->embedding, s->inputs.ids, first_row);
    all_reduce(s, &s->x);
    if (n) {
        struct tensor features = tensor_2d(m->scratch.features, DTYPE_F32, batch->n_features, dim);
        struct tensor chosen = tensor_2d(m->scratch.sum, DTYPE_F32, n, dim);
        op_upload(b, features.data, batch->features,
                  (size_t)batch->n_features * (size_t)dim * sizeof(float));
        op_gather_rows(b, &chosen, &features, s->inputs.feature_from);
        op_scatter_rows(b, &s->x, &chosen, s->inputs.feature_tokens);
    }
    capture_rows(s, CAPTURE_EMBEDS, &s->x, "inputs_embeds");
}

/* RMSNorm of each head of a view [n, heads * head_dim], in place. */
static void norm_heads(struct step *s, struct tensor *x, const float *weight)
{
    int64_t d = s->m->config->head_dim;
    for (int64_t c = 0; c < x->shape[1]; c += d) {
        struct tensor head = tensor_columns(x, c, d);
        op_rms_norm(s->m->backend, &head, &head, weight, s->m->config->rms_norm_eps);
    }
}

/* From here on the step has the needed rows alone, and what is attended to for them lies where
 * queries, keys and values were. */
static void keep_needed(struct step *s, struct tensor *mixed)
{
    struct backend *b = s->m->backend;
    const struct tensor all = s->x, all_mixed = *mixed;
    s->n = s->n_needed;
    set_tensors(s);
    *mixed = tensor_2d(s->m->scratch.qkv, mixed->dtype, s->n, mixed->shape[1]);
    op_gather_rows(b, mixed, &all_mixed, s->inputs.needed);
    op_gather_rows(b, &s->sum, &all, s->inputs.needed);
    op_copy(b, &s->x, &s->sum);
}

/* The layer's sum, of which rows nobody needs are left out where it is the model's last. */
static void attention(struct step *s, const struct language_layer *l, struct kv_pages *kv, int i)
{
    struct language_model *m = s->m;
    struct backend *b = m->backend;
    const struct layer_shard *part = &m->cut.dense;
    int64_t d = m->config->head_dim, q_dim = part->heads.n * d, kv_dim = part->kv_heads.n * d;
    struct tensor qkv = tensor_2d(m->scratch.qkv, b->activation_dtype, s->n, q_dim + 2 * kv_dim);
    struct tensor q = tensor_columns(&qkv, 0, q_dim), k = tensor_columns(&qkv, q_dim, kv_dim);
    struct tensor v = tensor_columns(&qkv, q_dim + kv_dim, kv_dim);
    struct tensor mixed = tensor_2d(m->scratch.attention, b->activation_dtype, s->n, q_dim);
    int drops_rows = s->drops_rows && i == m->config->n_layers - 1;

    op_matmul(b, &qkv, &s->normed, &l->qkv, NULL);
    if (l->q_norm) {
        norm_heads(s, &q, l->q_norm);
        norm_heads(s, &k, l->k_norm);
    }
    op_kv_write(b, kv, &s->layout, &k, &v,
                &(struct rotation){.q = &q, .cos = s->inputs.cos, .sin = s->inputs.sin});
    capture_cache(s, &k, i, "key");
    capture_cache(s, &v, i, "value");
    capture_attentions(s, &q, kv, i, l->window);
    if (drops_rows && s->n_needed == 0) {
        s->n = 0;
        return;
    }
    op_paged_attention(b, &mixed, &q, kv, &s->layout, m->kv_of_head, (int32_t)part->heads.n,
                       (float)(1.0 / sqrt((double)d)), l->window);
    if (drops_rows)
        keep_needed(s, &mixed);
    op_matmul(b, &s->sum, &mixed, &l->output, NULL);
}

static void mlp(struct step *s, const struct language_layer *l)
{
    struct language_model *m = s->m;
    struct backend *b = m->backend;
    int64_t columns = l->down.in_dim;
    struct tensor gate_up = tensor_2d(m->scratch.gate_up, b->activation_dtype, s->n, 2 * columns);
    struct tensor gated = tensor_2d(m->scratch.gated, l->down.dtype, s->n, columns);
    op_matmul_gated(b, &gated, &gate_up, &s->normed, &l->gate_up, m->config->hidden_act);
    op_matmul(b, &s->sum, &gated, &l->down, NULL);
}

/* The slots of all tokens are k times the rows that an all-reduce is made for: k of them. */
static void mixture(struct step *s, const struct language_layer *l)
{
    struct language_model *m = s->m;
    struct tensor slots;
    experts_forward(&l->experts, &m->scratch.experts, m->backend, m->config, &s->normed, &slots);
    for (int i = 0; i < m->config->n_experts_per_token; i++) {
        struct tensor part = tensor_rows(&slots, i * s->n, s->n);
        all_reduce(s, &part);
    }
    experts_combine(&m->scratch.experts, m->backend, m->config, &slots, &s->sum);
}

/* x += sum, and normed <- the norm of x by `weight`, what the next products read; NULL: none. */
static void add_sum(struct step *s, const float *weight)
{
    struct backend *b = s->m->backend;
    if (weight)
        op_add_rms_norm(b, &s->normed, &s->x, &s->sum, weight, s->m->config->rms_norm_eps);
    else
        op_add(b, &s->x, &s->sum);
}

/* The same of shards' parts of a sum, to which `bias` (or NULL) is added once. */
static void reduce_and_add(struct step *s, const float *bias, const float *weight)
{
    struct language_model *m = s->m;
    if (weight && !bias && m->comm && m->comm->shards &&
        comm_all_reduce_norm(m->comm->shards, &s->normed, &s->x, &s->sum, weight,
                             m->config->rms_norm_eps))
        return;
    all_reduce(s, &s->sum);
    if (bias)
        op_add_bias(m->backend, &s->sum, bias);
    add_sum(s, weight);
}

static void run_layers(struct step *s)
{
    struct language_model *m = s->m;
    const struct language_layer *layers = m->layers;
    op_rms_norm(m->backend, &s->normed, &s->x, layers[0].input_norm, m->config->rms_norm_eps);
    for (int64_t j = 0; j < m->layer_range.n; j++) {
        const struct language_layer *l = &layers[j];
        const float *next_norm = j + 1 < m->layer_range.n ? layers[j + 1].input_norm : NULL;
        int i = (int)(m->layer_range.start + j);
        capture_hidden(s, &s->x, i);
        attention(s, l, &m->kv.layers[j], i);
        if (s->n == 0) // of a part of a prompt that others follow, only keys and values are wanted
            return;
        reduce_and_add(s, l->output_bias, l->post_norm);
        if (l->experts.n_experts) {
            mixture(s, l);
            add_sum(s, next_norm);
        } else {
            mlp(s, l);
            reduce_and_add(s, l->down_bias, next_norm);
        }
    }
}

/* ---- recorded steps ---- */

/* Of `rows` sequences with a new token each, of up to context_len tokens. */
static struct step decode_step(struct language_model *m, int32_t rows, int32_t context_len)
{
    struct step s = {.m = m, .n = rows};
    set_inputs(&s, rows, rows, 0, 0, context_len);
    set_tensors(&s);
    return s;
}

/* The layers of such steps, for each of the context lengths. */
static void record_rows(struct language_model *m, int i)
{
    struct step_graphs *g = &m->graphs;
    struct step first = decode_step(m, g->rows[i], g->contexts[0]);
    run_layers(&first); // products choose their algorithms
    for (int j = 0; j < g->n_context_sizes; j++) {
        struct step s = decode_step(m, g->rows[i], g->contexts[j]);
        op_graph_begin(m->backend);
        run_layers(&s);
        g->graphs[i][j] = op_graph_end(m->backend);
    }
}

/* Inputs of nobody's rows, however many. */
static void upload_zeros(struct language_model *m)
{
    const struct step_graphs *g = &m->graphs;
    int32_t most = g->rows[g->n_row_sizes - 1];
    struct step s = {.m = m};
    size_t n_bytes = set_inputs(&s, most, most, 0, 0, 0);
    memset(m->host_inputs, 0, n_bytes);
    op_upload(m->backend, m->scratch.inputs, m->host_inputs, n_bytes);
}

static void replay(struct step *s)
{
    uint64_t begin_ns = trace_begin();
    op_graph_launch(s->m->backend, s->graph);
    trace_end("replay", begin_ns, "rows", s->n);
}

void language_record(struct language_model *m)
{
    struct step_graphs *g = &m->graphs;
    const struct language_limits *limits = &m->limits;
    uint64_t start_ns = clock_now_ns();
    if (!m->backend->replays)
        return;
    for (int64_t j = 0; j < m->layer_range.n; j++)
        if (m->layers[j].experts.n_experts) {
            log_info("language", "no step is recorded: experts are chosen on the host");
            return;
        }
    step_graphs_init(
        g, limits->max_tokens < limits->max_sequences ? limits->max_tokens : limits->max_sequences,
        limits->max_model_len);
    /* Shards are loaded at different times, and a sum over CUDA IPC waits for the others only so
     * long: all meet here first. */
    all_gather(m, m->scratch.x, m->scratch.sum, 1);
    op_sync(m->backend);
    upload_zeros(m);
    for (int i = 0; i < g->n_row_sizes; i++)
        record_rows(m, i);
    op_sync(m->backend); /* ready means that nothing is left to run */
    log_info("language", "decode steps of %d sizes, up to %d sequences, recorded in %.1f s",
             g->n_row_sizes * g->n_context_sizes, g->rows[g->n_row_sizes - 1],
             (double)(clock_now_ns() - start_ns) / 1e9);
}

/* ---- the last stage ---- */

static int captures_logits(const struct step *s, int32_t row)
{
    const struct batch *b = s->batch;
    return b->want_logits[row] && b->captures[s->m->sequence_of[row]] & CAPTURE_LOGITS;
}

/* Logits of needed[first, first + n): row j of shard t begins at (t * n + j) * vocab.n. */
static void finish_chunk(struct step *s, const int32_t *needed, int32_t n)
{
    struct language_model *m = s->m;
    const struct batch *b = s->batch;
    int32_t vocab = m->config->vocab_size;
    const struct logits l = {m->host_logits, m->n_shards, n, m->cut.vocab.n, vocab};
    float *run = NULL; // rows left of the run of neighbouring rows that is being captured
    int32_t run_row = -1, n_targets = draw_n_targets(b, needed, n);
    for (int32_t j = 0; j < n; j++) {
        int32_t row = needed[j], sequence = m->sequence_of[row];
        if (!captures_logits(s, row))
            continue;
        int32_t last = j; // the run ends where a row, the sequence or the wish does
        while (last + 1 < n && needed[last + 1] == needed[last] + 1 &&
               b->want_logits[needed[last + 1]] && m->sequence_of[needed[last + 1]] == sequence)
            last++;
        if (row != run_row)
            run = capture_add(s->captures, "logits", sequence, row - b->query_start[sequence],
                              last - j + 1, vocab);
        memcpy(run, logits_row(&l, j, m->draw.drawers[0].row), (size_t)vocab * sizeof(float));
        run += vocab;
        run_row = last > j ? row + 1 : -1;
    }
    if (s->out->n_targets + n_targets > m->targets_capacity) {
        m->targets_capacity = 2 * (s->out->n_targets + n_targets);
        m->targets = xrealloc(m->targets, (size_t)m->targets_capacity, sizeof(*m->targets));
    }
    draw_rows(&m->draw, m->backend, b, needed, &l, m->is_drawn, m->samples,
              m->targets + s->out->n_targets);
    s->out->n_targets += n_targets;
}

/* The device draws what the best of needed[first, first + n), whose logits are gathered, suffice
 * for. */
static void finish_on_device(struct step *s, int32_t first, int32_t n)
{
    struct language_model *m = s->m;
    struct backend *b = m->backend;
    const struct batch *batch = s->batch;
    const int32_t *needed = s->host.needed + first, vocab = m->config->vocab_size;
    enum draw_wish wish = draw_wants(batch, needed, n, s->host.draws);
    if (wish == DRAW_NOTHING)
        return;
    op_top_k(b, m->scratch.best, m->scratch.gathered, m->n_shards, n, (int32_t)m->cut.vocab.n,
             vocab, s->inputs.temperature + first);
    op_draw(b, m->scratch.drawn, s->inputs.draws, batch->n_samples, m->scratch.best, first, n,
            vocab);
    if (wish == DRAW_TOKENS_AND_BEST)
        op_download(b, m->host_best, m->scratch.best, (size_t)n * sizeof(*m->host_best));
    op_download(b, m->host_drawn, m->scratch.drawn,
                (size_t)batch->n_samples * sizeof(*m->host_drawn));
    draw_take(batch, needed, first, n, s->host.draws, m->host_drawn, m->host_best, m->samples,
              m->is_drawn);
}

/* What the host still wants of needed[first, first + n): those rows, or all where they are many.
 * Returns 0 when it is nothing. */
static int download_logits(struct step *s, int32_t first, int32_t n)
{
    struct language_model *m = s->m;
    const int32_t *needed = s->host.needed + first;
    int64_t part = m->cut.vocab.n;
    int32_t wanted[LANGUAGE_LOGIT_ROWS], n_wanted = 0;
    for (int32_t j = 0; j < n; j++)
        if (captures_logits(s, needed[j]) || draw_wants_row(s->batch, needed[j], m->is_drawn))
            wanted[n_wanted++] = j;
    if (m->backend->is_host) // where they are
        return n_wanted > 0;
    if (n_wanted > n / 4) {
        op_download(m->backend, m->host_logits, m->scratch.gathered,
                    (size_t)(m->n_shards * n * part) * sizeof(float));
        return 1;
    }
    for (int32_t i = 0; i < n_wanted; i++)
        for (int t = 0; t < m->n_shards; t++) {
            int64_t at = ((int64_t)t * n + wanted[i]) * part;
            op_download(m->backend, m->host_logits + at, m->scratch.gathered + at,
                        (size_t)part * sizeof(float));
        }
    return n_wanted > 0;
}

static void finish(struct step *s)
{
    struct language_model *m = s->m;
    struct backend *b = m->backend;
    const struct batch *batch = s->batch;
    int64_t part = m->cut.vocab.n, dim = m->config->hidden_size;
    if (s->n > 0) {
        op_rms_norm(b, &s->normed, &s->x, m->final_norm, m->config->rms_norm_eps);
        capture_hidden(s, &s->normed, m->config->n_layers);
    }
    if (m->shard == 0)
        memset(m->is_drawn, 0, (size_t)m->limits.max_sequences);
    for (int32_t first = 0; first < s->n_needed; first += LANGUAGE_LOGIT_ROWS) {
        int32_t n = s->n_needed - first;
        n = n < LANGUAGE_LOGIT_ROWS ? n : LANGUAGE_LOGIT_ROWS;
        struct tensor chosen = tensor_2d(m->scratch.sum, b->activation_dtype, n, dim);
        struct tensor logits = tensor_2d(m->scratch.logits, DTYPE_F32, n, part);
        if (s->n == s->n_needed)
            chosen = tensor_rows(&s->normed, first, n);
        else
            op_gather_rows(b, &chosen, &s->normed, s->inputs.needed + first);
        op_matmul(b, &logits, &chosen, &m->lm_head, NULL);
        if (m->n_shards > 1)
            all_gather(m, m->scratch.gathered, logits.data, n * part);
        if (m->shard != 0)
            continue;
        if (b->ops->draw)
            finish_on_device(s, first, n);
        if (!download_logits(s, first, n))
            continue;
        uint64_t begin_ns = trace_begin();
        finish_chunk(s, s->host.needed + first, n);
        trace_end("sample", begin_ns, "rows", n);
    }
    if (m->shard != 0)
        return;
    s->out->n_samples = batch->n_samples;
    s->out->samples = m->samples;
    s->out->targets = m->targets;
}

void language_forward(struct language_model *m, const struct batch *batch,
                      struct language_output *out, struct capture_list *captures)
{
    struct step s = {.m = m, .batch = batch, .out = out, .captures = captures};
    *out = (struct language_output){0};
    if (batch->n_tokens == 0)
        return;
    begin(&s);
    size_t n_bytes = (size_t)tensor_n_elements(&s.x) * sizeof(float);
    if (s.is_first)
        embed(&s);
    else
        comm_recv(m->comm->stages, s.x.data, n_bytes, m->stage - 1);
    if (s.graph)
        replay(&s);
    else
        run_layers(&s);
    if (s.is_last)
        finish(&s);
    else
        comm_send(m->comm->stages, s.x.data, n_bytes, m->stage + 1);
}
