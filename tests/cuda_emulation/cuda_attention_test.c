/*
 * CUDA's attentions: values against the naive loop, and the promise that a query's result depends
 * on its own keys alone: not on its neighbours, the cut of the prompt (prefill, chunks, decode one
 * by one), the page numbers, or what unused slots of a page hold.
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
#include "tests/cuda_emulation/cuda_op_case.h"
#include "tests/op/op_naive.h"

#define SEQUENCES 3

struct world {
    int n_heads, n_kv_heads, head_dim, page_size, window;
    int length[SEQUENCES];
    enum dtype kv_type;
    struct case_matrix q, k, v;
    int first[SEQUENCES + 1];
    int32_t kv_of_head[32], page_start[SEQUENCES + 1], pages[512];
    int n_pages;
    struct kv_pages kv;
};

static void world_pages(struct world *w, struct backend *b, int shuffled)
{
    int n = 0, spare = 2;

    for (int s = 0; s < SEQUENCES; s++) {
        w->page_start[s] = n;
        n += (w->length[s] + w->page_size - 1) / w->page_size;
    }
    w->page_start[SEQUENCES] = n;
    for (int i = 0; i < n; i++)
        w->pages[i] = i;
    for (int i = n - 1; shuffled && i > 0; i--) {
        int j = case_integer(i + 1);
        int32_t page = w->pages[i];
        w->pages[i] = w->pages[j];
        w->pages[j] = page;
    }
    size_t n_bytes = (size_t)((n + spare) * w->n_kv_heads) *
                     kv_head_bytes(w->head_dim, w->page_size, w->kv_type);
    char *nan = xcalloc(n_bytes, 1);
    memset(nan, 0xff, n_bytes);
    w->kv = (struct kv_pages){op_alloc(b, n_bytes), op_alloc(b, n_bytes), w->kv_type, n + spare,
                              w->page_size,         w->n_kv_heads,        w->head_dim};
    op_upload(b, w->kv.k, nan, n_bytes);
    op_upload(b, w->kv.v, nan, n_bytes);
    free(nan);
}

/* Every sequence contributes `chunk` tokens a step (0: all; negative: the first sequence all at
 * once, the others one by one, so that a step mixes prefill and decode). */
static void world_run(struct world *w, struct backend *b, struct tensor *out, int chunk)
{
    int done[SEQUENCES] = {0}, left = 1;

    while (left) {
        int32_t query_start[SEQUENCES + 1] = {0}, context_len[SEQUENCES], rows[2048], n = 0;
        struct paged_layout layout = {.n_sequences = SEQUENCES};
        left = 0;
        for (int s = 0; s < SEQUENCES; s++) {
            int take = w->length[s] - done[s];
            int most = chunk > 0 ? chunk : chunk < 0 && s > 0 ? 1 : take;
            take = take < most ? take : most;
            for (int i = 0; i < take; i++)
                rows[n++] = w->first[s] + done[s] + i;
            done[s] += take;
            query_start[s + 1] = n;
            context_len[s] = done[s];
            if (done[s] > layout.max_context_len)
                layout.max_context_len = done[s];
            left |= done[s] < w->length[s];
        }
        layout.n_tokens = n;
        layout.query_start = case_upload_ids(b, query_start, SEQUENCES + 1);
        layout.context_len = case_upload_ids(b, context_len, SEQUENCES);
        layout.page_start = case_upload_ids(b, w->page_start, SEQUENCES + 1);
        layout.pages = case_upload_ids(b, w->pages, w->page_start[SEQUENCES]);
        const int32_t *device_rows = case_upload_ids(b, rows, n);
        enum dtype t = w->q.device.dtype;
        struct tensor q = case_matrix_new(b, t, n, w->q.device.shape[1], 8).device;
        struct tensor o = case_matrix_new(b, t, n, w->q.device.shape[1], 0).device;
        struct tensor k = case_matrix_new(b, t, n, w->k.device.shape[1], 0).device;
        struct tensor v = case_matrix_new(b, t, n, w->k.device.shape[1], 2).device;
        op_gather_rows(b, &q, &w->q.device, device_rows);
        op_gather_rows(b, &k, &w->k.device, device_rows);
        op_gather_rows(b, &v, &w->v.device, device_rows);
        op_kv_write(b, &w->kv, &layout, &k, &v, NULL);
        op_paged_attention(b, &o, &q, &w->kv, &layout, w->kv_of_head, w->n_heads,
                           1 / sqrtf((float)w->head_dim), w->window);
        op_scatter_rows(b, out, &o, device_rows);
    }
}

/* x [n] <- what pages of a type hold of it, head by head. */
static void hold(float *x, int64_t n, int head_dim, enum dtype kv_type)
{
    int8_t codes[256];

    for (int64_t i = 0; kv_type == DTYPE_BF16 && i < n; i++)
        x[i] = bf16_to_f32(f32_to_bf16(x[i]));
    for (int64_t i = 0; kv_type == DTYPE_I8 && i < n; i += head_dim) {
        float scale = naive_codes(codes, x + i, head_dim);
        for (int d = 0; d < head_dim; d++)
            x[i + d] = (float)codes[d] * scale;
    }
}

static void world_naive(const struct world *w, float *want)
{
    int hd = w->head_dim, stride = w->n_kv_heads * hd;
    int64_t n = (int64_t)w->first[SEQUENCES] * stride;
    float *k = case_floats(n, 0, DTYPE_F32), *v = case_floats(n, 0, DTYPE_F32);

    memcpy(k, w->k.host, (size_t)n * sizeof(float));
    memcpy(v, w->v.host, (size_t)n * sizeof(float));
    hold(k, n, hd, w->kv_type);
    hold(v, n, hd, w->kv_type);
    for (int s = 0; s < SEQUENCES; s++)
        for (int t = 0; t < w->length[s]; t++)
            for (int h = 0; h < w->n_heads; h++) {
                int low = w->window > 0 && t + 1 > w->window ? t + 1 - w->window : 0;
                int64_t at = (int64_t)(w->first[s] + low) * stride + w->kv_of_head[h] * hd;
                int64_t row = ((int64_t)(w->first[s] + t) * w->n_heads + h) * hd;
                naive_attend(want + row, NULL, w->q.host + row, k + at, v + at, t + 1 - low, stride,
                             hd, 1 / sqrt(hd));
            }
}

static void check_world(struct world *w, enum dtype t, enum dtype kv_type)
{
    struct backend *b = case_open(t, 0);
    static const int chunks[] = {-1, 1, 40};
    int n_cols = w->n_heads * w->head_dim;

    w->kv_type = kv_type;
    w->first[0] = 0;
    for (int s = 0; s < SEQUENCES; s++)
        w->first[s + 1] = w->first[s] + w->length[s];
    int n = w->first[SEQUENCES];
    w->q = case_matrix_new(b, t, n, n_cols, 0);
    w->k = case_matrix_new(b, t, n, w->n_kv_heads * w->head_dim, 4);
    w->v = case_matrix_new(b, t, n, w->n_kv_heads * w->head_dim, 0);
    float *want = case_floats((int64_t)n * n_cols, 0, DTYPE_F32);
    world_naive(w, want);
    struct tensor all = case_matrix_new(b, t, n, n_cols, 0).device;
    struct tensor other = case_matrix_new(b, t, n, n_cols, 0).device;
    world_pages(w, b, 0);
    world_run(w, b, &all, 0);
    char name[64];
    snprintf(name, sizeof(name), "paged_attention, pages %s,", dtype_name(kv_type));
    case_compare(b, name, &all, want, t == DTYPE_F32 ? 1e-11 : 3e-5);
    op_free(b, w->kv.k);
    op_free(b, w->kv.v);
    for (int i = 0; i < 3; i++) {
        if (chunks[i] == 1 && (n > 150 || case_small))
            continue; // the mixed run covers decode of long sequences
        world_pages(w, b, 1);
        world_run(w, b, &other, chunks[i]);
        case_same(b, &all, &other, "paged attention in pieces, pages shuffled");
        op_free(b, w->kv.k);
        op_free(b, w->kv.v);
    }
    case_clear(b);
    backend_close(b);
}

/* heads, kv heads, head_dim, page_size, window, three lengths */
static struct world world_of(const int c[8])
{
    struct world w = {.n_heads = c[0], .n_kv_heads = c[1], .head_dim = c[2], .page_size = c[3]};

    w.window = c[4];
    for (int s = 0; s < SEQUENCES; s++)
        w.length[s] = c[5 + s];
    for (int h = 0; h < w.n_heads; h++)
        w.kv_of_head[h] = h * w.n_kv_heads / w.n_heads;
    return w;
}

static void test_paged(void **state)
{
    (void)state;
    static const int cases[][8] = {{14, 2, 16, 32, 0, 1, 20, 37}, {4, 4, 16, 16, 0, 70, 9, 64},
                                   {3, 1, 5, 16, 0, 3, 2, 40},    {8, 2, 32, 48, 20, 33, 5, 90},
                                   {4, 2, 128, 64, 1, 2, 7, 3},   {20, 1, 64, 16, 0, 4, 6, 2},
                                   {2, 1, 16, 16, 0, 300, 3, 2},  {2, 1, 16, 32, 270, 550, 2, 1},
                                   {1, 1, 16, 16, 0, 2, 290, 1}};
    case_seed(10);
    for (int i = 0; i < (int)(sizeof(cases) / sizeof(cases[0])); i++) {
        struct world w = world_of(cases[i]);
        if (case_small && i % 3 != 0)
            continue;
        for (int s = 0; case_small && s < SEQUENCES; s++)
            w.length[s] = w.length[s] % 290; // two splits at most
        check_world(&w, DTYPE_BF16, DTYPE_BF16);
        if (i < 5 || i == 7) {
            check_world(&w, DTYPE_F32, DTYPE_F32);
            check_world(&w, DTYPE_F32, DTYPE_BF16);
        }
        if (w.head_dim % 16 == 0) {
            check_world(&w, DTYPE_BF16, DTYPE_I8);
            if (i < 5 || i == 7)
                check_world(&w, DTYPE_F32, DTYPE_I8);
        }
    }
    static const int any[8] = {5, 3, 16, 16, 0, 4, 20, 7}; // heads read any kv head, in any order
    static const int32_t kv_of_head[5] = {2, 0, 1, 2, 0};
    struct world w = world_of(any);
    memcpy(w.kv_of_head, kv_of_head, sizeof(kv_of_head));
    check_world(&w, DTYPE_BF16, DTYPE_BF16);
    check_world(&w, DTYPE_F32, DTYPE_F32);
    case_report();
}

/* The codes and scales themselves, where struct kv_pages says they lie: a zero, one that is not
 * finite and one too small for a scale among the vectors. */
static void test_codes(void **state)
{
    enum { DIM = 48, HEADS = 3, SIZE = 16, TOKENS = 5, N = TOKENS * HEADS * DIM };
    struct backend *b = case_open(DTYPE_F32, 0);
    const size_t head_bytes = kv_head_bytes(DIM, SIZE, DTYPE_I8), n_bytes = 2 * HEADS * head_bytes;
    static const int32_t query_start[] = {0, TOKENS}, context_len[] = {TOKENS + 2};
    static const int32_t page_start[] = {0, 1}, pages[] = {1};
    const struct paged_layout layout = {1,
                                        TOKENS,
                                        TOKENS + 2,
                                        case_upload_ids(b, query_start, 2),
                                        case_upload_ids(b, context_len, 1),
                                        case_upload_ids(b, page_start, 2),
                                        case_upload_ids(b, pages, 1)};
    struct kv_pages kv = {
        op_alloc(b, n_bytes), op_alloc(b, n_bytes), DTYPE_I8, 2, SIZE, HEADS, DIM};
    float *x[2] = {case_floats(N, 3, DTYPE_F32), case_floats(N, 3, DTYPE_F32)};

    (void)state;
    for (int i = 0; i < DIM; i++) {
        x[0][i] = 0;
        x[0][2 * DIM + i] = 1e-39f;
    }
    x[0][DIM + 40] = NAN;
    x[1][4 * DIM] = -INFINITY;
    struct tensor k = tensor_2d(case_upload(b, x[0], N), DTYPE_F32, TOKENS, HEADS * DIM);
    struct tensor v = tensor_2d(case_upload(b, x[1], N), DTYPE_F32, TOKENS, HEADS * DIM);
    op_kv_write(b, &kv, &layout, &k, &v, NULL);
    for (int is_value = 0; is_value < 2; is_value++) {
        int8_t *found = xcalloc(1, n_bytes), codes[DIM];
        op_download(b, found, is_value ? kv.v : kv.k, n_bytes);
        for (int i = 0; i < TOKENS * HEADS; i++) {
            const int8_t *head = found + (size_t)(HEADS + i % HEADS) * head_bytes;
            int slot = 2 + i / HEADS;
            float scale = naive_codes(codes, x[is_value] + i * DIM, DIM), held;
            memcpy(&held, head + DIM * SIZE + slot * 4, sizeof(held));
            assert_true(isnan(scale) ? isnan(held) : scale == held);
            for (int d = 0; d < DIM; d++)
                assert_int_equal(head[is_value ? slot * DIM + d : d * SIZE + slot], codes[d]);
        }
        free(found);
    }
    op_free(b, kv.k);
    op_free(b, kv.v);
    case_clear(b);
    backend_close(b);
}

static void check_full(enum dtype type, int n_tiles, int t, int n_heads, int hd)
{
    struct backend *b = case_open(type, 0);
    int rows = n_tiles * t, cols = n_heads * hd;
    struct case_matrix qkv = case_matrix_new(b, type, rows, 3 * cols, 0);
    struct tensor out = case_matrix_new(b, type, rows, cols, 8).device;
    struct tensor q = tensor_columns(&qkv.device, 0, cols);
    struct tensor k = tensor_columns(&qkv.device, cols, cols);
    struct tensor v = tensor_columns(&qkv.device, 2 * cols, cols);
    int64_t n_probs = (int64_t)n_tiles * n_heads * t * t;
    float *want = case_floats(rows * cols, 0, DTYPE_F32);
    float *want_probs = case_floats(n_probs, 0, DTYPE_F32);
    float *probs = case_upload(b, want_probs, n_probs);
    float scale = 1 / sqrtf((float)hd);
    double bound = type == DTYPE_F32 ? 1e-11 : 3e-5;

    for (int i = 0; i < rows; i++)
        for (int h = 0; h < n_heads; h++) {
            int64_t at = (int64_t)(i / t * t) * 3 * cols + h * hd;
            naive_attend(want + i * cols + h * hd,
                         want_probs + ((int64_t)(i / t * n_heads + h) * t + i % t) * t,
                         qkv.host + (int64_t)i * 3 * cols + h * hd, qkv.host + at + cols,
                         qkv.host + at + 2 * cols, t, 3 * cols, hd, scale);
        }
    op_attention(b, &out, &q, &k, &v, n_tiles, n_heads, scale, type, NULL);
    case_compare(b, "attention", &out, want, bound);
    struct tensor alone = case_matrix_new(b, type, t, cols, 0).device;
    struct tensor q1 = tensor_rows(&q, (n_tiles - 1) * t, t),
                  k1 = tensor_rows(&k, (n_tiles - 1) * t, t);
    struct tensor v1 = tensor_rows(&v, (n_tiles - 1) * t, t);
    struct tensor last = tensor_rows(&out, (n_tiles - 1) * t, t);
    op_attention(b, &alone, &q1, &k1, &v1, 1, n_heads, scale, type, NULL);
    case_same(b, &last, &alone, "attention of one tile");
    op_attention(b, &out, &q, &k, &v, n_tiles, n_heads, scale, type, probs);
    case_compare(b, "attention with probabilities", &out, want, bound);
    struct tensor p = tensor_2d(probs, DTYPE_F32, n_probs / t, t);
    case_compare(b, "attention probabilities", &p, want_probs, 1e-11);
    case_clear(b);
    backend_close(b);
}

static void test_full(void **state)
{
    (void)state;
    case_seed(30);
    for (int t = DTYPE_F32; t <= DTYPE_BF16; t++) {
        check_full((enum dtype)t, 1, 1, 1, 16);
        check_full((enum dtype)t, 2, 17, 3, 16);
        check_full((enum dtype)t, 2, 65, 2, 64);
        check_full((enum dtype)t, 1, 50, 5, 13);
        if (case_small)
            continue;
        check_full((enum dtype)t, 1, 100, 1, 128);
        check_full((enum dtype)t, 2, 130, 2, 32);
    }
    case_report();
}

int cuda_attention_tests(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_paged), cmocka_unit_test(test_codes),
                                       cmocka_unit_test(test_full)};

    return cmocka_run_group_tests_name("cuda attention", tests, NULL, NULL);
}
