/*
 * Quantised weights on CUDA. Rows, and products of float32 linears, are, bit for bit, those of the
 * dense weight of quantized_value()'s numbers, also when it is dense in parts. Products of bfloat16
 * linears multiply those numbers rounded to bfloat16, in an order of their own: they are held to
 * the naive loop, and a row has the same bits whatever the call's other rows and the shards.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/cuda_emulation/cuda_op_case.h"
#include "tests/op/op_naive.h"
#include "tests/op/op_quantized_case.h"

static struct linear linear_case(const struct quantized_shape *s, enum dtype dtype)
{
    return case_linear(s->n, s->k, s->n_lanes, dtype);
}

static void check_product(struct backend *b, const struct quantized_shape *s, enum dtype dtype,
                          enum weight_format f, int variant)
{
    char what[96];
    struct quantized q = quantized_case(s, f, variant, case_integer);
    float *values = quantized_case_values(&q);
    struct tensor w = tensor_2d(values, DTYPE_F32, s->n, s->k);
    struct tensor bias = tensor_1d(case_floats(s->n, 1, DTYPE_BF16), DTYPE_F32, s->n);
    struct case_matrix x = case_matrix_new(b, b->activation_dtype, s->m, s->k, 0);
    struct case_matrix y = case_matrix_new(b, b->activation_dtype, s->m, s->n, 0);
    struct linear l = linear_case(s, dtype);
    const struct tensor *with_bias = variant & WITH_ZEROS ? NULL : &bias;
    struct case_matrix residual = case_matrix_new(b, b->activation_dtype, s->m, s->n, 4);
    const float *scale = f % 3 ? case_floats(s->n, 1, DTYPE_F32) : NULL;
    struct epilogue e = {.act = variant & WITH_ORDER ? ACTIVATION_GELU : ACTIVATION_NONE};

    e.scale = scale ? case_upload(b, scale, s->n) : NULL;
    e.residual = f % 2 ? &residual.device : NULL;
    op_linear_pack_quantized(b, &l, &q, with_bias);
    op_matmul(b, &y.device, &x.device, &l, &e);
    if (dtype == DTYPE_F32) {
        struct case_matrix want = case_matrix_new(b, b->activation_dtype, s->m, s->n, 0);
        struct linear dense = linear_case(s, dtype);
        snprintf(what, sizeof(what), "%s x%d: %d x %d x %d", weight_format_name(f), variant, s->m,
                 s->n, s->k);
        op_linear_pack(b, &dense, &w, with_bias);
        op_matmul(b, &want.device, &x.device, &dense, &e);
        case_same(b, &want.device, &y.device, what);
        op_linear_free(b, &dense);
    } else {
        const struct tensor hx = tensor_2d(x.host, DTYPE_F32, s->m, s->k);
        const struct tensor hr = tensor_2d(residual.host, DTYPE_F32, s->m, s->n);
        float *want = case_floats((int64_t)s->m * s->n, 0, DTYPE_F32);
        snprintf(what, sizeof(what), "codes of %s,", weight_format_name(f));
        naive_matmul(want, &hx, &w, 1, with_bias ? bias.data : NULL, e.act, scale,
                     e.residual ? &hr : NULL);
        case_compare(b, what, &y.device, want, y.device.dtype == DTYPE_F32 ? 1e-11 : 2e-5);
    }
    op_linear_free(b, &l);
    quantized_case_release(&q);
    free(values);
    case_clear(b);
}

static void check_rows(struct backend *b, const struct quantized_shape *s, enum dtype dtype,
                       enum weight_format f, int variant)
{
    enum { FIRST = 100 };
    const int32_t ids[] = {FIRST, FIRST + s->n - 1, FIRST + s->n / 2, FIRST - 1, FIRST + s->n, -1};
    const int n = sizeof(ids) / sizeof(ids[0]);
    const struct quantized_shape table = {1, s->n, s->k, 1, s->group_size, s->group_phase};
    struct quantized q = quantized_case(s, f, variant, case_integer);
    float *values = quantized_case_values(&q), *want = case_floats((int64_t)n * s->k, 0, DTYPE_F32);
    struct case_matrix y = case_matrix_new(b, b->activation_dtype, n, s->k, 8);
    struct linear l = linear_case(&table, dtype);

    for (int i = 0; i < n; i++)
        for (int k = 0; k < s->k; k++) {
            float v = i < 3 ? values[(ids[i] - FIRST) * s->k + k] : 0;
            if (dtype == DTYPE_BF16 || b->activation_dtype == DTYPE_BF16)
                v = bf16_to_f32(f32_to_bf16(v));
            want[i * s->k + k] = v;
        }
    op_linear_pack_quantized(b, &l, &q, NULL);
    op_embed_quantized(b, &y.device, &l, case_upload_ids(b, ids, n), FIRST);
    case_compare(b, "embed, quantised", &y.device, want, 0);
    op_linear_free(b, &l);
    quantized_case_release(&q);
    free(values);
    case_clear(b);
}

static void test_values(void **state)
{
    (void)state;
    case_seed(11);
    for (int i = 0; i < 4; i++) {
        enum dtype values = i % 2 ? DTYPE_BF16 : DTYPE_F32;
        /* So little that a weight of more than 64 rows is dense in parts. */
        struct cuda_options o = {.activation_dtype = values, .deterministic = i / 2};
        o.dense_bytes = 1;
        struct backend *b = backend_cuda_open(&o);
        for (int s = 0; s < n_quantized_shapes; s += 1 + 3 * case_small)
            for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++) {
                int variant = (s + f) % QUANTIZED_VARIANTS;
                variant = quantized_case_takes((enum weight_format)f, variant) ? variant : 0;
                enum dtype dtype = (s + f + i) % 3 ? DTYPE_BF16 : DTYPE_F32;
                check_product(b, &quantized_shapes[s], dtype, (enum weight_format)f, variant);
                check_rows(b, &quantized_shapes[s], dtype, (enum weight_format)f, variant);
            }
        backend_close(b);
    }
    case_report();
}

/* Which kernel and which tile has a row depends on the call's other rows; its bits do not. */
static void check_row_alone(struct backend *b, enum weight_format f, int variant, int pad)
{
    static const struct quantized_shape s = {330, 70, 600, 4, 64, 8};
    static const int rows[] = {1, 7, 9, 33, 130};
    struct quantized q = quantized_case(&s, f, variant, case_integer);
    struct case_matrix x = case_matrix_new(b, b->activation_dtype, s.m, s.k, pad);
    struct case_matrix all = case_matrix_new(b, b->activation_dtype, s.m, s.n, 0);
    struct case_matrix parts = case_matrix_new(b, b->activation_dtype, s.m, s.n, 0);
    struct linear l = linear_case(&s, DTYPE_BF16);

    op_linear_pack_quantized(b, &l, &q, NULL);
    op_matmul(b, &all.device, &x.device, &l, NULL);
    for (int i = 0, first = 0, n; first < s.m; first += n, i++) {
        n = rows[i % 5] < s.m - first ? rows[i % 5] : s.m - first;
        struct tensor y1 = tensor_rows(&parts.device, first, n);
        struct tensor x1 = tensor_rows(&x.device, first, n);
        op_matmul(b, &y1, &x1, &l, NULL);
    }
    case_same(b, &all.device, &parts.device, weight_format_name(f));
    op_linear_free(b, &l);
    quantized_case_release(&q);
    case_clear(b);
}

static void test_rows_are_independent(void **state)
{
    (void)state;
    case_seed(12);
    for (int deterministic = 0; deterministic < 2; deterministic++) {
        /* In one piece: how many rows are multiplied at once is what is varied. */
        struct cuda_options o = {.activation_dtype = DTYPE_BF16, .deterministic = deterministic};
        struct backend *b = backend_cuda_open(&o);
        for (int f = WEIGHT_INT8 + deterministic; f < WEIGHT_FORMAT_COUNT; f += 1 + deterministic) {
            int variant = (f + deterministic) % QUANTIZED_VARIANTS;
            variant = quantized_case_takes((enum weight_format)f, variant) ? variant : 0;
            check_row_alone(b, (enum weight_format)f, variant, f % 2 ? 8 : 3);
        }
        backend_close(b);
    }
}

/* Deterministic: the parts of T shards, added by the tree, are the whole. */
static void check_shards(struct backend *b, enum weight_format f, int variant, int n_shards)
{
    static const struct quantized_shape s = {5, 40, 1200, LANES_MAX, 64, 8};
    struct quantized q = quantized_case(&s, f, variant, case_integer);
    struct case_matrix x = case_matrix_new(b, DTYPE_BF16, s.m, s.k, 0);
    struct case_matrix want = case_matrix_new(b, DTYPE_F32, s.m, s.n, 0);
    struct case_matrix sum = case_matrix_new(b, DTYPE_F32, s.m, s.n, 0);
    struct case_matrix parts = case_matrix_new(b, DTYPE_F32, (int64_t)s.m * n_shards, s.n, 0);
    struct linear whole = linear_case(&s, DTYPE_BF16);

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
    case_same(b, &want.device, &sum.device, weight_format_name(f));
    op_linear_free(b, &whole);
    quantized_case_release(&q);
    case_clear(b);
}

static void test_shards_add_up(void **state)
{
    (void)state;
    struct backend *b = case_open(DTYPE_BF16, 1);

    case_seed(13);
    for (int n_shards = 2; n_shards <= LANES_MAX; n_shards *= 2) {
        check_shards(b, WEIGHT_INT8, 0, n_shards);
        check_shards(b, WEIGHT_INT4, WITH_ZEROS, n_shards);
        check_shards(b, WEIGHT_NF4, 0, n_shards);
    }
    backend_close(b);
}

int cuda_quantized_tests(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_rows_are_independent),
        cmocka_unit_test(test_shards_add_up),
    };
    return cmocka_run_group_tests_name("cuda quantised weights", tests, NULL, NULL);
}
