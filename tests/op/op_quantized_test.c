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

struct shape {
    int m, n, k, n_lanes;
    int group_size, group_phase; // columns; 0: the whole row
};
static const struct shape shapes[] = {
    {1, 1, 1, 1, 0, 0},     {1, 17, 33, 2, 0, 0},      {2, 15, 7, 4, 3, 1},
    {1, 70, 256, 1, 64, 0}, {3, 64, 160, 8, 32, 16},   {4, 33, 250, 4, 128, 70},
    {1, 96, 700, 8, 64, 3}, {13, 48, 300, 2, 64, 10},  {29, 100, 130, 1, 32, 0},
    {5, 40, 223, 8, 1, 0},  {12, 64, 1024, 1, 128, 0}, {150, 33, 90, 4, 16, 8},
};
#define N_SHAPES ((int)(sizeof(shapes) / sizeof(shapes[0])))

enum { WITH_ZEROS = 1, WITH_ORDER = 2 };

/* Random codes of every value the format has, scales of both signs. */
static struct quantized random_weight(const struct shape *s, enum weight_format f, int variant)
{
    struct quantized q = {.format = f, .out_dim = s->n, .in_dim = s->k, .n_groups = 1};
    q.group_size = s->group_size ? s->group_size : s->k;
    q.group_phase = s->group_phase;
    q.n_groups = (s->k + q.group_phase + q.group_size - 1) / q.group_size;
    size_t n = (size_t)(q.out_dim * q.in_dim), n_scales = (size_t)(q.out_dim * q.n_groups);
    q.codes = xcalloc(n, 1);
    q.scales = op_case_floats((int64_t)n_scales, 0.5f);
    for (size_t i = 0; i < n; i++)
        do {
            q.codes[i] = (uint8_t)op_case_integer(weight_format_bits(f) == 4 ? 16 : 256);
        } while (f == WEIGHT_FP8 && (q.codes[i] & 0x7f) == 0x7f); // not a number
    if (variant & WITH_ZEROS)
        q.zeros = xcalloc(n_scales, 1);
    for (size_t i = 0; q.zeros && i < n_scales; i++)
        q.zeros[i] =
            (int8_t)(op_case_integer(f == WEIGHT_INT4 ? 17 : 255) - (f == WEIGHT_INT4 ? 0 : 127));
    if (variant & WITH_ORDER) {
        int32_t *of = xcalloc((size_t)s->k, sizeof(*of));
        for (int k = 0; k < s->k; k++)
            of[k] = op_case_integer((int)q.n_groups);
        q.group_of = of;
    }
    return q;
}

static void release(struct quantized *q)
{
    free((void *)(uintptr_t)q->group_of);
    free(q->codes);
    free(q->scales);
    free(q->zeros);
}

static struct tensor dequantized(const struct quantized *q)
{
    struct tensor w = op_case_matrix(q->out_dim, q->in_dim);
    for (int64_t n = 0; n < q->out_dim; n++)
        for (int64_t k = 0; k < q->in_dim; k++)
            ((float *)w.data)[n * q->in_dim + k] = quantized_value(q, n, k);
    return w;
}

/* The whole at once and row by row against the dense product. */
static void check_shape(struct backend *b, const struct shape *s, enum dtype dtype,
                        enum weight_format f, int variant)
{
    char what[96];
    struct quantized q = random_weight(s, f, variant);
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
    release(&q);
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
        for (int s = 0; s < N_SHAPES; s++) {
            for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++) {
                int has_zeros = f == WEIGHT_INT8 || f == WEIGHT_INT4;
                for (int variant = 0; variant < 4; variant++) {
                    if (variant & WITH_ZEROS && !has_zeros)
                        continue;
                    check_shape(b, &shapes[s], DTYPE_F32, (enum weight_format)f, variant);
                    check_shape(b, &shapes[s], DTYPE_BF16, (enum weight_format)f, variant);
                }
            }
        }
        backend_close(b);
    }
}

/* Rows of a quantised weight; ids of other shards give zeros. */
static void check_embed(struct backend *b, const struct shape *s, enum dtype dtype,
                        enum weight_format f, int variant)
{
    enum { FIRST = 100 };
    const int32_t ids[] = {FIRST, FIRST + s->n - 1, FIRST + s->n / 2, FIRST - 1, FIRST + s->n, -1};
    const int n = sizeof(ids) / sizeof(ids[0]);
    struct quantized q = random_weight(s, f, variant);
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
    release(&q);
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
        for (int s = 0; s < N_SHAPES; s++)
            for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++)
                for (int variant = 0; variant < 4; variant += f == WEIGHT_INT4 ? 1 : WITH_ORDER) {
                    check_embed(b, &shapes[s], DTYPE_F32, (enum weight_format)f, variant);
                    check_embed(b, &shapes[s], DTYPE_BF16, (enum weight_format)f, variant);
                }
        backend_close(b);
    }
}

/* A packed weight takes the bytes of its codes and scales, and a lane's padding to a whole unit of
 * 64 bytes for sixteen outputs: these lanes have odd lengths. */
static void test_packed_bytes(void **state)
{
    (void)state;
    const struct shape s = {1, 256, 1024, 8, 128, 0};
    struct backend *b = backend_cpu_open(1, NULL);
    for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++) {
        struct quantized q = random_weight(&s, (enum weight_format)f, 0);
        struct linear l = op_case_linear(s.n, s.k, DTYPE_BF16, s.n_lanes);
        op_linear_pack_quantized(b, &l, &q, NULL);
        int64_t codes = (int64_t)s.n * s.k * weight_format_bits(q.format) / 8;
        int64_t scales = (int64_t)s.n * 8 * 4;
        assert_in_range(l.packed_bytes, codes + scales, codes + scales + s.n / 16 * s.n_lanes * 64);
        op_linear_free(b, &l);
        release(&q);
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
