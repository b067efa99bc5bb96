/*
 * op_bench: products with each weight of a model, in each format it can be held in.
 *
 * A weight is measured in copies that together outgrow the caches, each call taking the next, as
 * the layers of a model do.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"
#include "tests/bench/op_bench.h"

/* Of all copies of a weight. */
#define COPIES_BYTES ((size_t)192 << 20)
#define N_COPIES_MAX 128

struct weight {
    const char *what;
    int64_t out_dim, in_dim;
    int n_lanes;
};

struct format {
    const char *name;
    enum dtype dtype;
    enum weight_format format;
    int64_t group; // columns that share a scale; 0: the row
    enum weight_format x_format;
};

static const struct format formats[] = {
    {"float32", DTYPE_F32, WEIGHT_FLOAT, 0, WEIGHT_FLOAT},
    {"bfloat16", DTYPE_BF16, WEIGHT_FLOAT, 0, WEIGHT_FLOAT},
    {"int8", DTYPE_BF16, WEIGHT_INT8, 0, WEIGHT_FLOAT},
    {"int8-int8", DTYPE_BF16, WEIGHT_INT8, 0, WEIGHT_INT8},
    {"int4", DTYPE_BF16, WEIGHT_INT4, 128, WEIGHT_FLOAT},
    {"int4-int8", DTYPE_BF16, WEIGHT_INT4, 128, WEIGHT_INT8},
    {"fp8", DTYPE_BF16, WEIGHT_FP8, 0, WEIGHT_FLOAT},
    {"nf4", DTYPE_BF16, WEIGHT_NF4, 64, WEIGHT_FLOAT},
    {"fp4", DTYPE_BF16, WEIGHT_FP4, 64, WEIGHT_FLOAT},
};
#define N_FORMATS ((int)(sizeof(formats) / sizeof(formats[0])))

struct matmul_case {
    struct backend *b;
    struct linear l[N_COPIES_MAX];
    int n_copies, at;
    struct tensor x, y;
};

static void run_matmul(void *arg)
{
    struct matmul_case *c = arg;
    op_matmul(c->b, &c->y, &c->x, &c->l[c->at++ % c->n_copies], NULL);
}

static void pack_quantized(const struct bench *bench, struct linear *l, const struct format *f)
{
    struct quantized q = {.format = f->format, .out_dim = l->out_dim, .in_dim = l->in_dim};
    q.group_size = f->group ? f->group : l->in_dim;
    q.n_groups = (l->in_dim + q.group_size - 1) / q.group_size;
    q.codes = xcalloc((size_t)(l->out_dim * l->in_dim), 1);
    q.scales = xcalloc((size_t)(l->out_dim * q.n_groups), sizeof(float));
    int is_4_bit = weight_format_bits(f->format) == 4;
    for (int64_t i = 0; i < l->out_dim * l->in_dim; i++)
        q.codes[i] = (uint8_t)((i * 37 + i / 61) & (is_4_bit ? 15 : 255));
    for (int64_t i = 0; i < l->out_dim * q.n_groups; i++)
        q.scales[i] = 0.01f + (float)(i % 7) * 0.001f;
    op_linear_pack_quantized(bench->b, l, &q, NULL);
    free(q.codes);
    free(q.scales);
}

/* Packed once; the copies are copies of that. */
static void pack(const struct bench *bench, struct matmul_case *c, const struct weight *w,
                 const struct format *f)
{
    struct linear l = {.out_dim = w->out_dim, .in_dim = w->in_dim, .dtype = f->dtype};
    l.n_lanes = w->n_lanes;
    l.x_format = f->x_format;
    for (int i = 0; i <= w->n_lanes; i++)
        l.lane_start[i] = w->in_dim * i / w->n_lanes;
    if (f->format == WEIGHT_FLOAT) {
        struct tensor values = bench_matrix(bench, f->dtype, w->out_dim, w->in_dim);
        op_linear_pack(bench->b, &l, &values, NULL);
        op_free(bench->b, values.data);
    } else {
        pack_quantized(bench, &l, f);
    }
    c->n_copies = (int)(COPIES_BYTES / l.packed_bytes) + 1;
    if (c->n_copies > N_COPIES_MAX)
        c->n_copies = N_COPIES_MAX;
    for (int i = 0; i < c->n_copies; i++) {
        c->l[i] = l;
        if (i > 0) {
            c->l[i].packed = op_alloc(bench->b, l.packed_bytes);
            memcpy(c->l[i].packed, l.packed, l.packed_bytes);
        }
    }
}

static enum arithmetic arithmetic_of(const struct format *f)
{
    if (f->x_format == WEIGHT_INT8)
        return ARITHMETIC_INT8;
    return f->dtype == DTYPE_F32 ? ARITHMETIC_F32 : ARITHMETIC_BF16;
}

static void measure_rows(const struct bench *bench, struct matmul_case *c, const struct weight *w,
                         const struct format *f, int64_t rows)
{
    c->x = bench_matrix(bench, DTYPE_F32, rows, w->in_dim);
    c->y = bench_matrix(bench, DTYPE_F32, rows, w->out_dim);
    struct op_case op = {
        .op = "matmul",
        .what = w->what,
        .format = f->name,
        .rows = rows,
        .flops = 2.0 * (double)rows * (double)w->out_dim * (double)w->in_dim,
        .bytes =
            (double)c->l[0].packed_bytes + 4.0 * (double)rows * (double)(w->out_dim + w->in_dim),
        .arithmetic = arithmetic_of(f),
        .run = run_matmul,
        .arg = c,
    };
    bench_measure(bench, &op);
    op_free(bench->b, c->x.data);
    op_free(bench->b, c->y.data);
}

static void measure_weight(const struct bench *bench, const struct weight *w, const int64_t *rows,
                           int n_rows)
{
    for (int f = 0; f < N_FORMATS; f++) {
        if (!bench_wants(bench, "matmul", formats[f].name))
            continue;
        struct matmul_case c = {.b = bench->b};
        pack(bench, &c, w, &formats[f]);
        if (bench->only_rows)
            measure_rows(bench, &c, w, &formats[f], bench->only_rows);
        for (int i = 0; i < n_rows && !bench->only_rows; i++)
            measure_rows(bench, &c, w, &formats[f], rows[i]);
        for (int i = 1; i < c.n_copies; i++)
            op_free(bench->b, c.l[i].packed);
        op_linear_free(bench->b, &c.l[0]);
    }
}

void bench_matmul(const struct bench *bench)
{
    const struct shapes *s = bench->shapes;
    const int64_t q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    const struct weight language[] = {
        {"qkv", q + 2 * kv, s->dim, 1},
        {"o", s->dim, q, s->n_lanes},
        {"gate_up", 2 * s->inner, s->dim, 1},
        {"down", s->dim, s->inner, s->n_lanes},
    };
    const struct weight vision[] = {
        {"vision_qkv", 3 * s->v_dim, s->v_dim, 1}, {"vision_o", s->v_dim, s->v_dim, 1},
        {"vision_fc1", s->v_inner, s->v_dim, 1},   {"vision_fc2", s->v_dim, s->v_inner, 1},
        {"projector", s->dim, 4 * s->v_dim, 1},
    };
    static const int64_t few[] = {1, 4, 16, 512, 1024}, one[] = {1, 16}, tile[] = {1025};
    for (int i = 0; i < 4; i++)
        measure_weight(bench, &language[i], few, 5);
    measure_weight(bench, &(struct weight){"lm_head", s->vocab, s->dim, 1}, one, 2);
    for (int i = 0; i < 5; i++)
        measure_weight(bench, &vision[i], tile, 1);
}
