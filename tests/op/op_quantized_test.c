/*
 * Products with quantised weights: bit for bit those with the dense weight of quantized_value()'s
 * numbers, whatever the format, groups, zero points, lanes, rows, threads and instruction set; and
 * what quantize_group() makes of a row.
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
#include "tests/op/op_quantized_case.h"

static struct tensor dequantized(const struct quantized *q)
{
    return tensor_2d(quantized_case_values(q), DTYPE_F32, q->out_dim, q->in_dim);
}

/* The whole at once and row by row against the dense product. */
static void check_shape(struct backend *b, const struct quantized_shape *s, enum dtype dtype,
                        enum weight_format f, int variant)
{
    char what[96];
    struct quantized q = quantized_case(s, f, variant, op_case_integer);
    struct tensor w = dequantized(&q), x = op_case_matrix(s->m, s->k);
    struct tensor want = op_case_matrix(s->m, s->n), y = op_case_matrix(s->m, s->n);
    struct tensor bias = tensor_1d(op_case_floats(s->n, 1), DTYPE_F32, s->n);
    struct linear dense = op_case_linear(s->n, s->k, dtype, s->n_lanes), l = dense;
    snprintf(what, sizeof(what), "%s %s x%d: %d x %d x %d, group %d", weight_format_name(f),
             dtype_name(dtype), variant, s->m, s->n, s->k, s->group_size);
    op_linear_pack(b, &dense, &w, &bias);
    op_linear_pack_quantized(b, &l, &q, &bias);
    op_matmul(b, &want, &x, &dense, NULL);
    op_matmul(b, &y, &x, &l, NULL);
    op_case_same(want.data, y.data, (size_t)(s->m * s->n) * sizeof(float), what);
    for (int i = 0; i < s->m; i++) {
        struct tensor y1 = tensor_rows(&y, i, 1), x1 = tensor_rows(&x, i, 1);
        op_matmul(b, &y1, &x1, &l, NULL);
    }
    op_case_same(want.data, y.data, (size_t)(s->m * s->n) * sizeof(float), what);
    op_linear_free(b, &dense);
    op_linear_free(b, &l);
    quantized_case_release(&q);
    free(w.data);
    free(x.data);
    free(want.data);
    free(y.data);
    free(bias.data);
}

static void test_equals_dense(void **state)
{
    (void)state;
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        op_case_seed(5);
        for (int s = 0; s < n_quantized_shapes; s++) {
            for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++) {
                for (int variant = 0; variant < QUANTIZED_VARIANTS; variant++) {
                    if (!quantized_case_takes((enum weight_format)f, variant))
                        continue;
                    check_shape(b, &quantized_shapes[s], DTYPE_F32, (enum weight_format)f, variant);
                    check_shape(b, &quantized_shapes[s], DTYPE_BF16, (enum weight_format)f,
                                variant);
                }
            }
        }
        backend_close(b);
    }
}

/* Rows of a quantised weight; ids of other shards give zeros. */
static void check_embed(struct backend *b, const struct quantized_shape *s, enum dtype dtype,
                        enum weight_format f, int variant)
{
    enum { FIRST = 100 };
    const int32_t ids[] = {FIRST, FIRST + s->n - 1, FIRST + s->n / 2, FIRST - 1, FIRST + s->n, -1};
    const int n = sizeof(ids) / sizeof(ids[0]);
    struct quantized q = quantized_case(s, f, variant, op_case_integer);
    struct tensor w = dequantized(&q), want = op_case_matrix(n, s->k), y = op_case_strided(n, s->k);
    struct linear l = op_case_linear(s->n, s->k, dtype, 1);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < s->k; k++) {
            float value = i < 3 ? ((float *)w.data)[(ids[i] - FIRST) * s->k + k] : 0;
            ((float *)want.data)[i * s->k + k] =
                dtype == DTYPE_F32 ? value : bf16_to_f32(f32_to_bf16(value));
        }
    op_linear_pack_quantized(b, &l, &q, NULL);
    op_embed_quantized(b, &y, &l, ids, FIRST);
    op_case_compare("embed_quantized", &y, want.data, 0);
    op_linear_free(b, &l);
    quantized_case_release(&q);
    free(w.data);
    free(want.data);
    free(y.data);
}

static void test_embed(void **state)
{
    (void)state;
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        op_case_seed(6);
        for (int s = 0; s < n_quantized_shapes; s++)
            for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++)
                for (int variant = 0; variant < QUANTIZED_VARIANTS; variant++) {
                    if (!quantized_case_takes((enum weight_format)f, variant))
                        continue;
                    check_embed(b, &quantized_shapes[s], DTYPE_F32, (enum weight_format)f, variant);
                    check_embed(b, &quantized_shapes[s], DTYPE_BF16, (enum weight_format)f,
                                variant);
                }
        backend_close(b);
    }
}

static size_t packed_bytes(struct backend *b, struct linear l, const struct quantized *q)
{
    op_linear_pack_quantized(b, &l, q, NULL);
    size_t n_bytes = l.packed_bytes;
    op_linear_free(b, &l);
    return n_bytes;
}

/* A packed weight takes the bytes of its codes and scales; where lanes are no whole units, as the
 * odd ones here, each is padded to a unit of 64 bytes for sixteen outputs. */
static void test_packed_bytes(void **state)
{
    (void)state;
    const struct quantized_shape s = {1, 256, 1024, 8, 128, 0};
    struct backend *b = backend_cpu_open(1, NULL);
    for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++) {
        struct quantized q = quantized_case(&s, (enum weight_format)f, 0, op_case_integer);
        struct linear odd = op_case_linear(s.n, s.k, DTYPE_BF16, s.n_lanes), whole = odd;
        for (int i = 0; i <= s.n_lanes; i++)
            whole.lane_start[i] = (int64_t)s.k * i / s.n_lanes;
        int64_t codes = (int64_t)s.n * s.k * weight_format_bits(q.format) / 8;
        int64_t scales = (int64_t)s.n * 8 * 4;
        assert_in_range(packed_bytes(b, whole, &q), codes + scales, codes + scales + (codes >> 6));
        assert_in_range(packed_bytes(b, odd, &q), codes + scales,
                        codes + scales + s.n / 16 * s.n_lanes * 64);
        quantized_case_release(&q);
    }
    backend_close(b);
}

/* Every value of a group comes back within half a step of its own size. */
static void test_quantize_group(void **state)
{
    (void)state;
    static const enum weight_format formats[] = {WEIGHT_INT8, WEIGHT_INT4, WEIGHT_NF4, WEIGHT_FP4};
    static const float widest_step[] = {1.0f / 127, 1.0f / 8, 0.304f, 0.334f}; // of the largest |w|
    op_case_seed(6);
    for (int i = 0; i < 4; i++) {
        for (int round = 0; round < 200; round++) {
            uint8_t codes[64];
            int n = 1 + op_case_integer(64);
            float *w = op_case_floats(n, 3), largest = 0, scale;
            for (int k = 0; k < n; k++)
                largest = fmaxf(largest, fabsf(w[k]));
            struct quantized q = {formats[i], 1, n, 1, 64, 0, NULL, codes, &scale, NULL};
            scale = quantize_group(formats[i], w, n, round & 1, codes);
            for (int k = 0; k < n; k++) {
                float bound =
                    widest_step[i] * largest * (formats[i] == WEIGHT_INT4 ? 1.01f : 0.51f);
                assert_true(fabsf(quantized_value(&q, 0, k) - w[k]) <= bound);
            }
            free(w);
        }
        float zeros[8] = {0}, scale;
        uint8_t codes[8];
        struct quantized q = {formats[i], 1, 8, 1, 64, 0, NULL, codes, &scale, NULL};
        scale = quantize_group(formats[i], zeros, 8, 0, codes);
        for (int k = 0; k < 8; k++)
            assert_true(quantized_value(&q, 0, k) == 0);
    }
}

int op_quantized_tests(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equals_dense),
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_packed_bytes),
        cmocka_unit_test(test_quantize_group),
    };
    return cmocka_run_group_tests_name("quantised weights", tests, NULL, NULL);
}
