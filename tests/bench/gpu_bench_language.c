/*
 * gpu_bench: one shard of the language model, through language_forward().
 *
 *   decode          one token of each of n sequences, whose caches hold `context` tokens
 *   decode_sampled  the same, with lm_head, the best of each row, and greedy tokens from these
 *   prefill         n new tokens of one sequence
 *
 * There are no other shards: their parts of every sum are missing, and so is the time of the sums.
 */
#include <stdlib.h>
#include <string.h>

#include "daemon/model/language.h"
#include "kernels/log.h"
#include "tests/bench/gpu_bench.h"

#define PAGE_SIZE 16
#define N_BATCHES 3

struct sizes {
    int32_t batches[N_BATCHES], context, prefill;
};
static const struct sizes sizes = {{1, 8, 64}, 4096, 8192}, small_sizes = {{1, 2, 3}, 40, 32};

struct shard {
    struct gpu_bench *bench;
    struct sizes sizes;
    struct weights weights;
    struct language_model model;
    struct batch batch; // its arrays are these, long enough for the largest
    int32_t *token_ids, *feature_rows, *targets, *query_start, *context_len, *rope_len;
    float *positions;
    uint8_t *target_tops, *want_logits;
    uint32_t *captures;
    int32_t *page_start, *pages;
    struct sample_row *samples;
};

static int32_t larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

static int32_t pages_of(int32_t n_tokens)
{
    return (n_tokens + PAGE_SIZE - 1) / PAGE_SIZE;
}

static struct language_limits limits_of(const struct sizes *s)
{
    int32_t most = s->batches[N_BATCHES - 1];
    return (struct language_limits){.max_tokens = larger(s->prefill, most),
                                    .max_sequences = most,
                                    .max_model_len = larger(s->context, s->prefill),
                                    .page_size = PAGE_SIZE,
                                    .n_pages =
                                        larger(most * pages_of(s->context), pages_of(s->prefill)),
                                    .kv_dtype = DTYPE_BF16};
}

/* ---- batches ---- */

static void allocate_batch(struct shard *s)
{
    const struct language_limits l = limits_of(&s->sizes);
    size_t n = (size_t)l.max_tokens, m = (size_t)l.max_sequences;
    s->token_ids = xcalloc(n, sizeof(*s->token_ids));
    s->feature_rows = xcalloc(n, sizeof(*s->feature_rows));
    s->targets = xcalloc(n, sizeof(*s->targets));
    s->target_tops = xcalloc(n, sizeof(*s->target_tops));
    s->want_logits = xcalloc(n, sizeof(*s->want_logits));
    s->positions = xcalloc(n, sizeof(*s->positions));
    s->query_start = xcalloc(m + 1, sizeof(*s->query_start));
    s->context_len = xcalloc(m, sizeof(*s->context_len));
    s->rope_len = xcalloc(m, sizeof(*s->rope_len));
    s->captures = xcalloc(m, sizeof(*s->captures));
    s->page_start = xcalloc(m + 1, sizeof(*s->page_start));
    s->pages = xcalloc((size_t)l.n_pages, sizeof(*s->pages));
    s->samples = xcalloc(m, sizeof(*s->samples));
    memset(s->feature_rows, 0xff, n * sizeof(*s->feature_rows)); // -1: none
    memset(s->targets, 0xff, n * sizeof(*s->targets));
    s->batch = (struct batch){.token_ids = s->token_ids,
                              .positions = s->positions,
                              .feature_rows = s->feature_rows,
                              .targets = s->targets,
                              .target_tops = s->target_tops,
                              .want_logits = s->want_logits,
                              .query_start = s->query_start,
                              .context_len = s->context_len,
                              .rope_len = s->rope_len,
                              .captures = s->captures,
                              .page_start = s->page_start,
                              .pages = s->pages,
                              .samples = s->samples};
}

static void free_batch(struct shard *s)
{
    void *arrays[] = {s->token_ids,   s->feature_rows, s->targets,  s->target_tops, s->want_logits,
                      s->positions,   s->query_start,  s->rope_len, s->captures,    s->page_start,
                      s->context_len, s->pages,        s->samples};
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++)
        free(arrays[i]);
}

/* The batch: the last n_new tokens of each of n sequences of `length` tokens; greedy samples of
 * their last rows, or none. Sequence i has pages of its own. */
static void set_batch(struct shard *s, int32_t n, int32_t length, int32_t n_new, int is_sampled)
{
    struct batch *b = &s->batch;
    const int32_t n_pages = pages_of(length), vocab = s->model.config->vocab_size;
    for (int32_t i = 0; i < n; i++) {
        s->context_len[i] = s->rope_len[i] = length;
        s->query_start[i + 1] = (i + 1) * n_new;
        s->page_start[i + 1] = (i + 1) * n_pages;
        for (int32_t r = 0; r < n_new; r++) {
            s->token_ids[i * n_new + r] = (int32_t)((i + 1) * 7919LL + r * 31LL) % vocab;
            s->positions[i * n_new + r] = (float)(length - n_new + r);
        }
        s->samples[i] = (struct sample_row){.row = (i + 1) * n_new - 1,
                                            .sequence = i,
                                            .sampling = {.top_p = 1, .repetition_penalty = 1}};
    }
    for (int32_t p = 0; p < n * n_pages; p++)
        s->pages[p] = p;
    b->n_sequences = n;
    b->n_tokens = n * n_new;
    b->n_pages = n * n_pages;
    b->n_samples = is_sampled ? n : 0;
}

static void run_step(void *arg)
{
    struct shard *s = arg;
    struct language_output out;
    struct capture_list captures = {0};
    language_forward(&s->model, &s->batch, &out, &captures);
    op_sync(s->bench->b);
}

/* The cache as after prompts of `context` tokens: one is computed, the others are copies. */
static void fill_cache(struct shard *s)
{
    const int32_t context = s->sizes.context, n_pages = pages_of(context);
    const int32_t n = s->sizes.batches[N_BATCHES - 1];
    int32_t *from = xcalloc((size_t)(n * n_pages), sizeof(*from));
    int32_t *to = xcalloc((size_t)(n * n_pages), sizeof(*to));
    for (int32_t done = 0, part; done < context; done += part) {
        part = context - done < s->sizes.prefill ? context - done : s->sizes.prefill;
        set_batch(s, 1, done + part, part, 0);
        run_step(s);
    }
    for (int32_t p = 0; p < (n - 1) * n_pages; p++) {
        from[p] = p % n_pages;
        to[p] = n_pages + p;
    }
    kv_cache_copy_pages(&s->model.kv, from, to, (n - 1) * n_pages);
    op_sync(s->bench->b);
    free(from);
    free(to);
}

/* ---- cases ---- */

/* Products, attention and cache of the batch that is set. */
static void add_costs(struct gpu_case *c, const struct shard *s)
{
    const struct language_model *m = &s->model;
    const struct batch *b = &s->batch;
    double pairs = 0, cached = 0; // of queries and keys; tokens in the caches
    for (int32_t i = 0; i < b->n_sequences; i++) {
        double n_new = b->query_start[i + 1] - b->query_start[i], length = b->context_len[i];
        pairs += n_new * (length - n_new) + n_new * (n_new + 1) / 2;
        cached += length;
    }
    for (int64_t j = 0; j < m->layer_range.n; j++) {
        const struct language_layer *l = &m->layers[j];
        const struct linear *linears[] = {&l->qkv, &l->output, &l->gate_up, &l->down};
        const struct kv_pages *kv = &m->kv.layers[j];
        for (int i = 0; i < 4; i++)
            gpu_case_add(c, linears[i], b->n_tokens);
        c->flops += 4 * pairs * (double)(m->cut.dense.heads.n * m->config->head_dim);
        c->bytes +=
            2 * cached * (double)(kv->n_kv_heads * kv->head_dim) * (double)dtype_size(kv->dtype);
    }
    if (b->n_samples)
        gpu_case_add(c, &m->lm_head, b->n_samples);
}

static void measure(struct shard *s, const struct gpu_format *f, const char *what, int64_t n,
                    int64_t context)
{
    struct gpu_case c = {.part = "language",
                         .what = what,
                         .format = f->name,
                         .n = n,
                         .context = context,
                         .n_layers = (int)s->model.layer_range.n,
                         .run = run_step,
                         .arg = s};
    add_costs(&c, s);
    gpu_bench_measure(s->bench, &c);
}

static void measure_format(struct shard *s, const struct gpu_format *f)
{
    fill_cache(s);
    for (int i = 0; i < N_BATCHES; i++) {
        for (int is_sampled = 0; is_sampled < 2; is_sampled++) {
            int32_t n = s->sizes.batches[i];
            set_batch(s, n, s->sizes.context, 1, is_sampled);
            measure(s, f, is_sampled ? "decode_sampled" : "decode", n, s->sizes.context);
        }
    }
    set_batch(s, 1, s->sizes.prefill, s->sizes.prefill, 0);
    measure(s, f, "prefill", s->sizes.prefill, s->sizes.prefill);
}

/* Ready to run in that format, decode steps recorded as the daemon has them. */
static void hold(struct shard *s, const struct gpu_format *f)
{
    struct language_model *m = &s->model;
    for (int64_t j = 0; j < m->layer_range.n; j++) {
        struct language_layer *l = &m->layers[j];
        struct linear *linears[] = {&l->qkv, &l->output, &l->gate_up, &l->down};
        for (int i = 0; i < 4; i++)
            gpu_codes_hold(s->bench->b, linears[i], f, KIND_LANGUAGE_LINEAR);
    }
    gpu_codes_hold(s->bench->b, &m->lm_head, f, KIND_LM_HEAD);
    step_graphs_release(&m->graphs, s->bench->b); // of the former weights
    language_record(m);
}

void gpu_bench_language(struct gpu_bench *bench)
{
    struct shard *s = xcalloc(1, sizeof(*s));
    struct topology t = {.role = ROLE_LANGUAGE, .layout = {1, bench->n_shards, 1}};
    struct error err;

    s->bench = bench;
    s->sizes = bench->is_small ? small_sizes : sizes;
    struct language_limits limits = limits_of(&s->sizes);
    if (bench->config.text.n_experts)
        die("%s is a mixture of experts: this measures dense models", bench->dir);
    if (weights_open(&s->weights, bench->dir, &bench->config, 1, &err) != 0)
        die("%s", err.msg);
    printf("language: %d layers, shard 0 of %d: making random weights\n",
           bench->config.text.n_layers, bench->n_shards);
    fflush(stdout);
    language_init(&s->model, &bench->config, &s->weights, bench->b, DTYPE_BF16, &t, NULL, &limits);
    allocate_batch(s);
    for (int i = 0; i < n_gpu_formats; i++) {
        if (!gpu_bench_wants(bench, &gpu_formats[i]))
            continue;
        printf("language: %s\n", gpu_formats[i].name);
        fflush(stdout);
        hold(s, &gpu_formats[i]);
        measure_format(s, &gpu_formats[i]);
    }
    free_batch(s);
    language_release(&s->model);
    weights_release(&s->weights);
    free(s);
}
