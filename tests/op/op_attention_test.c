/*
 * Attention: values against the naive loop, and the promise that a query's result depends on its
 * own keys alone: not on its neighbours, the cut of the prompt, the page numbers, or what unused
 * slots of a page hold.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/log.h"
#include "tests/op/op_case.h"
#include "tests/op/op_naive.h"

/* A few sequences with their queries, keys and values, and the pages they live in. */
struct world {
    int n_sequences, n_heads, n_kv_heads, head_dim, page_size, window;
    enum dtype dtype;
    int length[4]; // tokens
    int first[5];  // row of each sequence's first token
    struct tensor q, k, v;
    int32_t kv_of_head[16];
    struct kv_pages kv;
    int32_t page_start[5], pages[256];
};

/* Pages are numbered in order, or dealt at random, and full of NaN (int8: as scales) before they
 * are written. */
static void world_make_pages(struct world *w, struct backend *b, int shuffled)
{
    w->page_start[0] = 0;
    for (int s = 0; s < w->n_sequences; s++)
        w->page_start[s + 1] = w->page_start[s] + (w->length[s] + w->page_size - 1) / w->page_size;
    int n = w->page_start[w->n_sequences], spare = 3;
    w->kv = (struct kv_pages){.dtype = w->dtype, .n_pages = n + spare};
    w->kv.page_size = w->page_size;
    w->kv.n_kv_heads = w->n_kv_heads;
    w->kv.head_dim = w->head_dim;
    for (int i = 0; i < n; i++)
        w->pages[i] = i;
    for (int i = n - 1; shuffled && i > 0; i--) {
        int j = op_case_integer(i + 1);
        int32_t page = w->pages[i];
        w->pages[i] = w->pages[j];
        w->pages[j] = page;
    }
    for (int i = 0; shuffled && i < n; i++)
        w->pages[i] += spare;
    size_t n_bytes =
        (size_t)((n + spare) * w->n_kv_heads) * kv_head_bytes(w->head_dim, w->page_size, w->dtype);
    w->kv.k = op_alloc(b, n_bytes);
    w->kv.v = op_alloc(b, n_bytes);
    memset(w->kv.k, 0xff, n_bytes);
    memset(w->kv.v, 0xff, n_bytes);
}

static void world_free_pages(struct world *w, struct backend *b)
{
    op_free(b, w->kv.k);
    op_free(b, w->kv.v);
}

static void world_init(struct world *w, int n_heads, int n_kv_heads, int head_dim, int page_size,
                       int window, enum dtype dtype)
{
    const int lengths[4] = {1, 50, 17, dtype == DTYPE_F32 ? 133 : 277}; // the last: several steps
    *w = (struct world){.n_sequences = 4, .n_heads = n_heads, .n_kv_heads = n_kv_heads};
    w->head_dim = head_dim;
    w->page_size = page_size;
    w->window = window;
    w->dtype = dtype;
    for (int s = 0; s < 4; s++) {
        w->length[s] = lengths[s];
        w->first[s + 1] = w->first[s] + lengths[s];
    }
    int n = w->first[4];
    w->q = op_case_strided(n, (int64_t)n_heads * head_dim);
    w->k = op_case_strided(n, (int64_t)n_kv_heads * head_dim);
    w->v = op_case_strided(n, (int64_t)n_kv_heads * head_dim);
    for (int h = 0; h < n_heads; h++)
        w->kv_of_head[h] = h * n_kv_heads / n_heads;
}

static void world_release(struct world *w)
{
    free(w->q.data);
    free(w->k.data);
    free(w->v.data);
}

/* The steps of a run: each sequence contributes `chunk` tokens a step (0: all at once). */
static void world_run(struct world *w, struct backend *b, struct tensor *out, int chunk)
{
    int done[4] = {0}, left = 1;
    while (left) {
        int32_t query_start[5] = {0}, context_len[4], n = 0;
        int rows[512];
        struct paged_layout layout = {.n_sequences = w->n_sequences};
        left = 0;
        for (int s = 0; s < w->n_sequences; s++) {
            int take = w->length[s] - done[s];
            if (chunk && take > chunk)
                take = chunk;
            for (int i = 0; i < take; i++)
                rows[n++] = w->first[s] + done[s] + i;
            done[s] += take;
            query_start[s + 1] = n;
            context_len[s] = done[s];
            layout.max_context_len =
                done[s] > layout.max_context_len ? done[s] : layout.max_context_len;
            left |= done[s] < w->length[s];
        }
        layout.n_tokens = n;
        layout.query_start = query_start;
        layout.context_len = context_len;
        layout.page_start = w->page_start;
        layout.pages = w->pages;
        struct tensor q = op_case_matrix(n, w->q.shape[1]), o = op_case_matrix(n, w->q.shape[1]);
        struct tensor k = op_case_matrix(n, w->k.shape[1]), v = op_case_matrix(n, w->k.shape[1]);
        op_gather_rows(b, &q, &w->q, rows);
        op_gather_rows(b, &k, &w->k, rows);
        op_gather_rows(b, &v, &w->v, rows);
        op_kv_write(b, &w->kv, &layout, &k, &v, NULL);
        op_paged_attention(b, &o, &q, &w->kv, &layout, w->kv_of_head, w->n_heads,
                           1 / sqrtf((float)w->head_dim), w->window);
        op_scatter_rows(b, out, &o, rows);
        free(q.data);
        free(o.data);
        free(k.data);
        free(v.data);
    }
}

/* The values of t as a product of `dtype` takes them; the caller frees. */
static float *copy_rounded(const struct tensor *t, enum dtype dtype)
{
    int64_t n = t->shape[0] * t->row_stride;
    float *copy = op_case_floats(n, 0);
    for (int64_t i = 0; i < n; i++) {
        float f = ((const float *)t->data)[i];
        copy[i] = dtype == DTYPE_BF16 ? bf16_to_f32(f32_to_bf16(f)) : f;
    }
    return copy;
}

/* The keys or values of t as pages of `dtype` hold them; the caller frees. */
static float *copy_held(const struct tensor *t, enum dtype dtype, int head_dim)
{
    float *copy = copy_rounded(t, dtype);
    int8_t codes[128];
    for (int64_t i = 0; dtype == DTYPE_I8 && i < t->shape[0]; i++) {
        for (float *x = copy + i * t->row_stride, *end = x + t->shape[1]; x < end; x += head_dim) {
            float scale = naive_codes(codes, x, head_dim);
            for (int d = 0; d < head_dim; d++)
                x[d] = (float)codes[d] * scale;
        }
    }
    return copy;
}

/* Of what the pages hold and products take, or of the operands as they are. */
static void world_naive(struct world *w, float *want, int is_rounded)
{
    int hd = w->head_dim;
    struct tensor q = w->q, kv[2] = {w->k, w->v};
    if (is_rounded) {
        q.data = copy_rounded(&w->q, w->dtype == DTYPE_F32 ? DTYPE_F32 : DTYPE_BF16);
        for (int i = 0; i < 2; i++)
            kv[i].data = copy_held(&kv[i], w->dtype, hd);
    }
    for (int s = 0; s < w->n_sequences; s++) {
        for (int t = 0; t < w->length[s]; t++) {
            int lo = w->window > 0 && t + 1 > w->window ? t + 1 - w->window : 0;
            for (int h = 0; h < w->n_heads; h++) {
                int64_t at = (w->first[s] + lo) * kv[0].row_stride + w->kv_of_head[h] * hd;
                int64_t row = w->first[s] + t;
                const float *query = (const float *)q.data + row * q.row_stride + h * hd;
                naive_attend(want + (row * w->n_heads + h) * hd, NULL, query,
                             (float *)kv[0].data + at, (float *)kv[1].data + at, t + 1 - lo,
                             kv[0].row_stride, hd, 1 / sqrt(hd));
            }
        }
    }
    if (is_rounded) {
        free(q.data);
        free(kv[0].data);
        free(kv[1].data);
    }
}

/* The naive loop rounds no probability; rounding one to bfloat16 errs by up to 2^-8 of it, evenly.
 */
static double bound_of(enum dtype dtype)
{
    return dtype == DTYPE_F32 ? 1e-12 : ldexp(1, -16) / 3;
}

/* One back end: prefill against the naive loop; chunks, decode and shuffled pages equal prefill. */
static void check_world(struct world *w, struct backend *b, const float *want, float *bits)
{
    const int page_size = w->page_size;
    struct tensor a = op_case_matrix(w->q.shape[0], w->q.shape[1]);
    struct tensor c = op_case_matrix(w->q.shape[0], w->q.shape[1]);
    size_t n_bytes = (size_t)tensor_n_elements(&a) * sizeof(float);
    world_make_pages(w, b, 0);
    world_run(w, b, &a, 0);
    world_free_pages(w, b);
    char name[64];
    snprintf(name, sizeof(name), "paged attention %s", dtype_name(w->dtype));
    op_case_compare(name, &a, want, bound_of(w->dtype));
    static const int chunks[] = {1, 7, 32};
    for (int i = 0; i < 3; i++) {
        world_make_pages(w, b, 1);
        world_run(w, b, &c, chunks[i]);
        world_free_pages(w, b);
        op_case_same(a.data, c.data, n_bytes, "paged attention in chunks, pages shuffled");
    }
    w->page_size = 112 - page_size;
    world_make_pages(w, b, 1);
    world_run(w, b, &c, 23);
    world_free_pages(w, b);
    op_case_same(a.data, c.data, n_bytes, "paged attention with pages of another size");
    w->page_size = page_size;
    if (isnan(bits[0]))
        memcpy(bits, a.data, n_bytes);
    op_case_same(bits, a.data, n_bytes, "paged attention by another instruction set");
    free(a.data);
    free(c.data);
}

static void test_paged(void **state)
{
    (void)state;
    static const int cases[][5] = {// heads, kv heads, head_dim, page_size, window
                                   {14, 2, 64, 32, 0},
                                   {4, 4, 16, 16, 0},
                                   {3, 1, 5, 16, 0},
                                   {8, 2, 33, 48, 20},
                                   {4, 2, 128, 64, 1}};
    for (int i = 0; i < 5; i++) {
        static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_I8};
        static const int multiples[] = {1, 2, 16}; // of head_dim
        for (int t = 0; t < 3; t++) {
            struct world w;
            op_case_seed(10 + (uint32_t)i);
            int head_dim = (cases[i][2] + multiples[t] - 1) / multiples[t] * multiples[t];
            world_init(&w, cases[i][0], cases[i][1], head_dim, cases[i][3], cases[i][4], dtypes[t]);
            int64_t n = tensor_n_elements(&w.q);
            float *want = op_case_floats(n, 0), *bits = op_case_floats(n, 0);
            world_naive(&w, want, 1);
            bits[0] = NAN;
            for (int j = 0; j < op_n_isas * 2; j++) {
                if (!op_case_has(op_isas[j / 2]))
                    continue;
                struct backend *b = backend_cpu_open(1 + j % 2 * 2, op_isas[j / 2]);
                check_world(&w, b, want, bits);
                backend_close(b);
            }
            world_release(&w);
            free(want);
            free(bits);
        }
    }
    op_case_report();
}

/* Heads may read any kv head, in any order. */
static void test_any_kv_of_head(void **state)
{
    (void)state;
    struct world w;
    op_case_seed(20);
    world_init(&w, 5, 3, 16, 16, 0, DTYPE_F32);
    static const int32_t kv_of_head[5] = {2, 0, 1, 2, 0};
    memcpy(w.kv_of_head, kv_of_head, sizeof(kv_of_head));
    int64_t n = tensor_n_elements(&w.q);
    float *want = op_case_floats(n, 0), *bits = op_case_floats(n, 0);
    world_naive(&w, want, 1);
    bits[0] = NAN;
    struct backend *b = backend_cpu_open(2, NULL);
    check_world(&w, b, want, bits);
    backend_close(b);
    world_release(&w);
    free(want);
    free(bits);
}

static float largest_of(const struct tensor *t)
{
    float largest = 0;
    for (int64_t i = 0; i < t->shape[0] * t->row_stride; i++)
        largest = fmaxf(largest, fabsf(((const float *)t->data)[i]));
    return largest;
}

/* What int8 pages cost. A code errs by half a scale, 1/254 of the largest: so a key's score by the
 * sum of |q| times that, which with the rounding of q to bfloat16 is `e`; every probability is then
 * wrong by a factor within e^(2 e) of 1. Values err by half their scale and the rounding of the
 * probability before them. */
static void test_int8_error(void **state)
{
    (void)state;
    struct world w;
    op_case_seed(40);
    world_init(&w, 6, 2, 64, 16, 0, DTYPE_I8);
    int64_t n = tensor_n_elements(&w.q);
    float *want = op_case_floats(n, 0);
    world_naive(&w, want, 0);
    struct backend *b = backend_cpu_open(1, NULL);
    struct tensor out = op_case_matrix(w.q.shape[0], w.q.shape[1]);
    world_make_pages(&w, b, 0);
    world_run(&w, b, &out, 0);
    const double k = largest_of(&w.k), v = largest_of(&w.v), bf16 = ldexp(1, -9);
    double nearest = INFINITY, worst = 0;
    for (int64_t i = 0; i < n; i += w.head_dim) {
        const float *q =
            (const float *)w.q.data + i / w.q.shape[1] * w.q.row_stride + i % w.q.shape[1];
        double sum = 0;
        for (int d = 0; d < w.head_dim; d++)
            sum += fabsf(q[d]);
        double e = sum * k * (1.0 / 254 + bf16) / sqrt(w.head_dim);
        double bound = v * (exp(2 * e) - 1 + 1.0 / 254 + bf16) + 1e-6;
        for (int d = 0; d < w.head_dim; d++) {
            double error = fabs((double)((const float *)out.data)[i + d] - want[i + d]);
            assert_true(error <= bound);
            worst = fmax(worst, error);
        }
        nearest = fmin(nearest, bound);
    }
    print_message("int8 pages: largest error %.5f, smallest bound %.5f\n", worst, nearest);
    world_free_pages(&w, b);
    backend_close(b);
    world_release(&w);
    free(out.data);
    free(want);
}

/* The codes and scales themselves, where struct kv_pages says they lie. */
static void check_codes(struct backend *b, const struct tensor *k, const struct tensor *v)
{
    enum { DIM = 32, HEADS = 2, SIZE = 32, TOKENS = 21 };
    const size_t head_bytes = kv_head_bytes(DIM, SIZE, DTYPE_I8), n_bytes = 2 * HEADS * head_bytes;
    struct kv_pages kv = {
        op_alloc(b, n_bytes), op_alloc(b, n_bytes), DTYPE_I8, 2, SIZE, HEADS, DIM};
    static const int32_t query_start[] = {0, TOKENS}, context_len[] = {TOKENS};
    static const int32_t page_start[] = {0, 1}, pages[] = {1};
    const struct paged_layout layout = {1,           TOKENS,     TOKENS, query_start,
                                        context_len, page_start, pages};
    struct tensor keys = *k; // not turned
    op_kv_write(b, &kv, &layout, &keys, v, NULL);
    for (int i = 0; i < TOKENS * HEADS; i++) {
        const int token = i / HEADS, head = i % HEADS;
        const size_t at = (size_t)(HEADS + head) * head_bytes;
        const int8_t *found[2] = {(int8_t *)kv.k + at, (int8_t *)kv.v + at};
        const float *x[2] = {(float *)k->data + token * k->row_stride + head * DIM,
                             (float *)v->data + token * v->row_stride + head * DIM};
        for (int is_value = 0; is_value < 2; is_value++) {
            int8_t codes[DIM];
            float scale = naive_codes(codes, x[is_value], DIM), found_scale;
            memcpy(&found_scale, found[is_value] + DIM * SIZE + token * 4, 4);
            assert_true(isnan(scale) ? isnan(found_scale) : scale == found_scale);
            for (int d = 0; d < DIM; d++) {
                int of_key = ((d / 2 * SIZE / 16 + token / 16) * 2 + d % 2) * 16 + token % 16;
                int of_value = ((token / 2 * DIM / 16 + d / 16) * 2 + token % 2) * 16 + d % 16;
                assert_int_equal(found[is_value][is_value ? of_value : of_key], codes[d]);
            }
        }
    }
    op_free(b, kv.k);
    op_free(b, kv.v);
}

static void test_codes(void **state)
{
    (void)state;
    op_case_seed(41);
    struct tensor k = op_case_strided(21, 64), v = op_case_strided(21, 64);
    float *at = k.data;
    for (int d = 0; d < 32; d++) {
        at[d] = 0;                                           // no scale
        at[k.row_stride + d] = ldexpf((float)d - 16, -140);  // a scale below the normal numbers
        at[2 * k.row_stride + d] = (float)d - 14.5f;         // ties, below
        at[3 * k.row_stride + d] = d == 3 ? NAN : 1;         // what is not finite has no codes
        at[4 * k.row_stride + d] = d == 31 ? -INFINITY : -1; //
        at[5 * k.row_stride + d] = d % 2 ? -3e38f : 3e38f;
        at[6 * k.row_stride + d] = d == 9 ? -1e-30f : 1e-37f;
    }
    at[2 * k.row_stride] = -127;
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 1);
        if (!b)
            continue;
        check_codes(b, &k, &v);
        backend_close(b);
    }
    free(k.data);
    free(v.data);
}

/* A copied page reads like the original. */
static void check_copy_pages(enum dtype dtype, int head_dim)
{
    struct backend *b = backend_cpu_open(1, NULL);
    struct kv_pages kv = {.dtype = dtype, .n_pages = 5, .page_size = 16, .n_kv_heads = 3};
    kv.head_dim = head_dim;
    size_t page = 3 * kv_head_bytes(head_dim, 16, dtype);
    kv.k = op_alloc(b, 5 * page);
    kv.v = op_alloc(b, 5 * page);
    for (size_t i = 0; i < 5 * page; i++) {
        ((char *)kv.k)[i] = (char)op_case_integer(256);
        ((char *)kv.v)[i] = (char)op_case_integer(256);
    }
    static const int32_t src[] = {1, 4}, dst[] = {3, 0};
    op_copy_pages(b, &kv, src, dst, 2);
    for (int i = 0; i < 2; i++) {
        assert_memory_equal((char *)kv.k + (size_t)src[i] * page,
                            (char *)kv.k + (size_t)dst[i] * page, page);
        assert_memory_equal((char *)kv.v + (size_t)src[i] * page,
                            (char *)kv.v + (size_t)dst[i] * page, page);
    }
    op_free(b, kv.k);
    op_free(b, kv.v);
    backend_close(b);
}

static void test_copy_pages(void **state)
{
    (void)state;
    check_copy_pages(DTYPE_BF16, 7);
    check_copy_pages(DTYPE_I8, 16);
}

static struct tensor as_bf16(struct backend *b, const struct tensor *t)
{
    struct tensor copy = op_case_strided(t->shape[0], t->shape[1]);
    copy.dtype = DTYPE_BF16;
    op_copy(b, &copy, t);
    return copy;
}

/* Tensors of bfloat16 give what float32 ones do, rounded. */
static void check_full_stored(struct backend *b, const struct tensor *qkv, const struct tensor *out,
                              int n_tiles, int n_heads)
{
    int64_t cols = out->shape[1];
    struct tensor stored = as_bf16(b, qkv), want = as_bf16(b, out), got = as_bf16(b, out);
    struct tensor q = tensor_columns(&stored, 0, cols), k = tensor_columns(&stored, cols, cols);
    struct tensor v = tensor_columns(&stored, 2 * cols, cols);
    for (int64_t r = 0; r < out->shape[0]; r++)
        memset((uint16_t *)got.data + r * got.row_stride, 0xff, (size_t)cols * sizeof(uint16_t));
    op_attention(b, &got, &q, &k, &v, n_tiles, n_heads, 1 / sqrtf((float)(cols / n_heads)),
                 DTYPE_BF16, NULL);
    for (int64_t r = 0; r < out->shape[0]; r++)
        op_case_same((uint16_t *)want.data + r * want.row_stride,
                     (uint16_t *)got.data + r * got.row_stride, (size_t)cols * sizeof(uint16_t),
                     "attention stored in bfloat16");
    free(stored.data);
    free(want.data);
    free(got.data);
}

/* *bits: NULL, or what another instruction set gave; the caller frees. */
static void check_full(struct backend *b, enum dtype dtype, int n_tiles, int t, int n_heads, int hd,
                       float **bits)
{
    int rows = n_tiles * t, cols = n_heads * hd;
    struct tensor qkv = op_case_matrix(rows, 3 * cols), out = op_case_strided(rows, cols);
    struct tensor q = tensor_columns(&qkv, 0, cols), k = tensor_columns(&qkv, cols, cols);
    struct tensor v = tensor_columns(&qkv, 2 * cols, cols);
    float *rounded = copy_rounded(&qkv, dtype);
    float *want = op_case_floats(rows * cols, 0);
    int64_t n_probs = (int64_t)n_tiles * n_heads * t * t;
    float *probs = op_case_floats(n_probs, 0), *want_probs = op_case_floats(n_probs, 0);
    float scale = 1 / sqrtf((float)hd);
    for (int i = 0; i < rows; i++) {
        for (int h = 0; h < n_heads; h++) {
            int64_t at = i / t * t * qkv.row_stride + h * hd;
            naive_attend(want + i * cols + h * hd,
                         want_probs + ((i / t * n_heads + h) * t + i % t) * t,
                         rounded + i * qkv.row_stride + h * hd, rounded + at + cols,
                         rounded + at + 2 * cols, t, qkv.row_stride, hd, scale);
        }
    }
    op_attention(b, &out, &q, &k, &v, n_tiles, n_heads, scale, dtype, probs);
    op_case_compare(dtype == DTYPE_F32 ? "attention float32" : "attention bfloat16", &out, want,
                    bound_of(dtype));
    struct tensor p = tensor_2d(probs, DTYPE_F32, n_probs / t, t);
    op_case_compare("attention probabilities", &p, want_probs, 1e-12);
    /* Each tile alone gives the same bits. */
    struct tensor alone = op_case_matrix(t, cols);
    for (int i = 0; i < n_tiles; i++) {
        struct tensor q1 = tensor_rows(&q, i * t, t), k1 = tensor_rows(&k, i * t, t);
        struct tensor v1 = tensor_rows(&v, i * t, t), out1 = tensor_rows(&out, i * t, t);
        op_attention(b, &alone, &q1, &k1, &v1, 1, n_heads, scale, dtype, NULL);
        for (int r = 0; r < t; r++)
            op_case_same((float *)alone.data + r * cols, (float *)out1.data + r * out1.row_stride,
                         (size_t)cols * sizeof(float), "attention of one tile");
    }
    if (!*bits) {
        *bits = op_case_floats(rows * cols, 0);
        for (int r = 0; r < rows; r++)
            memcpy(*bits + r * cols, (float *)out.data + r * out.row_stride,
                   (size_t)cols * sizeof(float));
    }
    for (int r = 0; r < rows; r++)
        op_case_same(*bits + r * cols, (float *)out.data + r * out.row_stride,
                     (size_t)cols * sizeof(float), "attention by another instruction set");
    if (dtype == DTYPE_BF16)
        check_full_stored(b, &qkv, &out, n_tiles, n_heads);
    free(alone.data);
    free(qkv.data);
    free(rounded);
    free(out.data);
    free(want);
    free(probs);
    free(want_probs);
}

static void test_full(void **state)
{
    (void)state;
    static const int cases[][4] = {// tiles, tokens, heads, head_dim
                                   {1, 1, 1, 1},     {2, 17, 3, 16}, {3, 65, 2, 64}, {1, 50, 5, 13},
                                   {1, 100, 1, 128}, {2, 48, 2, 32}, {1, 145, 2, 20}};
    for (size_t c = 0; c < 2 * sizeof(cases) / sizeof(cases[0]); c++) {
        const int *n = cases[c / 2];
        float *bits = NULL;
        for (int i = 0; i < 2 * op_n_isas; i++) {
            struct backend *b = op_case_open(op_isas[i / 2], i % 2 ? 5 : 1);
            if (!b)
                continue;
            op_case_seed(30 + (uint32_t)c);
            check_full(b, c % 2 ? DTYPE_BF16 : DTYPE_F32, n[0], n[1], n[2], n[3], &bits);
            backend_close(b);
        }
        free(bits);
    }
    op_case_report();
}

int op_attention_tests(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_paged),      cmocka_unit_test(test_any_kv_of_head),
        cmocka_unit_test(test_int8_error), cmocka_unit_test(test_codes),
        cmocka_unit_test(test_copy_pages), cmocka_unit_test(test_full),
    };
    return cmocka_run_group_tests_name("attention", tests, NULL, NULL);
}
