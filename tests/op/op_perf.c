/*
 * op_test --perf [threads]: how near the ops come to what this machine can do.
 *
 * Prints the machine's own limits, measured here (float32 multiply-adds and, where there are any,
 * bfloat16 products in registers; reading memory), then each op on InternVL3-1B's shapes. Figures,
 * no verdicts: other processes share the machine.
 */
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cpu_backend.h"
#include "kernels/log.h"
#include "tests/op/op_case.h"

static int n_threads_measured;

/* One thread is timed by its own clock, which other processes do not advance. */
static double now(void)
{
    struct timespec t;
    clock_gettime(n_threads_measured == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Seconds a call: the best of many short windows, since other processes take their share. */
static double time_of(void (*run)(void *), void *arg)
{
    run(arg);
    double t = now();
    run(arg);
    t = now() - t;
    int n = (int)(0.002 / (t + 1e-9)) + 1;
    double best = INFINITY, begun = now();
    for (int i = 0; i < 5 || (now() - begun < 0.4 && i < 100); i++) {
        double start = now();
        for (int j = 0; j < n; j++)
            run(arg);
        double each = (now() - start) / n;
        best = each < best ? each : best;
    }
    return best;
}

struct limits {
    struct backend *b;
    int n_threads;
    float *memory;
    int64_t n_floats;
    enum tile_source source;
    double flops[2]; // float32, bfloat16 products
    double bytes_per_s;
};

/* The tallest tile over one cached step again and again: nothing but multiply-adds. */
#define PEAK_STEPS 100000

static void run_peak(void *arg)
{
    struct limits *l = arg;
    const struct cpu_tile_ops *tile = cpu_state(l->b)->tile;
#pragma omp parallel num_threads(l->n_threads)
    {
        float a[2 * TILE_ROWS_MAX] = {0}, b[64] = {0}, c[TILE_FLOATS_MAX];
        struct tile t = {.a = a, .b = b, .c = c, .c_row = 32, .n_k = PEAK_STEPS};
        tile->run(&t, tile->max_rows, tile->wide_blocks(tile->max_rows), l->source);
    }
}

static volatile int64_t sink;

/* Every thread reads its part once, a cache line a step, with prefetch across pages. */
static void run_read(void *arg)
{
    struct limits *l = arg;
    int64_t n_lines = l->n_floats / 16;
#pragma omp parallel num_threads(l->n_threads)
    {
        int64_t first, end, sum[4] = {0};
        cpu_share(n_lines, omp_get_thread_num(), omp_get_num_threads(), &first, &end);
        const int64_t *p = (const int64_t *)l->memory + first * 8;
        for (int64_t i = first; i < end; i += 4, p += 32) {
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch(p + 8 * j + 512);
                sum[j] += p[8 * j];
            }
        }
        sink = sum[0] + sum[1] + sum[2] + sum[3];
    }
}

static void measure_limits(struct limits *l)
{
    const struct cpu_tile_ops *tile = cpu_state(l->b)->tile;
    for (int i = 0; i < 2; i++) { // float32, bfloat16
        l->source = i ? TILE_BF16_PAIRS : TILE_F32;
        double columns = 16.0 * tile->wide_blocks(tile->max_rows), k = PEAK_STEPS * (1.0 + i);
        l->flops[i] = 2 * tile->max_rows * columns * k * l->n_threads / time_of(run_peak, l);
    }
    l->n_floats = 64 << 20;
    l->memory = op_alloc(l->b, (size_t)l->n_floats * sizeof(float));
    for (int64_t i = 0; i < l->n_floats; i++)
        l->memory[i] = (float)i;
    l->bytes_per_s = 4.0 * (double)l->n_floats / time_of(run_read, l);
    op_free(l->b, l->memory);
    printf("%s\n  peak: float32 %.1f GFLOP/s, bfloat16 %.1f GFLOP/s; memory %.1f GB/s\n",
           l->b->ops->describe(l->b), l->flops[0] * 1e-9, l->flops[1] * 1e-9,
           l->bytes_per_s * 1e-9);
}

/* Enough copies of one weight that none is still in the cache when its turn comes again. */
#define N_COPIES_MAX 64
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

static void perf_matmul(const struct limits *limits, const char *what, enum dtype dtype, int m,
                        int n, int k, int n_lanes)
{
    struct matmul_case c = {.b = limits->b, .x = op_case_matrix(m, k), .y = op_case_matrix(m, n)};
    struct tensor w = op_case_matrix(n, k);
    double bytes = (double)n * k * (double)dtype_size(dtype);
    c.n_copies = m > 16 ? 1 : (int)(256e6 / bytes) + 1;
    c.n_copies = c.n_copies > N_COPIES_MAX ? N_COPIES_MAX : c.n_copies;
    for (int i = 0; i < c.n_copies; i++) {
        struct linear l = {.out_dim = n, .in_dim = k, .dtype = dtype, .n_lanes = n_lanes};
        for (int j = 0; j <= n_lanes; j++)
            l.lane_start[j] = (int64_t)k * j / n_lanes;
        c.l[i] = l;
        op_linear_pack(c.b, &c.l[i], &w, NULL);
    }
    double s = time_of(run_matmul, &c), flops = 2.0 * m * n * k / s;
    printf("  %-22s %-8s M %4d N %6d K %5d: %9.1f us %8.1f GFLOP/s (%3.0f %%) %6.1f GB/s (%3.0f "
           "%%)\n",
           what, dtype_name(dtype), m, n, k, s * 1e6, flops * 1e-9,
           100 * flops / limits->flops[dtype == DTYPE_BF16], bytes / s * 1e-9,
           100 * bytes / s / limits->bytes_per_s);
    for (int i = 0; i < c.n_copies; i++)
        op_linear_free(c.b, &c.l[i]);
    free(c.x.data);
    free(c.y.data);
    free(w.data);
}

/* The same weight in each format of --quantization, in turn, for one row: bytes are those packed.
 */
static void perf_formats(const struct limits *limits, int n, int k)
{
    static const enum weight_format formats[] = {WEIGHT_INT8, WEIGHT_INT4, WEIGHT_NF4, WEIGHT_FP4};
    struct matmul_case c = {.b = limits->b, .x = op_case_matrix(1, k), .y = op_case_matrix(1, n)};
    struct tensor w = op_case_matrix(n, k);
    for (int f = 0; f < 4; f++) {
        struct quantized q = {.format = formats[f], .out_dim = n, .in_dim = k};
        q.group_size = f == 0 ? k : f == 1 ? 128 : BITSANDBYTES_GROUP;
        q.n_groups = k / q.group_size;
        q.codes = xcalloc((size_t)n * (size_t)k, 1);
        q.scales = xcalloc((size_t)n * (size_t)q.n_groups, sizeof(float));
        for (int64_t g = 0; g < n * q.n_groups; g++)
            q.scales[g] = quantize_group(q.format, (float *)w.data + g * q.group_size, q.group_size,
                                         0, q.codes + g * q.group_size);
        c.n_copies = (int)(256e6 * 8 / weight_format_bits(q.format) / n / k) + 1;
        c.n_copies = c.n_copies > N_COPIES_MAX ? N_COPIES_MAX : c.n_copies;
        for (int i = 0; i < c.n_copies; i++) {
            c.l[i] = (struct linear){.out_dim = n, .in_dim = k, .dtype = DTYPE_BF16, .n_lanes = 1};
            c.l[i].lane_start[1] = k;
            op_linear_pack_quantized(c.b, &c.l[i], &q, NULL);
        }
        double s = time_of(run_matmul, &c), rate = (double)c.l[0].packed_bytes / s;
        printf("  %-22s %-8s M %4d N %6d K %5d: %9.1f us %6.1f GB/s (%3.0f %%)\n", "quantised",
               weight_format_name(q.format), 1, n, k, s * 1e6, rate * 1e-9,
               100 * rate / limits->bytes_per_s);
        for (int i = 0; i < c.n_copies; i++)
            op_linear_free(c.b, &c.l[i]);
        free(q.codes);
        free(q.scales);
    }
    free(c.x.data);
    free(c.y.data);
    free(w.data);
}

struct attention_case {
    struct backend *b;
    struct tensor q, k, v, out;
    struct kv_pages kv;
    struct paged_layout layout;
    int32_t kv_of_head[14];
};

static void run_paged(void *arg)
{
    struct attention_case *c = arg;
    op_paged_attention(c->b, &c->out, &c->q, &c->kv, &c->layout, c->kv_of_head, 14, 0.125f, 0);
}

static void perf_paged(const struct limits *limits, enum dtype dtype, int n_tokens, int context)
{
    enum { PAGE = 64, HEADS = 14, KV = 2, DIM = 64 };
    struct attention_case c = {.b = limits->b, .q = op_case_matrix(n_tokens, HEADS * DIM)};
    int32_t n_pages = (context + PAGE - 1) / PAGE, query_start[2] = {0, n_tokens};
    int32_t page_start[2] = {0, n_pages}, context_len = context;
    int32_t *pages = xcalloc((size_t)n_pages, sizeof(*pages));
    for (int i = 0; i < n_pages; i++)
        pages[i] = i;
    c.out = op_case_matrix(n_tokens, HEADS * DIM);
    c.kv = (struct kv_pages){.dtype = dtype, .n_pages = n_pages, .page_size = PAGE};
    c.kv.n_kv_heads = KV;
    c.kv.head_dim = DIM;
    size_t n_bytes = (size_t)(n_pages * PAGE * KV * DIM) * dtype_size(dtype);
    c.kv.k = op_alloc(c.b, n_bytes);
    c.kv.v = op_alloc(c.b, n_bytes);
    c.layout = (struct paged_layout){.n_sequences = 1, .n_tokens = n_tokens, .pages = pages};
    c.layout.max_context_len = context;
    c.layout.query_start = query_start;
    c.layout.context_len = &context_len;
    c.layout.page_start = page_start;
    for (int h = 0; h < HEADS; h++)
        c.kv_of_head[h] = h * KV / HEADS;
    double s = time_of(run_paged, &c);
    double pairs = (double)n_tokens * context - (double)n_tokens * (n_tokens - 1) / 2;
    double flops = 4.0 * pairs * HEADS * DIM / s;
    printf("  paged attention        %-8s tokens %4d context %5d: %9.1f us %8.1f GFLOP/s (%3.0f "
           "%%)\n",
           dtype_name(dtype), n_tokens, context, s * 1e6, flops * 1e-9,
           100 * flops / limits->flops[0]);
    op_free(c.b, c.kv.k);
    op_free(c.b, c.kv.v);
    free(c.q.data);
    free(c.out.data);
    free(pages);
}

static void run_full(void *arg)
{
    struct attention_case *c = arg;
    op_attention(c->b, &c->out, &c->q, &c->k, &c->v, 1, 16, 0.125f, NULL);
}

static void perf_full(const struct limits *limits)
{
    enum { T = 1025, DIM = 1024 };
    struct tensor qkv = op_case_matrix(T, 3 * DIM);
    struct attention_case c = {.b = limits->b, .out = op_case_matrix(T, DIM)};
    c.q = tensor_columns(&qkv, 0, DIM);
    c.k = tensor_columns(&qkv, DIM, DIM);
    c.v = tensor_columns(&qkv, 2 * DIM, DIM);
    double s = time_of(run_full, &c), flops = 4.0 * T * T * DIM / s;
    printf("  vision attention       float32  tokens %4d heads 16: %9.1f us %8.1f GFLOP/s (%3.0f "
           "%%)\n",
           T, s * 1e6, flops * 1e-9, 100 * flops / limits->flops[0]);
    free(qkv.data);
    free(c.out.data);
}

static void run_gated(void *arg)
{
    struct attention_case *c = arg;
    op_gated_activation(c->b, &c->out, &c->q, ACTIVATION_SILU);
}

static void run_norm(void *arg)
{
    struct attention_case *c = arg;
    op_layer_norm(c->b, &c->out, &c->q, c->k.data, c->v.data, 1e-6f);
}

static void perf_rows(const struct limits *limits)
{
    struct attention_case c = {.b = limits->b, .q = op_case_matrix(512, 2 * 4864)};
    c.out = op_case_matrix(512, 4864);
    double s = time_of(run_gated, &c);
    printf("  gated silu             rows 512 cols 4864: %9.1f us %6.2f ns an element\n", s * 1e6,
           s * 1e9 / (512 * 4864.0));
    c.out = op_case_matrix(512, 2 * 4864);
    c.k = op_case_matrix(1, 2 * 4864);
    c.v = op_case_matrix(1, 2 * 4864);
    s = time_of(run_norm, &c);
    printf("  layer_norm             rows 512 cols 9728: %9.1f us %6.2f ns an element\n", s * 1e6,
           s * 1e9 / (512 * 9728.0));
}

int op_perf(int n_threads)
{
    n_threads_measured = n_threads;
    for (int i = 0; i < 3; i++) {
        struct limits l = {.b = op_case_open(op_isas[i], n_threads), .n_threads = n_threads};
        if (!l.b)
            continue;
        measure_limits(&l);
        for (int j = 0; j < 2; j++) {
            enum dtype t = j ? DTYPE_F32 : DTYPE_BF16;
            static const int rows[] = {1, 4, 16, 512};
            for (int r = 0; r < 4; r++) {
                perf_matmul(&l, "qkv", t, rows[r], 1152, 896, 1);
                perf_matmul(&l, "attention output", t, rows[r], 896, 896, 2);
                perf_matmul(&l, "gate and up", t, rows[r], 9728, 896, 1);
                perf_matmul(&l, "down", t, rows[r], 896, 4864, 8);
            }
            perf_matmul(&l, "logits", t, 1, 151674, 896, 1);
            perf_matmul(&l, "vision fc1", t, 1025, 4096, 1024, 1);
            perf_matmul(&l, "vision fc2", t, 1025, 1024, 4096, 1);
            perf_paged(&l, t, 1, 1024);
            perf_paged(&l, t, 1, 8192);
            perf_paged(&l, t, 512, 512);
            perf_paged(&l, t, 512, 4096);
        }
        perf_formats(&l, 9728, 896);
        perf_formats(&l, 2048, 8192);
        perf_full(&l);
        perf_rows(&l);
        backend_close(l.b);
    }
    return 0;
}
