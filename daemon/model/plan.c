/*
 * The memory of every rank, before anything is allocated (plan.h).
 */
#include "daemon/model/plan.h"

#include <stdlib.h>

#include "daemon/model/language.h"
#include "daemon/model/plan_cuda.h"
#include "daemon/model/vision.h"
#include "daemon/model/weight_list.h"
#include "kernels/cuda_backend.h"
#include "kernels/log.h"

/* 1 when the rank holds `s`. */
static int holds(const struct topology *t, const struct weight_spec *s, int n_layers)
{
    struct range layers = {0, 0};
    int last = t->layout.pipeline_parallel - 1;
    if (t->role == ROLE_LANGUAGE)
        layers = shard_layers(n_layers, t->stage, t->layout.pipeline_parallel);
    switch (s->home) {
    case HOME_VISION:
        return t->role == ROLE_VISION;
    case HOME_FIRST:
        return t->role == ROLE_LANGUAGE && t->stage == 0;
    case HOME_LAST:
        return t->role == ROLE_LANGUAGE && t->stage == last;
    case HOME_LAYER:
        return s->layer >= layers.start && s->layer < layers.start + layers.n;
    }
    return 0;
}

/* lm_head is held whether or not the checkpoint ties it: the tied one is packed a second time, but
 * where the embedding, being quantised, serves as it is. */
static int is_embedding_again(const struct topology *t, const struct weight_spec *s,
                              const struct model_config *c, const struct weight_list *list)
{
    const struct weight_spec *embedding =
        weight_list_find(list, "language_model.model.embed_tokens.weight");
    return s->kind == KIND_LM_HEAD && c->tie_word_embeddings && t->stage == 0 &&
           embedding->format != WEIGHT_FLOAT;
}

/* The lanes that a shard's columns of a row-parallel weight are cut into; NULL of others. */
static const struct lanes *lanes_of(const struct weight_spec *s, const struct weight_cut *cut)
{
    return s->axis == AXIS_HEAD_COLUMNS     ? &cut->dense.head_lanes
           : s->axis == AXIS_MLP_COLUMNS    ? &cut->dense.column_lanes
           : s->axis == AXIS_EXPERT_COLUMNS ? &cut->expert.column_lanes
                                            : NULL;
}

/* Matrices are kept at the run's dtype, or quantised; norms, biases and other vectors as float32.
 */
static uint64_t held_bytes(const struct weight_spec *s, const struct weight_list *list,
                           const struct weight_cut *cut, const struct text_config *t,
                           const struct plan_settings *p)
{
    struct range rows = {0, weight_spec_rows(s)}, columns = {0, weight_spec_columns(s)};
    if (s->home != HOME_VISION)
        weight_cut_ranges(cut, t, s, &rows, &columns);
    if (p->on_cuda)
        return plan_cuda_weight_bytes(s, list, rows, columns, lanes_of(s, cut), p);
    if (s->format != WEIGHT_FLOAT)
        return weight_spec_quantized_bytes(s, rows, columns);
    return (uint64_t)(rows.n * columns.n) *
           dtype_size(weight_spec_is_matrix(s) ? p->dtype : DTYPE_F32);
}

/* The program, Open MPI, gRPC and what they allocate before any request: resident pages, measured
 * on Debian 12 with 3 to 11 ranks (40 to 42 MiB, a vision rank's 39; the gateway, with its
 * vocabulary, 45 to 60), and the huge page that a rank's small weights do not fill. */
#define LANGUAGE_PROCESS_BYTES ((uint64_t)46 << 20)
#define VISION_PROCESS_BYTES ((uint64_t)44 << 20)
#define GATEWAY_PROCESS_BYTES ((uint64_t)64 << 20)

/* Scratch in the memory of the back end, and what steps have on the host. */
static void add_step(struct plan_rank *r, const struct model_config *c,
                     const struct plan_settings *s, size_t scratch, size_t host)
{
    if (s->on_cuda) {
        r->on_device = 1;
        r->scratch_bytes += plan_cuda_block(scratch) + plan_cuda_fixed_bytes(s, &r->topology, c);
        r->process_bytes += host + CUDA_STAGING_BYTES;
    } else {
        r->scratch_bytes += scratch + host;
    }
}

/* What a vision rank takes beyond its weights. */
static void add_vision_step(struct plan_rank *r, const struct model_config *c,
                            const struct plan_settings *s)
{
    size_t scratch = vision_scratch_bytes(c, s->max_vision_tiles, s->activation_dtype, s->dtype);
    size_t host = vision_host_bytes(c, s->max_vision_tiles);
    int64_t n_rows, n_columns;
    vision_largest_input(c, s->max_vision_tiles, &n_rows, &n_columns);
    add_step(r, c, s, scratch, host);
    if (!s->on_cuda)
        r->scratch_bytes += backend_cpu_matmul_bytes(s->cpu_isa, n_rows, n_columns, s->dtype);
}

/* What a language rank takes beyond its weights and pages. */
static void add_language_step(struct plan_rank *r, const struct model_config *c,
                              const struct plan_settings *s, const struct weight_cut *cut)
{
    const struct text_config *t = &c->text;
    const struct topology *topology = &r->topology;
    int n_shards = s->layout.tensor_parallel;
    int is_last = topology->stage == s->layout.pipeline_parallel - 1;
    struct language_limits limits = {.max_tokens = s->max_num_batched_tokens,
                                     .max_sequences = s->max_num_seqs,
                                     .max_model_len = s->max_model_len,
                                     .page_size = s->page_size};
    size_t scratch =
        language_scratch_bytes(t, cut, n_shards, is_last, &limits, s->activation_dtype);
    size_t host = language_host_bytes(t, cut, n_shards, is_last && topology->shard == 0, s->on_cuda,
                                      &limits, s->n_threads);
    add_step(r, c, s, scratch, host);
    if (!s->on_cuda)
        r->scratch_bytes += backend_cpu_matmul_bytes(s->cpu_isa, limits.max_tokens,
                                                     language_widest_input(t, cut), s->dtype);
}

/* Codes stay codes where all parts of their linear have the like; else all are floats. */
static int is_stacked_alike(const struct weight_list *list, const struct weight_spec *s)
{
    const struct weight_spec *parts[3];
    int alike = 1;
    for (int i = weight_list_stack(list, s, parts) - 1; i >= 0; i--)
        alike = alike && weight_spec_is_like(parts[i], s);
    return alike;
}

/* What the threads expand a quantised weight to, with those that stand in one linear with it. */
static uint64_t expanded_bytes(const struct weight_spec *s, const struct weight_list *list,
                               const struct weight_cut *cut, const struct text_config *t,
                               const struct plan_settings *p)
{
    const struct weight_spec *parts[3];
    int n_parts = weight_list_stack(list, s, parts);
    int64_t n_rows = 0, n_columns = 0;
    if (s->format == WEIGHT_FLOAT)
        return 0;
    for (int i = 0; i < n_parts; i++) {
        struct range rows = {0, weight_spec_rows(parts[i])};
        struct range columns = {0, weight_spec_columns(parts[i])};
        if (s->home != HOME_VISION)
            weight_cut_ranges(cut, t, parts[i], &rows, &columns);
        n_rows += rows.n;
        n_columns = columns.n;
    }
    return (uint64_t)p->n_threads * backend_cpu_expanded_bytes(p->cpu_isa, n_rows, n_columns,
                                                               n_parts == 2 ? 2 : 1, p->dtype);
}

static void add_weights(struct plan_rank *r, const struct model_config *c,
                        const struct plan_settings *s, const struct weight_cut *cut,
                        const struct weight_list *list)
{
    const struct text_config *t = &c->text;
    uint64_t floats = 0; // that codes become before a product
    for (int i = 0; i < list->n; i++) {
        struct weight_spec w = list->specs[i];
        if (!holds(&r->topology, &w, t->n_layers) || is_embedding_again(&r->topology, &w, c, list))
            continue;
        if (w.format != WEIGHT_FLOAT && !is_stacked_alike(list, &w))
            w.format = WEIGHT_FLOAT;
        r->weight_bytes += held_bytes(&w, list, cut, t, s);
        uint64_t n = 0; // of integers: their products are of codes alone
        if (s->on_cuda)
            n = plan_cuda_dense_bytes(&w, list, cut, t, s->dtype);
        else if (c->quantization.x_format != WEIGHT_INT8)
            n = expanded_bytes(&w, list, cut, t, s);
        floats = n > floats ? n : floats;
    }
    r->scratch_bytes += floats;
}

static int plan_rank(struct plan_rank *r, const struct plan *p, const struct model_config *c,
                     const struct weight_list *list, struct error *err)
{
    const struct plan_settings *s = &p->settings;
    const struct text_config *t = &c->text;
    const struct topology *topology = &r->topology;
    struct weight_cut cut = {0};
    if (topology->role == ROLE_LANGUAGE &&
        weight_cut_init(&cut, t, topology->shard, s->layout.tensor_parallel, err) != 0)
        return -1;
    add_weights(r, c, s, &cut, list);
    r->process_bytes = topology->role == ROLE_GATEWAY  ? GATEWAY_PROCESS_BYTES
                       : topology->role == ROLE_VISION ? VISION_PROCESS_BYTES
                                                       : LANGUAGE_PROCESS_BYTES;
    if (topology->role == ROLE_GATEWAY)
        r->scratch_bytes += s->vision_cache_bytes + s->media_store_bytes;
    if (topology->role == ROLE_VISION)
        add_vision_step(r, c, s);
    if (topology->role != ROLE_LANGUAGE)
        return 0;
    struct range layers = shard_layers(t->n_layers, topology->stage, s->layout.pipeline_parallel);
    add_language_step(r, c, s, &cut);
    r->page_bytes = kv_page_bytes((int)layers.n, (int)cut.dense.kv_heads.n, t->head_dim,
                                  s->page_size, s->kv_dtype);
    return 0;
}

static int count_pages(struct plan *p, struct error *err)
{
    const struct plan_settings *s = &p->settings;
    uint64_t n = INT32_MAX / 2, largest = 0;
    int64_t needed = ((int64_t)s->max_model_len + s->page_size - 1) / s->page_size;
    for (int i = 0; i < p->n_ranks; i++) {
        uint64_t page = p->ranks[i].page_bytes;
        if (page && s->kv_budget_bytes / page < n)
            n = s->kv_budget_bytes / page;
        largest = page > largest ? page : largest;
    }
    if (n < (uint64_t)needed)
        return error_set(
            err, ERROR_INVALID_ARGUMENT,
            "%llu bytes of KV memory hold %llu pages of %llu bytes; one sequence of %d "
            "tokens needs %lld",
            (unsigned long long)s->kv_budget_bytes, (unsigned long long)n,
            (unsigned long long)largest, s->max_model_len, (long long)needed);
    p->n_pages = (int32_t)n;
    for (int i = 0; i < p->n_ranks; i++)
        p->ranks[i].kv_bytes = n * p->ranks[i].page_bytes;
    return 0;
}

int plan_make(struct plan *p, const struct model_config *c, const struct plan_settings *s,
              struct error *err)
{
    int rc = 0;
    *p = (struct plan){.settings = *s};
    if (s->page_size < 16 || s->page_size % 16 != 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "page size %d: a multiple of 16 tokens is expected", s->page_size);
    if (s->kv_dtype == DTYPE_I8 && c->text.head_dim % 16 != 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--kv-cache-dtype int8: the model's heads have %d dimensions, a multiple "
                         "of 16 is expected",
                         c->text.head_dim);
    if (s->layout.pipeline_parallel > c->text.n_layers)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "pipeline-parallel-size %d: the model has only %d layers",
                         s->layout.pipeline_parallel, c->text.n_layers);
    if (s->max_model_len < 1 || s->max_num_seqs < 1 || s->max_num_batched_tokens < 1 ||
        s->max_vision_tiles < 1)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "limits of sequences, tokens and tiles must be at least 1");
    struct weight_list list = {0};
    p->settings.weights = NULL; // borrowed for this call
    if (!s->weights)
        weight_list_init(&list, c);
    p->n_ranks = layout_world(&s->layout);
    p->ranks = xcalloc((size_t)p->n_ranks, sizeof(*p->ranks));
    for (int i = 0; i < p->n_ranks && rc == 0; i++) {
        rc = topology_init(&p->ranks[i].topology, i, p->n_ranks, &s->layout, err);
        if (rc == 0)
            rc = plan_rank(&p->ranks[i], p, c, s->weights ? s->weights : &list, err);
    }
    weight_list_release(&list);
    if (rc == 0)
        rc = count_pages(p, err);
    if (rc != 0)
        plan_release(p);
    return rc;
}

uint64_t plan_rank_host_bytes(const struct plan_rank *r)
{
    return r->process_bytes + (r->on_device ? 0 : r->weight_bytes + r->kv_bytes + r->scratch_bytes);
}

uint64_t plan_rank_device_bytes(const struct plan_rank *r)
{
    return r->on_device ? r->weight_bytes + r->kv_bytes + r->scratch_bytes : 0;
}

void plan_release(struct plan *p)
{
    free(p->ranks);
    *p = (struct plan){0};
}

/* One line a rank. */
static void print_ranks(FILE *f, const struct plan *p)
{
    const double mib = 1 << 20;
    const int on_cuda = p->settings.on_cuda;
    char role[64];
    fprintf(f, "%4s  %-28s %12s %12s %12s %12s %12s\n", "rank", "role", "weights MiB", "KV MiB",
            "scratch MiB", on_cuda ? "host MiB" : "process MiB", on_cuda ? "GPU MiB" : "total MiB");
    for (int i = 0; i < p->n_ranks; i++) {
        const struct plan_rank *r = &p->ranks[i];
        fprintf(f, "%4d  %-28s %12.1f %12.1f %12.1f %12.1f %12.1f\n", i,
                topology_describe(&r->topology, i, role, sizeof(role)),
                (double)r->weight_bytes / mib, (double)r->kv_bytes / mib,
                (double)r->scratch_bytes / mib,
                (double)(on_cuda ? plan_rank_host_bytes(r) : r->process_bytes) / mib,
                (double)(on_cuda ? plan_rank_device_bytes(r) : plan_rank_host_bytes(r)) / mib);
    }
}

/* Of the GPU that holds most. Shared ones have vision rank v beside language rank v % n, as
 * hosts_device() places them on one host. */
static uint64_t fullest_device(const struct plan *p)
{
    const struct layout *l = &p->settings.layout;
    int n_language = l->tensor_parallel * l->pipeline_parallel, first = 1 + l->n_vision;
    uint64_t largest = 0;
    for (int i = 1; i < p->n_ranks; i++) {
        uint64_t n_bytes = plan_rank_device_bytes(&p->ranks[i]);
        for (int v = i - first; i >= first && p->settings.vision_share_gpu && v < l->n_vision;
             v += n_language)
            n_bytes += plan_rank_device_bytes(&p->ranks[1 + v]);
        largest = n_bytes > largest ? n_bytes : largest;
    }
    return largest;
}

void plan_print(FILE *f, const struct plan *p, const struct model_config *c, uint64_t host_bytes)
{
    const double mib = 1 << 20, gib = 1 << 30;
    uint64_t total = 0, largest = 0;
    const struct layout *l = &p->settings.layout;
    char quantized[QUANTIZATION_BYTES];
    fprintf(f,
            "model %s, %s, quantization %s: %d ranks = 1 gateway + %d vision + %d x %d language\n",
            c->name, dtype_name(p->settings.dtype),
            quantization_describe(&c->quantization, quantized, sizeof(quantized)), p->n_ranks,
            l->n_vision, l->pipeline_parallel, l->tensor_parallel);
    print_ranks(f, p);
    for (int i = 0; i < p->n_ranks; i++) {
        uint64_t bytes = plan_rank_host_bytes(&p->ranks[i]);
        total += bytes;
        largest = bytes > largest ? bytes : largest;
    }
    fprintf(f, "KV: %d pages of %d tokens = %lld tokens in %s\n", p->n_pages, p->settings.page_size,
            (long long)p->n_pages * p->settings.page_size, dtype_name(p->settings.kv_dtype));
    fprintf(f,
            "gateway: %.1f MiB of vision cache, %.1f KiB a tile, and %.1f MiB of uploaded media\n",
            (double)p->settings.vision_cache_bytes / mib,
            (double)c->n_features_per_tile * c->text.hidden_size * sizeof(float) / 1024,
            (double)p->settings.media_store_bytes / mib);
    if (p->settings.on_cuda)
        fprintf(f,
                "GPU: %.1f GiB on the fullest, and what the driver, NCCL and recorded graphs take "
                "beside it\n",
                (double)fullest_device(p) / gib);
    fprintf(
        f, "memory: %.1f GiB for all ranks, %.1f GiB for the largest; this host has %.1f GiB: %s\n",
        (double)total / gib, (double)largest / gib, (double)host_bytes / gib,
        total <= host_bytes     ? "all ranks fit on it"
        : largest <= host_bytes ? "they need several like it"
                                : "not even the largest rank fits");
}
