/*
 * Quantised weights on CUDA: products and rows are, bit for bit, those of the dense weight of
 * quantized_value()'s numbers, also when it is dense in parts.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/cuda_emulation/cuda_op_case.h"
#include "tests/op/op_quantized_case.h"

/* Lanes that begin at multiples of eight, as a model's do. */
static struct linear linear_case(const struct quantized_shape *s, enum dtype dtype)
{
    struct linear l = {.out_dim = s->n, .in_dim = s->k, .dtype = dtype, .n_lanes = s->n_lanes};

    for (int i = 1; i < s->n_lanes; i++)
        l.lane_start[i] = l.in_dim * i / s->n_lanes / 8 * 8;
    l.lane_start[s->n_lanes] = l.in_dim;
    return l;
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
    struct case_matrix want = case_matrix_new(b, b->activation_dtype, s->m, s->n, 0);
    struct linear dense = linear_case(s, dtype), l = dense;
    struct epilogue e = {.act = variant & WITH_ORDER ? ACTIVATION_GELU : ACTIVATION_NONE};

    snprintf(what, sizeof(what), "%s %s x%d: %d x %d x %d", weight_format_name(f),
             dtype_name(dtype), variant, s->m, s->n, s->k);
    op_linear_pack(b, &dense, &w, variant & WITH_ZEROS ? NULL : &bias);
    op_linear_pack_quantized(b, &l, &q, variant & WITH_ZEROS ? NULL : &bias);
    op_matmul(b, &want.device, &x.device, &dense, &e);
    op_matmul(b, &y.device, &x.device, &l, &e);
    case_same(b, &want.device, &y.device, what);
    op_linear_free(b, &dense);
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

static void test_equals_dense(void **state)
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

int cuda_quantized_tests(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_equals_dense)};
    return cmocka_run_group_tests_name("cuda quantised weights", tests, NULL, NULL);
}
