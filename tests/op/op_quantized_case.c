/*
 * Random quantised weights (op_quantized_case.h).
 */
#include "tests/op/op_quantized_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"
#include "tests/op/op_naive.h"

const struct quantized_shape quantized_shapes[] = {
    {1, 1, 1, 1, 0, 0},      {1, 17, 33, 2, 0, 0},      {2, 15, 7, 4, 3, 1},
    {1, 70, 256, 1, 64, 0},  {3, 64, 160, 8, 32, 16},   {4, 33, 250, 4, 128, 70},
    {1, 96, 700, 8, 64, 3},  {13, 48, 300, 2, 64, 10},  {29, 100, 130, 1, 32, 0},
    {5, 40, 223, 8, 1, 0},   {12, 64, 1024, 1, 128, 0}, {150, 33, 90, 4, 16, 8},
    {2, 208, 136, 1, 40, 0}, {4, 144, 272, 2, 24, 8},
};
const int n_quantized_shapes = (int)(sizeof(quantized_shapes) / sizeof(quantized_shapes[0]));

int quantized_case_takes(enum weight_format f, int variant)
{
    return !(variant & WITH_ZEROS) || f == WEIGHT_INT8 || f == WEIGHT_INT4;
}

struct quantized quantized_case(const struct quantized_shape *s, enum weight_format f, int variant,
                                int (*integer)(int n))
{
    struct quantized q = {.format = f, .out_dim = s->n, .in_dim = s->k, .n_groups = 1};
    q.group_size = s->group_size ? s->group_size : s->k;
    q.group_phase = s->group_phase;
    q.n_groups = (s->k + q.group_phase + q.group_size - 1) / q.group_size;
    size_t n = (size_t)(q.out_dim * q.in_dim), n_scales = (size_t)(q.out_dim * q.n_groups);
    q.codes = xcalloc(n, 1);
    q.scales = xcalloc(n_scales, sizeof(float));
    for (size_t i = 0; i < n; i++)
        do {
            q.codes[i] = (uint8_t)integer(weight_format_bits(f) == 4 ? 16 : 256);
        } while (f == WEIGHT_FP8 && (q.codes[i] & 0x7f) == 0x7f); // not a number
    for (size_t i = 0; i < n_scales; i++)
        q.scales[i] = (float)(integer(20001) - 10000) / 20000;
    if (variant & WITH_ZEROS)
        q.zeros = xcalloc(n_scales, 1);
    for (size_t i = 0; q.zeros && i < n_scales; i++)
        q.zeros[i] = (int8_t)(f == WEIGHT_INT4 ? integer(17) : integer(255) - 127);
    if (variant & WITH_ORDER) {
        int32_t *of = xcalloc((size_t)s->k, sizeof(*of));
        for (int k = 0; k < s->k; k++)
            of[k] = integer((int)q.n_groups);
        q.group_of = of;
    }
    return q;
}

struct quantized quantized_case_columns(const struct quantized *q, int64_t start, int64_t n_columns)
{
    struct quantized of = *q;
    int64_t skipped = (q->group_phase + start) / q->group_size;
    of.in_dim = n_columns;
    of.group_phase = (q->group_phase + start) % q->group_size;
    of.n_groups = (of.group_phase + n_columns + q->group_size - 1) / q->group_size;
    size_t n_scales = (size_t)(of.out_dim * of.n_groups);
    of.codes = xcalloc((size_t)(of.out_dim * n_columns), 1);
    of.scales = xcalloc(n_scales, sizeof(float));
    of.zeros = q->zeros ? xcalloc(n_scales, 1) : NULL;
    for (int64_t n = 0; n < of.out_dim; n++) {
        int64_t to = n * of.n_groups, from = n * q->n_groups + skipped;
        memcpy(of.codes + n * n_columns, q->codes + n * q->in_dim + start, (size_t)n_columns);
        memcpy(of.scales + to, q->scales + from, (size_t)of.n_groups * sizeof(float));
        if (q->zeros)
            memcpy(of.zeros + to, q->zeros + from, (size_t)of.n_groups);
    }
    return of;
}

struct linear quantized_case_lanes(const struct linear *l, int first, int n_lanes)
{
    struct linear part = *l;
    part.n_lanes = n_lanes;
    for (int i = 0; i <= n_lanes; i++)
        part.lane_start[i] = l->lane_start[first + i] - l->lane_start[first];
    part.in_dim = part.lane_start[n_lanes];
    return part;
}

void quantized_case_release(struct quantized *q)
{
    free((void *)(uintptr_t)q->group_of);
    free(q->codes);
    free(q->scales);
    free(q->zeros);
}

float *quantized_case_values(const struct quantized *q)
{
    float *values = xcalloc((size_t)(q->out_dim * q->in_dim), sizeof(float));
    for (int64_t n = 0; n < q->out_dim; n++)
        for (int64_t k = 0; k < q->in_dim; k++)
            values[n * q->in_dim + k] = quantized_value(q, n, k);
    return values;
}

int quantized_case_is_factored(const struct quantized *q, const struct linear *l, int lane)
{
    const int unit = weight_format_bits(q->format) == 4 ? 8 : 4;
    if (q->group_of || q->format == WEIGHT_NF4 || q->format == WEIGHT_FP4)
        return 0;
    for (int64_t k = l->lane_start[lane] + 1; k < l->lane_start[lane + 1]; k++)
        if (quantized_group(q, k) != quantized_group(q, k - 1) &&
            (k - l->lane_start[lane]) % unit != 0)
            return 0;
    return 1;
}

static float as_bf16(float x)
{
    return bf16_to_f32(f32_to_bf16(x));
}

/* Of columns [k, end) as vdpbf16ps adds: two at a time, the odd one first. */
static float pairs_sum(const float *x, const float *w, int64_t k, int64_t end)
{
    float sum = 0;
    for (; k < end; k += 2) {
        if (k + 1 < end)
            sum = fmaf(as_bf16(x[k + 1]), w[k + 1], sum);
        sum = fmaf(as_bf16(x[k]), w[k], sum);
    }
    return sum;
}

static float run_scale(const struct quantized *q, int64_t n, int64_t k)
{
    float scale = q->scales[n * q->n_groups + quantized_group(q, k)];
    return q->format == WEIGHT_INT8_127 ? scale * INT8_127_FACTOR : scale;
}

static float lane_sum(const float *x, const struct quantized *q, int64_t n, const float *multiples,
                      int64_t k, int64_t end)
{
    float sum = 0;
    for (int64_t next; k < end; k = next) {
        for (next = k + 1; next < end && quantized_group(q, next) == quantized_group(q, k);)
            next++;
        sum = fmaf(run_scale(q, n, k), pairs_sum(x, multiples, k, next), sum);
    }
    return sum;
}

static float tree_sum(float *lanes, int n_lanes)
{
    for (int apart = 1; apart < n_lanes; apart *= 2)
        for (int i = 0; i < n_lanes; i += 2 * apart)
            lanes[i] += lanes[i + apart];
    return lanes[0];
}

void quantized_case_product(float *y, const struct tensor *x, const struct quantized *q,
                            const struct linear *l)
{
    float *multiples = xcalloc((size_t)q->in_dim, sizeof(float));
    float *values = xcalloc((size_t)q->in_dim, sizeof(float));
    for (int64_t n = 0; n < q->out_dim; n++) {
        for (int64_t k = 0; k < q->in_dim; k++) {
            multiples[k] = quantized_multiple(q, n, k);
            values[k] = as_bf16(quantized_value(q, n, k));
        }
        for (int64_t m = 0; m < x->shape[0]; m++) {
            const float *row = (const float *)x->data + m * x->row_stride;
            float lanes[LANES_MAX] = {0};
            for (int i = 0; i < l->n_lanes; i++) {
                int64_t k = l->lane_start[i], end = l->lane_start[i + 1];
                lanes[i] = quantized_case_is_factored(q, l, i)
                               ? lane_sum(row, q, n, multiples, k, end)
                               : pairs_sum(row, values, k, end);
            }
            y[m * q->out_dim + n] = tree_sum(lanes, l->n_lanes);
        }
    }
    free(multiples);
    free(values);
}

/* Of columns [k, end) of rounded x, before its scale. */
static float integer_lane_sum(const int8_t *x, const struct quantized *q, int64_t n,
                              const int32_t *multiples, int64_t k, int64_t end)
{
    float sum = 0;
    for (int64_t next; k < end; k = next) {
        int32_t run = 0;
        next = (quantized_group(q, k) + 1) * q->group_size - q->group_phase;
        next = next < end ? next : end;
        for (int64_t i = k; i < next; i++)
            run += x[i] * multiples[i];
        sum = fmaf(run_scale(q, n, k), (float)run, sum);
    }
    return sum;
}

void quantized_case_integer_product(float *y, const struct tensor *x, const struct quantized *q,
                                    const struct linear *l)
{
    const int64_t n_rows = x->shape[0], n_k = q->in_dim;
    int8_t *codes = xcalloc((size_t)(n_rows * n_k), 1);
    float *scales = xcalloc((size_t)(n_rows * l->n_lanes), sizeof(float)); // of x
    int32_t *multiples = xcalloc((size_t)n_k, sizeof(*multiples));
    for (int64_t m = 0; m < n_rows; m++)
        for (int i = 0; i < l->n_lanes; i++)
            scales[m * l->n_lanes + i] =
                naive_codes(codes + m * n_k + l->lane_start[i],
                            (const float *)x->data + m * x->row_stride + l->lane_start[i],
                            (int)(l->lane_start[i + 1] - l->lane_start[i]));
    for (int64_t n = 0; n < q->out_dim; n++) {
        for (int64_t k = 0; k < n_k; k++)
            multiples[k] = (int32_t)quantized_multiple(q, n, k);
        for (int64_t m = 0; m < n_rows; m++) {
            float lanes[LANES_MAX] = {0};
            for (int i = 0; i < l->n_lanes; i++)
                lanes[i] = integer_lane_sum(codes + m * n_k, q, n, multiples, l->lane_start[i],
                                            l->lane_start[i + 1]) *
                           scales[m * l->n_lanes + i];
            y[m * q->out_dim + n] = tree_sum(lanes, l->n_lanes);
        }
    }
    free(codes);
    free(scales);
    free(multiples);
}
