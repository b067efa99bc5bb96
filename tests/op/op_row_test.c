/*
 * The ops that work on rows or only move values: norms, activations, rope, embedding, patches. Each
 * against its naive loop; the same bits on every instruction set and any number of threads.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/cpu_backend.h"
#include "kernels/log.h"
#include "tests/op/op_case.h"
#include "tests/op/op_naive.h"

/* Everything the ops below put out, in order: what must not depend on the instruction set. */
struct record {
    float *values;
    int64_t n, reserved;
    int is_check;
};

static void record_add(struct record *r, const struct tensor *t)
{
    int64_t n_cols = tensor_n_cols(t);
    for (int64_t i = 0; i < tensor_n_rows(t); i++) {
        const float *row = (const float *)t->data + i * t->row_stride;
        if (r->is_check) {
            op_case_same(r->values + r->n, row, (size_t)n_cols * sizeof(float),
                         "a row op by another instruction set");
        } else {
            if (r->n + n_cols > r->reserved) {
                r->reserved = 2 * (r->n + n_cols);
                r->values = xrealloc(r->values, (size_t)r->reserved, sizeof(float));
            }
            memcpy(r->values + r->n, row, (size_t)n_cols * sizeof(float));
        }
        r->n += n_cols;
    }
}

static void check_norms(struct backend *b, struct record *r, int m, int n)
{
    struct tensor x = op_case_strided(m, n), y = op_case_strided(m, n);
    float *weight = op_case_floats(n, 1), *bias = op_case_floats(n, 1);
    float *want = op_case_floats(m * n, 0);
    for (int64_t i = 0; i < m * x.row_stride; i++)
        ((float *)x.data)[i] += 3; // a mean to be taken off
    naive_rms_norm(want, &x, weight, 1e-6f);
    op_rms_norm(b, &y, &x, weight, 1e-6f);
    op_case_compare("rms_norm", &y, want, 1e-13);
    record_add(r, &y);
    if (n > 1) {
        naive_layer_norm(want, &x, weight, bias, 1e-5f);
        op_layer_norm(b, &y, &x, weight, bias, 1e-5f);
        op_case_compare("layer_norm", &y, want, 1e-10);
        record_add(r, &y);
        op_layer_norm(b, &x, &x, weight, bias, 1e-5f);
        op_case_compare("layer_norm in place", &x, want, 1e-10);
    }
    free(x.data);
    free(y.data);
    free(weight);
    free(bias);
    free(want);
}

static void check_sums(struct backend *b, int m, int n)
{
    struct tensor x = op_case_strided(m, n), y = op_case_strided(m, n);
    float *bias = op_case_floats(n, 1), *want = op_case_floats(m * n, 0);
    for (int i = 0; i < m * n; i++)
        want[i] = ((float *)y.data)[i / n * y.row_stride + i % n] +
                  ((float *)x.data)[i / n * x.row_stride + i % n];
    op_add(b, &y, &x);
    op_case_compare("add", &y, want, 0);
    for (int i = 0; i < m * n; i++)
        want[i] += bias[i % n];
    op_add_bias(b, &y, bias);
    op_case_compare("add_bias", &y, want, 0);
    free(x.data);
    free(y.data);
    free(bias);
    free(want);
}

static void check_gated(struct backend *b, struct record *r, int m, int n)
{
    static const char *const names[] = {"gated none",       "gated gelu", "gated gelu_tanh",
                                        "gated quick_gelu", "gated relu", "gated silu"};
    for (int act = ACTIVATION_NONE; act <= ACTIVATION_SILU; act++) {
        struct tensor x = op_case_strided(m, 2 * n), y = op_case_strided(m, n);
        float *want = op_case_floats(m * n, 0);
        for (int i = 0; i < m * n; i++) {
            float *gate = (float *)x.data + i / n * x.row_stride + i % n;
            *gate *= 8;
            want[i] = (float)(naive_activation(*gate, (enum activation)act) * gate[n]);
        }
        op_gated_activation(b, &y, &x, (enum activation)act);
        op_case_compare(names[act], &y, want, 1e-13);
        record_add(r, &y);
        free(x.data);
        free(y.data);
        free(want);
    }
}

/* m new tokens of one sequence, float32 pages: what is rotated, and where keys and values lie. */
static void check_rope(struct backend *b, struct record *r, int m, int n_heads, int n_kv, int hd)
{
    enum { PAGE = 16, PAGES_MAX = 32 };
    int32_t query_start[] = {0, m}, context_len[] = {m}, page_start[] = {0, (m + PAGE - 1) / PAGE};
    int32_t pages[PAGES_MAX];
    struct tensor q = op_case_strided(m, n_heads * hd), k = op_case_strided(m, n_kv * hd);
    struct tensor v = op_case_strided(m, n_kv * hd);
    float *cosines = op_case_floats(m * hd / 2, 1), *sines = op_case_floats(m * hd / 2, 1);
    float *want_q = op_case_floats(tensor_n_elements(&q), 0);
    float *want_k = op_case_floats(tensor_n_elements(&k), 0);
    int n_page = n_kv * hd * PAGE;
    struct kv_pages kv = {.dtype = DTYPE_F32, .n_pages = page_start[1], .page_size = PAGE};
    kv.k = op_case_floats(page_start[1] * n_page, 0);
    kv.v = op_case_floats(page_start[1] * n_page, 0);
    kv.n_kv_heads = n_kv;
    kv.head_dim = hd;
    assert_true(page_start[1] <= PAGES_MAX);
    for (int32_t i = 0; i < page_start[1]; i++)
        pages[i] = page_start[1] - 1 - i;
    struct paged_layout layout = {1, m, m, query_start, context_len, page_start, pages};
    naive_rope(want_q, &q, cosines, sines, hd);
    naive_rope(want_k, &k, cosines, sines, hd);
    op_kv_write(b, &kv, &layout, &k, &v, &(struct rotation){.q = &q, .cos = cosines, .sin = sines});
    op_case_compare("rope", &q, want_q, 1e-13);
    op_case_compare("rope", &k, want_k, 1e-13);
    for (int i = 0; i < m; i++)
        for (int c = 0; c < n_kv * hd; c++) {
            int at = pages[i / PAGE] * n_page + c / hd * hd * PAGE;
            assert_true(((float *)kv.k)[at + c % hd * PAGE + i % PAGE] ==
                        ((float *)k.data)[i * k.row_stride + c]);
            assert_true(((float *)kv.v)[at + i % PAGE * hd + c % hd] ==
                        ((float *)v.data)[i * v.row_stride + c]);
        }
    record_add(r, &q);
    free(q.data);
    free(k.data);
    free(v.data);
    free(kv.k);
    free(kv.v);
    free(cosines);
    free(sines);
    free(want_q);
    free(want_k);
}

/* In one op the bits of the two. */
static void check_add_rms_norm(struct backend *b, int m, int n)
{
    struct tensor x = op_case_strided(m, n), add = op_case_strided(m, n), y = op_case_strided(m, n);
    struct tensor x2 = op_case_strided(m, n), y2 = op_case_strided(m, n);
    float *weight = op_case_floats(n, 1);
    op_copy(b, &x2, &x);
    op_add(b, &x2, &add);
    op_rms_norm(b, &y2, &x2, weight, 1e-6f);
    op_add_rms_norm(b, &y, &x, &add, weight, 1e-6f);
    for (int i = 0; i < m; i++) {
        size_t row = (size_t)(i * x.row_stride), n_bytes = (size_t)n * sizeof(float);
        assert_memory_equal((float *)x.data + row, (float *)x2.data + row, n_bytes);
        assert_memory_equal((float *)y.data + row, (float *)y2.data + row, n_bytes);
    }
    free(x.data);
    free(add.data);
    free(y.data);
    free(x2.data);
    free(y2.data);
    free(weight);
}

static void run_rows(struct backend *b, struct record *r)
{
    static const int sizes[][2] = {{1, 1},  {3, 2},   {2, 15},  {5, 16},    {4, 17},
                                   {1, 64}, {7, 100}, {2, 896}, {40, 1027}, {300, 64}};
    op_case_seed(40);
    for (int i = 0; i < 10; i++) {
        check_norms(b, r, sizes[i][0], sizes[i][1]);
        check_sums(b, sizes[i][0], sizes[i][1]);
        check_gated(b, r, sizes[i][0], sizes[i][1]);
    }
    for (int i = 0; i < 10; i++)
        check_add_rms_norm(b, sizes[i][0], sizes[i][1]);
    check_rope(b, r, 5, 3, 1, 2);
    check_rope(b, r, 17, 14, 2, 64);
    check_rope(b, r, 2, 2, 2, 30);
    check_rope(b, r, 70, 4, 2, 128);
}

static void test_rows(void **state)
{
    (void)state;
    struct record r = {0};
    for (int i = 0; i < op_n_isas; i++) {
        for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
            struct backend *b = op_case_open(op_isas[i], n_threads);
            if (!b)
                continue;
            r.n = 0;
            run_rows(b, &r);
            r.is_check = 1;
            backend_close(b);
        }
    }
    op_case_report();
    free(r.values);
}

/* e^x on every instruction set, in units of the last place. */
static void test_exp(void **state)
{
    (void)state;
    enum { N = 1 << 18 };
    float *x = xcalloc(N, sizeof(*x)), *y = xcalloc(N, sizeof(*y));
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 1);
        if (!b)
            continue;
        double largest = 0;
        for (int j = 0; j < N; j++)
            x[j] = -87.3f + (float)j * (176.0f / N);
        cpu_state(b)->vector->exp(y, x, N);
        for (int j = 0; j < N; j++) {
            double want = exp((double)x[j]);
            float ulp = nextafterf((float)want, INFINITY) - (float)want;
            double error = fabs(y[j] - want) / ulp;
            if (want < 3.4e38)
                largest = error > largest ? error : largest;
        }
        printf("    exp %-10s %.3f ulp\n", op_isas[i], largest);
        assert_true(largest <= 2);
        float special[6] = {-INFINITY, INFINITY, NAN, 0, -200, 100}, out[6];
        cpu_state(b)->vector->exp(out, special, 6);
        assert_true(out[0] == 0 && isinf(out[1]) && isnan(out[2]) && out[3] == 1 && out[4] == 0 &&
                    isinf(out[5]));
        backend_close(b);
    }
    free(x);
    free(y);
}

/* 2^x in units of the last place, and bit for bit on every instruction set, denormals too. */
static void test_exp2(void **state)
{
    (void)state;
    enum { N = 1 << 18, N_NORMAL = 126 * (N / 152) };
    float *x = xcalloc(N, sizeof(*x)), *y = xcalloc(N, sizeof(*y)), *want = NULL;
    for (int j = 0; j < N; j++)
        x[j] = (float)j * -(152.0f / N);
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 1);
        if (!b)
            continue;
        double largest = 0;
        cpu_state(b)->vector->exp2_falling(y, x, N);
        for (int j = 0; j < N_NORMAL; j++) {
            double exact = exp2((double)x[j]);
            float ulp = nextafterf((float)exact, INFINITY) - (float)exact;
            largest = fmax(largest, fabs(y[j] - exact) / ulp);
        }
        printf("    exp2 %-10s %.3f ulp\n", op_isas[i], largest);
        assert_true(largest <= 2);
        if (want)
            op_case_same(want, y, N * sizeof(*y), "exp2");
        else
            want = memcpy(xcalloc(N, sizeof(*want)), y, N * sizeof(*y));
        float special[5] = {-INFINITY, NAN, 0, -200, -1e30f}, out[5];
        cpu_state(b)->vector->exp2_falling(out, special, 5);
        assert_true(out[0] == 0 && isnan(out[1]) && out[2] == 1 && out[3] == 0 && out[4] == 0);
        backend_close(b);
    }
    free(x);
    free(y);
    free(want);
}

/* GELU by the vector erf, absolutely and relatively, against the C library's. */
static void test_gelu(void **state)
{
    (void)state;
    enum { N = 1 << 16 };
    struct backend *b = backend_cpu_open(1, NULL);
    float *x = xcalloc(2 * N, sizeof(*x)), *y = xcalloc(N, sizeof(*y));
    double largest = 0;
    for (int j = 0; j < N; j++) {
        x[j] = -8.0f + (float)j * (16.0f / N);
        x[N + j] = 1;
    }
    struct tensor tx = tensor_2d(x, DTYPE_F32, 1, 2 * N), ty = tensor_2d(y, DTYPE_F32, 1, N);
    op_gated_activation(b, &ty, &tx, ACTIVATION_GELU);
    for (int j = 0; j < N; j++) {
        double want = naive_activation(x[j], ACTIVATION_GELU), size = fabs(x[j]) + 0.1;
        largest = fabs(y[j] - want) / size > largest ? fabs(y[j] - want) / size : largest;
    }
    printf("    gelu: largest error %.3g of |x|\n", largest);
    assert_true(largest < 1.2e-7);
    backend_close(b);
    free(x);
    free(y);
}

static void check_embed(struct backend *b, enum dtype dtype)
{
    enum { ROWS = 11, DIM = 37, N = 6, FIRST = 100 };
    static const int32_t ids[N] = {100, 110, 99, 111, 105, -1};
    struct tensor table = op_case_strided(ROWS, DIM), y = op_case_strided(N, DIM);
    float want[N][DIM] = {{0}};
    uint16_t narrow[ROWS * (DIM + 5)];
    for (int64_t i = 0; i < ROWS * table.row_stride; i++)
        narrow[i] = f32_to_bf16(((float *)table.data)[i]);
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < DIM && ids[i] >= FIRST && ids[i] < FIRST + ROWS; j++) {
            int64_t at = (ids[i] - FIRST) * table.row_stride + j;
            want[i][j] = dtype == DTYPE_F32 ? ((float *)table.data)[at] : bf16_to_f32(narrow[at]);
        }
    }
    struct tensor t = table;
    t.dtype = dtype;
    if (dtype == DTYPE_BF16)
        t.data = narrow;
    op_embed(b, &y, &t, ids, FIRST);
    op_case_compare("embed", &y, want[0], 0);
    free(table.data);
    free(y.data);
}

static void check_rows_moved(struct backend *b)
{
    enum { N = 5, M = 9, DIM = 19 };
    static const int32_t rows[N] = {8, -1, 0, 3, 4}, from[N] = {8, 8, 0, 3, 4};
    struct tensor x = op_case_strided(N, DIM), y = op_case_strided(M, DIM);
    struct tensor back = op_case_matrix(N, DIM);
    float want[N][DIM];
    op_scatter_rows(b, &y, &x, rows);
    op_gather_rows(b, &back, &y, from);
    for (int i = 0; i < N; i++)
        memcpy(want[i], (float *)x.data + (i == 1 ? 0 : i) * x.row_stride, sizeof(want[i]));
    op_case_compare("scatter_rows, gather_rows", &back, want[0], 0);
    free(x.data);
    free(y.data);
    free(back.data);
}

/* 2 tiles of 3 channels, 11 x 9 pixels, patches of 4 x 2: the last rows and column are dropped. */
static void check_patchify(struct backend *b)
{
    enum { TILES = 2, C = 3, H = 11, W = 9, PH = 4, PW = 2, GH = H / PH, GW = W / PW };
    enum { ROWS = TILES * GH * GW, COLS = C * PH * PW };
    static const float mean[C] = {120.5f, 110, 90.25f}, std[C] = {58.5f, 57, 3};
    uint8_t pixels[TILES * C * H * W];
    float floats[TILES * C * H * W], want[ROWS][COLS], want_floats[ROWS][COLS];
    for (int i = 0; i < TILES * C * H * W; i++) {
        pixels[i] = (uint8_t)op_case_integer(256);
        floats[i] = op_case_random();
    }
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < COLS; j++) {
            int t = i / (GH * GW), gy = i / GW % GH, gx = i % GW;
            int c = j / (PH * PW), y = gy * PH + j / PW % PH, x = gx * PW + j % PW;
            int at = ((t * C + c) * H + y) * W + x;
            want[i][j] = ((float)pixels[at] - mean[c]) / std[c];
            want_floats[i][j] = floats[at];
        }
    }
    struct tensor t = {.data = pixels, .dtype = DTYPE_U8, .n_dims = 4, .shape = {TILES, C, H, W}};
    t.row_stride = W;
    struct tensor y = op_case_strided(ROWS, COLS);
    op_patchify(b, &y, &t, PH, PW, mean, std);
    op_case_compare("patchify u8", &y, want[0], 0);
    t.data = floats;
    t.dtype = DTYPE_F32;
    op_patchify(b, &y, &t, PH, PW, NULL, NULL);
    op_case_compare("patchify float32", &y, want_floats[0], 0);
    free(y.data);
}

static void check_pixel_shuffle(struct backend *b, int side, int k)
{
    enum { TILES = 2, DIM = 3 };
    int out = side / k;
    struct tensor x = op_case_matrix(TILES * side * side, DIM);
    struct tensor y = op_case_matrix(TILES * out * out, k * k * DIM);
    float *want = op_case_floats(tensor_n_elements(&y), 0), *w = want;
    for (int t = 0; t < TILES; t++) {
        for (int i = 0; i < out * out; i++) {
            for (int block = 0; block < k * k; block++) {
                int row = k * (i / out) + block / k, column = k * (i % out) + block % k;
                for (int d = 0; d < DIM; d++)
                    *w++ = ((float *)x.data)[((t * side + row) * side + column) * DIM + d];
            }
        }
    }
    op_pixel_shuffle(b, &y, &x, side, k);
    op_case_compare("pixel_shuffle", &y, want, 0);
    free(x.data);
    free(y.data);
    free(want);
}

static void check_copy(struct backend *b)
{
    enum { M = 3, N = 37 };
    struct tensor x = op_case_strided(M, N), y = op_case_strided(M, N);
    uint16_t narrow[M * N];
    float want[M][N];
    ((float *)x.data)[0] = NAN;
    ((float *)x.data)[x.row_stride] = 3.3961776e38f; // rounds to infinity
    for (int i = 0; i < M * N; i++)
        want[i / N][i % N] =
            bf16_to_f32(f32_to_bf16(((float *)x.data)[i / N * x.row_stride + i % N]));
    struct tensor h = tensor_2d(narrow, DTYPE_BF16, M, N);
    op_copy(b, &h, &x);
    op_copy(b, &y, &h);
    for (int i = 0; i < M; i++)
        op_case_same((float *)y.data + i * y.row_stride, want[i], sizeof(want[i]), "copy");
    free(x.data);
    free(y.data);
}

static void test_moves(void **state)
{
    (void)state;
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        op_case_seed(50);
        check_embed(b, DTYPE_F32);
        check_embed(b, DTYPE_BF16);
        check_rows_moved(b);
        check_patchify(b);
        check_pixel_shuffle(b, 4, 2);
        check_pixel_shuffle(b, 6, 3);
        check_pixel_shuffle(b, 5, 1);
        check_copy(b);
        backend_close(b);
    }
    op_case_report();
}

/* No tokens: every op returns at once and touches nothing. */
static void test_no_tokens(void **state)
{
    (void)state;
    struct backend *b = backend_cpu_open(2, NULL);
    struct tensor y = tensor_2d(NULL, DTYPE_F32, 0, 8), x = y, wide = y;
    wide.shape[1] = wide.row_stride = 16;
    float weight[16] = {0};
    int32_t kv_of_head[2] = {0, 0}, zero[1] = {0};
    struct kv_pages kv = {.k = weight, .v = weight, .dtype = DTYPE_F32, .n_pages = 1};
    kv.page_size = 16;
    kv.n_kv_heads = 2;
    kv.head_dim = 4;
    struct paged_layout layout = {.query_start = zero, .page_start = zero};
    op_embed(b, &y, &x, zero, 0);
    op_scatter_rows(b, &y, &x, zero);
    op_gather_rows(b, &y, &x, zero);
    op_rms_norm(b, &y, &x, weight, 1e-6f);
    op_layer_norm(b, &y, &x, weight, weight, 1e-6f);
    op_add(b, &y, &x);
    op_add_bias(b, &y, weight);
    op_gated_activation(b, &y, &wide, ACTIVATION_SILU);
    op_kv_write(b, &kv, &layout, &x, &x, NULL);
    op_paged_attention(b, &y, &x, &kv, &layout, kv_of_head, 2, 1, 0);
    op_attention(b, &y, &x, &x, &x, 0, 2, 1, DTYPE_BF16, NULL);
    op_pixel_shuffle(b, &wide, &(struct tensor){.n_dims = 2, .shape = {0, 4}, .row_stride = 4}, 2,
                     2);
    op_copy(b, &y, &x);
    op_copy_pages(b, &kv, zero, zero, 0);
    backend_close(b);
}

int op_row_tests(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows), cmocka_unit_test(test_exp),   cmocka_unit_test(test_exp2),
        cmocka_unit_test(test_gelu), cmocka_unit_test(test_moves), cmocka_unit_test(test_no_tokens),
    };
    return cmocka_run_group_tests_name("rows", tests, NULL, NULL);
}
