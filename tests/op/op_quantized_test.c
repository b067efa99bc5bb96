/*
 * Products with quantised weights: bit for bit what kernels/quantized.h says, whatever the format,
 * groups, zero points, lanes, rows, threads, shards and instruction set; and what quantize_group()
 * makes of a row.
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
#include "tests/op/op_quantized_case.h"

static struct tensor dequantized(const struct quantized *q)
{
    return tensor_2d(quantized_case_values(q), DTYPE_F32, q->out_dim, q->in_dim);
}

/* Lanes of odd lengths, or such as a model's, that begin at multiples of eight. */
static struct linear lanes_of(const struct quantized_shape *s, enum dtype dtype, int are_whole)
{
    struct linear l = op_case_linear(s->n, s->k, dtype, s->n_lanes);
    for (int i = 1; are_whole && i < s->n_lanes; i++)
        l.lane_start[i] = l.lane_start[i] / 8 * 8;
    return l;
}

/* y <- the product by its definition: in float32, the dense one; without bias. */
static void product_by_definition(struct backend *b, struct tensor *y, const struct tensor *x,
                                  const struct quantized *q, const struct linear *l)
{
    if (l->dtype == DTYPE_BF16) {
        quantized_case_product(y->data, x, q, l);
        return;
    }
    struct tensor w = dequantized(q);
    struct linear dense = *l;
    op_linear_pack(b, &dense, &w, NULL);
    op_matmul(b, y, x, &dense, NULL);
    op_linear_free(b, &dense);
    free(w.data);
}

/* The whole at once and row by row. */
static void check_shape(struct backend *b, const struct quantized_shape *s, enum dtype dtype,
                        enum weight_format f, int variant, int lanes_are_whole)
{
    char what[96];
    struct quantized q = quantized_case(s, f, variant, op_case_integer);
    struct tensor x = op_case_matrix(s->m, s->k);
    struct tensor want = op_case_matrix(s->m, s->n), y = op_case_matrix(s->m, s->n);
    struct tensor bias = tensor_1d(op_case_floats(s->n, 1), DTYPE_F32, s->n);
    struct linear l = lanes_of(s, dtype, lanes_are_whole);
    snprintf(what, sizeof(what), "%s %s x%d: %d x %d x %d, group %d, lanes %d",
             weight_format_name(f), dtype_name(dtype), variant, s->m, s->n, s->k, s->group_size,
             lanes_are_whole);
    product_by_definition(b, &want, &x, &q, &l);
    op_add_bias(b, &want, bias.data);
    op_linear_pack_quantized(b, &l, &q, &bias);
    op_matmul(b, &y, &x, &l, NULL);
    op_case_same(want.data, y.data, (size_t)(s->m * s->n) * sizeof(float), what);
    for (int i = 0; i < s->m; i++) {
        struct tensor y1 = tensor_rows(&y, i, 1), x1 = tensor_rows(&x, i, 1);
        op_matmul(b, &y1, &x1, &l, NULL);
    }
    op_case_same(want.data, y.data, (size_t)(s->m * s->n) * sizeof(float), what);
    op_linear_free(b, &l);
    quantized_case_release(&q);
    free(x.data);
    free(want.data);
    free(y.data);
    free(bias.data);
}

static void test_products(void **state)
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
                    check_shape(b, &quantized_shapes[s], DTYPE_F32, (enum weight_format)f, variant,
                                variant & 1);
                    for (int whole = 0; whole < 2; whole++)
                        check_shape(b, &quantized_shapes[s], DTYPE_BF16, (enum weight_format)f,
                                    variant, whole);
                }
            }
        }
        backend_close(b);
    }
}

/* Each number of rows that is multiplied with codes has a loop of its own. */
static void check_rows(struct backend *b, enum weight_format f, int variant)
{
    const struct quantized_shape s = {26, 176, 272, 2, 24, 8};
    struct quantized q = quantized_case(&s, f, variant, op_case_integer);
    struct tensor x = op_case_matrix(s.m, s.k);
    struct tensor want = op_case_matrix(s.m, s.n), y = op_case_matrix(s.m, s.n);
    struct linear l = lanes_of(&s, DTYPE_BF16, 1);
    product_by_definition(b, &want, &x, &q, &l);
    op_linear_pack_quantized(b, &l, &q, NULL);
    for (int n = 1; n <= s.m; n++) {
        struct tensor part = tensor_rows(&y, 0, n), of = tensor_rows(&x, 0, n);
        char what[64];
        snprintf(what, sizeof(what), "%s x%d: %d rows", weight_format_name(f), variant, n);
        memset(y.data, 0, (size_t)(s.m * s.n) * sizeof(float));
        op_matmul(b, &part, &of, &l, NULL);
        op_case_same(want.data, y.data, (size_t)(n * s.n) * sizeof(float), what);
    }
    op_linear_free(b, &l);
    quantized_case_release(&q);
    free(x.data);
    free(want.data);
    free(y.data);
}

static void test_rows(void **state)
{
    (void)state;
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        op_case_seed(12);
        for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++)
            for (int variant = 0; variant < QUANTIZED_VARIANTS; variant++)
                if (quantized_case_takes((enum weight_format)f, variant))
                    check_rows(b, (enum weight_format)f, variant);
        backend_close(b);
    }
}

/* Gate and up in codes, for the rows that are multiplied at once, one panel of them and several. */
static void test_gated(void **state)
{
    (void)state;
    static const struct quantized_shape shapes[] = {
        {110, 640, 96, 1, 32, 0},  {1, 192, 256, 1, 64, 0}, {3, 64, 160, 2, 32, 16},
        {17, 96, 250, 1, 128, 70}, {29, 128, 90, 4, 16, 8}, {2, 80, 96, 1, 32, 0},
    };
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        size_t most = 0; // that a thread may take for what it expands
        op_case_seed(9);
        for (int s = 0; s < (int)(sizeof(shapes) / sizeof(shapes[0])); s++) {
            for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++) {
                struct quantized q =
                    quantized_case(&shapes[s], (enum weight_format)f, 0, op_case_integer);
                struct linear l = lanes_of(&shapes[s], DTYPE_BF16, 1);
                for (int round = 0; round < 2; round++) {
                    l.dtype = round ? DTYPE_BF16 : DTYPE_F32;
                    op_linear_pack_quantized(b, &l, &q, NULL);
                    op_case_check_gated(b, &l, shapes[s].m);
                    size_t planned =
                        backend_cpu_expanded_bytes(op_isas[i], l.out_dim, l.in_dim, 2, l.dtype);
                    most = planned > most ? planned : most;
                    op_linear_free(b, &l);
                }
                quantized_case_release(&q);
            }
        }
        for (int t = 0; t < 2; t++)
            assert_in_range(cpu_state(b)->expanded[t].n_bytes, most / 3, most + 63);
        backend_close(b);
    }
}

/* y <- the product of lanes [first, first + l->n_lanes / 2), as the rank that owns them has it. */
static void half_product(struct backend *b, struct tensor *y, const struct tensor *x,
                         const struct quantized *q, const struct linear *l, int first)
{
    struct linear half = quantized_case_lanes(l, first, l->n_lanes / 2);
    struct quantized of = quantized_case_columns(q, l->lane_start[first], half.in_dim);
    struct tensor columns = *x;
    columns.data = (float *)x->data + l->lane_start[first];
    columns.shape[1] = of.in_dim;
    op_linear_pack_quantized(b, &half, &of, NULL);
    op_matmul(b, y, &columns, &half, NULL);
    op_linear_free(b, &half);
    quantized_case_release(&of);
}

/* Two ranks' parts add up to the bits of one, also where only one of them has a lane that begins
 * within a unit, or a group that ends in one. */
static void test_shards(void **state)
{
    (void)state;
    static const struct quantized_shape shapes[] = {
        {3, 40, 256, 4, 128, 0}, {3, 40, 304, 8, 64, 0}, {3, 40, 160, 8, 100, 0},
        {3, 40, 256, 2, 24, 0},  {3, 40, 600, 4, 36, 0}, {3, 40, 96, 2, 96, 0},
    };
    struct backend *b = backend_cpu_open(2, NULL);
    op_case_seed(7);
    for (int i = 0; i < (int)(sizeof(shapes) / sizeof(shapes[0])); i++) {
        for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++) {
            const struct quantized_shape *s = &shapes[i];
            struct quantized q = quantized_case(s, (enum weight_format)f, 0, op_case_integer);
            struct linear l = lanes_of(s, DTYPE_BF16, i % 2), whole = l;
            struct tensor x = op_case_matrix(s->m, s->k), y = op_case_matrix(s->m, s->n);
            struct tensor lower = op_case_matrix(s->m, s->n), upper = op_case_matrix(s->m, s->n);
            op_linear_pack_quantized(b, &whole, &q, NULL);
            op_matmul(b, &y, &x, &whole, NULL);
            half_product(b, &lower, &x, &q, &l, 0);
            half_product(b, &upper, &x, &q, &l, s->n_lanes / 2);
            op_add(b, &lower, &upper);
            op_case_same(y.data, lower.data, (size_t)(s->m * s->n) * sizeof(float),
                         weight_format_name((enum weight_format)f));
            op_linear_free(b, &whole);
            quantized_case_release(&q);
            free(x.data);
            free(y.data);
            free(lower.data);
            free(upper.data);
        }
    }
    backend_close(b);
}

/* Formats whose multiples bfloat16 has lose nothing in bfloat16 but the rounding of x: against
 * double precision their products are float32's sums, 1e-13, where rounded values are 1e-6. */
static void test_precision(void **state)
{
    (void)state;
    const struct quantized_shape s = {5, 64, 1024, 4, 128, 0};
    struct backend *b = backend_cpu_open(2, NULL);
    op_case_seed(8);
    for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++) {
        struct quantized q = quantized_case(&s, (enum weight_format)f, 0, op_case_integer);
        struct linear l = lanes_of(&s, DTYPE_BF16, 1);
        struct tensor w = dequantized(&q), x = op_case_matrix(s.m, s.k);
        struct tensor y = op_case_matrix(s.m, s.n), want = op_case_matrix(s.m, s.n);
        for (int64_t i = 0; i < tensor_n_elements(&x); i++)
            ((float *)x.data)[i] = bf16_to_f32(f32_to_bf16(((float *)x.data)[i]));
        naive_matmul(want.data, &x, &w, 0, NULL, ACTIVATION_NONE, NULL, NULL);
        op_linear_pack_quantized(b, &l, &q, NULL);
        op_matmul(b, &y, &x, &l, NULL);
        if (weight_format_is_factored((enum weight_format)f))
            op_case_compare("factored bfloat16", &y, want.data, 1e-12);
        else
            op_case_compare("rounded bfloat16", &y, want.data, 1e-5);
        op_linear_free(b, &l);
        quantized_case_release(&q);
        free(w.data);
        free(x.data);
        free(y.data);
        free(want.data);
    }
    backend_close(b);
    op_case_report();
}

/* y <- the product of 28 rows on instruction set `isa`: all at once, or so few at a time that they
 * are multiplied with codes. */
static void product_on(const char *isa, struct tensor *y, const struct tensor *x,
                       const struct quantized *q, struct linear l, int at_once)
{
    struct backend *b = backend_cpu_open(2, isa);
    op_linear_pack_quantized(b, &l, q, NULL);
    static const int whole[] = {28, 0}, parts[] = {4, 1, 5, 12, 6, 0};
    int64_t i = 0;
    for (const int *n = at_once ? whole : parts; *n > 0; i += *n++) {
        struct tensor part = tensor_rows(y, i, *n), of = tensor_rows(x, i, *n);
        op_matmul(b, &part, &of, &l, NULL);
    }
    op_linear_free(b, &l);
    backend_close(b);
}

/* Both paths of AVX-512 BF16 flush the same denormals, of a few rows as of many: x and values whose
 * products are denormal, sums that become so, and ends of runs, which are not flushed. */
static void test_denormals(void **state)
{
    (void)state;
    const struct quantized_shape s = {28, 144, 272, 2, 24, 8};
    const size_t n_bytes = (size_t)(s.m * s.n) * sizeof(float);
    if (!op_case_has("avx512bf16"))
        return;
    op_case_seed(10);
    struct tensor x = op_case_matrix(s.m, s.k);
    struct tensor want = op_case_matrix(s.m, s.n), y = op_case_matrix(s.m, s.n);
    for (int f = WEIGHT_INT8; f < WEIGHT_FORMAT_COUNT; f++) {
        for (int power = -132; power <= -12; power += 12) { // of x
            struct quantized q = quantized_case(&s, (enum weight_format)f, 0, op_case_integer);
            struct linear l = lanes_of(&s, DTYPE_BF16, 1);
            for (int i = 0; i < s.m * s.k; i++)
                ((float *)x.data)[i] = ldexpf(op_case_random(), power + i % 7);
            for (int64_t i = 0; i < q.out_dim * q.n_groups; i++)
                q.scales[i] = ldexpf(q.scales[i], -126 - power);
            product_on("avx512bf16", &want, &x, &q, l, 1);
            product_on("avx512bf16", &y, &x, &q, l, 0);
            op_case_same(want.data, y.data, n_bytes, weight_format_name(q.format));
            product_on("avx512bf16fma", &y, &x, &q, l, 1);
            op_case_same(want.data, y.data, n_bytes, weight_format_name(q.format));
            product_on("avx512bf16fma", &y, &x, &q, l, 0);
            op_case_same(want.data, y.data, n_bytes, weight_format_name(q.format));
            quantized_case_release(&q);
        }
    }
    free(x.data);
    free(want.data);
    free(y.data);
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
    static const enum weight_format formats[] = {WEIGHT_INT8, WEIGHT_INT4, WEIGHT_NF4, WEIGHT_FP4,
                                                 WEIGHT_FP8};
    /* of the largest |w| */
    static const float widest_step[] = {1.0f / 127, 1.0f / 8, 0.304f, 0.334f, 1.0f / 14};
    op_case_seed(6);
    for (int i = 0; i < 5; i++) {
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

/* Of a positive E4M3 code, as its definition says. */
static float e4m3(int code)
{
    return code < 8 ? (float)code / 512 : ldexpf((float)(8 + code % 8), code / 8 - 10);
}

/* The code of w beside 448, which makes the scale 1. */
static int fp8_code_of(float w)
{
    const float group[2] = {w, 448};
    uint8_t codes[2];
    assert_true(quantize_group(WEIGHT_FP8, group, 2, 0, codes) == 1);
    assert_int_equal(codes[1], 126);
    return codes[0];
}

/* Every value has its code; the middle of two goes to the even one, and what is next to it to the
 * nearer. */
static void test_fp8_codes(void **state)
{
    (void)state;
    for (int sign = 0; sign < 256; sign += 128)
        for (int code = 0; code < 127; code++) {
            float v = sign ? -e4m3(code) : e4m3(code);
            float next = sign ? -e4m3(code + 1) : e4m3(code + 1), middle = (v + next) / 2;
            assert_int_equal(fp8_code_of(v), sign + code);
            if (code == 126)
                continue;
            assert_int_equal(fp8_code_of(middle), sign + code + code % 2);
            assert_int_equal(fp8_code_of(nextafterf(middle, v)), sign + code);
            assert_int_equal(fp8_code_of(nextafterf(middle, next)), sign + code + 1);
        }
    assert_int_equal(fp8_code_of(NAN), 127);
}

int op_quantized_tests(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),     cmocka_unit_test(test_rows),
        cmocka_unit_test(test_gated),        cmocka_unit_test(test_shards),
        cmocka_unit_test(test_precision),    cmocka_unit_test(test_embed),
        cmocka_unit_test(test_packed_bytes), cmocka_unit_test(test_quantize_group),
        cmocka_unit_test(test_fp8_codes),    cmocka_unit_test(test_denormals),
    };
    return cmocka_run_group_tests_name("quantised weights", tests, NULL, NULL);
}
