/*
 * Random quantised weights (op_quantized_case.h).
 */
#include "tests/op/op_quantized_case.h"

#include <stdlib.h>

#include "kernels/log.h"

const struct quantized_shape quantized_shapes[] = {
    {1, 1, 1, 1, 0, 0},     {1, 17, 33, 2, 0, 0},      {2, 15, 7, 4, 3, 1},
    {1, 70, 256, 1, 64, 0}, {3, 64, 160, 8, 32, 16},   {4, 33, 250, 4, 128, 70},
    {1, 96, 700, 8, 64, 3}, {13, 48, 300, 2, 64, 10},  {29, 100, 130, 1, 32, 0},
    {5, 40, 223, 8, 1, 0},  {12, 64, 1024, 1, 128, 0}, {150, 33, 90, 4, 16, 8},
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
