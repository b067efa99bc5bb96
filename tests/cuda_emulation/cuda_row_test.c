/*
 * CUDA's ops on rows: norms, sums, gate, rotation, moves, patches, pages copied; each against its
 * naive loop in float32 and bfloat16.
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

static double bound_of(enum dtype t)
{
    return t == DTYPE_F32 ? 1e-12 : 1e-5;
}

/* x of type tx, y of type ty. */
static void check_norms(struct backend *b, enum dtype ty, enum dtype tx, int m, int n)
{
    struct case_matrix x = case_matrix_new(b, tx, m, n, 3), y = case_matrix_new(b, ty, m, n, 1);
    struct tensor hx = tensor_2d(x.host, DTYPE_F32, m, n);
    const float *weight = case_floats(n, 1, DTYPE_F32), *bias = case_floats(n, 1, DTYPE_F32);
    const float *dw = case_upload(b, weight, n), *db = case_upload(b, bias, n);
    float *want = case_floats(m * n, 0, DTYPE_F32);

    naive_rms_norm(want, &hx, weight, 1e-6f);
    op_rms_norm(b, &y.device, &x.device, dw, 1e-6f);
    double bound = bound_of(tx) > bound_of(ty) ? bound_of(tx) : bound_of(ty);
    if (n == 1 &&
        bound > 1e-12) // two roundings of up to 2^-8 each, which no other element evens out
        bound = 6.2e-5;
    case_compare(b, "rms_norm", &y.device, want, bound);
    struct tensor row = tensor_rows(&x.device, m - 1, 1), row_y = tensor_rows(&y.device, m - 1, 1);
    struct case_matrix alone = case_matrix_new(b, ty, 1, n, 0);
    op_rms_norm(b, &alone.device, &row, dw, 1e-6f);
    case_same(b, &row_y, &alone.device, "rms_norm of one row");
    naive_layer_norm(want, &hx, weight, bias, 1e-5f);
    op_layer_norm(b, &y.device, &x.device, dw, db, 1e-5f);
    case_compare(b, "layer_norm", &y.device, want, bound);
    op_layer_norm(b, &x.device, &x.device, dw, db, 1e-5f); // in place
    case_compare(b, "layer_norm", &x.device, want, bound_of(tx));
    case_clear(b);
}

static void check_sums(struct backend *b, enum dtype t, int m, int n)
{
    struct case_matrix x = case_matrix_new(b, t, m, n, 3), y = case_matrix_new(b, t, m, n, 1);
    const float *bias = case_floats(n, 1, DTYPE_F32);
    float *want = case_floats(m * n, 0, DTYPE_F32);

    for (int i = 0; i < m * n; i++)
        want[i] = y.host[i] + x.host[i];
    op_add(b, &y.device, &x.device);
    case_compare(b, "add", &y.device, want, bound_of(t));
    for (int i = 0; i < m * n; i++)
        want[i] = x.host[i] + bias[i % n];
    op_add_bias(b, &x.device, case_upload(b, bias, n));
    case_compare(b, "add_bias", &x.device, want, bound_of(t));
    case_clear(b);
}

static void check_gate(struct backend *b, enum dtype t, int m, int n)
{
    struct case_matrix x = case_matrix_new(b, t, m, 2 * n, 2), y = case_matrix_new(b, t, m, n, 1);
    float *want = case_floats(m * n, 0, DTYPE_F32);

    for (int act = ACTIVATION_NONE; act <= ACTIVATION_SILU; act++) {
        for (int i = 0; i < m * n; i++) {
            const float *row = x.host + i / n * 2 * n;
            want[i] = (float)(naive_activation(row[i % n], (enum activation)act) * row[n + i % n]);
        }
        op_gated_activation(b, &y.device, &x.device, (enum activation)act);
        case_compare(b, "gated_activation", &y.device, want, bound_of(t));
    }
    case_clear(b);
}

/* In one op the bits of the two. */
static void check_add_rms_norm(struct backend *b, enum dtype ty, enum dtype tx, int m, int n)
{
    struct case_matrix x = case_matrix_new(b, tx, m, n, 3), add = case_matrix_new(b, tx, m, n, 0);
    struct case_matrix x2 = case_matrix_new(b, tx, m, n, 0), y = case_matrix_new(b, ty, m, n, 1);
    struct case_matrix y2 = case_matrix_new(b, ty, m, n, 0);
    const float *weight = case_upload(b, case_floats(n, 1, DTYPE_F32), n);

    op_copy(b, &x2.device, &x.device);
    op_add(b, &x2.device, &add.device);
    op_rms_norm(b, &y2.device, &x2.device, weight, 1e-6f);
    op_add_rms_norm(b, &y.device, &x.device, &add.device, weight, 1e-6f);
    case_same(b, &x2.device, &x.device, "x of add_rms_norm");
    case_same(b, &y2.device, &y.device, "y of add_rms_norm");
    case_clear(b);
}

/* One sequence of m tokens; where its keys and values go is cuda_attention_test.c's. */
static void check_rope(struct backend *b, enum dtype t, int m, int n_heads, int hd)
{
    const int32_t starts[] = {0, m}, context[] = {m}, page_starts[] = {0, 1}, page[] = {0};
    struct case_matrix q = case_matrix_new(b, t, m, n_heads * hd, 4);
    struct case_matrix k = case_matrix_new(b, t, m, hd, 0), v = case_matrix_new(b, t, m, hd, 2);
    struct case_matrix keys = case_matrix_new(b, t, hd, 16, 0);
    struct case_matrix values = case_matrix_new(b, t, 16, hd, 0);
    struct tensor hq = tensor_2d(q.host, DTYPE_F32, m, n_heads * hd);
    struct tensor hk = tensor_2d(k.host, DTYPE_F32, m, hd);
    const float *cosines = case_floats(m * hd / 2, 1, DTYPE_F32);
    const float *sines = case_floats(m * hd / 2, 1, DTYPE_F32);
    float *want_q = case_floats(m * n_heads * hd, 0, DTYPE_F32);
    float *want_k = case_floats(m * hd, 0, DTYPE_F32);
    struct kv_pages kv = {keys.device.data, values.device.data, t, 1, 16, 1, hd};
    struct paged_layout layout = {1,
                                  m,
                                  m,
                                  case_upload_ids(b, starts, 2),
                                  case_upload_ids(b, context, 1),
                                  case_upload_ids(b, page_starts, 2),
                                  case_upload_ids(b, page, 1)};
    struct rotation rope = {&q.device, case_upload(b, cosines, m * hd / 2),
                            case_upload(b, sines, m * hd / 2)};

    naive_rope(want_q, &hq, cosines, sines, hd);
    naive_rope(want_k, &hk, cosines, sines, hd);
    op_kv_write(b, &kv, &layout, &k.device, &v.device, &rope);
    case_compare(b, "rope", &q.device, want_q, bound_of(t));
    case_compare(b, "rope", &k.device, want_k, bound_of(t));
    for (int i = 0; i < hd * 16; i++) // what no token wrote is as it was
        if (i % 16 < m)
            keys.host[i] = want_k[i % 16 * hd + i / 16];
    case_compare(b, "keys", &keys.device, keys.host, bound_of(t));
    for (int i = 0; i < m * hd; i++)
        values.host[i] = v.host[i];
    case_compare(b, "values", &values.device, values.host, 0);
    case_clear(b);
}

static void check_moves(struct backend *b, enum dtype t, enum dtype table_type)
{
    enum { ROWS = 9, N = 6, DIM = 37 };
    static const int32_t ids[N] = {3, 12, 5, 4, -1, 11}, rows[N] = {4, -1, 0, 7, 2, 8};
    const int32_t *dids = case_upload_ids(b, ids, N), *drows = case_upload_ids(b, rows, N);
    struct case_matrix table = case_matrix_new(b, table_type, ROWS, DIM, 3);
    struct case_matrix y = case_matrix_new(b, t, N, DIM, 1),
                       big = case_matrix_new(b, t, ROWS, DIM, 2);
    struct case_matrix x = case_matrix_new(b, t, N, DIM, 0);
    float *want = case_floats(N * DIM, 0, DTYPE_F32);

    for (int i = 0; i < N; i++) {
        int row = ids[i] - 3;
        for (int c = 0; c < DIM; c++)
            want[i * DIM + c] = row >= 0 && row < ROWS ? table.host[row * DIM + c] : 0;
    }
    op_embed(b, &y.device, &table.device, dids, 3);
    case_compare(b, "embed", &y.device, want, bound_of(t));
    for (int i = 0; i < N; i++)
        for (int c = 0; rows[i] >= 0 && c < DIM; c++)
            big.host[rows[i] * DIM + c] = x.host[i * DIM + c];
    op_scatter_rows(b, &big.device, &x.device, drows);
    case_compare(b, "scatter_rows", &big.device, big.host, 0);
    static const int32_t from[N] = {8, 0, 0, 3, 7, 1};
    for (int i = 0; i < N * DIM; i++)
        want[i] = big.host[from[i / DIM] * DIM + i % DIM];
    op_gather_rows(b, &y.device, &big.device, case_upload_ids(b, from, N));
    case_compare(b, "gather_rows", &y.device, want, 0);
    struct case_matrix other = case_matrix_new(b, table_type, N, DIM, 5);
    op_copy(b, &other.device, &x.device);
    case_compare(b, "copy", &other.device, x.host, bound_of(table_type));
    case_clear(b);
}

static void check_patchify(struct backend *b, enum dtype t)
{
    enum { TILES = 2, C = 3, H = 11, W = 9, PH = 4, PW = 2, GH = H / PH, GW = W / PW };
    enum { ROWS = TILES * GH * GW, COLS = C * PH * PW, N = TILES * C * H * W };
    static const float mean[C] = {120.5f, 110, 90.25f}, std[C] = {58.5f, 57, 3};
    uint8_t pixels[N];
    float *want = case_floats(ROWS * COLS, 0, DTYPE_F32),
          *want_float = case_floats(ROWS * COLS, 0, 0);
    float *floats = case_floats(N, 1, DTYPE_F32);
    struct case_matrix y = case_matrix_new(b, t, ROWS, COLS, 2);
    uint8_t *device = op_alloc(b, N);

    for (int i = 0; i < N; i++)
        pixels[i] = (uint8_t)case_integer(256);
    op_upload(b, device, pixels, N);
    for (int i = 0; i < ROWS * COLS; i++) {
        int row = i / COLS, j = i % COLS, tile = row / (GH * GW), c = j / (PH * PW);
        int yy = row / GW % GH * PH + j / PW % PH, xx = row % GW * PW + j % PW;
        int at = ((tile * C + c) * H + yy) * W + xx;
        want[i] = ((float)pixels[at] - mean[c]) / std[c];
        want_float[i] = floats[at];
    }
    struct tensor p = {.data = device, .dtype = DTYPE_U8, .n_dims = 4, .shape = {TILES, C, H, W}};
    p.row_stride = W;
    op_patchify(b, &y.device, &p, PH, PW, mean, std);
    case_compare(b, "patchify u8", &y.device, want, bound_of(t));
    p.data = case_upload(b, floats, N);
    p.dtype = DTYPE_F32;
    op_patchify(b, &y.device, &p, PH, PW, NULL, NULL);
    case_compare(b, "patchify float", &y.device, want_float, bound_of(t));
    op_free(b, device);
    case_clear(b);
}

static void check_pixel_shuffle(struct backend *b, enum dtype t, int side, int k)
{
    enum { TILES = 2, DIM = 3 };
    int out = side / k;
    struct case_matrix x = case_matrix_new(b, t, TILES * side * side, DIM, 1);
    struct case_matrix y = case_matrix_new(b, t, TILES * out * out, k * k * DIM, 0);
    float *want = case_floats(TILES * side * side * DIM, 0, DTYPE_F32), *w = want;

    for (int i = 0; i < TILES * out * out; i++) {
        int tile = i / (out * out), ty = i / out % out, tx = i % out;
        for (int block = 0; block < k * k; block++) {
            int row = (tile * side + k * ty + block / k) * side + k * tx + block % k;
            for (int d = 0; d < DIM; d++)
                *w++ = x.host[row * DIM + d];
        }
    }
    op_pixel_shuffle(b, &y.device, &x.device, side, k);
    case_compare(b, "pixel_shuffle", &y.device, want, 0);
    case_clear(b);
}

static void check_copy_pages(struct backend *b, enum dtype t)
{
    enum { PAGES = 5, HEADS = 3, DIM = 7, SIZE = 16 };
    struct case_matrix k = case_matrix_new(b, t, PAGES, HEADS * DIM * SIZE, 0);
    struct case_matrix v = case_matrix_new(b, t, PAGES, HEADS * DIM * SIZE, 0);
    static const int32_t src[] = {1, 4}, dst[] = {3, 0};
    struct kv_pages kv = {k.device.data, v.device.data, t, PAGES, SIZE, HEADS, DIM};

    op_copy_pages(b, &kv, src, dst, 2);
    for (int i = 0; i < 2; i++) {
        size_t n = HEADS * DIM * SIZE;
        memcpy(k.host + (size_t)dst[i] * n, k.host + (size_t)src[i] * n, n * sizeof(float));
        memcpy(v.host + (size_t)dst[i] * n, v.host + (size_t)src[i] * n, n * sizeof(float));
    }
    case_compare(b, "copy_pages", &k.device, k.host, 0);
    case_compare(b, "copy_pages", &v.device, v.host, 0);
    case_clear(b);
}

/* Blocks of several parts of the staging memory, and of none: what the source, pinned or not, held
 * when upload returned arrives, though it changes after and the next block follows at once. */
static void check_transfers(struct backend *b, uint32_t *source, const size_t *sizes, uint32_t n)
{
    size_t largest = sizes[n - 1];
    uint32_t *got = op_alloc_host(b, largest);
    void **devices = xcalloc(n, sizeof(*devices));

    for (size_t i = 0; i < largest / 4; i++)
        assert_int_equal(got[i], 0);
    for (uint32_t k = 0; k < n; k++) {
        for (size_t i = 0; i <= sizes[k] / 4; i++)
            source[i] = (uint32_t)i * 0x9e3779b1u + k;
        devices[k] = op_alloc(b, sizes[k]);
        op_upload(b, devices[k], source, sizes[k]);
        memset(source, 0x55, sizes[k]);
    }
    for (uint32_t k = n; k-- > 0;) { // freed from the end: the emulation guards all below
        op_download(b, got, devices[k], sizes[k]);
        for (size_t i = 0; i < sizes[k] / 4; i++)
            assert_int_equal(got[i], (uint32_t)i * 0x9e3779b1u + k);
        for (size_t i = sizes[k] / 4 * 4; i < sizes[k]; i++)
            assert_int_equal(((uint8_t *)got)[i],
                             (uint8_t)(((uint32_t)(i / 4) * 0x9e3779b1u + k) >> i % 4 * 8));
        op_free(b, devices[k]);
    }
    op_free_host(b, got);
    free(devices);
}

static void test_transfers(void **state)
{
    enum { LARGEST = (40 << 20) + 13, N = 6, N_SMALL = 5000, SMALL = 4000 };
    static const size_t sizes[N] = {0, 1, SMALL, (1 << 20) - 1, 1 << 20, LARGEST};
    static size_t small[N_SMALL];
    struct backend *b = case_open(DTYPE_F32, 0);
    uint32_t *source = xcalloc(LARGEST / 4 + 1, 4), *pinned = op_alloc_host(b, LARGEST + 4);

    (void)state;
    assert_true((size_t)N_SMALL * SMALL > CUDA_STAGING_BYTES);
    for (int i = 0; i < N_SMALL; i++)
        small[i] = SMALL;
    check_transfers(b, source, sizes, N);
    check_transfers(b, pinned, sizes, N);
    check_transfers(b, pinned, small, N_SMALL);
    op_free_host(b, pinned);
    op_free_host(b, NULL);
    free(source);
    backend_close(b);
}

static void test_rows(void **state)
{
    (void)state;
    case_seed(40);
    for (int i = DTYPE_F32; i <= DTYPE_BF16; i++) {
        enum dtype t = (enum dtype)i;
        struct backend *b = case_open(t, 0);
        static const int sizes[][2] = {{1, 1}, {3, 17}, {2, 128}, {5, 200}, {2, 1100}};
        for (int s = 0; s < 5; s += 1 + case_small) {
            check_norms(b, t, t, sizes[s][0], sizes[s][1]);
            check_norms(b, b->activation_dtype, DTYPE_F32, sizes[s][0], sizes[s][1]);
            check_sums(b, t, sizes[s][0], sizes[s][1]);
            check_gate(b, t, sizes[s][0], sizes[s][1]);
        }
        check_rope(b, t, 5, 3, 16);
        check_rope(b, t, 2, 14, 64);
        check_moves(b, t, DTYPE_F32);
        check_moves(b, t, DTYPE_BF16);
        check_patchify(b, t);
        check_pixel_shuffle(b, t, 4, 2);
        check_pixel_shuffle(b, t, 6, 3);
        check_pixel_shuffle(b, t, 5, 1);
        check_copy_pages(b, t);
        for (int s = 0; s < 5; s += 1 + case_small) {
            check_add_rms_norm(b, t, t, sizes[s][0], sizes[s][1]);
            check_add_rms_norm(b, b->activation_dtype, DTYPE_F32, sizes[s][0], sizes[s][1]);
        }
        backend_close(b);
    }
    case_report();
}

int cuda_row_tests(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_transfers),
                                       cmocka_unit_test(test_rows)};

    return cmocka_run_group_tests_name("cuda rows", tests, NULL, NULL);
}
