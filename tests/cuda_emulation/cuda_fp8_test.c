/*
 * FP8 weights with activations that are rounded to FP8 too (struct linear's x_format): the rounding
 * alone, exactly; products against the naive loop over numbers rounded here by another rule; the
 * bits of a row alone, among others, and in shards.
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
#include "tests/op/op_quantized_case.h"

#define N_MAGNITUDES 127 // of E4M3

/* Of one sum of E4M3 products: float32 in the emulation; the tensor cores of sm_90 keep 14 bits of
 * what they add (DeepSeek-V3's report, 3.3.2), which is 2^-13 of a partial sum, or 1.5e-8 squared,
 * a few times in a row. */
static double bound_of(const struct backend *b)
{
    return strstr(b->ops->describe(b), "emulated") ? 1e-11 : 1e-6;
}

static double magnitude(int code)
{
    return code < 8 ? code / 512.0 : ldexp(8 + code % 8, code / 8 - 10);
}

/* The nearest of the table, of two as near the one of even code; with its sign. */
static double round_e4m3(double x)
{
    int best = 0;

    for (int i = 1; i < N_MAGNITUDES; i++) {
        double d = fabs(fabs(x) - magnitude(i)), least = fabs(fabs(x) - magnitude(best));
        if (d < least || (d == least && i % 2 == 0))
            best = i;
    }
    return copysign(magnitude(best), x);
}

/* x [m, in_dim] as a product of l's takes it: each sum's columns rounded with a scale of their own.
 */
static float *rounded(const float *x, int64_t m, const struct linear *l, int deterministic)
{
    float *y = case_floats(m * l->in_dim, 0, DTYPE_F32);
    int n_sums = deterministic ? l->n_lanes : 1;

    for (int64_t i = 0; i < m; i++)
        for (int lane = 0; lane < n_sums; lane++) {
            int64_t first = i * l->in_dim + (n_sums > 1 ? l->lane_start[lane] : 0);
            int64_t end = i * l->in_dim + (n_sums > 1 ? l->lane_start[lane + 1] : l->in_dim);
            float largest = 0;
            for (int64_t k = first; k < end; k++)
                largest = fmaxf(largest, fabsf(x[k]));
            float scale = fmaxf(largest / 448, 0x1p-126f);
            for (int64_t k = first; k < end; k++)
                y[k] = (float)round_e4m3(x[k] / scale) * scale;
        }
    return y;
}

/* ---- the rounding ---- */

/* y <- x in E4M3: a product with the unit matrix, x's scale being 1 where its largest is 448. */
static void through_unit_matrix(struct backend *b, struct case_matrix *y, const struct tensor *x)
{
    enum { K = 64 };
    struct quantized q = {.format = WEIGHT_FP8, .out_dim = K, .in_dim = K, .n_groups = 1};
    struct linear l = case_linear(K, K, 1, DTYPE_BF16);

    q.group_size = K;
    q.codes = xcalloc((size_t)K * K, 1);
    q.scales = xcalloc(K, sizeof(float));
    for (int i = 0; i < K; i++) {
        q.codes[i * K + i] = 0x38;
        q.scales[i] = 1;
    }
    l.x_format = WEIGHT_FP8;
    op_linear_pack_quantized(b, &l, &q, NULL);
    op_matmul(b, &y->device, x, &l, NULL);
    op_linear_free(b, &l);
    quantized_case_release(&q);
}

/* Every value, the middle between any two, and the nearest bfloat16 on both sides of each. */
static void test_rounding(void **state)
{
    enum { K = 64, N_VALUES = 2 * 6 * N_MAGNITUDES, M = (N_VALUES + K - 2) / (K - 1) };
    (void)state;
    struct backend *b = case_open(DTYPE_BF16, 0);
    uint16_t *bits = xcalloc((size_t)M * K, sizeof(*bits));
    struct case_matrix x = case_matrix_new(b, DTYPE_BF16, M, K, 0);
    struct case_matrix y = case_matrix_new(b, DTYPE_F32, M, K, 0);

    for (int i = 0; i < N_VALUES; i++) {
        int code = i / 12, kind = i / 2 % 6;
        double v = kind < 3 || code == N_MAGNITUDES - 1
                       ? magnitude(code)
                       : (magnitude(code) + magnitude(code + 1)) / 2;
        uint16_t near = f32_to_bf16((float)v);
        if (bf16_to_f32(near) != (float)v)
            fail_msg("%g is no bfloat16", v);
        near = (uint16_t)(near + kind % 3 - (near > 0)) & 0x7fff; // one less, itself, one more
        near = near > 0x43e0 ? 0x43e0 : near;                     // 448
        bits[i / (K - 1) * K + i % (K - 1)] = (uint16_t)(near | (i % 2 ? 0x8000 : 0));
    }
    for (int i = 0; i < M; i++)
        bits[i * K + K - 1] = 0x43e0;
    op_upload(b, x.device.data, bits, (size_t)M * K * sizeof(*bits));
    through_unit_matrix(b, &y, &x.device);
    const float *got = case_download(b, &y.device);
    for (int i = 0; i < M * K; i++) {
        float v = bf16_to_f32(bits[i]);
        if (got[i] != (float)round_e4m3(v))
            fail_msg("%.9g is rounded to %.9g, not to %.9g", v, got[i], round_e4m3(v));
    }
    free(bits);
    case_clear(b);
    backend_close(b);
}

/* Rows of zeros and of numbers too small to divide stay near 0; what is no number stays in its row.
 */
static void test_extremes(void **state)
{
    enum { M = 6, K = 64 };
    static const float of_row[M] = {0, 1e-40f, 3e-38f, NAN, INFINITY, 3e38f};
    (void)state;
    struct backend *b = case_open(DTYPE_BF16, 0);
    uint16_t bits[M * K];
    struct case_matrix x = case_matrix_new(b, DTYPE_BF16, M, K, 0);
    struct case_matrix y = case_matrix_new(b, DTYPE_F32, M, K, 0);

    for (int i = 0; i < M * K; i++)
        bits[i] = f32_to_bf16(i % K == 5 ? of_row[i / K] : 0);
    op_upload(b, x.device.data, bits, sizeof(bits));
    through_unit_matrix(b, &y, &x.device);
    const float *got = case_download(b, &y.device);
    for (int i = 0; i < M; i++) {
        float v = got[i * K + 5], in = bf16_to_f32(bits[i * K + 5]);
        if (isfinite(in) ? !(fabsf(v - in) <= fmaxf(in / 16, 0x1p-135f)) : isfinite(v))
            fail_msg("%g became %g", in, v);
        for (int k = 0; k < K && isfinite(in); k++)
            if (k != 5 && got[i * K + k] != 0)
                fail_msg("0 beside %g became %g", in, got[i * K + k]);
    }
    case_clear(b);
    backend_close(b);
}

/* ---- products ---- */

static const struct quantized_shape shapes[] = {
    {1, 1, 1, 1, 0, 0},   {1, 17, 33, 2, 0, 0},   {3, 64, 160, 8, 0, 0},  {5, 40, 223, 8, 0, 0},
    {2, 16, 20, 8, 0, 0}, {150, 33, 90, 4, 0, 0}, {29, 100, 700, 8, 0, 0}};

static void check_product(struct backend *b, const struct quantized_shape *s, int deterministic,
                          int variant)
{
    struct quantized q = quantized_case(s, WEIGHT_FP8, 0, case_integer);
    float *values = quantized_case_values(&q);
    struct tensor w = tensor_2d(values, DTYPE_F32, s->n, s->k);
    struct tensor bias = tensor_1d(case_floats(s->n, 1, DTYPE_BF16), DTYPE_F32, s->n);
    struct case_matrix x = case_matrix_new(b, DTYPE_BF16, s->m, s->k, variant % 2 ? 3 : 8);
    enum dtype type_y = variant % 3 ? DTYPE_F32 : DTYPE_BF16;
    struct case_matrix y = case_matrix_new(b, type_y, s->m, s->n, 4);
    struct case_matrix residual = case_matrix_new(b, type_y, s->m, s->n, 0);
    struct linear l = case_linear(s->n, s->k, s->n_lanes, DTYPE_BF16);
    const float *scale = case_floats(s->n, 1, DTYPE_F32);
    const struct tensor hr = tensor_2d(residual.host, DTYPE_F32, s->m, s->n);
    struct epilogue e = {.act = (enum activation)(variant % 6)};
    float *want = case_floats((int64_t)s->m * s->n, 0, DTYPE_F32);
    struct tensor hx = tensor_2d(rounded(x.host, s->m, &l, deterministic), DTYPE_F32, s->m, s->k);

    e.scale = variant & 2 ? case_upload(b, scale, s->n) : NULL;
    e.residual = variant & 4 ? &residual.device : NULL;
    l.x_format = WEIGHT_FP8;
    op_linear_pack_quantized(b, &l, &q, variant & 1 ? &bias : NULL);
    op_matmul(b, &y.device, &x.device, &l, &e);
    naive_matmul(want, &hx, &w, 0, variant & 1 ? bias.data : NULL, e.act,
                 variant & 2 ? scale : NULL, e.residual ? &hr : NULL);
    case_compare(b, "activations in fp8,", &y.device, want,
                 type_y == DTYPE_F32 ? bound_of(b) : 2e-5);
    op_linear_free(b, &l);
    quantized_case_release(&q);
    free(values);
    case_clear(b);
}

static void test_products(void **state)
{
    (void)state;
    case_seed(21);
    for (int deterministic = 0; deterministic < 2; deterministic++) {
        struct backend *b = case_open(DTYPE_BF16, deterministic);
        for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s += 1 + case_small)
            for (int variant = 0; variant < 8; variant += 1 + 4 * case_small)
                check_product(b, &shapes[s], deterministic, variant);
        backend_close(b);
    }
    case_report();
}

/* A row's bits are the same among any number of others, in one piece and in many. */
static void test_rows_are_independent(void **state)
{
    static const struct quantized_shape s = {70, 48, 330, 8, 0, 0};
    static const int rows[] = {1, 7, 33};
    (void)state;
    case_seed(22);
    for (int deterministic = 0; deterministic < 2; deterministic++) {
        struct backend *b = case_open(DTYPE_BF16, deterministic);
        struct quantized q = quantized_case(&s, WEIGHT_FP8, 0, case_integer);
        struct case_matrix x = case_matrix_new(b, DTYPE_BF16, s.m, s.k, 2);
        struct case_matrix all = case_matrix_new(b, DTYPE_BF16, s.m, s.n, 0);
        struct case_matrix parts = case_matrix_new(b, DTYPE_BF16, s.m, s.n, 0);
        struct linear l = case_linear(s.n, s.k, s.n_lanes, DTYPE_BF16);
        l.x_format = WEIGHT_FP8;
        op_linear_pack_quantized(b, &l, &q, NULL);
        op_matmul(b, &all.device, &x.device, &l, NULL);
        for (int i = 0, first = 0, n; first < s.m; first += n, i++) {
            n = rows[i % 3] < s.m - first ? rows[i % 3] : s.m - first;
            struct tensor y1 = tensor_rows(&parts.device, first, n);
            struct tensor x1 = tensor_rows(&x.device, first, n);
            op_matmul(b, &y1, &x1, &l, NULL);
        }
        case_same(b, &all.device, &parts.device, "rows alone and together");
        op_linear_free(b, &l);
        quantized_case_release(&q);
        case_clear(b);
        backend_close(b);
    }
}

/* Deterministic: T shards of lanes, added by the tree, are the whole; so are shards of outputs. */
static void check_shards(struct backend *b, int n_shards)
{
    static const struct quantized_shape s = {5, 40, 1200, LANES_MAX, 0, 0};
    struct quantized q = quantized_case(&s, WEIGHT_FP8, 0, case_integer);
    struct case_matrix x = case_matrix_new(b, DTYPE_BF16, s.m, s.k, 0);
    struct case_matrix want = case_matrix_new(b, DTYPE_F32, s.m, s.n, 0);
    struct case_matrix sum = case_matrix_new(b, DTYPE_F32, s.m, s.n, 0);
    struct case_matrix parts = case_matrix_new(b, DTYPE_F32, (int64_t)s.m * n_shards, s.n, 0);
    struct linear whole = case_linear(s.n, s.k, s.n_lanes, DTYPE_BF16);

    whole.x_format = WEIGHT_FP8;
    for (int t = 0; t < n_shards; t++) {
        int first = t * LANES_MAX / n_shards;
        struct linear l = quantized_case_lanes(&whole, first, LANES_MAX / n_shards);
        struct quantized own = quantized_case_columns(&q, whole.lane_start[first], l.in_dim);
        struct tensor x1 = tensor_columns(&x.device, whole.lane_start[first], l.in_dim);
        struct tensor y1 = tensor_rows(&parts.device, (int64_t)t * s.m, s.m);
        op_linear_pack_quantized(b, &l, &own, NULL);
        op_matmul(b, &y1, &x1, &l, NULL);
        op_linear_free(b, &l);
        quantized_case_release(&own);
    }
    op_linear_pack_quantized(b, &whole, &q, NULL);
    op_matmul(b, &want.device, &x.device, &whole, NULL);
    backend_cuda_tree_sum(b, sum.device.data, parts.device.data, n_shards, (size_t)(s.m * s.n));
    case_same(b, &want.device, &sum.device, "sum of shards");
    op_linear_free(b, &whole);
    for (int t = 0; t < n_shards; t++) {
        struct linear l = whole;
        struct quantized own = q;
        own.out_dim = l.out_dim = s.n / n_shards;
        own.codes += t * own.out_dim * s.k;
        own.scales += t * own.out_dim;
        struct tensor y1 = tensor_columns(&sum.device, t * own.out_dim, own.out_dim);
        op_linear_pack_quantized(b, &l, &own, NULL);
        op_matmul(b, &y1, &x.device, &l, NULL);
        op_linear_free(b, &l);
    }
    case_same(b, &want.device, &sum.device, "outputs of shards");
    quantized_case_release(&q);
    case_clear(b);
}

static void test_shards_add_up(void **state)
{
    (void)state;
    struct backend *b = case_open(DTYPE_BF16, 1);

    case_seed(23);
    for (int n_shards = 2; n_shards <= LANES_MAX; n_shards *= 2)
        check_shards(b, n_shards);
    backend_close(b);
}

int cuda_fp8_tests(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rounding),      cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_products),      cmocka_unit_test(test_rows_are_independent),
        cmocka_unit_test(test_shards_add_up),
    };
    struct backend *b = case_open(DTYPE_BF16, 0);
    int has_fp8 = b->has_fp8;

    if (!has_fp8)
        printf("skipped: no products in FP8 on %s, sm_89 or newer is needed\n",
               b->ops->describe(b));
    backend_close(b);
    return has_fp8 ? cmocka_run_group_tests_name("cuda fp8", tests, NULL, NULL) : 0;
}
