/*
 * op_bench: every op but the product. Attention at lengths that decode and prefill have, and what
 * works row by row or only moves values, for one token and for a prefill of 512 or a vision tile.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"
#include "tests/bench/op_bench.h"

#define PAGE 16 // tokens, the daemon's default
#define N_ROWS 2
static const int64_t row_counts[N_ROWS] = {1, 512};

/* ---- attention ---- */

struct attention_case {
    struct backend *b;
    struct tensor q, k, v, out;
    struct kv_pages kv;
    void *layers[BENCH_LAYERS_MAX][2]; // keys and values of each, read in turn
    int n_layers, layer;
    struct paged_layout layout;
    int32_t *kv_of_head;
    float *cos, *sin;
    int32_t n_heads, n_tiles;
    enum dtype dtype;
};

static void run_paged(void *arg)
{
    struct attention_case *c = arg;
    c->kv.k = c->layers[c->layer][0];
    c->kv.v = c->layers[c->layer][1];
    c->layer = (c->layer + 1) % c->n_layers;
    op_paged_attention(c->b, &c->out, &c->q, &c->kv, &c->layout, c->kv_of_head, c->n_heads, 0.125f,
                       0);
}

static void run_kv_write(void *arg)
{
    struct attention_case *c = arg;
    op_kv_write(c->b, &c->kv, &c->layout, &c->k, &c->v,
                &(struct rotation){.q = &c->q, .cos = c->cos, .sin = c->sin});
}

/* n_sequences of `context` tokens each, n_tokens of them new. */
struct load {
    int32_t n_sequences, n_tokens, context;
};

static void layout_init(struct attention_case *c, const struct load *load)
{
    const int32_t n = load->n_sequences, n_pages = (load->context + PAGE - 1) / PAGE;
    int32_t *starts = xcalloc((size_t)(3 * n + 2), sizeof(*starts));
    int32_t *page_start = starts + n + 1, *context_len = page_start + n + 1;
    int32_t *pages = xcalloc((size_t)(n * n_pages), sizeof(*pages));
    for (int32_t i = 0; i <= n; i++) {
        starts[i] = i * load->n_tokens;
        page_start[i] = i * n_pages;
    }
    for (int32_t i = 0; i < n; i++)
        context_len[i] = load->context;
    for (int32_t i = 0; i < n * n_pages; i++) // as scattered as those of a pool in use
        pages[i] = (int32_t)((int64_t)i * 7919 % (n * n_pages));
    c->layout = (struct paged_layout){.n_sequences = n,
                                      .n_tokens = n * load->n_tokens,
                                      .max_context_len = load->context,
                                      .query_start = starts,
                                      .context_len = context_len,
                                      .page_start = page_start,
                                      .pages = pages};
    c->kv.n_pages = n * n_pages;
}

/* Keys, or values, of all pages. */
static void *values_of_pages(const struct bench *bench, const struct kv_pages *kv)
{
    const size_t head_bytes = kv_head_bytes(kv->head_dim, kv->page_size, kv->dtype);
    const int64_t n_heads = (int64_t)kv->n_pages * kv->n_kv_heads;
    if (kv->dtype != DTYPE_I8)
        return bench_values(bench, kv->dtype, n_heads * kv->head_dim * kv->page_size);
    char *pages = bench_values(bench, DTYPE_I8, n_heads * (int64_t)head_bytes);
    for (int64_t i = 0; i < n_heads; i++) {
        char *codes = pages + (size_t)i * head_bytes;
        float *scales = (float *)(void *)(codes + kv->head_dim * kv->page_size);
        for (int32_t j = 0; j < kv->page_size; j++)
            scales[j] = 1.0f / 127.0f;
    }
    return pages;
}

static void measure_paged(const struct bench *bench, const struct load *load, enum dtype dtype)
{
    const struct shapes *s = bench->shapes;
    struct attention_case c = {.b = bench->b, .n_heads = (int32_t)s->n_heads};
    if (!bench_wants(bench, "paged_attention", dtype_name(dtype)) &&
        !bench_wants(bench, "kv_write", dtype_name(dtype)))
        return;
    c.n_layers = bench->n_layers;
    c.kv = (struct kv_pages){.dtype = dtype, .page_size = PAGE};
    c.kv.n_kv_heads = (int32_t)s->n_kv_heads;
    c.kv.head_dim = (int32_t)s->head_dim;
    layout_init(&c, load);
    const int64_t rows = c.layout.n_tokens, width = s->n_kv_heads * s->head_dim;
    for (int i = 0; i < c.n_layers; i++) {
        c.layers[i][0] = c.kv.k = values_of_pages(bench, &c.kv);
        c.layers[i][1] = c.kv.v = values_of_pages(bench, &c.kv);
    }
    c.q = bench_matrix(bench, DTYPE_F32, rows, s->n_heads * s->head_dim);
    c.out = bench_matrix(bench, DTYPE_F32, rows, s->n_heads * s->head_dim);
    c.k = bench_matrix(bench, DTYPE_F32, rows, width);
    c.v = bench_matrix(bench, DTYPE_F32, rows, width);
    c.sin = op_alloc(bench->b, (size_t)(rows * s->head_dim / 2) * sizeof(float));
    c.cos = op_alloc(bench->b, (size_t)(rows * s->head_dim / 2) * sizeof(float));
    for (int64_t i = 0; i < rows * s->head_dim / 2; i++)
        c.cos[i] = 1; // turned by nothing, over and over
    c.kv_of_head = xcalloc((size_t)s->n_heads, sizeof(*c.kv_of_head));
    for (int32_t h = 0; h < c.n_heads; h++)
        c.kv_of_head[h] = h * c.kv.n_kv_heads / c.n_heads;
    char what[64];
    snprintf(what, sizeof(what), "%d x %d of %d", load->n_sequences, load->n_tokens, load->context);
    double new = load->n_tokens, pairs = new * load->context - new *(new - 1) / 2;
    const double held = (double)kv_head_bytes(c.kv.head_dim, 1, dtype); // of a token's head
    struct op_case op = {
        .op = "paged_attention",
        .what = what,
        .format = dtype_name(dtype),
        .arithmetic = dtype == DTYPE_F32 ? ARITHMETIC_F32 : ARITHMETIC_BF16,
        .rows = rows,
        .flops = 4 * pairs * load->n_sequences * (double)(s->n_heads * s->head_dim),
        .bytes = 2.0 * load->n_sequences * load->context * (double)s->n_kv_heads * held +
                 8.0 * (double)(rows * s->n_heads * s->head_dim),
        .run = run_paged,
        .arg = &c,
    };
    if (bench_wants(bench, op.op, op.format))
        bench_measure(bench, &op);
    op.op = "kv_write";
    op.flops = 0;
    op.bytes =
        (double)rows * ((double)width * 12 + 2 * (double)s->n_kv_heads * held +
                        8.0 * (double)(s->n_heads * s->head_dim) + 4.0 * (double)s->head_dim);
    op.run = run_kv_write;
    if (bench_wants(bench, op.op, op.format) && load->n_sequences == 1 && load->context <= 1024)
        bench_measure(bench, &op);
    void *memory[] = {c.q.data, c.k.data, c.v.data, c.out.data, c.cos, c.sin};
    for (int i = 0; i < 6; i++)
        op_free(bench->b, memory[i]);
    for (int i = 0; i < c.n_layers; i++) {
        op_free(bench->b, c.layers[i][0]);
        op_free(bench->b, c.layers[i][1]);
    }
    free((void *)c.layout.query_start);
    free((void *)c.layout.pages);
    free(c.kv_of_head);
}

static void run_full(void *arg)
{
    struct attention_case *c = arg;
    op_attention(c->b, &c->out, &c->q, &c->k, &c->v, c->n_tiles, c->n_heads, 0.125f, c->dtype,
                 NULL);
}

static void measure_full(const struct bench *bench, int32_t n_tiles, enum dtype dtype)
{
    const struct shapes *s = bench->shapes;
    const int64_t n = 1025, rows = n * n_tiles, dim = s->v_dim;
    struct tensor qkv = bench_matrix(bench, DTYPE_F32, rows, 3 * dim);
    struct attention_case c = {.b = bench->b, .n_heads = (int32_t)s->v_heads, .n_tiles = n_tiles};
    c.dtype = dtype;
    c.out = bench_matrix(bench, DTYPE_F32, rows, dim);
    c.q = tensor_columns(&qkv, 0, dim);
    c.k = tensor_columns(&qkv, dim, dim);
    c.v = tensor_columns(&qkv, 2 * dim, dim);
    char what[64];
    snprintf(what, sizeof(what), "%d tiles", n_tiles);
    struct op_case op = {
        .op = "attention",
        .what = what,
        .format = dtype_name(dtype),
        .arithmetic = dtype == DTYPE_F32 ? ARITHMETIC_F32 : ARITHMETIC_BF16,
        .rows = rows,
        .flops = 4.0 * (double)(rows * n * dim),
        .bytes = 16.0 * (double)(rows * dim),
        .run = run_full,
        .arg = &c,
    };
    bench_measure(bench, &op);
    op_free(bench->b, qkv.data);
    op_free(bench->b, c.out.data);
}

/* ---- row by row ---- */

/* Operands of one of the small ops; which of them it takes is its own affair. */
struct small_case {
    struct backend *b;
    struct tensor x, x2, y;
    const float *weight, *bias, *mean;
    const int32_t *rows;
    struct tensor table;
    struct kv_pages kv;
    int32_t n;
};

static void run_rms_norm(void *arg)
{
    struct small_case *c = arg;
    op_rms_norm(c->b, &c->y, &c->x, c->weight, 1e-6f);
}

static void run_layer_norm(void *arg)
{
    struct small_case *c = arg;
    op_layer_norm(c->b, &c->y, &c->x, c->weight, c->bias, 1e-6f);
}

static void run_add(void *arg)
{
    struct small_case *c = arg;
    op_add(c->b, &c->y, &c->x);
}

static void run_add_bias(void *arg)
{
    struct small_case *c = arg;
    op_add_bias(c->b, &c->y, c->bias);
}

static void run_gated(void *arg)
{
    struct small_case *c = arg;
    op_gated_activation(c->b, &c->y, &c->x, ACTIVATION_SILU);
}

static void run_add_rms_norm(void *arg)
{
    struct small_case *c = arg;
    op_add_rms_norm(c->b, &c->y, &c->x2, &c->x, c->weight, 1e-6f);
}

static void run_embed(void *arg)
{
    struct small_case *c = arg;
    op_embed(c->b, &c->y, &c->table, c->rows, 0);
}

static void run_scatter(void *arg)
{
    struct small_case *c = arg;
    op_scatter_rows(c->b, &c->y, &c->x, c->rows);
}

static void run_gather(void *arg)
{
    struct small_case *c = arg;
    op_gather_rows(c->b, &c->y, &c->x, c->rows);
}

static void run_copy(void *arg)
{
    struct small_case *c = arg;
    op_copy(c->b, &c->y, &c->x);
}

static void run_patchify(void *arg)
{
    struct small_case *c = arg;
    op_patchify(c->b, &c->y, &c->x, 14, 14, c->mean, c->mean);
}

static void run_pixel_shuffle(void *arg)
{
    struct small_case *c = arg;
    op_pixel_shuffle(c->b, &c->y, &c->x, 32, 2);
}

static void run_copy_pages(void *arg)
{
    struct small_case *c = arg;
    op_copy_pages(c->b, &c->kv, c->rows, c->rows + c->n, c->n);
}

/* y [rows, y_cols] is written, or read and written; x [rows, x_cols] (0: none) is read. */
static void measure_small(const struct bench *bench, const char *op, void (*run)(void *),
                          int64_t rows, int64_t y_cols, int64_t x_cols, double extra_bytes)
{
    const struct shapes *s = bench->shapes;
    if (!bench_wants(bench, op, "float32"))
        return;
    const int64_t widest = y_cols > x_cols ? y_cols : x_cols;
    struct small_case c = {.b = bench->b, .n = (int32_t)s->head_dim};
    c.y = bench_matrix(bench, DTYPE_F32, rows, y_cols);
    c.x = bench_matrix(bench, DTYPE_F32, rows, x_cols ? x_cols : 1);
    c.x2 = bench_matrix(bench, DTYPE_F32, rows, y_cols);
    int64_t n = widest > rows * s->head_dim ? widest : rows * s->head_dim;
    float *weight = bench_values(bench, DTYPE_F32, n), *bias = bench_values(bench, DTYPE_F32, n);
    int32_t *ids = xcalloc((size_t)rows, sizeof(*ids));
    for (int64_t i = 0; i < rows; i++)
        ids[i] = (int32_t)(rows - 1 - i);
    c.weight = weight;
    c.bias = bias;
    c.rows = ids;
    struct op_case op_case = {
        .op = op,
        .what = "",
        .format = "float32",
        .rows = rows,
        .bytes = 4.0 * (double)(rows * (y_cols + x_cols)) + extra_bytes,
        .run = run,
        .arg = &c,
    };
    bench_measure(bench, &op_case);
    op_free(bench->b, weight);
    op_free(bench->b, bias);
    op_free(bench->b, c.x2.data);
    op_free(bench->b, c.x.data);
    op_free(bench->b, c.y.data);
    free(ids);
}

static void measure_embed(const struct bench *bench, int64_t rows)
{
    const struct shapes *s = bench->shapes;
    if (!bench_wants(bench, "embed", "bfloat16"))
        return;
    struct small_case c = {.b = bench->b};
    c.table = bench_matrix(bench, DTYPE_BF16, s->vocab, s->dim);
    c.y = bench_matrix(bench, DTYPE_F32, rows, s->dim);
    int32_t *ids = xcalloc((size_t)rows, sizeof(*ids));
    for (int64_t i = 0; i < rows; i++)
        ids[i] = (int32_t)(i * 104729 % s->vocab);
    c.rows = ids;
    struct op_case op = {.op = "embed", .what = "", .format = "bfloat16", .rows = rows};
    op.bytes = 6.0 * (double)(rows * s->dim);
    op.run = run_embed;
    op.arg = &c;
    bench_measure(bench, &op);
    op_free(bench->b, c.table.data);
    op_free(bench->b, c.y.data);
    free(ids);
}

/* 448 x 448 pixels to 1024 patches, and 1024 features to 256. */
static void measure_tile(const struct bench *bench)
{
    const struct shapes *s = bench->shapes;
    static const float mean[3] = {123.7f, 116.3f, 103.5f};
    struct small_case c = {.b = bench->b, .mean = mean};
    if (bench_wants(bench, "patchify", "uint8")) {
        c.x = bench_matrix(bench, DTYPE_U8, 3 * 448, 448);
        c.x.n_dims = 4;
        memcpy(c.x.shape, (int64_t[]){1, 3, 448, 448}, 4 * sizeof(int64_t));
        c.y = bench_matrix(bench, DTYPE_F32, 1024, 588);
        struct op_case op = {.op = "patchify", .what = "", .format = "uint8", .rows = 1024};
        op.bytes = 5.0 * 1024 * 588;
        op.run = run_patchify;
        op.arg = &c;
        bench_measure(bench, &op);
        op_free(bench->b, c.x.data);
        op_free(bench->b, c.y.data);
    }
    if (bench_wants(bench, "pixel_shuffle", "float32")) {
        c.x = bench_matrix(bench, DTYPE_F32, 1024, s->v_dim);
        c.x = tensor_3d(c.x.data, DTYPE_F32, 1, 1024, s->v_dim);
        c.y = bench_matrix(bench, DTYPE_F32, 256, 4 * s->v_dim);
        c.y = tensor_3d(c.y.data, DTYPE_F32, 1, 256, 4 * s->v_dim);
        struct op_case op = {.op = "pixel_shuffle", .what = "", .format = "float32", .rows = 256};
        op.bytes = 8.0 * 1024 * (double)s->v_dim;
        op.run = run_pixel_shuffle;
        op.arg = &c;
        bench_measure(bench, &op);
        op_free(bench->b, c.x.data);
        op_free(bench->b, c.y.data);
    }
}

static void measure_copy_pages(const struct bench *bench)
{
    enum { N = 64 };
    const struct shapes *s = bench->shapes;
    int32_t pages[2 * N];
    if (!bench_wants(bench, "copy_pages", "bfloat16"))
        return;
    for (int i = 0; i < 2 * N; i++)
        pages[i] = i;
    struct small_case c = {.b = bench->b, .rows = pages, .n = N};
    const int64_t n_values = 2 * N * PAGE * s->n_kv_heads * s->head_dim;
    c.kv = (struct kv_pages){.dtype = DTYPE_BF16, .n_pages = 2 * N, .page_size = PAGE};
    c.kv.n_kv_heads = (int32_t)s->n_kv_heads;
    c.kv.head_dim = (int32_t)s->head_dim;
    c.kv.k = bench_values(bench, DTYPE_BF16, n_values);
    c.kv.v = bench_values(bench, DTYPE_BF16, n_values);
    struct op_case op = {.op = "copy_pages", .what = "", .format = "bfloat16", .rows = N};
    op.bytes = 4.0 * (double)n_values;
    op.run = run_copy_pages;
    op.arg = &c;
    bench_measure(bench, &op);
    op_free(bench->b, c.kv.k);
    op_free(bench->b, c.kv.v);
}

static void run_nothing(void *arg)
{
    (void)arg;
}

/* The limits alone, for who has something else to hold beside them; only where asked for. */
static void measure_limits(const struct bench *bench)
{
    static const char *const formats[ARITHMETIC_COUNT] = {"float32", "bfloat16", "int8"};
    for (int i = 0; i < ARITHMETIC_COUNT; i++) {
        if (!bench->only_op || !bench_wants(bench, "limits", formats[i]))
            continue;
        struct op_case op = {.op = "limits", .what = "", .format = formats[i], .run = run_nothing};
        op.arithmetic = (enum arithmetic)i;
        bench_measure(bench, &op);
    }
}

void bench_others(const struct bench *bench)
{
    const struct shapes *s = bench->shapes;
    measure_limits(bench);
    static const struct load loads[] = {
        {1, 1, 1024},  {1, 1, 4096},  {1, 1, 8192},   {1, 1, 32768},
        {16, 1, 1024}, {1, 512, 512}, {1, 512, 4096},
    };
    static const enum dtype dtypes[] = {DTYPE_BF16, DTYPE_F32, DTYPE_I8};
    for (int t = 0; t < 3; t++) {
        for (size_t i = 0; i < sizeof(loads) / sizeof(loads[0]); i++)
            measure_paged(bench, &loads[i], dtypes[t]);
    }
    for (int t = 0; t < 2; t++) {
        if (!bench_wants(bench, "attention", dtype_name(dtypes[t])))
            continue;
        measure_full(bench, 1, dtypes[t]);
        measure_full(bench, 4, dtypes[t]);
    }
    for (int i = 0; i < N_ROWS; i++) {
        const int64_t rows = row_counts[i];
        measure_small(bench, "rms_norm", run_rms_norm, rows, s->dim, s->dim, 0);
        measure_small(bench, "add_rms_norm", run_add_rms_norm, rows, s->dim, s->dim,
                      8.0 * (double)(rows * s->dim));
        measure_small(bench, "add", run_add, rows, s->dim, s->dim, 4.0 * (double)(rows * s->dim));
        measure_small(bench, "gated_activation", run_gated, rows, s->inner, 2 * s->inner, 0);
        measure_small(bench, "scatter_rows", run_scatter, rows, s->dim, s->dim, 0);
        measure_small(bench, "gather_rows", run_gather, rows, s->dim, s->dim, 0);
        measure_small(bench, "copy", run_copy, rows, s->dim, s->dim, 0);
        measure_embed(bench, rows);
    }
    measure_small(bench, "layer_norm", run_layer_norm, 1025, s->v_dim, s->v_dim, 0);
    measure_small(bench, "add_bias", run_add_bias, 1025, s->v_dim, 0,
                  4.0 * 1025 * (double)s->v_dim);
    measure_tile(bench);
    measure_copy_pages(bench);
}
