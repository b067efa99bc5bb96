/*
 * Products of x rounded to int8 with integer weights: bit for bit the plain loop of
 * kernels/quantized.h (x_format), whatever the format, groups, zero points, lanes, rows, threads,
 * shards and instruction set, and whatever follows the product.
 */
#include <float.h>
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

static const enum weight_format integers[] = {WEIGHT_INT8, WEIGHT_INT8_127, WEIGHT_INT4};
#define N_INTEGERS 3

/* Lanes of very uneven lengths: odd ones where the whole row is one group, else such as begin at
 * whole units of codes. */
static struct linear lanes_of(const struct quantized_shape *s, enum weight_format f)
{
    const int unit = weight_format_bits(f) == 4 ? 8 : 4;
    struct linear l = op_case_linear(s->n, s->k, DTYPE_BF16, s->n_lanes);
    l.x_format = WEIGHT_INT8;
    for (int i = 1; i < s->n_lanes; i++) {
        l.lane_start[i] = (int64_t)s->k * i * i / (s->n_lanes * s->n_lanes);
        if (s->group_size && s->group_size < s->k + s->group_phase)
            l.lane_start[i] = l.lane_start[i] / unit * unit;
    }
    return l;
}

/* Lines of `y` are those of `want`, contiguous; any NaN is as any other. */
static void check_same(const float *want, const struct tensor *y, const char *what)
{
    const int64_t n = tensor_n_cols(y);
    for (int64_t i = 0; i < tensor_n_rows(y); i++)
        for (int64_t j = 0; j < n; j++) {
            float w = want[i * n + j], got = ((const float *)y->data)[i * y->row_stride + j];
            if (memcmp(&w, &got, sizeof(w)) != 0 && !(isnan(w) && isnan(got)))
                fail_msg("%s: row %d, column %d is %.9g, not %.9g", what, (int)i, (int)j, got, w);
        }
}

/* A weight, x and the product by its definition. */
struct case_of {
    struct quantized q;
    struct linear l;
    struct tensor x, want;
    char what[96];
};

static void case_init(struct case_of *c, const struct quantized_shape *s, enum weight_format f,
                      int variant)
{
    c->q = quantized_case(s, f, variant, op_case_integer);
    c->l = lanes_of(s, f);
    c->x = op_case_strided(s->m, s->k);
    c->want = op_case_matrix(s->m, s->n);
    snprintf(c->what, sizeof(c->what), "%s%s: %d x %d x %d, %d lanes, group %d from %d",
             f == WEIGHT_INT8_127 ? "int8 / 127" : weight_format_name(f),
             variant & WITH_ZEROS ? " with zeros" : "", s->m, s->n, s->k, s->n_lanes, s->group_size,
             s->group_phase);
}

static void case_pack(struct case_of *c, struct backend *b, const struct tensor *bias)
{
    quantized_case_integer_product(c->want.data, &c->x, &c->q, &c->l);
    op_linear_pack_quantized(b, &c->l, &c->q, bias);
}

static void case_release(struct case_of *c, struct backend *b)
{
    op_linear_free(b, &c->l);
    quantized_case_release(&c->q);
    free(c->x.data);
    free(c->want.data);
}

/* Rows [first, first + n) at once give what is wanted of them. */
static void check_part(struct backend *b, const struct case_of *c, int64_t first, int64_t n)
{
    struct tensor x = tensor_rows(&c->x, first, n), y = op_case_strided(n, c->l.out_dim);
    op_matmul(b, &y, &x, &c->l, NULL);
    check_same((const float *)c->want.data + first * c->l.out_dim, &y, c->what);
    free(y.data);
}

/* As check(b, format, variant) on every instruction set, of every format and with zero points. */
static void for_all(uint32_t seed,
                    void (*check)(struct backend *b, enum weight_format f, int variant))
{
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        op_case_seed(seed);
        for (int f = 0; f < N_INTEGERS; f++)
            for (int variant = 0; variant <= WITH_ZEROS; variant++)
                if (quantized_case_takes(integers[f], variant))
                    check(b, integers[f], variant);
        backend_close(b);
    }
}

/* ---- shapes and rows ---- */

/* The whole, and row by row. */
static void check_products(struct backend *b, enum weight_format f, int variant)
{
    static const struct quantized_shape shapes[] = {
        {1, 1, 1, 1, 0, 0},         {2, 20, 5, 8, 0, 0},       {3, 17, 33, 2, 0, 0},
        {5, 70, 259, 4, 0, 0},      {29, 100, 131, 8, 0, 0},   {220, 33, 90, 4, 0, 0},
        {4, 33, 256, 1, 32, 0},     {1, 70, 250, 1, 64, 16},   {13, 48, 300, 2, 64, 8},
        {7, 96, 700, 8, 32, 24},    {12, 64, 1024, 4, 128, 0}, {3, 144, 520, 8, 128, 40},
        {150, 40, 272, 2, 32, 8},   {6, 24, 96, 4, 128, 16},   {2, 208, 136, 1, 40, 0},
        {30, 272, 385, 1, 128, 64}, {1, 144, 2056, 1, 0, 0},   {9, 30, 1601, 8, 64, 56},
    };
    for (int i = 0; i < (int)(sizeof(shapes) / sizeof(shapes[0])); i++) {
        struct case_of c;
        case_init(&c, &shapes[i], f, variant);
        case_pack(&c, b, NULL);
        check_part(b, &c, 0, shapes[i].m);
        for (int m = 0; m < shapes[i].m && m < 30; m++)
            check_part(b, &c, m, 1);
        case_release(&c, b);
    }
}

static void test_products(void **state)
{
    (void)state;
    for_all(21, check_products);
}

/* Each number of rows may have a loop of its own; the company a row is in changes nothing. */
static void check_rows(struct backend *b, enum weight_format f, int variant)
{
    static const struct quantized_shape shapes[] = {{40, 176, 272, 2, 32, 8},
                                                    {40, 80, 195, 1, 0, 0}};
    for (int i = 0; i < 2; i++) {
        struct case_of c;
        case_init(&c, &shapes[i], f, variant);
        case_pack(&c, b, NULL);
        for (int n = 1; n <= 40; n++)
            check_part(b, &c, (40 - n) / 2, n);
        case_release(&c, b);
    }
}

static void test_rows(void **state)
{
    (void)state;
    for_all(22, check_rows);
}

/* So many that they go through the weight in parts, on one to three threads, in the memory that is
 * planned; nothing is expanded. */
static void test_many_rows(void **state)
{
    (void)state;
    const struct quantized_shape s = {2400, 35, 4104, 2, 128, 0};
    for (int i = 0; i < op_n_isas; i++) {
        if (!op_case_has(op_isas[i]))
            continue;
        struct backend *b = backend_cpu_open(1 + i % 3, op_isas[i]);
        struct case_of c;
        op_case_seed(23);
        case_init(&c, &s, i % 2 ? WEIGHT_INT4 : WEIGHT_INT8, WITH_ZEROS);
        case_pack(&c, b, NULL);
        check_part(b, &c, 0, s.m);
        check_part(b, &c, 700, 301);
        assert_in_range(cpu_state(b)->shared.n_bytes, 1,
                        backend_cpu_matmul_bytes(op_isas[i], s.m, s.k, DTYPE_BF16) + 63);
        assert_int_equal(cpu_state(b)->expanded[0].n_bytes, 0);
        case_release(&c, b);
        backend_close(b);
    }
}

/* Gate and up, of one panel of rows and of several. */
static void check_gated(struct backend *b, enum weight_format f, int variant)
{
    static const struct quantized_shape shapes[] = {
        {110, 640, 96, 1, 32, 0}, {1, 192, 256, 1, 64, 0}, {17, 96, 250, 1, 128, 64},
        {29, 128, 90, 4, 0, 0},   {2, 80, 96, 1, 32, 0},   {300, 64, 200, 1, 0, 0},
    };
    for (int i = 0; i < (int)(sizeof(shapes) / sizeof(shapes[0])); i++) {
        struct case_of c;
        case_init(&c, &shapes[i], f, variant);
        struct tensor bias = tensor_1d(op_case_floats(shapes[i].n, 1), DTYPE_F32, shapes[i].n);
        case_pack(&c, b, i % 2 ? &bias : NULL);
        op_case_check_gated(b, &c.l, shapes[i].m);
        free(bias.data);
        case_release(&c, b);
    }
}

static void test_gated(void **state)
{
    (void)state;
    for_all(24, check_gated);
}

/* ---- what is before and after ---- */

/* y <- what the epilogue makes of the product: that of a float32 product with ones, which leaves
 * every value as it is. */
static void finish_by_definition(struct backend *b, struct tensor *y, const struct tensor *product,
                                 const struct tensor *bias, const struct epilogue *e)
{
    const int64_t n = tensor_n_cols(product);
    struct tensor ones = tensor_2d(op_case_floats(n * n, 0), DTYPE_F32, n, n);
    struct linear l = op_case_linear(n, n, DTYPE_F32, 1);
    for (int64_t i = 0; i < n; i++)
        ((float *)ones.data)[i * n + i] = 1;
    op_linear_pack(b, &l, &ones, bias);
    op_matmul(b, y, product, &l, e);
    op_linear_free(b, &l);
    free(ones.data);
}

/* Bias, and what `variant` of sixteen chooses, into float32 and, without residual, bfloat16. */
static void check_epilogue(struct backend *b, const struct case_of *c, const struct tensor *bias,
                           int64_t n_rows, int variant)
{
    const int64_t n = c->l.out_dim;
    struct tensor x = tensor_rows(&c->x, 0, n_rows), product = tensor_rows(&c->want, 0, n_rows);
    struct tensor want = op_case_matrix(n_rows, n), y = op_case_strided(n_rows, n);
    struct tensor residual = op_case_matrix(n_rows, n);
    float *scale = op_case_floats(n, 1);
    struct epilogue e = {.act = (enum activation)(variant % 6)};
    e.scale = variant & 4 ? scale : NULL;
    e.residual = variant & 8 ? &residual : NULL;
    finish_by_definition(b, &want, &product, bias, &e);
    op_matmul(b, &y, &x, &c->l, &e);
    check_same(want.data, &y, c->what);
    if (e.residual) { // in place: the residual is y itself
        op_copy(b, &y, &residual);
        e.residual = &y;
        op_matmul(b, &y, &x, &c->l, &e);
        check_same(want.data, &y, c->what);
    } else {
        struct tensor rounded = tensor_2d(residual.data, DTYPE_BF16, n_rows, n);
        op_copy(b, &rounded, &want);
        y.dtype = DTYPE_BF16;
        op_matmul(b, &y, &x, &c->l, &e);
        for (int64_t i = 0; i < n_rows; i++)
            op_case_same((uint16_t *)rounded.data + i * n, (uint16_t *)y.data + i * y.row_stride,
                         (size_t)n * 2, c->what);
    }
    free(want.data);
    free(y.data);
    free(residual.data);
    free(scale);
}

static void check_epilogues(struct backend *b, enum weight_format f, int variant)
{
    static const struct quantized_shape shapes[] = {{40, 70, 136, 2, 32, 0},
                                                    {40, 128, 75, 1, 0, 0}};
    for (int i = 0; i < 2; i++) {
        struct case_of c;
        case_init(&c, &shapes[i], f, variant);
        struct tensor bias = tensor_1d(op_case_floats(shapes[i].n, 1), DTYPE_F32, shapes[i].n);
        case_pack(&c, b, &bias);
        for (int e = 0; e < 16; e++) {
            check_epilogue(b, &c, &bias, 1, e);
            check_epilogue(b, &c, &bias, 9, e);
            check_epilogue(b, &c, &bias, 40, e);
        }
        free(bias.data);
        case_release(&c, b);
    }
}

static void test_epilogues(void **state)
{
    (void)state;
    for_all(25, check_epilogues);
}

/* x that is bfloat16 already is rounded as its values are. */
static void check_bf16(struct backend *b, enum weight_format f, int variant)
{
    static const struct quantized_shape shapes[] = {
        {1, 48, 264, 1, 64, 0}, {33, 48, 301, 4, 0, 0}, {90, 48, 176, 2, 32, 16}};
    for (int i = 0; i < 3; i++) {
        struct case_of c;
        case_init(&c, &shapes[i], f, variant);
        struct tensor x = op_case_strided(shapes[i].m, shapes[i].k);
        struct tensor y = op_case_matrix(shapes[i].m, shapes[i].n);
        x.dtype = DTYPE_BF16;
        op_copy(b, &x, &c.x);
        op_copy(b, &c.x, &x);
        case_pack(&c, b, NULL);
        op_matmul(b, &y, &x, &c.l, NULL);
        check_same(c.want.data, &y, c.what);
        free(x.data);
        free(y.data);
        case_release(&c, b);
    }
}

static void test_bf16(void **state)
{
    (void)state;
    for_all(26, check_bf16);
}

/* ---- values ---- */

static float *x_at(const struct case_of *c, int64_t row, int64_t column)
{
    return (float *)c->x.data + row * c->x.row_stride + column;
}

/* Rows of x that are special somewhere: 28 of them, the last four ordinary ones. */
static void set_special(const struct case_of *c)
{
    static const float values[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, FLT_TRUE_MIN, 0};
    const int64_t n_k = c->l.in_dim, lane = c->l.lane_start[c->l.n_lanes / 2];
    for (int64_t k = lane; k < c->l.lane_start[c->l.n_lanes / 2 + 1]; k++) {
        const float at = (float)(k - lane);
        *x_at(c, 0, k) = 0;
        *x_at(c, 1, k) = k % 2 ? -0.0f : 0.0f;
        *x_at(c, 2, k) *= FLT_MIN;                                // denormals alone: no scale
        *x_at(c, 3, k) = ldexpf(*x_at(c, 3, k), -119);            // scales about the least
        *x_at(c, 4, k) *= FLT_MAX;                                // the largest scales
        *x_at(c, 5, k) = k % 3 ? FLT_MAX : -FLT_MAX;              // of which codes are ±127
        *x_at(c, 6, k) = k == lane ? 127 : fmodf(at, 127) + 0.5f; // scale 1: halves go to even
        *x_at(c, 7, k) = k == lane ? 127 : -fmodf(at, 127) - 0.5f;
        *x_at(c, 8, k) = -3;
        *x_at(c, 9, k) = k == lane ? FLT_MIN * 127 : 0;                       // the least scale
        *x_at(c, 10, k) = k == lane ? nextafterf(FLT_MIN * 127, 0) : FLT_MIN; // and below it
        *x_at(c, 11, k) = ldexpf(*x_at(c, 11, k), (int)(k % 100) - 50);
    }
    for (int64_t row = 12; row < 24; row++)
        *x_at(c, row, row < 19 ? (row * 37) % n_k : row % 2 ? n_k - 1 : 0) = values[row % 7];
}

/* What is not finite makes its row NaN, and leaves all others alone. */
static void check_special(struct backend *b, enum weight_format f, int variant)
{
    static const struct quantized_shape shapes[] = {{28, 48, 272, 4, 32, 0},
                                                    {28, 30, 131, 1, 0, 0},
                                                    {28, 64, 203, 8, 0, 0},
                                                    {28, 16, 1100, 2, 64, 32}};
    for (int i = 0; i < (int)(sizeof(shapes) / sizeof(shapes[0])); i++) {
        struct case_of c;
        case_init(&c, &shapes[i], f, variant);
        set_special(&c);
        case_pack(&c, b, NULL);
        for (int64_t row = 0; row < 28; row++) {
            int is_finite = 1;
            for (int64_t k = 0; k < shapes[i].k; k++)
                is_finite = is_finite && isfinite(*x_at(&c, row, k));
            for (int64_t n = 0; n < shapes[i].n; n++)
                assert_true(is_finite || isnan(((float *)c.want.data)[row * shapes[i].n + n]));
        }
        check_part(b, &c, 0, 28);
        check_part(b, &c, 0, 5);
        check_part(b, &c, 8, 13);
        for (int64_t row = 0; row < 28; row++)
            check_part(b, &c, row, 1);
        case_release(&c, b);
    }
}

static void test_special(void **state)
{
    (void)state;
    for_all(27, check_special);
}

/* The largest sums there are: all codes of x ±127, all multiples of the weight -255 or 255 (15 or
 * -16 of 4 bits), over as many columns as a model's longest row; past 2^24, where a sum is rounded
 * to float32. */
static void check_extremes(struct backend *b, enum weight_format f, int variant)
{
    static const struct quantized_shape shapes[] = {{5, 32, 29568, 1, 0, 0},
                                                    {26, 16, 4096, 2, 128, 0}};
    const int is_4_bit = weight_format_bits(f) == 4;
    for (int i = 0; i < 2; i++) {
        const struct quantized_shape *s = &shapes[i];
        struct case_of c;
        case_init(&c, s, f, variant);
        for (int64_t at = 0; at < (int64_t)s->n * s->k; at++) {
            const int64_t n = at / s->k, k = at % s->k;
            const int largest = n < 4   ? (int)(n & 1)
                                : n < 8 ? (int)((n + k) & 1)
                                        : op_case_integer(2);
            c.q.codes[at] = (uint8_t)(is_4_bit ? largest * 15 : largest ? 127 : -128);
        }
        for (int64_t at = 0; c.q.zeros && at < c.q.out_dim * c.q.n_groups; at++) {
            const int64_t n = at / c.q.n_groups;
            c.q.zeros[at] = (int8_t)(is_4_bit ? (n & 2) * 8 : n & 2 ? 127 : -128);
        }
        for (int64_t m = 0; m < s->m; m++)
            for (int64_t k = 0; k < s->k; k++)
                *x_at(&c, m, k) = m == 0   ? 0.7f
                                  : m == 1 ? -0.7f
                                  : m == 2 ? (k % 2 ? 0.7f : -0.7f)
                                           : 0.7f - 1.4f * (float)op_case_integer(2);
        case_pack(&c, b, NULL);
        check_part(b, &c, 0, s->m);
        for (int m = 0; m < 5; m++)
            check_part(b, &c, m, 1);
        case_release(&c, b);
    }
}

static void test_extremes(void **state)
{
    (void)state;
    for_all(28, check_extremes);
}

/* Denormals are flushed nowhere: scales, sums and results down to them. */
static void check_denormals(struct backend *b, enum weight_format f, int variant)
{
    const struct quantized_shape s = {28, 80, 272, 2, 32, 8};
    for (int power = -126; power <= -6; power += 12) { // of x
        struct case_of c;
        case_init(&c, &s, f, variant);
        for (int64_t i = 0; i < s.m * c.x.row_stride; i++)
            ((float *)c.x.data)[i] = ldexpf(op_case_random(), power + (int)(i % 7));
        for (int64_t i = 0; i < c.q.out_dim * c.q.n_groups; i++)
            c.q.scales[i] = ldexpf(c.q.scales[i], -136 - power);
        case_pack(&c, b, NULL);
        check_part(b, &c, 0, 28);
        check_part(b, &c, 0, 1);
        check_part(b, &c, 3, 6);
        case_release(&c, b);
    }
}

static void test_denormals(void **state)
{
    (void)state;
    for_all(29, check_denormals);
}

/* Against double precision the product has the rounding of x alone: 127 steps of the largest, of
 * uniform x 1.6e-5 of its power. */
static void check_precision(struct backend *b, enum weight_format f, int variant)
{
    const struct quantized_shape s = {5, 64, 1024, 4, 128, 0};
    struct case_of c;
    case_init(&c, &s, f, variant);
    case_pack(&c, b, NULL);
    struct tensor w = tensor_2d(quantized_case_values(&c.q), DTYPE_F32, s.n, s.k);
    struct tensor y = op_case_matrix(s.m, s.n);
    naive_matmul(c.want.data, &c.x, &w, 0, NULL, ACTIVATION_NONE, NULL, NULL);
    op_matmul(b, &y, &c.x, &c.l, NULL);
    op_case_compare("int8 with integers", &y, c.want.data, 2e-5);
    free(w.data);
    free(y.data);
    case_release(&c, b);
}

static void test_precision(void **state)
{
    (void)state;
    for_all(30, check_precision);
    op_case_report();
}

/* ---- shards, and rows of a table ---- */

/* y <- the product of lanes [first, first + c->l.n_lanes / 2), as the rank that owns them has it.
 */
static void half_product(struct backend *b, struct tensor *y, const struct case_of *c, int first)
{
    struct linear half = quantized_case_lanes(&c->l, first, c->l.n_lanes / 2);
    struct quantized of = quantized_case_columns(&c->q, c->l.lane_start[first], half.in_dim);
    struct tensor x = c->x;
    x.data = x_at(c, 0, c->l.lane_start[first]);
    x.shape[1] = of.in_dim;
    op_linear_pack_quantized(b, &half, &of, NULL);
    op_matmul(b, y, &x, &half, NULL);
    op_linear_free(b, &half);
    quantized_case_release(&of);
}

/* Two ranks' parts add up to the bits of one. */
static void check_shards(struct backend *b, enum weight_format f, int variant)
{
    static const struct quantized_shape shapes[] = {{3, 40, 256, 4, 128, 0},
                                                    {30, 40, 304, 8, 64, 0},
                                                    {3, 40, 160, 8, 0, 0},
                                                    {3, 40, 600, 4, 32, 8},
                                                    {30, 40, 96, 2, 0, 0}};
    for (int i = 0; i < (int)(sizeof(shapes) / sizeof(shapes[0])); i++) {
        struct case_of c;
        case_init(&c, &shapes[i], f, variant);
        struct tensor lower = op_case_matrix(shapes[i].m, shapes[i].n);
        struct tensor upper = op_case_matrix(shapes[i].m, shapes[i].n);
        case_pack(&c, b, NULL);
        half_product(b, &lower, &c, 0);
        half_product(b, &upper, &c, shapes[i].n_lanes / 2);
        op_add(b, &lower, &upper);
        check_same(c.want.data, &lower, c.what);
        free(lower.data);
        free(upper.data);
        case_release(&c, b);
    }
}

static void test_shards(void **state)
{
    (void)state;
    for_all(31, check_shards);
}

/* ---- what it takes ---- */

static int takes(enum weight_format f, int64_t columns, int64_t group_size, int64_t lane)
{
    struct linear l = {.in_dim = columns, .n_lanes = 2, .lane_start = {0, lane, columns}};
    struct quantized q = {.format = f, .in_dim = columns, .group_size = group_size};
    return linear_takes_int8(&l, &q);
}

/* Groups and lanes of whole units, or a lane of one group. */
static void test_takes(void **state)
{
    (void)state;
    assert_true(takes(WEIGHT_INT4, 96, 32, 24));
    assert_false(takes(WEIGHT_INT4, 96, 32, 28));
    assert_true(takes(WEIGHT_INT8, 96, 32, 28));
    assert_false(takes(WEIGHT_INT8, 96, 32, 30));
    assert_false(takes(WEIGHT_INT4, 96, 12, 24));
    assert_true(takes(WEIGHT_INT8, 96, 12, 24));
    assert_true(takes(WEIGHT_INT4, 97, 97, 31));
    assert_false(takes(WEIGHT_FP8, 96, 96, 48));
    assert_true(takes(WEIGHT_INT8, INT8_COLUMNS_MAX, INT8_COLUMNS_MAX, 32));
    assert_false(takes(WEIGHT_INT8, INT8_COLUMNS_MAX + 1, INT8_COLUMNS_MAX + 1, 32));
}

int op_integer_tests(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),  cmocka_unit_test(test_rows),
        cmocka_unit_test(test_many_rows), cmocka_unit_test(test_gated),
        cmocka_unit_test(test_epilogues), cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_special),   cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_denormals), cmocka_unit_test(test_precision),
        cmocka_unit_test(test_shards),    cmocka_unit_test(test_takes),
    };
    return cmocka_run_group_tests_name("int8 with integers", tests, NULL, NULL);
}
